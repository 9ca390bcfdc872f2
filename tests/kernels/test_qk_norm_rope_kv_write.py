import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numerics import DTYPES, LAYOUTS, assert_accurate, dtypes, layouts, poisoned_memory, random_tensor, seeds

from qtts_compile.kernels.qk_norm_rope_kv_write import (
    qk_norm_rope_kv_write,
    qk_norm_rope_kv_write_reference,
    qk_norm_rope_kv_write_triton,
)
from qtts_compile.kernels.rms_norm import rms_norm_triton
from qtts_compile.kernels.rotary import rotary_reference

variants = st.sampled_from([(40, [], False), (96, [], False), (80, [16, 12, 12], False), (128, [24, 20, 20], True), (16, [2, 3, 3], True)])


def make_arguments(seed, batch, heads, tokens, variant, dtype, device, layout="transposed", cache_layout="contiguous", q_norm=True, k_norm=True):
    width, sections, interleaved = variant
    q = random_tensor(seed, (batch, heads[0], tokens, width), dtype, device, layout)
    k = random_tensor(seed + 1, (batch, heads[1], tokens, width), dtype, device, layout)
    v = random_tensor(seed + 2, (batch, heads[1], tokens, width), dtype, device, layout)
    weights = [random_tensor(seed + i, (width,), dtype, device) if norm else None for i, norm in ((3, q_norm), (4, k_norm))]
    theta = random_tensor(seed + 5, (*((3,) if sections else ()), batch, tokens, width), torch.float32, device)
    caches = [random_tensor(seed + i, (batch, heads[1], 9, width), dtype, device, cache_layout) for i in (6, 7)]
    position = torch.randperm(9, generator=torch.Generator().manual_seed(seed))[:tokens].to(device)
    position[::2] -= 9
    return [q, k, v, *weights, 1e-6, 1e-5, theta.cos().to(dtype), theta.sin().to(dtype), sections, interleaved, *caches, position]


def oracle(x, weight, eps, cos, sin, sections, interleaved):
    x = x.double()
    if weight is not None:
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return rotary_reference(x, cos.double(), sin.double(), sections, interleaved)


@given(
    st.integers(1, 3), st.sampled_from([(1, 1), (4, 2), (8, 1)]), st.integers(1, 5), variants, dtypes, layouts,
    st.sampled_from(["contiguous", "transposed", "sliced"]), st.booleans(), st.booleans(), seeds,
)  # fmt: skip
def test_kernel_is_as_accurate_as_eager(device, batch, heads, tokens, variant, dtype, layout, cache_layout, q_norm, k_norm, seed):
    arguments = make_arguments(seed, batch, heads, tokens, variant, dtype, device, layout, cache_layout, q_norm, k_norm)
    q, k, v, q_weight, k_weight, q_eps, k_eps, cos, sin, sections, interleaved, k_cache, v_cache, position = arguments
    expected_k_cache, expected_v_cache = k_cache.clone(), v_cache.clone()
    reference = qk_norm_rope_kv_write_reference(*[*arguments[:11], expected_k_cache, expected_v_cache, position])
    with poisoned_memory():
        out = qk_norm_rope_kv_write_triton(*arguments)
    assert out.stride() == reference.stride()
    assert_accurate(out, oracle(q, q_weight, q_eps, cos, sin, sections, interleaved), reference)
    written = k_cache[:, :, position].clone()
    assert_accurate(written, oracle(k, k_weight, k_eps, cos, sin, sections, interleaved), expected_k_cache[:, :, position])
    assert torch.equal(v_cache, expected_v_cache)
    k_cache[:, :, position] = expected_k_cache[:, :, position]
    assert torch.equal(k_cache, expected_k_cache)


