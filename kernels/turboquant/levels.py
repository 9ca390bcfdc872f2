"""The levels of eight codes at a time, by permuting bytes in registers: no table in memory."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false
# Triton's stubs do not know its static loops and tuples.

import torch
import triton
import triton.language as tl

from qtts_compile.kernels.interpreted import IS_INTERPRETED
from qtts_compile.kernels.turboquant.codebook import codebook


def _magnitudes(bits: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Return the bits of the positive levels of a codebook, which bfloat16 and float16 both hold exactly."""
    return tuple(torch.tensor(codebook(bits).levels[2 ** (bits - 1) :]).to(dtype).view(torch.int16).tolist())


def _assembly(bits: int, dtype: torch.dtype) -> str:
    """Return PTX that makes four registers of two levels each out of one register of eight codes."""
    magnitudes, is_signed = _magnitudes(bits, dtype), bits == 3
    levels = magnitudes + tuple(m | 0x8000 for m in magnitudes) if is_signed else magnitudes
    (low_0, low_1), (high_0, high_1) = (
        [sum((level >> shift & 0xFF) << 8 * i for i, level in enumerate(levels[n : n + 4])) for n in (0, 4)] for shift in (0, 8)
    )
    lines = [".reg .b32 codes, moved, index, low, high, sign;", "mov.b32 codes, $4;"]
    lines += ["mov.b32 index, codes;"] if is_signed else ["shl.b32 moved, codes, 4;", "and.b32 index, codes, 0x77777777;"]
    for half in range(2):
        # prmt picks four bytes of eight by the low three bits of four nibbles: with one table of low and one of high bytes, four levels.
        lines += ["shr.b32 index, index, 16;"] * half
        lines += [f"prmt.b32 low, {low_0:#x}, {low_1:#x}, index;", f"prmt.b32 high, {high_0:#x}, {high_1:#x}, index;"]
        if not is_signed:
            # A nibble of 8 + n replicates the sign of byte n: of the code at the top of a byte, of the other where codes are moved up.
            signs = sum(8 + 2 * half + n // 2 + 4 * (n % 2) << 4 * n for n in range(4))
            lines += [f"prmt.b32 sign, moved, codes, {signs:#x};", "lop3.b32 high, high, sign, 0x80808080, 0x78;"]  # high ^ (sign & 0x80808080)
        lines += [f"prmt.b32 ${2 * half}, low, high, 0x5140;", f"prmt.b32 ${2 * half + 1}, low, high, 0x7362;"]
    return "{ " + " ".join(lines) + " }"


BFLOAT16_3, FLOAT16_3 = (tl.constexpr(_magnitudes(3, dtype)) for dtype in (torch.bfloat16, torch.float16))
BFLOAT16_4, FLOAT16_4 = (tl.constexpr(_magnitudes(4, dtype)) for dtype in (torch.bfloat16, torch.float16))
TO_BFLOAT16_3, TO_FLOAT16_3 = (tl.constexpr(_assembly(3, dtype)) for dtype in (torch.bfloat16, torch.float16))
TO_BFLOAT16_4, TO_FLOAT16_4 = (tl.constexpr(_assembly(4, dtype)) for dtype in (torch.bfloat16, torch.float16))


@triton.jit
def levels_of(codes, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Return a tuple of 8: the levels, in ``DTYPE``, that the nibbles of int32 ``codes`` stand for, from the lowest nibble on.

    The highest of a nibble's ``BITS`` is the sign, the others tell the magnitude. What is above them is zero.
    """
    HALF: tl.constexpr = tl.float16 if DTYPE == tl.float16 else tl.bfloat16
    if IS_INTERPRETED:  # it knows no assembly
        pairs = ()
        for pair in tl.static_range(4):
            pairs = pairs + (_level(codes >> 8 * pair, BITS, HALF) | (_level(codes >> 8 * pair + 4, BITS, HALF) << 16),)
    else:
        IS_FLOAT16: tl.constexpr = HALF == tl.float16
        assembly: tl.constexpr = (TO_FLOAT16_4 if BITS == 4 else TO_FLOAT16_3) if IS_FLOAT16 else (TO_BFLOAT16_4 if BITS == 4 else TO_BFLOAT16_3)
        pairs = tl.inline_asm_elementwise(assembly, "=&r,=&r,=&r,=&r,r", [codes], (tl.int32, tl.int32, tl.int32, tl.int32), True, 1)
    levels = ()
    for pair in tl.static_range(4):
        low, high = pairs[pair].to(tl.int16), (pairs[pair] >> 16).to(tl.int16)
        levels = levels + (low.to(HALF, bitcast=True).to(DTYPE), high.to(HALF, bitcast=True).to(DTYPE))
    return levels


@triton.jit
def _level(code, BITS: tl.constexpr, HALF: tl.constexpr):
    """Return the bits of the level that the lowest nibble stands for."""
    magnitudes: tl.constexpr = (FLOAT16_4 if BITS == 4 else FLOAT16_3) if HALF == tl.float16 else (BFLOAT16_4 if BITS == 4 else BFLOAT16_3)
    level = tl.zeros(code.shape, tl.int32)
    for i in tl.static_range(2 ** (BITS - 1)):
        level = tl.where((code & (2 ** (BITS - 1) - 1)) == i, magnitudes[i], level)
    return level | ((code & 2 ** (BITS - 1)) << (16 - BITS))
