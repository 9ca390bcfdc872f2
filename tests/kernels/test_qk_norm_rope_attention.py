# pyright: reportCallIssue=false, reportArgumentType=false
# Arguments are cut from lists, whose lengths pyright takes for unknown.

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DTYPES, LAYOUTS, assert_accurate, dtypes, layouts, poisoned_memory, random_tensor, seeds
from test_decode_attention import MASKS, excluding, make_mask, softmax_attention
from test_qk_norm_rope_kv_write import oracle, variants

from qtts_compile.kernels.decode_attention import decode_attention_triton
from qtts_compile.kernels.qk_norm_rope_attention import (
    qk_norm_rope_attention,
    qk_norm_rope_attention_reference,
    qk_norm_rope_attention_triton,
)
from qtts_compile.kernels.qk_norm_rope_kv_write import qk_norm_rope_kv_write_triton
from qtts_compile.kernels.rms_norm import rms_norm_reference
from qtts_compile.kernels.rotary import rotary_reference

SLOTS = [1, 9, 17, 32, 70]
splits = st.sampled_from([None, 1, 2, 5])


@st.composite
def positions(draw, slots, tokens):
    """Draw distinct rows of a cache, often at the borders of its tiles, some of them counted from the end."""
    borders = [row for row in (0, 15, 16, 31, 32, 63, 64, slots - 1) if row < slots]
    rows = draw(st.lists(st.one_of(st.sampled_from(borders), st.integers(0, slots - 1)), min_size=tokens, max_size=tokens, unique=True))
    return [row - slots if draw(st.booleans()) else row for row in rows]


@st.composite
def places(draw):
    """Draw how many tokens go to which rows of how large a cache."""
    slots = draw(st.sampled_from(SLOTS))
    return slots, draw(positions(slots, draw(st.integers(1, min(2, slots)))))


def make_arguments(
    seed, batch, heads, slots, position, variant, dtype, device, mask_kind="bool", mask_dtype=torch.float32, layout="transposed",
    cache_layout="contiguous", q_norm=True, k_norm=True,
) -> list[Any]:  # fmt: skip
    width, sections, interleaved = variant
    tokens = len(position)
    q = random_tensor(seed, (batch, heads[0], tokens, width), dtype, device, layout)
    k, v = (random_tensor(seed + i, (batch, heads[1], tokens, width), dtype, device, layout) for i in (1, 2))
    weights = [random_tensor(seed + i, (width,), dtype, device) if norm else None for i, norm in ((3, q_norm), (4, k_norm))]
    theta = random_tensor(seed + 5, (*((3,) if sections else ()), batch, tokens, width), torch.float32, device)
    caches = [random_tensor(seed + i, (batch, heads[1], slots, width), dtype, device, cache_layout) for i in (6, 7)]
    mask = make_mask(mask_kind, seed + 8, batch, heads[0], tokens, slots, mask_dtype, device)
    angles = theta.cos().to(dtype), theta.sin().to(dtype), sections, interleaved
    return [q, k, v, *weights, 1e-6, 1e-5, *angles, *caches, torch.tensor(position, device=device), mask, width**-0.5]


def low_precision_caches(arguments):
    """Return the caches as models fill them, in the dtype."""
    _, k, v, _, k_weight, _, eps, *angles, k_cache, v_cache, position, _, _ = arguments
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    k_cache[:, :, position] = rotary_reference(k if k_weight is None else rms_norm_reference(k, k_weight, eps), *angles)
    v_cache[:, :, position] = v
    return k_cache, v_cache


def check(arguments, **launch):
    """Assert that results are as accurate as those of models, and that nothing of the caches changes but the rows at the positions."""
    q, k, v, q_weight, k_weight, q_eps, k_eps, *angles, k_cache, v_cache, position, mask, scale = arguments
    k_before, v_before = k_cache.clone(), v_cache.clone()
    k_model, v_model = low_precision_caches(arguments)
    q_model = rotary_reference(q if q_weight is None else rms_norm_reference(q, q_weight, q_eps), *angles)
    k_exact, v_exact = k_before.double(), v_before.double()
    k_exact[:, :, position], v_exact[:, :, position] = oracle(k, k_weight, k_eps, *angles), v.double()
    exact = softmax_attention(oracle(q, q_weight, q_eps, *angles), k_exact, v_exact, mask, scale)
    with poisoned_memory():
        out = qk_norm_rope_attention_triton(*arguments, **launch)
    assert out.transpose(1, 2).is_contiguous()
    assert_accurate(out, exact, softmax_attention(q_model, k_model, v_model, mask, scale))
    assert_accurate(k_cache[:, :, position], k_exact[:, :, position], k_model[:, :, position])
    assert torch.equal(v_cache, v_model)
    k_written = k_cache.clone()
    k_written[:, :, position] = k_before[:, :, position]
    assert torch.equal(k_written, k_before)
    return out


