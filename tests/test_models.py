"""Eager sanity of the models the rewrites are proved on: stated structure, steps that agree, greedy codes that vary."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.models import CASES, GROUPS, ModelCase, Session, build_talker, case, generate_codes, generation_inputs, published

NAMES = [c.name for c in CASES]
MASKS = ["4d", "4d-additive", "2d", "none"]
CLOSE: dict[str, Any] = dict(rtol=0, atol=1e-5)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny matrices gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def stacks():
    return {c.name: c.build(torch.float32) for c in CASES}


@torch.no_grad()
def run(model, inputs):
    return model(**inputs).last_hidden_state


def decode(model, session, prefill, steps):
    """Hidden states ``[B, prefill + steps, H]`` of a prefill and single-token steps."""
    outputs = [run(model, session.prefill_inputs(prefill))]
    outputs += [run(model, session.decode_inputs()) for _ in range(steps)]
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("name", NAMES)
def test_stack_has_the_stated_structure(stacks, name):
    c, model = case(name), stacks[name]
    config = model.config
    assert len(model.layers) == c.layers
    assert config._attn_implementation == "sdpa"
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    if c.rope_axes == 3:
        assert config.rope_scaling["mrope_section"] == list(c.sections)
        assert config.rope_scaling["interleaved"] == (c.rope_layout == "interleaved")
        assert 2 * sum(c.sections) == c.head_dim
    inv_freq = c.rope_theta ** -(torch.arange(0, c.head_dim, 2) / c.head_dim)
    torch.testing.assert_close(model.get_buffer("rotary_emb.inv_freq"), inv_freq)
    for layer in model.layers:
        attention = layer.self_attn
        shapes = {n: tuple(getattr(attention, n).weight.shape) for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        width, kv_width = c.heads * c.head_dim, c.kv_heads * c.head_dim
        assert shapes == dict(q_proj=(width, c.hidden), k_proj=(kv_width, c.hidden), v_proj=(kv_width, c.hidden), o_proj=(c.hidden, width))
        assert tuple(layer.mlp.gate_proj.weight.shape) == (c.intermediate, c.hidden)
        assert tuple(n for n in shapes if getattr(attention, n).bias is not None) == c.biased
        assert hasattr(attention, "q_norm") == hasattr(attention, "k_norm") == c.qk_norm


@pytest.mark.parametrize("name", NAMES)
def test_no_two_layers_or_norms_share_weights(stacks, name):
    model = stacks[name]
    assert len({layer.self_attn.q_proj.weight.sum().item() for layer in model.layers}) == len(model.layers)
    norms = [p for n, p in model.named_parameters() if n.endswith("norm.weight")]
    assert len({p.sum().item() for p in norms}) == len(norms) == case(name).layers * (4 if case(name).qk_norm else 2) + 1
    assert all(p.std() > 0.1 for p in norms)


def test_cases_differ_in_what_a_rewrite_could_confuse():
    by_name = {c.name: c for c in CASES}
    assert len(by_name) == len(CASES)
    assert by_name["talker-1.7b"].hidden != by_name["predictor"].hidden == by_name["talker-0.6b"].hidden
    assert {c.rope_layout for c in CASES} == {"single", "interleaved", "concatenated"}
    odd = by_name["talker-odd"]
    assert odd.hidden & (odd.hidden - 1) and odd.head_dim & (odd.head_dim - 1) and odd.heads // odd.kv_heads == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_build_is_the_same_model_rounded(stacks, name, dtype):
    model = case(name).build(dtype)
    for (n, half), full in zip(model.named_parameters(), stacks[name].parameters(), strict=True):
        assert torch.equal(half, full.to(dtype)), n
    assert model.get_buffer("rotary_emb.inv_freq").dtype == torch.float32
    half = decode(model, Session(model, case(name)), 6, 3)
    full = decode(stacks[name], Session(stacks[name], case(name)), 6, 3)
    assert half.dtype == dtype
    assert torch.nn.functional.cosine_similarity(half.float(), full, dim=-1).min() > 0.99


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_decode_equal_one_prefill(stacks, name, cache, mask):
    model, c = stacks[name], case(name)
    whole = run(model, Session(model, c, cache="dynamic", mask="none").prefill_inputs(11))
    stepped = decode(model, Session(model, c, cache=cache, mask=mask), 7, 4)
    torch.testing.assert_close(stepped, whole, **CLOSE)


@pytest.mark.parametrize("mask", ["4d", "4d-additive", "2d"])
@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("name", NAMES)
def test_padded_rows_equal_unpadded_ones(stacks, name, cache, mask):
    model, c, padding = stacks[name], case(name), [3, 0, 5]
    session = Session(model, c, cache=cache, mask=mask, batch=3, padding=padding)
    padded = decode(model, session, 8, 3)
    assert session.valid.sum(1).tolist() == [11 - p for p in padding]
    for index, pad in enumerate(padding):
        alone = decode(model, session.row(index), 8 - pad, 3)
        torch.testing.assert_close(padded[index : index + 1, session.valid[index]], alone, **CLOSE)
    assert (padded[0, -1] - padded[1, -1]).abs().max() > 0.1


@pytest.mark.parametrize("name", [c.name for c in CASES if c.rope_axes == 3])
def test_each_rotary_section_matters(stacks, name):
    model, c = stacks[name], case(name)
    distinct = decode(model, Session(model, c), 7, 2)
    assert (distinct - decode(model, Session(model, c, axes="shared"), 7, 2)).abs().max() > 1e-2
    for other in (
        replace(c, rope_layout="concatenated" if c.rope_layout == "interleaved" else "interleaved"),
        replace(c, sections=(c.sections[0] + 1, c.sections[1] - 1, c.sections[2])),
    ):
        changed = other.build(torch.float32)
        assert (distinct - decode(changed, Session(changed, other), 7, 2)).abs().max() > 1e-3


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_clone_and_reset_replay_the_session(stacks, cache):
    model = stacks["talker-1.7b"]
    session = Session(model, case("talker-1.7b"), cache=cache, batch=2, padding=[0, 2], seed=3)
    first = decode(model, session, 5, 3)
    clone = session.clone()
    assert torch.equal(decode(model, clone, 5, 3), first)
    assert clone.cache is not session.cache and clone.position == session.position == 8
    layers = session.cache.layers
    buffers = [layer.keys.data_ptr() for layer in layers]
    session.reset()
    assert session.position == 0
    if cache == "static":
        assert not any(layer.keys.any() or layer.values.any() for layer in layers)
    assert torch.equal(decode(model, session, 5, 3), first)
    if cache == "static":
        assert [layer.keys.data_ptr() for layer in session.cache.layers] == buffers
        other = Session(model, case("talker-1.7b"), cache=cache, batch=2, padding=[0, 2], seed=4)
        assert not torch.allclose(decode(model, other, 5, 3), first, atol=0.1)


def test_static_cache_is_allocated_before_the_first_call(stacks):
    model, c = stacks["predictor"], case("predictor")
    for layer in Session(model, c, batch=2, max_len=17).cache.layers:
        assert tuple(layer.keys.shape) == tuple(layer.values.shape) == (2, c.kv_heads, 17, c.head_dim)
        assert layer.keys._dynamo_static_input_type == "unguarded"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(cache="paged"), "'paged'"),
        (dict(mask="3d"), "'3d'"),
        (dict(axes="four"), "'four'"),
        (dict(batch=2, padding=[1]), "names 1 rows"),
        (dict(padding=[1], mask="none"), "needs a mask"),
    ],
)
def test_session_refuses_bad_options(stacks, options, message):
    with pytest.raises(ValueError, match=message):
        Session(stacks["predictor"], case("predictor"), **options)


def test_session_refuses_bad_steps(stacks):
    session = Session(stacks["predictor"], case("predictor"), max_len=8, padding=[4])
    with pytest.raises(ValueError, match="before prefill"):
        session.decode_inputs()
    with pytest.raises(ValueError, match="no token after padding"):
        session.prefill_inputs(4)
    with pytest.raises(ValueError, match="beyond max_len=8"):
        session.prefill_inputs(9)
    session.prefill_inputs(8)
    with pytest.raises(ValueError, match="beyond max_len=8"):
        session.decode_inputs()
    with pytest.raises(ValueError, match="at position 8"):
        session.prefill_inputs(5)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no model case 'gpt'.*talker-1.7b"):
        case("gpt")
    with pytest.raises(ValueError, match="no published size '3b'"):
        published("3b")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="no part 'codec'"):
        published("1.7b", "codec")  # pyright: ignore[reportArgumentType]


# Bytes of bf16 weights read per step, as measured on the real shapes, less the output head.
@pytest.mark.parametrize(
    ("size", "part", "gigabytes", "head"),
    [("1.7b", "talker", 2.83, 3072 * 2048), ("0.6b", "talker", 0.89, 3072 * 1024), ("1.7b", "predictor", 0.161, 2048 * 1024)],
)
def test_published_shapes_weigh_what_the_checkpoints_do(size, part, gigabytes, head):
    c: ModelCase = published(size, part)
    model = c.construct(torch.bfloat16, "meta")
    weights = sum(p.numel() for n, p in model.named_parameters() if "embedding" not in n) + head
    assert 2 * weights / 1e9 == pytest.approx(gigabytes, rel=0.01)
    assert 2 * sum(c.sections) in (0, c.head_dim)


@pytest.fixture(scope="module")
def talkers():
    return {size: build_talker(size) for size in ("1.7b", "0.6b")}


def test_talker_joins_predictor_as_published(talkers):
    projection = talkers["1.7b"].code_predictor.small_to_mtp_projection
    assert (projection.in_features, projection.out_features) == (case("talker-1.7b").hidden, case("predictor").hidden)
    assert isinstance(talkers["0.6b"].code_predictor.small_to_mtp_projection, torch.nn.Identity)
    for talker in talkers.values():
        assert len(talker.code_predictor.lm_head) == GROUPS - 1


@pytest.mark.parametrize("lengths", [[9], [5, 9, 7]], ids=["single", "padded"])
@pytest.mark.parametrize("size", ["1.7b", "0.6b"])
def test_greedy_codes_vary_and_have_no_ties(talkers, size, lengths):
    talker, frames, margins = talkers[size], 32, []

    def record(logits):
        best = logits.topk(2).values
        margins.append((best[:, 0] - best[:, 1]).min().item())

    hooks = [head.register_forward_hook(lambda module, args, logits: record(logits[:, -1])) for head in talker.code_predictor.lm_head]
    try:
        with torch.no_grad():
            result = talker.generate(**generation_inputs(talker, frames, lengths), output_scores=True)
    finally:
        for hook in hooks:
            hook.remove()
    for scores in result.scores:
        record(scores)
    assert len(margins) == frames * GROUPS + 1
    assert min(margins) > 2e-4
    codes = torch.stack([hidden[-1] for hidden in result.hidden_states if hidden[-1] is not None], dim=1)
    assert codes.shape == (len(lengths), frames, GROUPS)
    assert codes.min() >= 0 and codes.max() < 64
    for row in codes:
        assert len({tuple(frame) for frame in row.tolist()}) == frames
        assert all(row[:, group].unique().numel() >= 10 for group in range(GROUPS))


def test_greedy_codes_are_reproducible_and_seeded(talkers):
    codes = generate_codes(talkers["1.7b"], 4)
    assert torch.equal(codes, generate_codes(build_talker("1.7b"), 4))
    assert not torch.equal(codes, generate_codes(talkers["1.7b"], 4, seed=1))
    assert not torch.equal(codes, generate_codes(build_talker("1.7b", seed=1), 4))


@pytest.mark.parametrize("size", ["1.7b", "0.6b"])
def test_padded_generation_equals_each_row_alone(talkers, size):
    talker, lengths, frames = talkers[size], [5, 9, 7], 16
    # transformers 5 does not penalise as many generated tokens as the row has padding, when a prompt is given as embeddings.
    penalty: dict[str, Any] = dict(repetition_penalty=1.0)
    codes = generate_codes(talker, frames, lengths, **penalty)
    together = generation_inputs(talker, frames, lengths)
    for row, length in enumerate(lengths):
        alone = {name: together[name][row : row + 1, -length:] for name in ("inputs_embeds", "attention_mask")}
        alone["trailing_text_hidden"] = together["trailing_text_hidden"][row : row + 1]
        assert torch.equal(generate_codes(talker, frames, lengths, **penalty, **alone)[0], codes[row])
    assert not torch.equal(codes[0], codes[1])
