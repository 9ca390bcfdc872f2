"""TTS: greedy speech equal to that of the installed qwen_tts, streams equal to whole waveforms, seeds, batches, ends and figures."""

import threading
import time
import warnings
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models.voices import GREEDY, SAMPLES, SPEAKER, TEXTS, TONE, assert_equal, generate, load, speak_with_qwen_tts, stats_of, stream, voice
from packaging.version import Version

from qtts_compile import TTS, Protect
from qtts_compile.stats import Stats

FRAMES = 64
ENDING = 2.5  # end of speech comes after some ten frames
LONG_TONE = (np.tile(TONE[0], 2), TONE[1])
# transformers 5 leaves generated tokens out of the repetition penalty when a prompt of embeddings is padded.
BATCH_PENALTY = 1.05 if Version(transformers.__version__).major < 5 else 1.0
# What is said in which voice: kind and size of the model, method, arguments for a batch of three.
VOICES: dict[str, tuple[Any, Any, str, dict[str, Any]]] = {
    "custom voice": ("custom_voice", "1b7", "custom_voice", {"speaker": ["vivian", "eric", "ryan"], "instruct": ["slowly", "", "very sadly"]}),
    "custom voice 0.6B": ("custom_voice", "0b6", "custom_voice", {**SPEAKER, "language": ["German", "Auto", "chinese"]}),
    "voice design": ("voice_design", "1b7", "voice_design", {"instruct": ["a calm, low voice", "", "a child"]}),
    "x-vector": ("base", "1b7", "voice_clone", {"ref_audio": [TONE, LONG_TONE, TONE], "x_vector_only_mode": True}),
    "x-vector 0.6B": ("base", "0b6", "voice_clone", {"ref_audio": TONE, "x_vector_only_mode": True}),
    "in context": ("base", "1b7", "voice_clone", {"ref_audio": [TONE, LONG_TONE, TONE], "ref_text": ["Evening.", "A longer reference.", "Hm."]}),
}


@pytest.fixture
def tts():
    return voice()


@pytest.fixture
def ending():
    """A model that ends its speech."""
    return voice(ending=ENDING)


@pytest.mark.filterwarnings("ignore:the speech")
@pytest.mark.parametrize("non_streaming_mode", [True, False])
@pytest.mark.parametrize("name", VOICES)
def test_greedy_speech_is_that_of_qwen_tts(name, non_streaming_mode):
    kind, size, method, arguments = VOICES[name]
    arguments = {
        **arguments,
        "text": TEXTS,
        "non_streaming_mode": non_streaming_mode,
        "max_new_tokens": FRAMES + 1,
        "repetition_penalty": BATCH_PENALTY,
    }
    tts = voice(kind, size)
    theirs = speak_with_qwen_tts(tts.model, f"generate_{method}", **arguments, **GREEDY)
    assert [len(codes) for codes in theirs.codes] == [FRAMES] * 3
    assert_equal(generate(tts, method, **arguments, do_sample=False), theirs)


@pytest.mark.filterwarnings("ignore:the speech")
@pytest.mark.parametrize("name", ["custom voice", "x-vector 0.6B", "in context"])
def test_greedy_speech_of_one_text_is_that_of_qwen_tts(name):
    kind, size, method, arguments = VOICES[name]
    arguments = {name: value[1] if isinstance(value, list) else value for name, value in arguments.items()}
    arguments |= {"text": TEXTS[1], "max_new_tokens": FRAMES + 1}
    tts = voice(kind, size)
    assert_equal(generate(tts, method, **arguments, do_sample=False), speak_with_qwen_tts(tts.model, f"generate_{method}", **arguments, **GREEDY))


def test_rows_end_where_they_do_in_qwen_tts(ending):
    arguments = {"text": TEXTS, **SPEAKER, "repetition_penalty": BATCH_PENALTY}
    theirs = speak_with_qwen_tts(ending.model, "generate_custom_voice", **arguments, **GREEDY)
    lengths = [len(codes) for codes in theirs.codes]
    assert len(set(lengths)) > 1 and max(lengths) < 200
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(generate(ending, "custom_voice", **arguments, do_sample=False), theirs)
    assert stats_of(ending).frames == lengths and stats_of(ending).end_reasons == ["end of speech"] * 3


