import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import DTYPES, LAYOUTS, assert_accurate, dtypes, layouts, poisoned_memory, random_tensor, seeds

from qtts_compile.kernels.rotary import (
    rotary,
    rotary_qk,
    rotary_qk_reference,
    rotary_qk_triton,
    rotary_reference,
    rotary_triton,
)

variants = st.sampled_from(
    [
        (40, [], False),
        (96, [], False),
        (80, [16, 12, 12], False),
        (128, [16, 24, 24], False),
        (80, [16, 12, 12], True),
        (128, [24, 20, 20], True),
        (16, [0, 5, 3], True),
    ]
)


def angles(seed: int, batch: int, tokens: int, width: int, sections: list[int], dtype: torch.dtype, device: str, layout: str = "contiguous"):
    shape = (*((3,) if sections else ()), batch, tokens, width)
    theta = random_tensor(seed, shape, torch.float32, device, layout)
    return theta.cos().to(dtype), theta.sin().to(dtype)


def axis_of(frequency: int, sections: list[int], interleaved: bool) -> int:
    if interleaved:
        axis = frequency % 3
        return axis if frequency < 3 * sections[axis] or axis == 0 else 0
    return 0 if frequency < sections[0] else 1 if frequency < sections[0] + sections[1] else 2


def oracle(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool) -> torch.Tensor:
    """Rotate element by element in float64."""
    half = x.shape[-1] // 2
    x, y = x.double(), torch.empty_like(x, dtype=torch.float64)
    for f in range(half):
        axis = axis_of(f, sections, interleaved) if sections else 0
        for column, other, sign in ((f, f + half, -1), (f + half, f, 1)):
            source = f if interleaved else column
            c, s = ((a[axis] if sections else a)[..., source].double().unsqueeze(1) for a in (cos, sin))
            y[..., column] = x[..., column] * c + sign * x[..., other] * s
    return y


@given(
    st.integers(1, 3),
    st.booleans(),
    st.integers(1, 5),
    st.sampled_from([(1, 1), (4, 2), (8, 1)]),
    variants,
    dtypes,
    layouts,
    layouts,
    seeds,
)
def test_kernel_equals_eager(device, batch, is_shared, tokens, heads, variant, dtype, q_layout, k_layout, seed):
    width, sections, interleaved = variant
    q = random_tensor(seed, (batch, heads[0], tokens, width), dtype, device, q_layout)
    k = random_tensor(seed + 1, (batch, heads[1], tokens, width), dtype, device, k_layout)
    cos, sin = angles(seed + 2, 1 if is_shared else batch, tokens, width, sections, dtype, device, q_layout)
    with poisoned_memory():
        rotated = rotary_qk_triton(q, k, cos, sin, sections, interleaved)
        alone = rotary_triton(q, cos, sin, sections, interleaved)
    reference = rotary_qk_reference(q, k, cos, sin, sections, interleaved)
    for actual, expected in zip((*rotated, alone), (*reference, reference[0]), strict=True):
        assert torch.equal(actual, expected)
        assert actual.stride() == expected.stride()


@given(st.integers(1, 3), st.integers(1, 3), variants, dtypes, seeds)
def test_reference_rotates_by_the_right_axis(device, batch, tokens, variant, dtype, seed):
    width, sections, interleaved = variant
    x = random_tensor(seed, (batch, 2, tokens, width), dtype, device, "transposed")
    cos, sin = angles(seed + 1, batch, tokens, width, sections, dtype, device)
    expected = oracle(x, cos, sin, sections, interleaved)
    wide = oracle(x.float(), cos.float(), sin.float(), sections, interleaved).to(dtype)
    assert_accurate(rotary_reference(x, cos, sin, sections, interleaved), expected, wide)


def test_angles_of_different_strides(device):
    x = random_tensor(0, (2, 2, 3, 40), torch.float32, device)
    cos, sin = angles(1, 2, 3, 40, [], torch.float32, device)
    strided_sin = sin.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(rotary_triton(x, cos, strided_sin, [], False), rotary_reference(x, cos, sin, [], False))


@pytest.mark.parametrize("shape", [(0, 2, 1, 40), (1, 2, 0, 40)])
def test_nothing_to_rotate(device, shape):
    x = torch.empty(shape, device=device)
    cos = torch.empty(shape[0], shape[2], 40, device=device)
    assert rotary_triton(x, cos, cos, [], False).shape == shape
    assert rotary_qk_triton(x, x, cos, cos, [], False)[1].shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(device, dtype, layout):
    for width, sections, interleaved in ((40, [], False), (80, [16, 12, 12], True), (80, [16, 12, 12], False)):
        q = random_tensor(0, (2, 4, 3, width), dtype, device, layout)
        k = random_tensor(1, (2, 2, 3, width), dtype, device, layout)
        cos, sin = angles(2, 2, 3, width, sections, dtype, device)
        torch.library.opcheck(torch.ops.qtts.rotary.default, (q, cos, sin, sections, interleaved))
        torch.library.opcheck(torch.ops.qtts.rotary_qk.default, (q, k, cos, sin, sections, interleaved))


X = torch.ones(1, 2, 3, 12)
ONE = torch.ones(1, 3, 12)
THREE = torch.ones(3, 1, 3, 12)


@pytest.mark.parametrize(
    ("x", "cos", "sin", "sections", "interleaved", "error", "message"),
    [
        (X.long(), ONE, ONE, [], False, TypeError, "x must be .*int64"),
        (X, ONE.half(), ONE, [], False, TypeError, "cos must have the dtype of x, torch.float32, got torch.float16"),
        (X, ONE, ONE.to("meta"), [], False, ValueError, "sin must be on the device of x"),
        (X[0], ONE, ONE, [], False, ValueError, r"x must have the shape \[B, H, T, D\], got \(2, 3, 12\)"),
        (X[..., :11], ONE, ONE, [], False, ValueError, r"even head dimension D > 0, got \(1, 2, 3, 11\)"),
        (X, THREE, THREE, [], False, ValueError, r"cos must have the shape \(1, 3, 12\).*got \(3, 1, 3, 12\)"),
        (X, ONE, ONE, [2, 2, 2], False, ValueError, r"cos must have the shape \(3, 1, 3, 12\)"),
        (X, THREE, THREE, [2, 2, 1], False, ValueError, r"sum is D / 2 = 6, got \[2, 2, 1\]"),
        (X, THREE, THREE, [3, 3], False, ValueError, r"three counts .*got \[3, 3\]"),
        (X, ONE, ONE, [], True, ValueError, "interleaved=True needs three sections"),
    ],
)  # fmt: skip
def test_bad_input(x, cos, sin, sections, interleaved, error, message):
    with pytest.raises(error, match=message):
        rotary(x, cos, sin, sections, interleaved)


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (X[0], ValueError, r"k must have the shape \[B, Hk, T, D\]"),
        (X.expand(2, 2, 3, 12), ValueError, r"k must have the shape \(1, 2, 3, 12\), got \(2, 2, 3, 12\)"),
        (X[:, :, :2], ValueError, r"k must have the shape \(1, 2, 3, 12\), got \(1, 2, 2, 12\)"),
        (X.half(), TypeError, "k must have the dtype of q"),
    ],
)
def test_bad_k(k, error, message):
    with pytest.raises(error, match=message):
        rotary_qk(X, k, ONE, ONE, [], False)
