"""What a quantised KV cache stores of a key and of a value."""

from __future__ import annotations

from dataclasses import dataclass

SCALE_BYTES = 2
E4M3_BITS = 8


@dataclass(frozen=True)
class Format:
    """A way to store a cache's keys and values: codes of ``k_bits`` and ``v_bits`` a coordinate, and one float16 scale a vector.

    Codes of 3 and 4 bits stand for levels of the Lloyd-Max codebook of the rotated vector (TurboQuant, arXiv 2504.19874): the highest bit is the
    sign, the others count magnitudes from the smallest on. Codes of 8 bits are e4m3 floats of the vector itself. Of a vector of width D, in
    numbers whose first byte is the lowest:

    - 4 bits: D/8 words of 32 bits, where word j has coordinate 8j + i at bit 4i;
    - 3 bits: D/16 words of 32 bits with the magnitudes, where word j has that of coordinate 16j + i at bit 4i for i < 8 and at bit 4(i - 8) + 2
      from there on, then D/16 words of 16 bits with the signs, in the same order at the bits 3, 7, 11, 15, 2, 6, 10, 14, 1, 5, 9, 13, 0, 4, 8, 12;
    - 8 bits: byte j is coordinate j.
    """

    name: str
    k_bits: int
    v_bits: int

    @classmethod
    def parse(cls, name: str) -> Format:
        """Return the format "int4", "int3", "k4v3" or "fp8". Raises ``ValueError`` for another name."""
        if name not in list(_FORMATS):  # which what has no hash may be compared with
            way = "; to hold keys and values as they are, leave this cache out" if name in ("bf16", "fp16", "fp32") else ""
            raise ValueError(f"a quantised KV cache is one of {', '.join(_FORMATS)}, got {name!r}{way}")
        return _FORMATS[name]

    def key_bytes(self, head_dim: int) -> int:
        """Return the bytes of the codes of a key. Raises ``ValueError`` as :func:`check_head_dim`."""
        return code_bytes(self.k_bits, head_dim)

    def value_bytes(self, head_dim: int) -> int:
        """Return the bytes of the codes of a value. Raises ``ValueError`` as :func:`check_head_dim`."""
        return code_bytes(self.v_bits, head_dim)

    def bytes_per_token(self, head_dim: int) -> int:
        """Return the bytes of a key, a value and their scales: what one token takes in one KV head."""
        return self.key_bytes(head_dim) + self.value_bytes(head_dim) + 2 * SCALE_BYTES


_FORMATS = {
    name: Format(name, k_bits, v_bits) for name, k_bits, v_bits in (("int4", 4, 4), ("k4v3", 4, 3), ("int3", 3, 3), ("fp8", E4M3_BITS, E4M3_BITS))
}


def code_bytes(bits: int, head_dim: int) -> int:
    """Return the bytes of ``head_dim`` codes. Raises ``ValueError`` as :func:`check_head_dim`."""
    check_head_dim(head_dim)
    return bits * head_dim // 8


def check_head_dim(head_dim: int) -> None:
    """Raise ``ValueError`` unless vectors of width ``head_dim`` can be stored."""
    if head_dim < 32 or head_dim & (head_dim - 1):  # three bits of 16 would not fill whole words
        raise ValueError(f"a quantised KV cache needs a head_dim that is a power of two from 32 on, got {head_dim}; keep its keys and values in bf16")
