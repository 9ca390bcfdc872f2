# pyright: reportCallIssue=false, reportArgumentType=false
import torch
import triton
import triton.language as tl

from qtts_compile.kernels.turboquant.decode import from_e4m3
from qtts_compile.kernels.turboquant.encode import to_e4m3


@triton.jit
def _encode_kernel(X_ptr, Codes_ptr, N, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Codes_ptr + offsets, to_e4m3(tl.load(X_ptr + offsets, mask=offsets < N, other=0.0)).to(tl.uint8), mask=offsets < N)


@triton.jit
def _decode_kernel(Codes_ptr, X_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(X_ptr + offsets, from_e4m3(tl.load(Codes_ptr + offsets).to(tl.int32)))


def test_encodes_as_pytorch(device):
    # Every float32 whose last 8 bits are 0, and the neighbours of every tie of two codes.
    grid = torch.arange(0, 2**32, 2**8).to(torch.int32).view(torch.float32)
    grid = grid[grid.isfinite()]
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (codes[1:] + codes[:-1]) / 2
    ties = torch.cat([ties, ties.nextafter(torch.tensor(0.0)), ties.nextafter(torch.tensor(1e9)), codes])
    x = torch.cat([grid, ties, -ties]).to(device)
    actual = torch.full(x.shape, 0x7F, dtype=torch.uint8, device=device)
    _encode_kernel[(triton.cdiv(len(x), 2**16),)](x, actual, len(x), BLOCK=2**16)
    assert torch.equal(actual, x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))


def test_decodes_as_pytorch(device):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    codes = torch.where(codes & 0x7F == 0x7F, 0, codes).to(torch.uint8)  # without the two NaN
    x = torch.full((256,), float("nan"), device=device)
    _decode_kernel[(1,)](codes, x, BLOCK=256)
    assert torch.equal(x.view(torch.int32), codes.view(torch.float8_e4m3fn).float().view(torch.int32))
