"""What instructions that compute give for the values of their operands, which are numpy arrays with an element a lane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.registers import Lanes

COMPARISONS: dict[str, Callable[[Lanes, Lanes], Lanes]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
LOGIC: dict[str, Callable[..., Lanes]] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
FLOATS: dict[str, Callable[..., Lanes]] = {  # in float64: rounded once, at the end
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative, "abs": np.abs, "max": np.fmax, "min": np.fmin,
    "fma": lambda a, b, c: a * b + c, "mad": lambda a, b, c: a * b + c,
    "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a), "rcp": lambda a: 1 / a,
}  # fmt: skip


def divide(a: Lanes, b: Lanes) -> Lanes:
    """Divide whole numbers, towards zero."""
    quotient = np.abs(a) // np.maximum(np.abs(b), 1)
    return np.where((a < 0) != (b < 0), -quotient, quotient)


WHOLE: dict[str, Callable[..., Lanes]] = {  # modulo 2 to the power of their bits
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "mad": lambda a, b, c: a * b + c, "neg": np.negative, "abs": np.abs,
    "max": np.maximum, "min": np.minimum, "div": divide, "rem": np.fmod, "popc": np.bitwise_count,
}  # fmt: skip
REDUCTIONS: dict[str, Any] = {"max": np.max, "min": np.min, "add": np.sum, "and": np.bitwise_and.reduce, "or": np.bitwise_or.reduce}


def compare(name: str, a: Lanes, b: Lanes) -> Lanes:
    """Compare as ``setp`` does: with a name that ends in u ("unordered", of floats only) NaN compares true, otherwise false."""
    unordered = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(a.shape, bool)
    if name in ("num", "nan"):
        return unordered == (name == "nan")
    is_unordered = a.dtype.kind == "f" and name.endswith("u")
    return np.where(unordered, is_unordered, COMPARISONS[name[:-1] if is_unordered else name](a, b))


def shift(name: str, a: Lanes, counts: Lanes) -> Lanes:
    """Shift; by as many bits as there are, or more, all go."""
    bits = 8 * a.dtype.itemsize
    count = np.minimum(counts, bits - 1).astype(a.dtype)
    if name == "shr":
        return np.where((counts >= bits) & (a.dtype.kind == "u"), 0, a >> count).astype(a.dtype)
    return np.where(counts >= bits, 0, a << count).astype(a.dtype)


def permute_bytes(low: Lanes, high: Lanes, selector: Lanes) -> Lanes:
    """Choose four of eight bytes, as ``prmt`` does; the highest bit of a choice spreads the byte's sign."""
    both, chosen = low | high << np.uint64(32), np.zeros_like(low)
    for i in range(4):
        choice = selector >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> (choice & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        byte = np.where(choice & np.uint64(8), np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
        chosen |= byte << np.uint64(8 * i)
    return chosen


def look_up(table: int, a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """Combine bit by bit by a table of eight results, as ``lop3`` does."""
    result = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result & np.uint64(0xFFFFFFFF)
