"""Tiles of a quantised KV cache as levels of its codebooks, for kernels to use."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false
# Triton's stubs do not know its static loops and tuples.

import triton
import triton.language as tl

from qtts_compile.kernels.turboquant.pairs import THREE_BITS, look_up


@triton.jit
def load_parts(Codes_ptr, mask, Pairs_ptr, D: tl.constexpr, BITS: tl.constexpr):
    """Load the codes at the row pointers ``Codes_ptr`` ``[N, 1]`` where ``mask`` ``[N, 1]``; return what each coordinate is in units of its scale.

    The result is a tuple of equal parts of D, ``[N, D / len]``, which bfloat16 holds exactly, so that nothing is interleaved: halves for 4
    bits, quarters for 3, the whole for 8. With 3 and 4 bits they are coordinates of the rotated vector. A row that is not loaded holds some
    finite values.
    """
    parts = ()
    if BITS == 8:
        parts = parts + (from_e4m3(_load_bytes(Codes_ptr, mask, tl.arange(0, D))),)
    elif BITS == 4:
        parts = look_up(Pairs_ptr, _load_bytes(Codes_ptr, mask, tl.arange(0, D // 2)))
    else:
        columns = tl.arange(0, D // 4)
        low = _load_bytes(Codes_ptr, mask, columns)
        # A quarter takes its third bits from two places of the byte, one for each of its halves.
        high = _load_bytes(Codes_ptr + D // 4, mask, columns % (D // 8)) >> (columns // (D // 8))[None, :]
        for _ in tl.static_range(2):
            codes = (low & 3) | ((high & 1) << 2) | ((low & 12) << 1) | ((high & 4) << 3)
            first, second = look_up(Pairs_ptr + THREE_BITS, codes)
            parts = parts + (first, second)
            low >>= 4
            high >>= 4
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
def from_e4m3(codes):
    """Return the float32 values of e4m3 bits, int32."""
    # The bits of a float16 of the same sign, exponent and mantissa, whose bias is larger by 8.
    bits = (((codes & 0x80) << 8) | ((codes & 0x7F) << 7)).to(tl.int16)
    return bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def _load_bytes(Codes_ptr, mask, columns):
    # Half a warp for a row, as of keys in half precision: with 16 bytes for each lane, a sum over rows would go through too many lanes.
    pointers = tl.max_contiguous(Codes_ptr + columns[None, :], [1, max(1, columns.shape[0] // 16)])
    return tl.load(pointers, mask=mask, other=0).to(tl.int32)
