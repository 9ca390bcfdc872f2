"""The quantised cache of the engine: what its buffers hold, what a speech becomes with it, and what stays as it is without codes."""

from typing import Any

import pytest
import torch
from models import build_talker, case, generate_codes, published
from rewriting import expected_kernels, kernels
from test_engine import CPU, FINAL_NORM, prompt, settings, speak
from test_engine import layer as one_layer

from qtts_compile import Protect, TurboQuantCache, collect
from qtts_compile.cache import StaticKVCache
from qtts_compile.engine import Engine, PromptInputs
from qtts_compile.kernels.turboquant.codec import dequantize, quantize
from qtts_compile.launcher import Launcher
from qtts_compile.options import KV_CACHES
from qtts_compile.regions import Stack
from qtts_compile.turboquant_cache import BUFFERS, TurboQuantKVCache, make_cache

FORMATS = KV_CACHES[1:]
BITS = {"int4": (4, 4), "k4v3": (4, 3), "int3": (3, 3), "fp8": (8, 8)}
# The relative error of a vector: roots of the codebooks' mean squared errors .0095 and .0345, and what 3 bits of mantissa lose.
VECTOR_ERROR = {4: 0.0975, 3: 0.186, 8: 0.0266}
SLOTS, STARTS, PROMPT, STEPS = 80, (0, 3), 12, 60
SMALL = Protect(first_layers=1, last_layers=1, sinks=2, window=8)  # 31 of the 41 tokens of a speech of 32 frames are read from codes


@pytest.fixture(scope="module")
def talker():
    return build_talker("0.6b")


def cache_of(config: Any, format: str = "int4", protect: Protect = SMALL, starts=STARTS, slots=SLOTS, dtype=torch.float32) -> Any:
    return make_cache(config, len(starts), slots, dtype, torch.tensor(starts), format, None if format == "bf16" else protect)


@torch.inference_mode()
def step_logits(talker: Any, cache: StaticKVCache, stack: Stack | None = None, steps: int = STEPS) -> torch.Tensor:
    """Return the logits ``[B, steps, V]`` of the steps after a prompt with 4 slots of padding at its right, all of fixed inputs."""
    stack, start = stack or Stack(talker.model, 3, SLOTS), torch.tensor(STARTS)[:, None]
    embeds = torch.randn(len(STARTS), SLOTS, talker.config.hidden_size, generator=torch.Generator().manual_seed(1))
    slots, every = torch.arange(PROMPT + 4), torch.arange(SLOTS)
    mask = (slots <= slots[:, None]) & (slots >= start[..., None]) | (slots == slots[:, None])
    positions, prompt = (slots - start).clamp(min=0), embeds[:, : PROMPT + 4] * (slots < PROMPT)[:, None]
    stack(prompt, mask[:, None], positions, stack.angles(positions), cache.prompt(slots, torch.tensor([PROMPT - 1])), varying=True)
    logits = []
    for slot in torch.arange(PROMPT, PROMPT + steps).split(1):
        mask = (every <= slot) & (every >= start)
        hidden = stack(embeds[:, slot], mask[:, None, None], slot - start, stack.angles(slot - start), cache.step(slot))
        logits.append(talker.codec_head(stack.norm(hidden)))
    return torch.cat(logits, 1)


@pytest.mark.parametrize("size", ["1.7b", "0.6b"])
def test_a_cache_without_codes_to_read_is_a_static_one(size):
    talker = build_talker(size)
    expected, layers = step_logits(talker, cache_of(talker.config, "bf16")), talker.config.num_hidden_layers
    for protect in (Protect(layers, 0, 0, 1), Protect(0, layers + 1, 0, 1), Protect(0, 0, 0, SLOTS - 1)):
        assert torch.equal(step_logits(talker, cache_of(talker.config, protect=protect)), expected)


