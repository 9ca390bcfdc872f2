"""Tiles of a quantised KV cache as levels of its codebooks, for kernels to use."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false
# Triton's stubs do not know its static loops and tuples.

import triton
import triton.language as tl

from qtts_compile.kernels.turboquant.levels import levels_of

SIGN = tl.constexpr(-(2**31))
E4M3_UNIT = tl.constexpr(2.0**120)


@triton.constexpr_function
def words_of(D, BITS):
    """Return how many words of 32 bits :func:`load_words` makes of a row."""
    return D // 4 if BITS == 8 else D // 8 if BITS == 4 else D // 16


@triton.jit
def load_words(Codes_ptr, words, mask, D: tl.constexpr, BITS: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """Load the ``words`` of the rows that begin at ``Codes_ptr``, which broadcast against each other, as a tuple for :func:`decode_words`.

    A lane is given no more than ``CONTIGUOUS`` neighbours, a tuple with an entry for each dimension.
    """
    loaded = (_load(Codes_ptr.to(tl.pointer_type(tl.int32)), words, mask, CONTIGUOUS),)
    if BITS == 3:
        loaded = loaded + (_load((Codes_ptr + D // 4).to(tl.pointer_type(tl.int16)), words, mask, CONTIGUOUS),)
    return loaded


@triton.jit
def _load(Rows_ptr, words, mask, CONTIGUOUS: tl.constexpr):
    pointers = tl.max_contiguous(Rows_ptr + words, CONTIGUOUS)  # Triton drops what is said of an argument
    return tl.load(pointers, mask=mask, other=0)


@triton.jit
def decode_words(words, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Return what the coordinates of ``words`` are in units of their scales, in ``DTYPE``. All are finite, whatever the words.

    The coordinates of a word take more dimensions of 2: two with 8 bits, three with 4, four with 3. With 3 and 4 bits they are those of the
    rotated vector.
    """
    if BITS == 8:
        coordinates = ()
        for i in tl.static_range(4):
            coordinates = coordinates + (from_e4m3(words[0] >> 8 * i).to(DTYPE),)
        return tl.join(tl.join(coordinates[0], coordinates[2]), tl.join(coordinates[1], coordinates[3]))
    elif BITS == 4:
        return _join_eight(levels_of(words[0], BITS, DTYPE))
    else:
        lower, upper = codes_of_planes(words[0], words[1].to(tl.int32))
        lower, upper = levels_of(lower, BITS, DTYPE), levels_of(upper, BITS, DTYPE)
        both = ()
        for i in tl.static_range(8):
            both = both + (tl.join(lower[i], upper[i]),)
        return _join_eight(both)


@triton.jit
def codes_of_planes(magnitudes, signs):
    """Return two words of eight codes of 3 bits, each in its nibble, of a word of magnitudes and one whose lower half holds signs, as in a cache."""
    first = (magnitudes & 0x33333333) | ((signs >> 1) & 0x4444) | ((signs & 0x4444) << 16)
    return first, ((magnitudes >> 2) & 0x33333333) | ((signs & 0x2222) << 1) | ((signs & 0x1111) << 18)


@triton.jit
def _join_eight(parts):
    """Add three dimensions to the last: the bits of the part's number from the highest on."""
    return tl.join(
        tl.join(tl.join(parts[0], parts[4]), tl.join(parts[2], parts[6])),
        tl.join(tl.join(parts[1], parts[5]), tl.join(parts[3], parts[7])),
    )


@triton.jit
def from_e4m3(codes):
    """Return the float32 values of e4m3 bits, the lowest of int32 ``codes``, with NaN as 480."""
    # The bits of a float32 of the same sign, exponent and mantissa, whose bias is larger by 120.
    bits = ((codes << 20) & 0x07F00000) | ((codes << 24) & SIGN)
    return bits.to(tl.float32, bitcast=True) * E4M3_UNIT
