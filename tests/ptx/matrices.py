"""Instructions with which a warp moves and multiplies matrices (PTX ISA, "Warp Level Matrix Instructions")."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.ptx.memory import Scratch
from tests.ptx.registers import Bits, Lanes, as_bits, as_values, field

LANE = np.arange(32)
ROW, PAIR = LANE // 4, LANE % 4 * 2  # of a lane in an 8 x 8 matrix, of which it has two neighbours


def transfer(shared: Scratch, addresses: Lanes, registers: Sequence[Bits] | None, count: int, is_transposed: bool, text: str) -> list[Bits]:
    """Store a warp's 8 x 8 matrices of 16-bit elements, or load them where ``registers`` is None; lane 8 j + r has the address of row r of j."""
    loaded = [np.zeros(32, np.uint64) for _ in range(count)]
    for matrix in range(count):
        for lane in range(32):
            for half in range(2):
                row, column = (PAIR[lane] + half, ROW[lane]) if is_transposed else (ROW[lane], PAIR[lane] + half)
                element = shared.at(int(addresses[8 * matrix + row]) + 2 * int(column), 2, text)
                if registers is None:
                    loaded[matrix][lane] |= np.uint64(int(element.view(np.uint16)[0]) << 16 * half)
                else:
                    element.view(np.uint16)[0] = int(registers[matrix][lane]) >> 16 * half & 0xFFFF
    return loaded


def multiply(a: Sequence[Bits], b: Sequence[Bits], c: Sequence[Bits], kind: str) -> list[Bits]:
    """Return a b + c of ``mma.m16n8k16``, whose factors are of a 16-bit type, summed in float32."""
    left, right, total = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    for half in range(2):

        def part(register: Bits, half: int = half) -> Lanes:
            return as_values(field(register, 16 * half, 16), kind).astype(np.float64)

        for i, register in enumerate(a):
            left[ROW + i % 2 * 8, PAIR + half + i // 2 * 8] = part(register)
        for i, register in enumerate(b):
            right[PAIR + half + i * 8, ROW] = part(register)
        for i in range(2):
            total[ROW + i * 8, PAIR + half] = as_values(c[2 * i + half], "f32")
    total += left @ right
    return [as_bits(total[ROW + i // 2 * 8, PAIR + i % 2], "f32") for i in range(4)]