@given(st.integers(1, 2), st.integers(1, 3), variants, dtypes, seeds)
@example(1, 3, (128, [24, 20, 20], True), torch.float16, 80)  # two terms of a rotation cancel, one of which rounds to its neighbour
def test_rounds_as_its_parts_round(device, batch, tokens, variant, dtype, seed):
    arguments = make_arguments(seed, batch, (4, 2), tokens, variant, dtype, device)
    q, k, _, q_weight, k_weight, q_eps, k_eps, cos, sin, sections, interleaved, k_cache, _, position = arguments
    out = qk_norm_rope_kv_write_triton(*arguments)
    for rotated, x, weight, eps in ((out, q, q_weight, q_eps), (k_cache[:, :, position], k, k_weight, k_eps)):
        normed = rms_norm_triton(x, weight, eps)
        parts = rotary_reference(normed, cos, sin, sections, interleaved)
        # The two kernels sum a row's squares in different orders, so a few elements may round to a neighbour; most must be equal to the bit.
        if dtype != torch.float32:
            assert (rotated == parts).double().mean() > 0.9
        # Those sums differ by no more than a float32 rounding an addend, and each of the four roundings to the dtype after them by a step, all
        # of the size of the two terms of the rotation: their sum may be small.
        by_cos = rotary_reference(normed.double(), cos.double(), torch.zeros_like(sin).double(), sections, interleaved)
        by_sin = rotary_reference(normed.double(), torch.zeros_like(cos).double(), sin.double(), sections, interleaved)
        terms = (by_cos.abs() + by_sin.abs()).clamp(min=torch.finfo(dtype).smallest_normal)
        budget = (4 * torch.finfo(dtype).eps + x.shape[-1] * torch.finfo(torch.float32).eps) * terms
        assert ((rotated.double() - parts.double()).abs() <= budget).all()


@pytest.mark.parametrize(("batch", "tokens"), [(0, 1), (1, 0)])
def test_no_tokens(device, batch, tokens):
    arguments = make_arguments(0, batch, (4, 2), tokens, (40, [], False), torch.float32, device)
    before = arguments[11].clone()
    assert qk_norm_rope_kv_write_triton(*arguments).shape == (batch, 4, tokens, 40)
    assert torch.equal(arguments[11], before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(device, dtype, layout):
    for variant, norm in (((40, [], False), True), ((80, [16, 12, 12], True), False)):
        arguments = make_arguments(0, 2, (4, 2), 3, variant, dtype, device, layout, q_norm=norm)
        torch.library.opcheck(torch.ops.qtts.qk_norm_rope_kv_write.default, tuple(arguments))
        arguments[5:7] = (torch.tensor(1e-6, dtype=torch.float64), torch.tensor(1e-5, dtype=torch.float32))
        torch.library.opcheck(torch.ops.qtts.qk_norm_rope_kv_write.tensor_eps, tuple(arguments))


@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (1, lambda k: k[:, :, :2], ValueError, "k must have the shape"),
        (1, lambda k: k.half(), TypeError, "k must have the dtype of q"),
        (2, lambda v: v[:, :1], ValueError, "src must have the shape"),
        (3, lambda w: w[:4], ValueError, "q_weight must have the shape"),
        (4, lambda w: w.double(), TypeError, "k_weight must be .*float64"),
        (7, lambda cos: cos[:, :2], ValueError, "cos must have the shape"),
        (9, lambda _: [1, 1, 1], ValueError, "sum is D / 2 = 20"),
        (11, lambda cache: cache[:, :, :4], ValueError, "v_cache must have the shape"),
        (12, lambda cache: cache.half(), TypeError, "v_cache"),
        (13, lambda position: position.int(), TypeError, "position must be int64"),
    ],
)
def test_bad_input(place, change, error, message):
    arguments = make_arguments(0, 1, (4, 2), 3, (40, [], False), torch.float32, "cpu")
    arguments[place] = change(arguments[place])
    with pytest.raises(error, match=message):
        qk_norm_rope_kv_write(*arguments)


def test_a_weight_that_would_promote_the_result():
    arguments = make_arguments(0, 1, (4, 2), 3, (40, [], False), torch.bfloat16, "cpu")
    arguments[3] = arguments[3].float()
    with pytest.raises(TypeError, match="q_weight of dtype torch.float32 would promote"):
        qk_norm_rope_kv_write(*arguments)