@given(
    st.integers(1, 3), st.sampled_from([(1, 1), (4, 2), (2, 2), (8, 1), (6, 2)]), places(), variants, dtypes, st.sampled_from(MASKS), dtypes,
    layouts, st.sampled_from(["contiguous", "transposed", "sliced"]), st.booleans(), st.booleans(), splits, st.sampled_from([None, 1, 2]), seeds,
)  # fmt: skip
def test_kernel_is_as_accurate_as_eager(
    device, batch, heads, place, variant, dtype, mask_kind, mask_dtype, layout, cache_layout, q_norm, k_norm, n_splits, block_m, seed
):
    slots, position = place
    check(
        make_arguments(seed, batch, heads, slots, position, variant, dtype, device, mask_kind, mask_dtype, layout, cache_layout, q_norm, k_norm),
        n_splits=n_splits,
        block_m=block_m and block_m * len(position),
    )


@settings(max_examples=10)
@given(places(), variants, dtypes, st.sampled_from(MASKS), splits, seeds)
def test_equals_the_two_operators_that_it_replaces(device, place, variant, dtype, mask_kind, n_splits, seed):
    """Over two steps, the second of which reads what the first wrote."""
    slots, position = place
    arguments = make_arguments(seed, 2, (4, 2), slots, position, variant, dtype, device, mask_kind)
    caches = arguments[11:13]
    of_two = [cache.clone() for cache in caches]
    for step in range(2):
        inputs = make_arguments(seed + 20 * step, 2, (4, 2), slots, [row - step if row > 0 else row for row in position], variant, dtype, device)
        inputs = [*inputs[:11], *caches, inputs[13], *arguments[14:]]
        out = qk_norm_rope_attention_triton(*inputs, n_splits=n_splits)
        q = qk_norm_rope_kv_write_triton(*inputs[:11], *of_two, inputs[13])
        expected = decode_attention_triton(q, *of_two, *inputs[14:], n_splits)
        assert torch.equal(caches[1], of_two[1])
        if dtype == torch.float32:
            torch.testing.assert_close(caches[0], of_two[0])
        else:
            # The kernels sum a row in different orders, so that a few elements round to a neighbour, and rotation may leave of two such elements
            # a difference that is small beside them.
            assert (caches[0] == of_two[0]).double().mean() > 0.99 and (out == expected).double().mean() > 0.8
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(caches[0], of_two[0], rtol=eps, atol=eps * of_two[0].abs().max().item())
        torch.testing.assert_close(out, expected)


def test_rounds_in_between_as_eager_does(device):
    """Each product of the rotation is rounded before they are added, also where that costs precision."""
    arguments = make_arguments(0, 2, (4, 2), 9, [3], (128, [24, 20, 20], True), torch.bfloat16, device, q_norm=False, k_norm=False)
    k_cache = low_precision_caches(arguments)[0]
    qk_norm_rope_attention_triton(*arguments)
    assert torch.equal(arguments[11], k_cache)


@pytest.mark.parametrize("n_splits", [1, 3, 64])
@pytest.mark.parametrize("kind", ["none", "left_padded", "additive"])
def test_long_cache(device, kind, n_splits):
    check(make_arguments(0, 1, (4, 2), 1000, [700], (64, [], False), torch.bfloat16, device, kind, torch.bfloat16), n_splits=n_splits)


