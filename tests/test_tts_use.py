"""TTS in use: one call at a time, left streams, faults, refusals, loading, warming up."""

import gc
import inspect
import itertools
import re
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models.voices import SAMPLES, SPEAKER, TEXTS, TONE, assert_equal, checkpoint, generate, stats_of, stream, voice

from qtts_compile import TTS, Protect


@pytest.fixture
def tts():
    return voice()


def test_another_call_meanwhile_is_refused_and_does_no_harm(tts):
    arguments = {"text": TEXTS[0], **SPEAKER, "max_new_tokens": 20, "seed": 1}
    calls = [
        lambda: tts.generate_custom_voice(**arguments),
        lambda: next(tts.stream_custom_voice(**arguments)),
        lambda: tts.warmup(),
    ]
    refused = []

    def meanwhile():
        for call in calls:
            with pytest.raises(RuntimeError, match=r"speaking already.*close\(\).*another TTS of the same model"):
                call()
            refused.append(call)

    with pytest.warns(UserWarning, match="cut off"):
        whole, _ = tts.generate_custom_voice(**arguments)
        chunks = tts.stream_custom_voice(**arguments)
        heard = [next(chunks)[0]]
        thread = threading.Thread(target=meanwhile)
        thread.start()
        thread.join()
        meanwhile()
        heard += [samples for samples, _ in chunks]
    assert len(refused) == 2 * len(calls)
    np.testing.assert_allclose(np.concatenate(heard), whole[0], rtol=0, atol=1e-4)


def test_two_instances_of_a_model_do_not_mix(tts):
    arguments = {"text": TEXTS[0], **SPEAKER, "max_new_tokens": 12}
    pair = [tts, TTS(tts.model, max_seq_len=64)]
    with pytest.warns(UserWarning, match="cut off"):
        alone = [instance.generate_custom_voice(**arguments, seed=seed)[0][0] for seed, instance in enumerate(pair)]
        streams = [instance.stream_custom_voice(**arguments, seed=seed) for seed, instance in enumerate(pair)]
        taken = list(itertools.zip_longest(*streams))
    for number, waveform in enumerate(alone):
        np.testing.assert_allclose(np.concatenate([chunks[number][0] for chunks in taken]), waveform, rtol=0, atol=1e-4)


def leave_by_close(stream):
    next(stream)
    stream.close()


def leave_by_break(stream):
    for _ in stream:
        break


def leave_by_garbage(stream):
    cycle = [stream, next(stream)]
    cycle.append(cycle)
    del cycle, stream
    gc.collect()


def leave_by_exception(stream):
    next(stream)
    with pytest.raises(KeyError):
        stream.throw(KeyError)


@pytest.mark.parametrize("leave", [leave_by_close, leave_by_break, leave_by_garbage, leave_by_exception])
def test_a_stream_that_was_left_leaves_nothing_behind(tts, leave):
    arguments = {"text": TEXTS[0], **SPEAKER, "max_new_tokens": 20, "seed": 1}
    with pytest.warns(UserWarning, match="cut off"):
        expected = generate(tts, "custom_voice", **arguments)
        tts.stats = None
        leave(tts.stream_custom_voice(**{**arguments, "seed": 2}))
        assert leave is leave_by_exception or (stats_of(tts).end_reasons, stats_of(tts).seeds) == (["closed"], [2])
        _, chunks = stream(tts, "custom_voice", **arguments)
        np.testing.assert_allclose(np.concatenate(chunks), expected.waveforms[0], rtol=0, atol=1e-4)
        assert_equal(generate(tts, "custom_voice", **arguments), expected)


def test_a_stream_that_never_began_holds_nothing(tts):
    waiting = tts.stream_custom_voice("Hello", "vivian")
    with pytest.warns(UserWarning, match="cut off"):
        tts.generate_custom_voice("Hello", "vivian", max_new_tokens=3)
    waiting.close()


class Fault:
    """Makes a module fail in one of its next calls."""

    def __init__(self, module: torch.nn.Module, error: Exception, call: int) -> None:
        self.error, self.left = error, call
        self.hook = module.register_forward_hook(self.strike)

    def strike(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.hook.remove()
            raise self.error


@pytest.mark.parametrize("call", [1, 2, 9])
@pytest.mark.parametrize("streaming", [True, False])
def test_after_a_fault_the_instance_works(tts, call, streaming):
    arguments = {"text": TEXTS[0], **SPEAKER, "max_new_tokens": 20, "seed": 1}
    with pytest.warns(UserWarning, match="cut off"):
        expected = generate(tts, "custom_voice", **arguments)
        Fault(tts.model.model.talker.codec_head, ArithmeticError("struck"), call)
        with pytest.raises(ArithmeticError, match="struck"):
            list(tts.stream_custom_voice(**arguments)) if streaming else tts.generate_custom_voice(**arguments)
        assert_equal(generate(tts, "custom_voice", **arguments), expected)


@pytest.mark.parametrize("streaming", [True, False])
def test_out_of_memory_says_what_to_lower(tts, streaming):
    Fault(tts.model.model.talker.codec_head, torch.cuda.OutOfMemoryError("CUDA out of memory."), 3)
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"(?s)^CUDA out of memory\..*lower max_seq_len \(now 256\).*fewer texts"):
        list(tts.stream_custom_voice("Hello", "vivian")) if streaming else tts.generate_custom_voice("Hello", "vivian")
    with pytest.warns(UserWarning, match="cut off"):
        tts.generate_custom_voice("Hello", "vivian", max_new_tokens=3)