@pytest.mark.filterwarnings("ignore:the speech")
@pytest.mark.parametrize("name", ["custom voice", "in context"])
def test_a_stream_is_the_whole_speech(name):
    kind, size, method, arguments = VOICES[name]
    arguments = {name: value[1] if isinstance(value, list) else value for name, value in arguments.items()}
    arguments |= {"text": TEXTS[1], "max_new_tokens": 48, "seed": 5}
    tts = voice(kind, size)
    whole = generate(tts, method, **arguments)
    codes, chunks = stream(tts, method, **arguments)
    reference = 25 if name == "in context" else 0
    assert len(codes) == reference + 47 and torch.equal(codes[reference:], whole.codes[0])
    assert [len(chunk) // SAMPLES for chunk in chunks] == [1, 2, 4, 8, 8, 8, 8, 8]
    np.testing.assert_allclose(np.concatenate(chunks), whole.waveforms[0], rtol=0, atol=1e-4)


def test_a_stream_ends_with_the_speech(ending):
    arguments = {"text": TEXTS[0], **SPEAKER, "do_sample": False}
    whole = generate(ending, "custom_voice", **arguments)
    codes, chunks = stream(ending, "custom_voice", **arguments)
    assert torch.equal(codes, whole.codes[0]) and stats_of(ending).end_reasons == ["end of speech"]
    np.testing.assert_allclose(np.concatenate(chunks), whole.waveforms[0], rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:the speech")
@pytest.mark.parametrize(("sizes", "expected"), [((3,), [3, 3, 3, 1]), ((2, 20), [2, 8]), ([1, 1, 5], [1, 1, 5, 3])])
def test_chunk_sizes_are_the_user_s(tts, sizes, expected):
    other = TTS(tts.model, max_seq_len=64, chunk_frames=sizes)
    _, chunks = stream(other, "custom_voice", text="Hello", **SPEAKER, max_new_tokens=11)
    assert [len(chunk) // SAMPLES for chunk in chunks] == expected


@pytest.mark.filterwarnings("ignore:the speech")
def test_a_seed_speaks_the_same_alone_and_in_a_batch(tts):
    sampled = {**SPEAKER, "max_new_tokens": 17}
    batch = generate(tts, "custom_voice", text=[*TEXTS, TEXTS[0]], seed=[4, 5, 6, 7], **sampled)
    for row, seed in enumerate([4, 5, 6]):
        alone = generate(tts, "custom_voice", text=TEXTS[row], seed=seed, **sampled)
        assert torch.equal(alone.codes[0], batch.codes[row])
    assert not torch.equal(batch.codes[0], batch.codes[3])  # the same text with another seed
    same = generate(tts, "custom_voice", text=[TEXTS[0], TEXTS[0]], seed=4, **sampled)
    assert torch.equal(same.codes[0], same.codes[1]) and torch.equal(same.codes[0], batch.codes[0]) and stats_of(tts).seeds == [4, 4]


@pytest.mark.filterwarnings("ignore:the speech")
def test_without_a_seed_torch_s_generator_gives_one_that_repeats_the_speech(tts):
    sampled = {"text": [TEXTS[0]] * 2, **SPEAKER, "max_new_tokens": 9}
    torch.manual_seed(3)
    first, seeds = generate(tts, "custom_voice", **sampled), stats_of(tts).seeds
    assert not torch.equal(*first.codes)
    assert not torch.equal(generate(tts, "custom_voice", **sampled).codes[0], first.codes[0])
    torch.manual_seed(3)
    for again in ({}, {"seed": seeds}):
        assert [torch.equal(*pair) for pair in zip(generate(tts, "custom_voice", **sampled, **again).codes, first.codes)] == [True, True]
        assert stats_of(tts).seeds == seeds


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        ([1, 2], ValueError, "2 seeds for 3 texts"),
        (2**63, ValueError, "64 bits"),
        (True, TypeError, "seed=True"),
        ([1, 2, 0.5], TypeError, "seed=0.5"),
        (1.5, TypeError, "seed=1.5: give a whole number"),
        ("123", TypeError, "seed='123': give a whole number"),
    ],
)
def test_wrong_seeds_are_refused(tts, seed, error, message):
    with pytest.raises(error, match=message):
        tts.generate_custom_voice(TEXTS, "vivian", seed=seed)


@pytest.mark.filterwarnings("ignore:the speech")
def test_more_texts_than_a_batch_holds_are_spoken_in_several(tts):
    texts = [f"{number}" for number in range(tts.engine.max_batch_size + 2)]
    arguments = {**SPEAKER, "max_new_tokens": 3}
    many = generate(tts, "custom_voice", text=texts, seed=list(range(len(texts))), **arguments)
    assert stats_of(tts).frames == [2] * 34 and stats_of(tts).audio_seconds == pytest.approx(34 * 2 * 0.08) and len(stats_of(tts).end_reasons) == 34
    for row in (0, 33):
        assert torch.equal(generate(tts, "custom_voice", text=texts[row], seed=row, **arguments).codes[0], many.codes[row])


@pytest.mark.parametrize(("limit", "arguments", "frames"), [("max_new_tokens", {"max_new_tokens": 8}, 7), ("max_seq_len", {}, 64 - 14)])
def test_speech_that_is_cut_off_is_warned_of(tts, limit, arguments, frames):
    short = TTS(tts.model, max_seq_len=64)
    value = arguments.get(limit, 64)
    with pytest.warns(UserWarning, match=rf"^the speech was cut off by {limit}={value}: ") as caught:
        waveforms, _ = short.generate_custom_voice("Hey.", "vivian", non_streaming_mode=True, **arguments)
    assert caught[0].filename == __file__
    assert stats_of(short).end_reasons == [limit] and stats_of(short).frames == [frames] and len(waveforms[0]) == frames * SAMPLES
    with pytest.warns(UserWarning, match=f"cut off by {limit}"):
        list(short.stream_custom_voice("Hey.", "vivian", **arguments))
    assert stats_of(short).end_reasons == [limit] and stats_of(short).frames == [frames]


def test_the_warning_says_which_texts(ending):
    lengths = [len(codes) for codes in generate(ending, "custom_voice", text=TEXTS, **SPEAKER, do_sample=False).codes]
    longest = max(lengths)
    cut = ", ".join(str(row) for row, length in enumerate(lengths) if length == longest)
    with pytest.warns(UserWarning, match=f"the speech of text {cut} was cut off by max_new_tokens={longest}"):
        ending.generate_custom_voice(TEXTS, "vivian", do_sample=False, max_new_tokens=longest)
    assert sorted(set(stats_of(ending).end_reasons)) == ["end of speech", "max_new_tokens"]


def test_a_prompt_that_does_not_fit_is_refused(tts):
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens.*max_seq_len=256"):
        tts.generate_custom_voice("word " * 60, "vivian")
    with pytest.raises(ValueError, match=r"max_seq_len=16: give 32 to 32768"):
        TTS(tts.model, max_seq_len=16)


@pytest.mark.filterwarnings("ignore:the speech")
@pytest.mark.parametrize("texts", [1, 3])
def test_stats_add_up(tts, texts):
    tts.generate_custom_voice(TEXTS[:texts], "vivian", seed=3, max_new_tokens=9)
    stats = stats_of(tts)
    assert stats.frames == [8] * texts and stats.seeds == [3] * texts and stats.end_reasons == ["max_new_tokens"] * texts
    assert stats.audio_seconds == pytest.approx(8 * texts * 0.08) and stats.peak_vram_bytes is None
    assert stats.ms_per_frame == pytest.approx(1000 * stats.seconds / 8) and stats.time_to_first_audio == stats.seconds > 0
    assert stats.real_time_factor == pytest.approx(stats.audio_seconds / stats.seconds)
    line = str(stats)
    assert (
        "\n" not in line and f"{8 * texts} frames" in line and "seed 3" in line and "max_new_tokens" in line and ("3 texts" in line) == (texts == 3)
    )


@pytest.mark.filterwarnings("ignore:the speech")
@pytest.mark.parametrize("kv_cache", ["int4", "int3", "k4v3", "fp8"])
def test_speech_from_a_quantised_cache(tts, kv_cache):
    quantized = TTS(tts.model, max_seq_len=256, kv_cache=kv_cache, protect=Protect(0, 1, 2, 8))
    arguments = {**SPEAKER, "max_new_tokens": 17}
    batch = generate(quantized, "custom_voice", text=TEXTS, seed=[4, 5, 6], **arguments)
    stats, line = stats_of(quantized), str(stats_of(quantized))
    generate(tts, "custom_voice", text=TEXTS, seed=[4, 5, 6], **arguments)
    # Codes were read, though what is chosen may be the same.
    assert not torch.equal(*(instance.engine._runners[4].state.hidden for instance in (quantized, tts)))
    for row, seed in enumerate([4, 5, 6]):
        codes, chunks = stream(quantized, "custom_voice", text=TEXTS[row], seed=seed, **arguments)
        assert torch.equal(codes, batch.codes[row])
        np.testing.assert_allclose(np.concatenate(chunks), batch.waveforms[row], rtol=0, atol=1e-4)
        assert stats_of(quantized).quantized_tokens == [stats.quantized_tokens[row]]
    config, bits = tts.model.model.talker.config, {"int4": 8, "k4v3": 7, "int3": 6, "fp8": 16}[kv_cache]
    heads, width = config.num_key_value_heads, config.head_dim
    assert (stats.kv_cache, stats.quantized_layers) == (kv_cache, [0])
    assert stats.cache_bytes_per_token == heads * (bits * width // 8 + 4 + 8 * width)  # a layer of codes and one of float32
    assert stats.cache_bytes == 4 * (256 * stats.cache_bytes_per_token + heads * 10 * 8 * width + 8)  # rows, kept tokens, start
    assert len(set(stats.quantized_tokens)) > 1 and all(tokens > 16 - 2 - 8 for tokens in stats.quantized_tokens)
    assert f"; {kv_cache} cache of " in line and f" {sum(stats.quantized_tokens)} tokens quantised in layer 0" in line


@pytest.mark.filterwarnings("ignore:the speech")
def test_stats_of_the_cache_that_is_not_quantised(tts):
    tts = TTS(tts.model, max_seq_len=64)
    tts.generate_custom_voice("Hey.", "vivian", max_new_tokens=3)
    stats, config = stats_of(tts), tts.model.model.talker.config
    assert stats.cache_bytes_per_token == 2 * config.num_key_value_heads * 2 * config.head_dim * 4
    assert (stats.kv_cache, stats.quantized_layers, stats.quantized_tokens) == ("bf16", [], [0])
    assert stats.cache_bytes == 64 * stats.cache_bytes_per_token and "cache" not in str(stats)


@pytest.mark.filterwarnings("ignore:the speech")
def test_the_time_of_a_stream_is_its_own(tts):
    started, paused = time.perf_counter(), 0.0
    for _ in tts.stream_custom_voice("Hello", "vivian", max_new_tokens=3):
        pause = time.perf_counter()
        time.sleep(0.3)  # the consumer takes its time
        paused += time.perf_counter() - pause
    assert 0 < stats_of(tts).time_to_first_audio < stats_of(tts).seconds <= time.perf_counter() - started - paused
    assert {field.name for field in fields(Stats)} == set(vars(stats_of(tts)))


@pytest.mark.gpu
@pytest.mark.usefixtures("float32_products")
def test_recorded_speech_is_the_uncompiled_one():
    torch.compiler.reset()
    model = load("base", device="cuda")
    plain, recorded = TTS(model, mode=None, max_seq_len=128), TTS(model, max_seq_len=128)
    recorded.warmup(batch_sizes=(1, 2))
    arguments = {"text": TEXTS[0], "ref_audio": TONE, "ref_text": "Evening.", "do_sample": False, "max_new_tokens": 30}
    try:
        with pytest.warns(UserWarning, match="cut off"):
            expected = generate(plain, "voice_clone", **arguments)
            assert torch.equal(generate(recorded, "voice_clone", **arguments).codes[0], expected.codes[0])
            assert torch.equal(generate(recorded, "voice_clone", **arguments | {"text": TEXTS[:2]}).codes[0], expected.codes[0])
            left = recorded.stream_voice_clone(**arguments)
            next(left)
            left.close()
            heard = []
            thread = threading.Thread(target=lambda: heard.extend(recorded.stream_voice_clone(**arguments)))
            thread.start()
            thread.join()
    finally:
        torch.compiler.reset()
    np.testing.assert_allclose(np.concatenate([samples for samples, _ in heard]), expected.waveforms[0], rtol=0, atol=1e-4)
    assert stats_of(recorded).peak_vram_bytes and stats_of(recorded).frames == [29]