@pytest.mark.parametrize("slots", [16, 300])
@pytest.mark.parametrize("excluded", [False, float("-inf"), "lowest"])
@pytest.mark.parametrize("n_splits", [1, 4])
def test_what_the_mask_excludes_may_hold_anything(device, slots, excluded, n_splits):
    """Also the new keys and values themselves, and the rows that they replace."""
    position, live = [slots // 2, slots - 2], slots - 4
    arguments = make_arguments(0, 1, (4, 2), slots, position, (64, [], False), torch.float32, device)
    mask = torch.zeros(1, 1, 2, slots, dtype=torch.bool, device=device)
    mask[..., :live] = True
    arguments[14] = excluding(mask, excluded)
    expected = check(arguments, n_splits=n_splits)
    for cache in arguments[11:13]:
        cache[:, :, live:] = float("nan")
        cache[:, :, position] = float("nan")
    for new in arguments[1:3]:
        new[:, :, 1] = float("nan")
    assert torch.equal(qk_norm_rope_attention_triton(*arguments, n_splits=n_splits), expected)


@pytest.mark.parametrize("slots", [9, 70])
@pytest.mark.parametrize("n_splits", [1, 2])
def test_rows_without_a_key_give_zeros(device, slots, n_splits):
    arguments = make_arguments(0, 1, (4, 2), slots, [5, 2], (40, [], False), torch.float32, device)
    arguments[14] = torch.zeros(1, 1, 2, slots, dtype=torch.bool, device=device)
    arguments[14][:, :, 1, 5] = True
    with poisoned_memory():
        out = qk_norm_rope_attention_triton(*arguments, n_splits=n_splits)
    assert (out[:, :, 0] == 0).all()
    torch.testing.assert_close(out[:, :, 1], arguments[2][:, :, 0].repeat_interleave(2, dim=1))


@pytest.mark.parametrize("slots", [9, 70])
def test_nan_in_the_mask_is_not_hidden(device, slots):
    for nan in (4, 5):
        arguments = make_arguments(0, 1, (4, 2), slots, [5], (40, [], False), torch.float32, device)
        arguments[14] = torch.zeros(1, 1, 1, slots, device=device)
        arguments[14][..., nan] = float("nan")
        assert qk_norm_rope_attention_triton(*arguments).isnan().all()


@pytest.mark.parametrize("slots", [9, 70])
@pytest.mark.parametrize("n_splits", [1, 2])
@pytest.mark.parametrize("kind", ["none", "bool"])
def test_one_of_two_tokens_at_the_same_position_is_kept(device, slots, n_splits, kind):
    arguments = make_arguments(0, 2, (4, 2), slots, [5, 5 - slots], (40, [], False), torch.float32, device, kind)
    expected = []
    for kept in range(2):
        one: list[Any] = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
        one[1:3] = (x[:, :, [kept, kept]] for x in one[1:3])
        one[7:9] = (x[:, [0, 1]] for x in one[7:9])
        single = [x[:, :, kept : kept + 1] for x in one[:3]]
        caches = one[11:13]
        angles = [x[:, kept : kept + 1] for x in one[7:9]]
        qk_norm_rope_kv_write_triton(*single, *one[3:7], *angles, *one[9:11], *caches, one[13][kept : kept + 1])
        q = qk_norm_rope_kv_write_triton(*one[:11], *(cache.clone() for cache in caches), one[13])
        expected.append((decode_attention_triton(q, *caches, *one[14:]), *caches))
    out = qk_norm_rope_attention_triton(*arguments, n_splits=n_splits)
    found = (out, *arguments[11:13])
    assert any(all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, kept, strict=True)) for kept in expected)


@pytest.mark.parametrize("row", [8, -9, 2**40])
@pytest.mark.parametrize("n_splits", [1, 3])
def test_out_of_range_is_neither_written_nor_read(row, n_splits):
    # On the CPU only: on a GPU the device-side assert would end the CUDA context of the whole test run.
    arguments = make_arguments(0, 1, (4, 2), 8, [0], (40, [], False), torch.float32, "cpu", "none")
    memory = [random_tensor(seed, (1, 2, 24, 40), torch.float32, "cpu") for seed in (1, 2)]
    before = [x.clone() for x in memory]
    caches = [x[:, :, 8:16] for x in memory]
    q = qk_norm_rope_kv_write_triton(*arguments[:11], *(cache.clone() for cache in caches), arguments[13])
    arguments[11:14] = [*caches, torch.tensor([row])]
    out = qk_norm_rope_attention_triton(*arguments, n_splits=n_splits)
    assert all(map(torch.equal, memory, before))
    torch.testing.assert_close(out, decode_attention_triton(q, *caches, *arguments[14:]))


def test_writes_nothing_around_the_caches(device):
    arguments = make_arguments(0, 1, (4, 2), 8, [0, -1], (40, [], False), torch.float32, device)
    memory = [random_tensor(seed, (1, 2, 12, 40), torch.float32, device) for seed in (1, 2)]
    before = [x.clone() for x in memory]
    arguments[11:13] = (x[:, :, 2:10] for x in memory)
    qk_norm_rope_attention_triton(*arguments)
    for after, old in zip(memory, before, strict=True):
        assert (after[:, :, [2, 9]] != old[:, :, [2, 9]]).any()
        after[:, :, [2, 9]] = old[:, :, [2, 9]]
        assert torch.equal(after, old)


