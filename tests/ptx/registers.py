"""What registers hold: raw bits, one uint64 a lane, read and written as values of a PTX type."""

from __future__ import annotations

from typing import Any

import numpy as np

Lanes = np.ndarray[Any, Any]
Bits = np.ndarray[Any, np.dtype[np.uint64]]

BYTES = {"8": 1, "16": 2, "32": 4, "64": 8, "16x2": 4}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}


def size(kind: str) -> int:
    """Return the bytes of a PTX type such as "u32" or "bf16x2"."""
    return BYTES[kind.lstrip("busf")]


def is_float(kind: str) -> bool:
    """Tell whether a PTX type is a number with a fraction."""
    return kind.lstrip("b").startswith("f")


def as_values(bits: Bits, kind: str) -> Lanes:
    """Return the lanes as numbers of a PTX type; bfloat16 as float32."""
    if kind == "pred":
        return bits != 0
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    width = size(kind)
    return bits.astype(UNSIGNED[width]).view(np.dtype(f"{KINDS[kind[0]]}{width}"))


def as_bits(values: Lanes, kind: str) -> Bits:
    """Return the bits of numbers, rounded to a PTX type: to nearest, ties to even."""
    if kind == "pred":
        return values.astype(np.uint64)
    if kind == "bf16":
        exact = values.astype(np.float32)
        bits = exact.view(np.uint32).astype(np.uint64)
        return np.where(np.isnan(exact), np.uint64(0x7FFF), (bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16))
    width = size(kind)
    return values.astype(np.dtype(f"{KINDS[kind[0]]}{width}")).view(UNSIGNED[width]).astype(np.uint64)


def field(bits: Bits, first: int, count: int) -> Bits:
    """Return ``count`` bits from the bit ``first`` on."""
    return (bits >> np.uint64(first)) & np.uint64((1 << count) - 1)
