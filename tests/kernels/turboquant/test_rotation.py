# pyright: reportCallIssue=false
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from numerics import random_tensor, seeds

from qtts_compile.kernels.turboquant.rotation import rotate, rotate_row, signs, unrotate, unrotate_rows

WIDTHS = [1, 2, 16, 64, 128, 256]
widths = st.sampled_from(WIDTHS)


def hadamard(width: int) -> torch.Tensor:
    """Return the matrix in float64, by Sylvester's construction."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@given(widths, seeds)
def test_equals_the_matrix(width, seed):
    x = random_tensor(seed, (3, 5, width), torch.float32, "cpu")
    matrix = hadamard(width) * signs(width).double() / width**0.5
    assert torch.allclose(rotate(x).double(), x.double() @ matrix.T, atol=2e-6)
    assert torch.allclose(unrotate(x).double(), x.double() @ matrix, atol=2e-6)
    assert torch.allclose(unrotate(rotate(x)), x, atol=2e-6)


def test_computes_in_float32():
    x = random_tensor(0, (4, 64), torch.bfloat16, "cpu")
    assert torch.equal(rotate(x), rotate(x.float()))
    assert torch.equal(unrotate(x), unrotate(x.float()))


@pytest.mark.parametrize("width", [16, 32, 64, 128, 256])
def test_signs_do_not_align_with_the_matrix(width):
    # The rotated common mean of one: its largest coordinate would be sqrt(width) if the signs were a row of the matrix.
    assert set(signs(width).tolist()) == {-1.0, 1.0}
    assert rotate(torch.ones(width)).abs().max() < 3.2


@pytest.mark.parametrize("width", [0, 3, 96])
def test_bad_width(width):
    for function in (rotate, unrotate):
        with pytest.raises(ValueError, match="power of two"):
            function(torch.ones(2, width))


@triton.jit
def _rows_kernel(X_ptr, Y_ptr, N: tl.constexpr, D: tl.constexpr):
    offsets = tl.arange(0, N)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(Y_ptr + offsets, unrotate_rows(tl.load(X_ptr + offsets)))


@triton.jit
def _row_kernel(X_ptr, Y_ptr, D: tl.constexpr, IS_INVERSE: tl.constexpr):
    offsets = tl.program_id(0) * D + tl.arange(0, D)
    x = tl.load(X_ptr + offsets)
    tl.store(Y_ptr + offsets, unrotate_rows(x) if IS_INVERSE else rotate_row(x))


@given(st.sampled_from([1, 2, 8]), st.sampled_from(WIDTHS[2:]), st.sampled_from([1, 4]), seeds)
def test_kernels_equal_pytorch(device, n, width, num_warps, seed):
    x = random_tensor(seed, (n, width), torch.float32, device)
    y = torch.full((3, n, width), float("nan"), device=device)
    _row_kernel[(n,)](x, y[0], D=width, IS_INVERSE=False, num_warps=num_warps)
    _row_kernel[(n,)](x, y[1], D=width, IS_INVERSE=True, num_warps=num_warps)
    _rows_kernel[(1,)](x, y[2], N=n, D=width, num_warps=num_warps)
    for actual, expected in zip(y, (rotate(x), unrotate(x), unrotate(x)), strict=True):
        assert torch.equal(actual, expected)