@pytest.mark.parametrize(("batch", "tokens"), [(0, 1), (1, 0)])
def test_no_tokens(device, batch, tokens):
    arguments = make_arguments(0, batch, (4, 2), 9, [3][:tokens], (40, [], False), torch.float32, device, "none")
    arguments[13] = arguments[13].long()
    before = arguments[11].clone()
    assert qk_norm_rope_attention_triton(*arguments).shape == (batch, 4, tokens, 40)
    assert torch.equal(arguments[11], before)


def test_a_position_with_a_stride(device):
    arguments = make_arguments(0, 1, (4, 2), 9, [3, -1], (40, [], False), torch.float32, device)
    arguments[13] = arguments[13].repeat_interleave(2)[::2]
    check(arguments)


@given(st.sampled_from(MASKS), dtypes, seeds)
def test_reference_is_as_accurate_as_eager(device, mask_kind, dtype, seed):
    arguments = make_arguments(seed, 2, (4, 2), 17, [11, 3], (40, [], False), dtype, device, mask_kind)
    q, k, _, q_weight, k_weight, q_eps, k_eps, *angles, k_cache, v_cache, position, mask, scale = arguments
    k_model, v_model = low_precision_caches(arguments)
    out = qk_norm_rope_attention_reference(*arguments)
    assert torch.equal(k_cache, k_model) and torch.equal(v_cache, v_model)
    k_exact = k_cache.double()
    k_exact[:, :, position] = oracle(k, k_weight, k_eps, *angles)
    q_model = rotary_reference(rms_norm_reference(q, q_weight, q_eps), *angles)
    exact = softmax_attention(oracle(q, q_weight, q_eps, *angles), k_exact, v_model.double(), mask, scale)
    assert_accurate(out, exact, softmax_attention(q_model, k_model, v_model, mask, scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(device, dtype, layout):
    for variant, norm, kind in (((40, [], False), True, "bool"), ((80, [16, 12, 12], True), False, "none")):
        arguments = make_arguments(0, 2, (4, 2), 17, [3, -1], variant, dtype, device, kind, layout=layout, q_norm=norm)
        torch.library.opcheck(torch.ops.qtts.qk_norm_rope_attention.default, tuple(arguments))
        arguments[5:7] = (torch.tensor(1e-6, dtype=torch.float64), torch.tensor(1e-5, dtype=torch.float32))
        torch.library.opcheck(torch.ops.qtts.qk_norm_rope_attention.tensor_eps, tuple(arguments))


@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (1, lambda k: k[:, :, :1], ValueError, "k must have the shape"),
        (2, lambda v: v.half(), TypeError, "src must have the dtype of v_cache"),
        (3, lambda w: w.repeat_interleave(2)[::2], ValueError, "q_weight must be contiguous, got the stride 2"),
        (4, lambda w: w.repeat_interleave(2)[::2], ValueError, "k_weight must be contiguous, got the stride 2"),
        (7, lambda cos: cos[:, :1], ValueError, "cos must have the shape"),
        (9, lambda _: [1, 1, 1], ValueError, "sum is D / 2 = 20"),
        (11, lambda cache: cache[:, :, :4], ValueError, "v_cache must have the shape"),
        (13, lambda position: position.int(), TypeError, "position must be int64"),
        (14, lambda mask: mask.long(), TypeError, "mask must be bool or floating, got torch.int64"),
        (14, lambda mask: mask[..., :5], ValueError, r"broadcast to \(1, 4, 2, 9\)"),
    ],
)
def test_bad_input(place, change, error, message):
    arguments = make_arguments(0, 1, (4, 2), 9, [3, 4], (40, [], False), torch.float32, "cpu")
    arguments[place] = change(arguments[place])
    with pytest.raises(error, match=message):
        qk_norm_rope_attention(*arguments)


def test_a_program_serves_whole_tokens():
    arguments = make_arguments(0, 1, (4, 2), 9, [3, 4], (40, [], False), torch.float32, "cpu")
    with pytest.raises(ValueError, match="block_m must be a multiple of the 2 tokens of q, got 1"):
        qk_norm_rope_attention_triton(*arguments, block_m=1)


def test_too_many_tokens():
    arguments = make_arguments(0, 1, (4, 2), 9, [3, 4, 5], (40, [], False), torch.float32, "cpu")
    with pytest.raises(ValueError, match="q must have at most 2 tokens, got 3"):
        qk_norm_rope_attention(*arguments)


def test_heads_that_do_not_divide():
    arguments = make_arguments(0, 1, (4, 3), 9, [3], (40, [], False), torch.float32, "cpu", "none")
    with pytest.raises(ValueError, match="head count that divides q's 4"):
        qk_norm_rope_attention(*arguments)
