"""Tiles of a quantised KV cache as centroids, for kernels to use."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# Triton's stubs do not know its static loops and tuples.

import triton
import triton.language as tl

from qtts_compile.kernels.turboquant.encode import CENTROIDS_3, CENTROIDS_4


@triton.jit
def load_parts(Codes_ptr, mask, D: tl.constexpr, BITS: tl.constexpr):
    """Load the codes at the row pointers ``Codes_ptr`` ``[N, 1]`` where ``mask`` ``[N, 1]``; return what each coordinate is in units of its scale.

    The result is a tuple of equal parts of D, float32 ``[N, D / len]``, so that nothing is interleaved: halves for 4 bits, quarters for 3,
    the whole for 8. With 3 and 4 bits they are coordinates of the rotated vector. A row that is not loaded holds some finite values.
    """
    parts = ()
    if BITS == 8:
        parts = parts + (from_e4m3(_load_bytes(Codes_ptr, mask, tl.arange(0, D))),)
    elif BITS == 4:
        codes = _load_bytes(Codes_ptr, mask, tl.arange(0, D // 2))
        parts = parts + (centroid(codes, 4), centroid(codes >> 4, 4))
    else:
        columns = tl.arange(0, D // 4)
        low = _load_bytes(Codes_ptr, mask, columns)
        # A quarter takes its third bits from two places of the byte, one for each of its halves.
        high = _load_bytes(Codes_ptr + D // 4, mask, columns % (D // 8)) >> (columns // (D // 8))[None, :]
        for i in tl.static_range(4):
            parts = parts + (centroid(((low >> (2 * i)) & 3) | ((high >> (2 * i) & 1) << 2), 3),)
    return parts


@triton.jit
def join_parts(parts):
    """Put the parts of :func:`load_parts` together: ``[N, D]``."""
    N: tl.constexpr = parts[0].shape[0]
    WIDTH: tl.constexpr = parts[0].shape[1]
    if len(parts) == 1:
        return parts[0]
    elif len(parts) == 2:
        return tl.reshape(tl.permute(tl.join(parts[0], parts[1]), (0, 2, 1)), [N, 2 * WIDTH])
    else:
        joined = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
        return tl.reshape(tl.permute(joined, (0, 2, 3, 1)), [N, 4 * WIDTH])


@triton.jit
def centroid(index, BITS: tl.constexpr):
    """Return the centroid of the low ``BITS`` of each ``index``."""
    HALF: tl.constexpr = 2 ** (BITS - 1)
    centroids: tl.constexpr = CENTROIDS_4 if BITS == 4 else CENTROIDS_3
    levels = ()
    for i in tl.static_range(HALF):
        levels = levels + (centroids[HALF + i],)
    is_positive = (index & HALF) != 0
    step = tl.where(is_positive, index, ~index)
    for bit in tl.static_range(BITS - 1):
        is_set = (step & (1 << bit)) != 0
        chosen = ()
        for pair in tl.static_range(HALF >> (bit + 1)):
            chosen = chosen + (tl.where(is_set, levels[2 * pair + 1], levels[2 * pair]),)
        levels = chosen
    return tl.where(is_positive, levels[0], -levels[0])


@triton.jit
def from_e4m3(codes):
    """Return the float32 values of e4m3 bits, int32."""
    # The bits of a float16 of the same sign, exponent and mantissa, whose bias is larger by 8.
    bits = (((codes & 0x80) << 8) | ((codes & 0x7F) << 7)).to(tl.int16)
    return bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def _load_bytes(Codes_ptr, mask, columns):
    return tl.load(Codes_ptr + columns[None, :], mask=mask, other=0).to(tl.int32)
