"""Instructions on words of two numbers, or of several codes."""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Gluon's types do not know how a kernel is launched, its tensors' operators and static loops.

import pytest
import torch
from hypothesis import given
from numerics import seeds
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.ptx.words import codes_of_planes, levels_of_codes, multiply_pairs, numbers_of_bytes
from qtts_compile.kernels.turboquant.codebook import codebook
from qtts_compile.kernels.turboquant.codec import pack

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


@gluon.jit
def _bytes_kernel(X_ptr, Y_ptr, SIZE: gl.constexpr):
    numbers = gl.arange(0, SIZE, layout=gl.BlockedLayout([1], [32], [4], [0]))
    first, second = numbers_of_bytes(gl.load(X_ptr + numbers))
    gl.store(Y_ptr + 2 * numbers, first)
    gl.store(Y_ptr + 2 * numbers + 1, second)


@pytest.mark.ptx
def test_every_e4m3_is_what_it_stands_for(device):
    codes = torch.arange(256)
    codes = torch.stack([codes, codes.roll(1), codes.roll(-7), codes.flip(0)], 1).to(torch.uint8)
    result = torch.empty(512, dtype=torch.int32, device=device)
    _bytes_kernel[(1,)](codes.view(torch.int32).flatten().to(device), result, 256)
    expected = codes.view(torch.float8_e4m3fn).bfloat16().flatten()
    is_number = ~expected.isnan()  # NaN is never stored
    assert is_number.sum() == 4 * 254
    assert torch.equal(result.cpu().view(torch.int16)[is_number], expected.view(torch.int16)[is_number])


@gluon.jit
def _planes_kernel(Magnitudes_ptr, Signs_ptr, Y_ptr, SIZE: gl.constexpr):
    numbers = gl.arange(0, SIZE, layout=gl.BlockedLayout([1], [32], [4], [0]))
    codes = codes_of_planes(gl.load(Magnitudes_ptr + numbers), gl.load(Signs_ptr + numbers))
    for half in gl.static_range(2):
        levels = levels_of_codes(codes[half], 3)
        for i in gl.static_range(4):
            gl.store(Y_ptr + numbers * 8 + half * 4 + i, levels[i])


@pytest.mark.ptx
@given(seeds)
def test_codes_of_three_bits_have_their_levels(device, seed):
    """What is behind the signs of 16 codes in a word may be anything."""
    codes = torch.randint(8, (SIZE, 32), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, 3)  # two words of magnitudes, and two halves of a word of signs
    magnitudes, signs = packed[:, :4].contiguous().view(torch.int32), packed[:, 8:].contiguous().view(torch.int32)
    result = torch.empty(SIZE * 8, dtype=torch.int32, device=device)
    _planes_kernel[(1,)](magnitudes.flatten().to(device), signs.flatten().to(device), result, SIZE)
    positive = codebook(3).levels[4:]
    expected = torch.tensor((*positive, *(-level for level in positive)))[codes[:, :16]].bfloat16()
    assert torch.equal(result.cpu().view(torch.bfloat16).view(SIZE, 16), expected)
