"""TurboQuantCache in models' own forward() and generate(), eagerly and compiled, and what it refuses."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from models import build_talker, case, generate_codes
from models.weights import randomise
from torch._dynamo.exc import BackendCompilerFailed

import qtts_compile
from qtts_compile import Protect, TurboQuantCache

SLOTS = 64
SMALL = Protect(first_layers=0, last_layers=1, sinks=4, window=8)


@pytest.fixture(scope="module")
def talker():
    return build_talker("0.6b")


@pytest.fixture(scope="module")
def qwen3():
    model = transformers.Qwen3ForCausalLM._from_config(case("qwen3").config(), attn_implementation="sdpa")
    randomise(model, 0)
    return model.eval().requires_grad_(False)


def cache_for(model, lengths, format="int4", protect=SMALL, **arguments) -> TurboQuantCache:
    arguments = {"start": [max(lengths) - length for length in lengths], "dtype": torch.float32} | arguments
    return TurboQuantCache(model.config, len(lengths), SLOTS, format, protect, **arguments)


@pytest.mark.parametrize("lengths", [[9], [5, 9, 7]], ids=str)
@pytest.mark.parametrize("format", ["int4", "int3", "k4v3", "fp8"])
def test_generate_with_all_tokens_in_the_window_is_exact(talker, lengths, format):
    cache = cache_for(talker, lengths, format, Protect(0, 0, 0, 9 + 32))
    assert torch.equal(generate_codes(talker, 32, lengths, past_key_values=cache), generate_codes(talker, 32, lengths))
    assert cache.get_seq_length() == 9 + 32 and cache.packed.quantized_layers == (0, 1, 2)


def test_a_row_generates_what_it_does_alone(talker):
    # transformers 5 leaves generated tokens out of the repetition penalty when a prompt of embeddings is padded.
    lengths = [5, 9, 7]
    together = generate_codes(talker, 32, lengths, past_key_values=cache_for(talker, lengths), repetition_penalty=1.0)
    alone = generate_codes(talker, 32, [5], past_key_values=cache_for(talker, [5]), repetition_penalty=1.0)
    assert torch.equal(alone[0], together[0])
    assert not torch.equal(together, generate_codes(talker, 32, lengths, repetition_penalty=1.0))  # codes were read
    # Without its start, the padding takes the places of the first tokens.
    unset = cache_for(talker, lengths, start=None)
    assert not torch.equal(generate_codes(talker, 32, lengths, past_key_values=unset, repetition_penalty=1.0)[0], together[0])


def test_a_cache_that_is_reset_is_a_fresh_one(talker):
    cache = cache_for(talker, [9])
    generate_codes(talker, 32, [33], seed=1, past_key_values=cache, max_new_tokens=20, min_new_tokens=20)
    buffers = [buffer.data_ptr() for buffer in cache.packed.buffers()]
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(
        generate_codes(talker, 32, [9], past_key_values=cache), generate_codes(talker, 32, [9], past_key_values=cache_for(talker, [9]))
    )
    assert [buffer.data_ptr() for buffer in cache.packed.buffers()] == buffers


@pytest.mark.parametrize(
    ("size", "lengths", "backend"),
    [("1.7b", [9], "qtts"), ("0.6b", [5, 9, 7], "qtts"), ("0.6b", [5, 9, 7], "eager"), ("0.6b", [5, 9, 7], "inductor")],
    ids=str,
)
def test_compiled_codes_are_the_eager_ones(size, lengths, backend):
    talker = build_talker(size)
    expected = generate_codes(talker, 32, lengths, past_key_values=cache_for(talker, lengths))
    torch.compiler.reset()
    if backend == "qtts":
        qtts_compile.compile(talker, options={"executor": "eager", "strict": True})
    else:
        talker.model.compile(backend=backend, fullgraph=True)
    torch._dynamo.utils.counters.clear()
    with qtts_compile.collect() as report:
        codes = generate_codes(talker, 32, lengths, past_key_values=cache_for(talker, lengths))
    assert torch.equal(codes, expected)
    assert report.graph_breaks == [] and report.refusals == []
    # One graph for the prompt and one for all steps; under qtts those of the code predictor as well.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (5 if backend == "qtts" else 2)


def compiled_for(kv_cache) -> Any:
    """Return a new talker whose stack is compiled for one kind of cache."""
    torch.compiler.reset()
    talker = build_talker("0.6b")
    talker.model.compile(backend="qtts", options={"executor": "eager", "kv_cache": kv_cache})
    return talker


@pytest.mark.parametrize(("kv_cache", "format"), [("int4", "int4"), ("bf16", None)])
def test_a_stack_compiled_for_a_cache_runs_over_it(talker, kv_cache, format):
    expected, codes = (
        generate_codes(model, 8, past_key_values=cache_for(model, [9], format) if format else None) for model in (talker, compiled_for(kv_cache))
    )
    assert torch.equal(codes, expected)


@pytest.mark.parametrize(
    ("kv_cache", "format", "message"),
    [
        (
            "int4",
            "fp8",
            r"in 'fp8'; hand the model past_key_values=TurboQuantCache\(model.config, batch, slots, 'int4', "
            r"dtype=model.dtype, device=model.device\), or leave kv_cache out",
        ),
        ("int4", None, "in the model's dtype; hand the model past_key_values=TurboQuantCache"),
        ("bf16", "int4", "in 'int4'; hand the model a cache of its own dtype, or leave kv_cache out"),
    ],
)
def test_a_stack_compiled_for_another_cache_refuses_it(kv_cache, format, message):
    talker = compiled_for(kv_cache)
    with pytest.raises(BackendCompilerFailed, match=f"kv_cache='{kv_cache}': this graph holds its keys and values {message}") as caught:
        generate_codes(talker, 1, past_key_values=cache_for(talker, [9], format) if format else None)
    assert isinstance(caught.value.inner_exception, ValueError)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_graph_without_a_quantised_cache_is_refused_however_it_attends(attention, static):
    torch.compiler.reset()
    model = transformers.Qwen3Model._from_config(case("qwen3").config(), attn_implementation=attention)
    cache = transformers.StaticCache(model.config, max_cache_len=SLOTS) if static else None
    model.compile(backend="qtts", options={"executor": "eager", "kv_cache": "int4"})
    with pytest.raises(BackendCompilerFailed, match="kv_cache='int4': this graph holds its keys and values in the model's dtype"):
        model(torch.zeros(1, 9, dtype=torch.long), past_key_values=cache, use_cache=static)  # under autograd


def test_a_quantised_cache_is_for_one_stack(talker):
    with pytest.raises(ValueError, match=r"'int4' is for one decoder stack and 2 were found \(model, .*talker.model.compile\(.*'kv_cache': 'int4'"):
        qtts_compile.compile(talker, options={"kv_cache": "int4"})
    assert len(qtts_compile.compile(build_talker("0.6b"), options={"kv_cache": "bf16"})) == 2


@torch.no_grad()
def test_a_mask_of_ones_may_be_left_out(qwen3):
    ids = torch.randint(128, (2, 20), generator=torch.Generator().manual_seed(0))
    results = []
    for masked in (True, False):
        cache, logits = cache_for(qwen3, [10, 10]), []
        for first, end in ((0, 10), *((slot, slot + 1) for slot in range(10, 20))):
            mask = torch.ones(2, end, dtype=torch.long) if masked else None
            logits.append(qwen3(ids[:, first:end], attention_mask=mask, past_key_values=cache).logits)
        results.append(torch.cat(logits, 1))
    torch.testing.assert_close(*results)
    exact = qwen3(ids).logits
    # Prompt and window are exact; the first token that reads codes comes after the sinks and the window.
    torch.testing.assert_close(results[0][:, :12], exact[:, :12])
    assert all((results[0][:, slot] - exact[:, slot]).abs().max() > 1e-3 for slot in range(12, 20))


def test_any_decoder_generates(qwen3):
    ids = torch.randint(128, (2, 9), generator=torch.Generator().manual_seed(0))
    arguments = dict(max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0)
    cache = cache_for(qwen3, [9, 9], "fp8", Protect(0, 0, 0, 40))
    assert torch.equal(qwen3.generate(ids, past_key_values=cache, **arguments), qwen3.generate(ids, **arguments))
    with pytest.raises(NotImplementedError, match="ring, which cannot go back.*without beams"):
        qwen3.generate(ids[:1], past_key_values=cache_for(qwen3, [9, 9]), num_beams=2, **arguments)


@pytest.mark.parametrize("name", ["crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices"])
def test_what_would_take_tokens_back_is_refused(talker, name):
    with pytest.raises(NotImplementedError, match="DynamicCache"):
        getattr(cache_for(talker, [9]), name)(torch.tensor([0]))


def test_more_tokens_than_slots_are_refused(talker):
    with pytest.raises(ValueError, match="64 tokens and 1 more do not fit into slots=64"):
        generate_codes(talker, 60, [9], past_key_values=cache_for(talker, [9]))
    with pytest.raises(ValueError, match="0 tokens and 65 more do not fit"):
        generate_codes(talker, 1, [65], past_key_values=cache_for(talker, [9]))


def keys(batch=2, heads=2, tokens=1, width=32, **kwargs):
    return torch.zeros(batch, heads, tokens, width, **kwargs)


@pytest.mark.parametrize(
    ("states", "layer", "error", "message"),
    [
        (keys(batch=1), 0, ValueError, "made for batch=2 and the model has batch=1"),
        (keys(heads=4), 0, ValueError, "made for KV heads=2 and the model has KV heads=4"),
        (keys(width=16), 0, ValueError, "made for head_dim=32 and the model has head_dim=16"),
        (keys(dtype=torch.bfloat16), 0, TypeError, "made for torch.float32 and the model has torch.bfloat16: make it with dtype=torch.bfloat16"),
        (keys(device="meta"), 0, ValueError, "on cpu and the model on meta"),
        (keys(), 3, ValueError, "of a stack of 3 layers and the model has a layer 3"),
        (keys(), 1, ValueError, "layer 1 comes before layer 0"),
    ],
)
def test_a_model_of_another_layout_is_refused(talker, states, layer, error, message):
    cache = cache_for(talker, [9, 9])
    with pytest.raises(error, match=message):
        cache.update(states, states, layer)
    assert cache.get_seq_length() == 0


def test_a_model_of_fewer_layers_and_several_tokens_after_the_prompt_are_refused(talker):
    cache = cache_for(talker, [9, 9])
    cache.update(keys(tokens=5), keys(tokens=5), 0)
    with pytest.raises(ValueError, match="a stack of 3 layers and the model has 1: "):
        cache.update(keys(), keys(), 0)
    for layer in (1, 2):
        cache.update(keys(tokens=5), keys(tokens=5), layer)
    with pytest.raises(ValueError, match="3 tokens after the prompt"):
        cache.update(keys(tokens=3), keys(tokens=3), 0)


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        ([1], ValueError, r"start must have the shape \(2,\).*got \(1,\)"),
        ([0, 64], ValueError, r"start=\[0, 64\]: give slots from 0 to 63"),
        ([-1, 0], ValueError, r"start=\[-1, 0\]"),
        ([0.0, 1.0], TypeError, "start must be whole numbers, got torch.float32"),
    ],
)
def test_a_wrong_start_is_refused(talker, start, error, message):
    with pytest.raises(error, match=message):
        cache_for(talker, [9, 9], start=start)


def test_start_is_set_before_the_prompt(talker):
    cache = cache_for(talker, [9, 9])
    cache.start = torch.tensor([2, 0])
    assert cache.packed.start.tolist() == [2, 0]
    cache.update(keys(tokens=5), keys(tokens=5), 0)
    with pytest.raises(ValueError, match="set it before, or after reset"):
        cache.start = [0, 0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"format": "int8"}, ValueError, "one of int4, .*got 'int8'$"),
        ({"format": "bf16"}, ValueError, "one of int4, .*got 'bf16'; to hold keys and values as they are, leave this cache out"),
        ({"format": ["int4"]}, ValueError, r"one of int4, .*got \['int4'\]"),
        ({"dtype": torch.float64}, TypeError, "dtype=torch.float64"),
        ({"protect": {"window": 8}}, TypeError, r"protect=\{'window': 8\}: give a qtts_compile.Protect\("),
        ({"protect": False}, TypeError, "protect=False: give a qtts_compile.Protect"),
        ({"protect": (2, 2, 4, 64)}, TypeError, r"protect=\(2, 2, 4, 64\): give a"),
        ({"protect": Protect(window=0)}, ValueError, "window=0"),
        ({"protect": Protect(window=60)}, ValueError, "keep every token of 64 slots"),
    ],
)
def test_wrong_arguments_are_refused(talker, arguments, error, message):
    with pytest.raises(error, match=message):
        cache_for(talker, [9], **arguments)
    with pytest.raises(TypeError, match="config is a SimpleNamespace, which has no layers: give the decoder's"):
        TurboQuantCache(SimpleNamespace(talker_config=talker.config), 1, SLOTS)
    with pytest.raises(ValueError, match="batch=0: give 1 or more"):
        TurboQuantCache(talker.config, 0, SLOTS)
    for batch, slots, named in ((None, SLOTS, "batch=None"), ("2", SLOTS, "batch='2'"), (1, 64.0, "slots=64.0"), (1, True, "slots=True")):
        with pytest.raises(TypeError, match=f"{named}: give a whole number"):
            TurboQuantCache(talker.config, batch, slots)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("head_dim", [0, -64, 64.0])
def test_a_head_without_a_whole_number_of_coordinates_is_refused(talker, head_dim):
    config = copy.copy(talker.config)
    config.head_dim = head_dim
    with pytest.raises(ValueError, match=f"head_dim={head_dim} of the config"):
        TurboQuantCache(config, 1, 128)


def test_a_cache_that_quantises_nothing_is_warned_of(talker):
    with pytest.warns(UserWarning, match="kv_cache='int4' quantises nothing.*all 3 layers") as caught:
        TurboQuantCache(talker.config, 1, 128, protect=Protect(first_layers=3))
    assert caught[0].filename == __file__


def test_it_says_what_it_is(talker):
    cache = cache_for(talker, [9], "k4v3")
    assert repr(cache) == "TurboQuantCache(k4v3, batch=1, 0 of 64 slots, 2 of 3 layers quantised)"
    assert (len(cache), cache.get_max_length(), cache.get_max_cache_shape(), cache.is_sliding) == (3, 64, 64, [False] * 3)
