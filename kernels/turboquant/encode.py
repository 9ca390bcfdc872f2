"""Quantisation of vectors into the codes of a KV cache, for kernels to use: ``codec.quantize`` in registers."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false
# Triton's stubs do not know its static loops and shapes.

import triton
import triton.language as tl

from qtts_compile.kernels.turboquant.codebook import codebook
from qtts_compile.kernels.turboquant.codec import E4M3_MAX, FLOAT16_MAX, TINY
from qtts_compile.kernels.turboquant.rotation import rotate_row

MAX_CODE = tl.constexpr(E4M3_MAX)
MAX_SCALE = tl.constexpr(FLOAT16_MAX)
MIN_PEAK = tl.constexpr(TINY)
REFUSED = tl.constexpr(
    "quantized_kv_write: a key or value is not finite, or too large for a float16 scale; a cache in bf16 shows whether the model made it"
)
LEVELS_3, LEVELS_4 = tl.constexpr(codebook(3).levels), tl.constexpr(codebook(4).levels)
BOUNDARIES_3, BOUNDARIES_4 = tl.constexpr(codebook(3).boundaries), tl.constexpr(codebook(4).boundaries)


@triton.jit
def encode_row(x, unbiased, BITS: tl.constexpr):
    """Return the codes of ``BITS``, int32 ``[D]``, and the scale, float32, of a float32 row ``x`` ``[D]``.

    A scale that :func:`is_storable` refuses stands for a vector that is not finite or too large.
    """
    peak = tl.max(finite_magnitude(x), axis=0)
    if BITS == 8:
        scale = tl.div_rn(peak, MAX_CODE)
        stored = scale.to(tl.float16).to(tl.float32)
        return to_e4m3(tl.where(stored > 0, tl.div_rn(x, tl.where(stored > 0, stored, 1.0)), 0.0)), scale
    else:
        peak = tl.maximum(peak, MIN_PEAK)
        x_unit = x * (1.0 / peak)
        norm = tl.sqrt(tl.sum(x_unit * x_unit, axis=0))
        root: tl.constexpr = x.shape[0] ** 0.5
        z = rotate_row(x_unit) * (root / tl.maximum(norm, MIN_PEAK))
        codes, c = nearest(z, BITS)
        product = tl.sum(z * c, axis=0)
        return codes, scale_of(norm, product, tl.sum(c * c, axis=0), unbiased, x.shape[0]) / root * peak


@triton.jit
def finite_magnitude(x):
    """Return magnitudes, and infinity for what is no number, which a maximum would pass over."""
    magnitude = tl.abs(x)
    return tl.where(magnitude < float("inf"), magnitude, float("inf"))


@triton.jit
def scale_of(norm, product, level_squares, unbiased, D: tl.constexpr):
    """Return the scale, for levels of unit mean square, of vectors of a norm, with their product with their levels and the sum of these' squares."""
    return norm * tl.where(unbiased, D / tl.where(norm == 0, 1.0, product), product / level_squares)


@triton.jit
def is_storable(scale):
    """Tell whether a scale can be stored: it is no NaN and no more than float16 holds."""
    return scale <= MAX_SCALE


@triton.jit
def nearest(z, BITS: tl.constexpr):
    """Return the code and the level of the centroid nearest to each coordinate."""
    HALF: tl.constexpr = 2 ** (BITS - 1)
    levels: tl.constexpr = LEVELS_4 if BITS == 4 else LEVELS_3
    edges: tl.constexpr = BOUNDARIES_4 if BITS == 4 else BOUNDARIES_3
    is_positive = z > 0
    magnitude = tl.abs(z)
    is_above = magnitude > edges[HALF]
    step = is_above.to(tl.int32)
    c = tl.where(is_above, levels[HALF + 1], levels[HALF])
    for i in tl.static_range(HALF + 1, 2 * HALF - 1):
        is_above = magnitude > edges[i]
        step += is_above.to(tl.int32)
        c = tl.where(is_above, levels[i + 1], c)
    return tl.where(is_positive, step, HALF + step), tl.where(is_positive, c, -c)


@triton.jit
def to_e4m3(x):
    """Round float32 to the nearest e4m3, ties to even, saturated at 448; return its bits as int32."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # From 2^-6 on: drop 20 bits of the mantissa and change the exponent's bias from 127 to 7. Below: the sum's last bit is worth 2^-9.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.minimum(tl.where(magnitude < 0x3C800000, subnormal, normal), 0x7E)
    return code | ((bits >> 24) & 0x80)


@triton.jit
def store_codes(Codes_ptr, codes, mask, BITS: tl.constexpr):
    """Pack ``codes`` ``[D]`` and store them from ``Codes_ptr`` on, if ``mask``."""
    if BITS == 8:
        tl.store(Codes_ptr + tl.arange(0, codes.shape[0]), codes.to(tl.uint8), mask=mask)
    elif BITS == 4:
        _store_fields(Codes_ptr.to(tl.pointer_type(tl.int32)), codes, 4 * tl.arange(0, 8), mask)
    else:
        field = tl.arange(0, 16)
        _store_fields(Codes_ptr.to(tl.pointer_type(tl.int32)), codes & 3, 4 * (field % 8) + 2 * (field // 8), mask)
        signs_ptr = (Codes_ptr + codes.shape[0] // 4).to(tl.pointer_type(tl.int16))
        _store_fields(signs_ptr, codes >> 2, 4 * (field % 4) + 3 - field // 4, mask)


@triton.jit
def _store_fields(Numbers_ptr, fields, shifts, mask):
    """Store numbers that hold, shifted, as many neighbours among the ``fields`` ``[D]`` as there are ``shifts``."""
    WIDTH: tl.constexpr = fields.shape[0] // shifts.shape[0]
    packed = tl.sum(tl.reshape(fields, [WIDTH, shifts.shape[0]]) << shifts[None, :], axis=1)
    tl.store(Numbers_ptr + tl.arange(0, WIDTH), packed.to(Numbers_ptr.dtype.element_ty), mask=mask)