@pytest.mark.parametrize("method", ["generate_custom_voice", "generate_voice_clone", "generate_voice_design", "create_voice_clone_prompt"])
def test_signatures_are_those_of_qwen_tts(tts, method):
    ours = inspect.signature(getattr(TTS, method)).parameters.values()
    theirs = inspect.signature(getattr(type(tts.model), method)).parameters.values()
    positional = [[(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] for parameters in (ours, theirs)]
    assert positional[0] == positional[1]
    assert [p.name for p in ours if p.kind is p.KEYWORD_ONLY] == ["seed"] * method.startswith("generate")
    if method.startswith("generate"):
        streamed = inspect.signature(getattr(TTS, method.replace("generate", "stream"))).parameters.values()
        assert [(p.name, p.kind, p.default) for p in streamed] == [(p.name, p.kind, p.default) for p in ours]


def test_what_the_model_offers_is_passed_on(tts):
    assert tts.get_supported_speakers() == tts.model.get_supported_speakers()
    assert tts.get_supported_languages() == tts.model.get_supported_languages()


@pytest.mark.filterwarnings("ignore:the speech")
def test_a_prepared_recording_serves_many_calls():
    tts = voice("base")
    prompt = tts.create_voice_clone_prompt(TONE, "Evening.")
    given = generate(tts, "voice_clone", text=TEXTS[:2], ref_audio=TONE, ref_text="Evening.", seed=1, max_new_tokens=9)
    assert_equal(generate(tts, "voice_clone", text=TEXTS[:2], voice_clone_prompt=prompt, seed=1, max_new_tokens=9), given)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"text": TEXTS}, ValueError, "3 texts: a stream speaks one"),
        ({"text": ""}, ValueError, "nothing to speak"),
        ({"text": "Hello", "seed": [1, 2]}, ValueError, "2 seeds for 1 texts"),
    ],
)
def test_a_stream_refuses_at_once(tts, arguments, error, message):
    with pytest.raises(error, match=message):
        tts.stream_custom_voice(speaker="vivian", **arguments)


def test_refusals_leave_the_instance_free(tts):
    with pytest.raises(ValueError, match="Unsupported speakers"):
        tts.generate_custom_voice("Hello", "bob")
    with pytest.raises(ValueError, match="does not support generate_voice_design"):
        tts.generate_voice_design("Hello", "calm")
    with pytest.raises(TypeError, match="temprature"):
        next(tts.stream_custom_voice("Hello", "vivian", temprature=1.0))
    with pytest.warns(UserWarning, match="cut off"):
        tts.generate_custom_voice("Hello", "vivian", max_new_tokens=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the default device is the GPU")
def test_a_checkpoint_is_loaded_by_its_directory():
    tts = TTS.from_pretrained(str(checkpoint("custom_voice", "1b7")), max_seq_len=64)
    assert (tts.device.type, tts.mode, next(tts.model.model.parameters()).dtype) == ("cpu", None, torch.float32)
    half = TTS.from_pretrained(str(checkpoint("custom_voice", "1b7")), device="cpu", dtype=torch.bfloat16, max_seq_len=64)
    with pytest.warns(UserWarning, match="cut off"):
        waveforms, _ = half.generate_custom_voice("Hello", "vivian", max_new_tokens=4)
    assert waveforms[0].dtype == np.float32 and len(waveforms[0]) == 3 * SAMPLES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "reduce-overhead"}, "mode='reduce-overhead' records CUDA graphs and the model is on the cpu"),
        ({"mode": "max-autotune"}, "records CUDA graphs"),
        ({"mode": "default", "options": {"triton.cudagraphs": True}}, "records CUDA graphs"),
        ({"mode": "fast"}, "mode='fast': give 'auto', None or one of default, reduce-overhead"),
        ({"mode": None, "options": {"strict": True}}, "mode=None does not compile"),
        ({"mode": "default", "options": {"nonsense": 1}}, "unknown option 'nonsense'"),
        ({"mode": "default", "options": {"triton-cudagraphs": True}}, "unknown option 'triton-cudagraphs'"),
        ({"mode": "default", "options": {"layers": (0, 2)}}, r"layers=\(0, 2\) reaches beyond the 1 layers of code_predictor.model"),
        ({"chunk_frames": ()}, r"chunk_frames=\(\): give at least one"),
        ({"chunk_frames": (1, 0)}, r"chunk_frames\[1\]=0: give 1 or more"),
        ({"kv_cache": "int2"}, "kv_cache='int2': give one of bf16, int4, int3, k4v3, fp8"),
        ({"kv_cache": "int4", "max_seq_len": 64}, "sinks=4 and window=64 keep every token of 64 slots"),
        ({"protect": Protect()}, "kv_cache='bf16' quantises nothing"),
    ],
)
def test_wrong_arguments_are_refused(tts, arguments, message):
    with pytest.raises(ValueError, match=message):
        TTS(tts.model, **arguments)


