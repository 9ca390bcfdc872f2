"""Instructions on words of two numbers."""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# Gluon's types do not know how a kernel is launched, and its tensors' operators.

import pytest
import torch
from hypothesis import given
from numerics import seeds
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.ptx.words import multiply_pairs

SIZE = 4096
SPECIAL = [0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x0080, 0x3F80, 0xBF80, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80]  # zeros, subnormals, ones, infinities


@gluon.jit
def _multiply_kernel(X_ptr, Y_ptr, Z_ptr, SIZE: gl.constexpr):
    numbers = gl.arange(0, SIZE, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(Z_ptr + numbers, multiply_pairs(gl.load(X_ptr + numbers), gl.load(Y_ptr + numbers)))


@pytest.mark.ptx
@given(seeds)
def test_pairs_are_multiplied_as_by_float32_bit_for_bit(device, seed):
    bits = torch.randint(2**16, (2, 2 * SIZE), generator=torch.Generator().manual_seed(seed))
    special = torch.cartesian_prod(torch.tensor(SPECIAL), torch.tensor(SPECIAL)).T
    bits[:, : special.shape[1]] = special
    x, y = bits.to(torch.int16).view(torch.bfloat16)
    z = torch.empty(SIZE, dtype=torch.int32, device=device)
    _multiply_kernel[(1,)](x.view(torch.int32).to(device), y.view(torch.int32).to(device), z, SIZE)
    expected = (x.float() * y.float()).bfloat16()
    is_number = ~expected.isnan()
    assert is_number.sum() > SIZE
    assert torch.equal(z.cpu().view(torch.int16)[is_number], expected.view(torch.int16)[is_number])