@pytest.mark.parametrize("size", ["1.7b", "0.6b"])
def test_logits_are_as_close_as_a_vector_or_closer(size):
    # Measured with all layers quantised: .046 to .048 for int4, .074 to .075 for k4v3, .093 to .097 for int3, .013 for fp8.
    talker = build_talker(size)
    expected = step_logits(talker, cache_of(talker.config, "bf16"))
    errors = {}
    for format in FORMATS:
        logits = step_logits(talker, cache_of(talker.config, format, Protect(0, 0, 4, 8)))
        errors[format] = ((logits - expected).norm() / expected.norm()).item()
        # Attention averages the errors of vectors, and the layers' own input dilutes them. Far less would mean that codes are hardly read.
        worst = max(VECTOR_ERROR[bits] for bits in BITS[format])
        assert 0.2 * worst < errors[format] < worst
    assert sorted(errors, key=lambda format: errors[format]) == ["fp8", "int4", "k4v3", "int3"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("protect", [Protect(0, 0, 0, 1), Protect(0, 0, 2, 5), Protect(0, 0, 3, 20)], ids=str)
@pytest.mark.parametrize(("length", "padding"), [(1, 15), (7, 0), (9, 7)])
def test_attention_sees_what_was_written(format, protect, length, padding):
    # A first utterance, longer than the second, leaves the ring full of tokens that the second must not see.
    config = case("qwen3").config()
    cache, starts = cache_of(config, format, protect), torch.tensor(STARTS)
    for seed, tokens in enumerate((length + 20, length)):
        generator = torch.Generator().manual_seed(seed)
        k, v = (torch.randn(len(STARTS), 2, SLOTS, 32, generator=generator) for _ in range(2))
        slots = torch.arange(tokens + padding)
        view = cache.prompt(slots, torch.tensor([tokens - 1]))
        given = k[:, :, slots], v[:, :, slots]
        assert all(map(torch.equal, view.update(*given, 1), given))
        for slot in range(tokens, tokens + 30):
            read = cache.step(torch.tensor([slot])).update(k[:, :, slot : slot + 1], v[:, :, slot : slot + 1], 1)
            index = torch.arange(slot + 1)
            sink = (index >= starts[:, None]) & (index < starts[:, None] + protect.sinks)
            exact = (sink | (index > slot - protect.window))[:, None, :, None]
            for x, out, bits, unbiased in zip((k, v), read, BITS[format], (True, False)):
                x = x[:, :, : slot + 1]
                decoded = dequantize(*quantize(x, bits, unbiased), bits)
                torch.testing.assert_close(out[:, :, : slot + 1], torch.where(exact, x, decoded), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_buffers_are_what_the_format_takes(format, dtype):
    config = case("talker-1.7b").config(code_predictor_config=case("predictor").config())
    heads, width, layers = config.num_key_value_heads, config.head_dim, config.num_hidden_layers
    cache = cache_of(config, format, Protect(1, 0, 3, 5), dtype=dtype)
    vector = {4: width // 2, 3: 3 * width // 8, 8: width}
    coded, dense = sum(vector[bits] + 2 for bits in BITS[format]), 2 * width * dtype.itemsize
    quantized = layers - 1
    assert cache.quantized_layers == tuple(range(1, layers))
    assert cache.bytes_per_token == heads * (quantized * coded + dense)
    kept = quantized * (3 + 5) * heads * dense
    shared = len(STARTS) * 8
    assert cache.allocated_bytes == len(STARTS) * (SLOTS * cache.bytes_per_token + kept) + shared
    # No dense copy of a quantised layer, and nothing else.
    names = {f"{name}_{layer}" for layer in cache.quantized_layers for name in BUFFERS} | {"keys_0", "values_0", "start"}
    assert {name for name, _ in cache.named_buffers()} == names
    assert all(value.dtype == torch.uint8 for name, value in cache.named_buffers() if "codes" in name)
    assert cache.allocated_bytes < cache_of(config, "bf16", dtype=dtype).allocated_bytes + kept * len(STARTS) + shared


@pytest.mark.parametrize(
    ("format", "gib", "protected_gib"),
    [("bf16", 28.0, 28.0), ("int4", 7.22, 8.92), ("int3", 5.47, 7.29), ("k4v3", 6.34, 8.11), ("fp8", 14.22, 15.42)],
)
def test_caches_of_the_published_size_take_what_is_claimed(format, gib, protected_gib):
    """32 texts over 8192 slots, all layers quantised and, with what is kept as it is, the default."""
    config = published("1.7b").config(code_predictor_config=published("1.7b", "predictor").config())
    for protect, expected in (Protect(0, 0, 0, 1), gib), (None, protected_gib):
        start = torch.zeros(32, dtype=torch.long, device="meta")
        cache = make_cache(config, 32, 8192, torch.bfloat16, start, format, None if format == "bf16" else protect)
        window = 28 * 32 * 8 * 2 * 128 * 2 if protect and format != "bf16" else 0  # the token that is being read
        assert (cache.allocated_bytes - window) / 2**30 == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize("protect", [Protect(1, 0, 2, 5), Protect(0, 1, 0, 1), Protect(0, 0, 4, 60)], ids=str)
def test_the_quantised_tokens_are_those_that_need_their_codes(talker, protect):
    cache = cache_of(talker.config, protect=protect)
    step_logits(talker, cache)
    last = PROMPT + STEPS
    for layer in cache.quantized_layers:
        scales = cache.get_buffer(f"scales_{layer}")
        assert (scales[..., :last] > 0).all() and not scales[..., last:].any()  # every token is stored as codes
        scales.zero_()
        for read in cache.step(torch.tensor([last])).update(*torch.ones(2, len(STARTS), 2, 1, 32), layer):
            needed = (read[:, 0, : last + 1] == 0).all(-1)
            for row, start in enumerate(STARTS):
                assert needed[row, start:].sum() == cache.quantized_tokens(last + 1 - start) > 0
    assert cache.quantized_tokens(protect.sinks + protect.window) == 0 == cache_of(talker.config, "bf16").quantized_tokens(1000)


def test_layers_of_a_kind_share_a_graph_with_one_write_and_one_read(talker):
    graphs = []

    def backend(gm, example_inputs):
        graphs.append([node.target for node in gm.graph.nodes if "quantized_kv" in str(node.target)])
        return gm

    torch._dynamo.reset()
    protect = Protect(1, 0, 2, 5)
    stack = Stack(talker.model, 3, SLOTS, lambda part: torch.compile(part, backend=backend, fullgraph=True, dynamic=False))
    logits = step_logits(talker, cache_of(talker.config, protect=protect), stack, 3)
    torch.testing.assert_close(logits, step_logits(talker, cache_of(talker.config, protect=protect), steps=3))
    write, read = torch.ops.qtts.quantized_kv_write.default, torch.ops.qtts.quantized_kv_read.default
    assert graphs == [[], [write], [], [write, read]]  # a dense and a quantised layer in the prompt, and in a step


def engine(talker: Any, kv_cache: str = "int4", protect: Protect | None = SMALL, compiled: bool = False) -> Engine:
    launcher = Launcher(CPU, "default", options={"executor": "eager", "strict": True}) if compiled else None
    return Engine(talker, max_seq_len=128, launcher=launcher, kv_cache=kv_cache, protect=protect)


@pytest.mark.parametrize("lengths", [[9], [5, 9, 7]], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_a_window_as_long_as_the_speech_changes_no_code(talker, lengths, format):
    protect = Protect(0, 0, 0, max(lengths) + 32)
    expected = generate_codes(talker, 32, lengths, repetition_penalty=1.0)
    speech = speak(engine(talker, format, protect), prompt(talker, lengths), settings(repetition_penalty=1.0))
    assert torch.equal(speech.codes, expected) and speech.quantized_tokens == [0] * len(lengths)


# Prompts of 16 and 32 tokens are compiled sizes; the others are padded to one.
@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33])
def test_padding_of_a_prompt_is_not_taken_for_recent_tokens(talker, length):
    inputs = prompt(talker, [max(length, 2)])
    inputs = PromptInputs(inputs.embeds[:, :length], inputs.mask[:, :length], inputs.text, inputs.pad)
    padded = speak(engine(talker), inputs, settings()).codes.clone()
    unpadded = engine(talker)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qtts_compile.engine.padded_length", lambda length: length)
        assert torch.equal(speak(unpadded, inputs, settings()).codes, padded)


@pytest.mark.parametrize("lengths", [[9], [17, 3], [5, 9, 7]], ids=str)
def test_greedy_codes_are_those_of_generate_with_such_a_cache(talker, lengths):
    starts = [max(lengths) - length for length in lengths]
    cache = TurboQuantCache(talker.config, len(lengths), 64, "int4", SMALL, start=starts)
    expected = generate_codes(talker, 32, lengths, repetition_penalty=1.0, past_key_values=cache)
    assert torch.equal(speak(engine(talker), prompt(talker, lengths), settings(repetition_penalty=1.0)).codes, expected)
    assert not torch.equal(generate_codes(talker, 32, lengths, repetition_penalty=1.0), expected)  # codes were read


def test_rows_of_a_batch_are_what_they_are_alone(talker):
    lengths, wanted, seeds = [4, 21, 9], settings(do_sample=True, subtalker_dosample=True), [5, 6, 7]
    speaker, batch = engine(talker), prompt(talker, lengths)
    together = speak(speaker, batch, wanted, seeds)
    codes = together.codes.clone()
    assert together.quantized_tokens == [length + 32 - SMALL.sinks - SMALL.window for length in lengths]
    for row, length in enumerate(lengths):
        tokens = slice(batch.embeds.shape[1] - length, None)
        alone = PromptInputs(batch.embeds[row : row + 1, tokens], batch.mask[row : row + 1, tokens], batch.text[row : row + 1], batch.pad)
        assert torch.equal(speak(speaker, alone, wanted, [seeds[row]]).codes[0], codes[row])


@pytest.mark.parametrize("length", [3, 9])
def test_a_speech_after_another_is_what_it_is_on_a_fresh_engine(talker, length):
    used = engine(talker)
    speak(used, prompt(talker, [33], seed=1), settings())
    assert torch.equal(speak(used, prompt(talker, [length]), settings()).codes, speak(engine(talker), prompt(talker, [length]), settings()).codes)


@pytest.mark.parametrize(("size", "lengths", "format"), [("1.7b", [9], "int4"), ("0.6b", [5, 9, 7], "k4v3")], ids=str)
def test_compiled_codes_are_those_of_an_uncompiled_engine(size, lengths, format):
    talker = build_talker(size)
    torch.compiler.reset()
    compiled = engine(talker, format, compiled=True)
    with collect() as report:
        for tokens in (lengths, [length + 9 for length in lengths]):
            codes = speak(compiled, prompt(talker, tokens), settings()).codes.clone()
            assert torch.equal(codes, speak(engine(talker, format), prompt(talker, tokens), settings()).codes)
    assert report.graph_breaks == [] and report.refusals == []
    assert len(report.graphs) == 13  # 11, and a quantised layer beside the dense one in the prompt and in the step
    step = expected_kernels(one_layer(case(f"talker-{size}")), "decode", "quantized", len(lengths)) - FINAL_NORM
    assert [kernels(graph) for graph in report.graphs].count(step) == 1


def test_each_size_of_batch_has_a_cache(talker):
    speaker = engine(talker)
    assert speaker.cache_bytes == 0
    one, three = (speak(speaker, prompt(talker, lengths), settings()).cache for lengths in ([9], [9, 9, 9]))
    assert (one.shape[0], three.shape[0]) == (1, 4)
    assert speaker.cache_bytes == one.allocated_bytes + three.allocated_bytes
    assert isinstance(three, TurboQuantKVCache) and type(speak(engine(talker, "bf16", None), prompt(talker, [9]), settings()).cache) is StaticKVCache


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kv_cache": "int5"}, ValueError, "kv_cache='int5': give one of bf16, int4, int3, k4v3, fp8"),
        ({"kv_cache": None}, ValueError, "kv_cache=None: give one of"),
        ({"protect": Protect(window=0)}, ValueError, "window=0: give 1 or more: a token attends to its own"),
        ({"protect": Protect(sinks=-1)}, ValueError, "sinks=-1: give 0 or more"),
        ({"protect": Protect(first_layers=-1)}, ValueError, "first_layers=-1"),
        ({"protect": Protect(last_layers=1.5)}, TypeError, "last_layers=1.5: give a whole number"),  # pyright: ignore[reportArgumentType]
        ({"protect": Protect(sinks=4, window=124)}, ValueError, "sinks=4 and window=124 keep every token of 128 slots.*lower the window"),
        ({"protect": {"window": 8}}, TypeError, "give a qtts_compile.Protect"),
        ({"kv_cache": "bf16", "protect": Protect()}, ValueError, "kv_cache='bf16' quantises nothing: leave it out"),
    ],
)
def test_wrong_arguments_are_refused_at_once(talker, arguments, error, message):
    with pytest.raises(error, match=message):
        Engine(talker, **{"max_seq_len": 128, "kv_cache": "int4", **arguments})


def test_a_width_that_cannot_be_rotated_is_refused():
    with pytest.raises(ValueError, match="power of two from 32 on, got 40; keep its keys and values in bf16"):
        cache_of(case("talker-odd").config(code_predictor_config=case("predictor").config()))


def test_a_cache_that_quantises_nothing_is_warned_of(talker):
    with pytest.warns(UserWarning, match=r"kv_cache='int4' quantises nothing: Protect\(first_layers=2.* keeps all 3 layers"):
        Engine(talker, kv_cache="int4", protect=Protect(last_layers=1))


def test_that_it_is_experimental_is_said_and_of_the_default_is_not(talker, recwarn):
    Engine(talker)
    assert not recwarn.list
    with pytest.warns(
        UserWarning,
        match="kv_cache='int3' is experimental: it fails this project's limits on the 1.7B model with random weights and over random keys",
    ):
        Engine(talker, kv_cache="int3", protect=Protect(1, 0))


def test_several_tokens_after_the_prompt_are_refused(talker):
    with pytest.raises(ValueError, match="3 tokens after the prompt.*one by one"):
        cache_of(talker.config).step(torch.arange(3))