@pytest.mark.parametrize("mode", [None, "default", pytest.param("auto", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="compiles"))])
@pytest.mark.parametrize(("name", "value"), [("mode", "reduce-overhead"), ("kv_cache", "int4")])
def test_what_is_tts_s_own_is_no_option(tts, mode, name, value):
    with pytest.raises(ValueError, match=f"options={{'{name}': '{value}'}}: give it to TTS itself, {name}='{value}'"):
        TTS(tts.model, mode=mode, options={name: value})


@pytest.mark.parametrize("name", ["max_seq_len", "chunk_frames"])
@pytest.mark.parametrize("value", ["2048", 256.5, True, None, (64, "2")], ids=str)
def test_what_is_no_whole_number_is_named(tts, name, value):
    given: Any = {name: value}
    named = r"chunk_frames\[1\]='2'" if (name, value) == ("chunk_frames", (64, "2")) else re.escape(f"{name}={value!r}")
    with pytest.raises(TypeError, match=f"{named}: give a .*whole number"):
        TTS(tts.model, **given)


@pytest.mark.parametrize("name", ["batch_sizes", "prompt_lengths"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ((1, 0), ValueError, r"\[1\]=0: give 1 "),
        ((-3,), ValueError, r"\[0\]=-3: give 1 "),
        ((1.5,), TypeError, r"\[0\]=1.5: give a whole number"),
        (("1",), TypeError, r"\[0\]='1': give a whole number"),
        (4, TypeError, "=4: give a tuple or list of whole numbers"),
        ("4", TypeError, "='4': give a tuple or list"),
    ],
)
def test_wrong_sizes_to_warm_are_refused(tts, name, value, error, message):
    with pytest.raises(error, match=f"^{name}{message}"):
        tts.warmup(**{name: value})


def test_more_texts_than_a_batch_holds_cannot_be_warmed(tts):
    with pytest.raises(ValueError, match=r"^batch_sizes\[1\]=33: give 1 to 32"):
        tts.warmup(batch_sizes=(1, 33))


def test_a_quantised_cache_that_protects_every_layer_is_warned_of(tts):
    with pytest.warns(UserWarning, match="kv_cache='int4' quantises nothing: .* keeps all 2 layers.*lower first_layers") as caught:
        TTS(tts.model, kv_cache="int4")
    assert caught[0].filename == __file__


def test_wrong_models_are_refused(tts):
    with pytest.raises(TypeError, match="Qwen3TTSForConditionalGeneration is no Qwen3TTSModel"):
        TTS(tts.model.model)
    slow = SimpleNamespace(talker=tts.model.model.talker, speech_tokenizer=SimpleNamespace(get_model_type=lambda: "qwen3_tts_tokenizer_25hz"))
    with pytest.raises(ValueError, match="speech tokenizer 'qwen3_tts_tokenizer_25hz': only the 12 Hz one"):
        TTS(SimpleNamespace(model=slow))
    eager = type(tts.model).from_pretrained(str(checkpoint("custom_voice", "1b7")), device_map="cpu", attn_implementation="eager")
    with pytest.raises(ValueError, match="attn_implementation='eager'.*'sdpa'"):
        TTS(eager)


@pytest.mark.parametrize("kind", ["custom_voice", "voice_design", "base"])
def test_warmup_runs_for_every_kind_of_model(kind):
    voice(kind).warmup(batch_sizes=(1, 3), prompt_lengths=(8, 5000))


def test_after_warmup_nothing_is_compiled(tts, monkeypatch):
    monkeypatch.setattr("qtts_compile.engine.NEAR", 24)  # the prompt's tokens are fewer, with the frames they are more
    torch.compiler.reset()
    compiled = TTS(tts.model, mode="default", backend="eager", max_seq_len=64)
    compiled.codec = tts.codec  # test_codec_compiled.py compiles it
    compiled.warmup(prompt_lengths=(16,))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    arguments = {"text": "Hello", **SPEAKER, "seed": 1, "max_new_tokens": 13}
    with pytest.warns(UserWarning, match="cut off"):
        spoken = generate(compiled, "custom_voice", **arguments)
        _, chunks = stream(compiled, "custom_voice", **arguments)
        assert_equal(spoken, generate(tts, "custom_voice", **arguments))
    np.testing.assert_allclose(np.concatenate(chunks), spoken.waveforms[0], rtol=0, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch.compiler.reset()


def test_the_package_is_imported_without_what_only_speech_needs():
    code = "import sys, qtts_compile; assert not {'qwen_tts', 'transformers', 'qtts_compile.tts'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
