"""Quantisation of one token's key and value into codes, for kernels of clusters to use: ``codec.quantize`` in the lanes of a warp."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.memory import HEAD
from qtts_compile.kernels.clusters.rotation import rotate
from qtts_compile.kernels.ptx.global_memory import store_global_byte, store_global_float16
from qtts_compile.kernels.ptx.words import high, low
from qtts_compile.kernels.turboquant import encode

_finite_magnitude, _scale_of = gluon.jit(encode.finite_magnitude.fn), gluon.jit(encode.scale_of.fn)
_nearest, _is_storable = gluon.jit(encode.nearest.fn), gluon.jit(encode.is_storable.fn)
_to_e4m3 = gluon.jit(encode.to_e4m3.fn)
MAX_CODE, MIN_PEAK, REFUSED = encode.MAX_CODE, encode.MIN_PEAK, encode.REFUSED


@gluon.jit
def write_codes(
    base, a, b, K_code_ptr, V_code_ptr, K_scale_ptr, V_scale_ptr, is_written, K_BITS: gl.constexpr, V_BITS: gl.constexpr
):  # fmt: skip
    """Write codes and scales of the third and the fourth of four heads, a key and a value, to the pointers, if ``is_written``."""
    layout: gl.constexpr = a.type.layout
    x = low(a), high(a), low(b), high(b)
    role = gl.arange(0, 4, layout=gl.SliceLayout(1, layout))
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, layout))
    peaks = gl.maximum(gl.maximum(_finite_magnitude(x[0]), _finite_magnitude(x[1])), gl.maximum(_finite_magnitude(x[2]), _finite_magnitude(x[3])))
    peak = gl.max(peaks, axis=1)
    if K_BITS == 8:
        codes, scale = _bytes_of(x, peak)
    else:
        codes, scale = _codes_of(rotate(base, a, b), x, gl.maximum(peak, MIN_PEAK), role, K_BITS, V_BITS)
    Code_ptr, Scale_ptr = gl.where(role == 2, K_code_ptr, V_code_ptr), gl.where(role == 2, K_scale_ptr, V_scale_ptr)
    is_written = is_written & (role >= 2)
    for half in gl.static_range(2):
        first, second = codes[2 * half], codes[2 * half + 1]
        if K_BITS == 8:
            code_ptrs = Code_ptr[:, None] + (half * (HEAD // 2) + 2 * lane)[None, :]
            store_global_byte(code_ptrs, first, is_written.to(gl.int32)[:, None])
            store_global_byte(code_ptrs + 1, second, is_written.to(gl.int32)[:, None])
        if K_BITS == 4:
            is_of_4 = is_written & (role == 2) if V_BITS == 3 else is_written
            code_ptrs = Code_ptr[:, None] + (half * (HEAD // 4) + lane)[None, :]
            store_global_byte(code_ptrs, first | (second << 4), is_of_4.to(gl.int32)[:, None])
        if V_BITS == 3:
            is_of_3 = is_written & (role == 3) if K_BITS == 4 else is_written
            _store_planes(Code_ptr[:, None], lane[None, :], first, second, half, is_of_3[:, None])
    store_global_float16(Scale_ptr, scale, is_written.to(gl.int32))
    gl.device_assert((role < 2) | _is_storable(scale), REFUSED)


@gluon.jit
def _codes_of(rotated, x, peak, role, K_BITS: gl.constexpr, V_BITS: gl.constexpr):
    """Return codes of 3 or 4 bits, and scales, of heads whose largest magnitudes are ``peak``."""
    inverse = (1.0 / peak)[:, None]
    squares = gl.zeros_like(x[0])
    for i in gl.static_range(4):
        squares += (x[i] * inverse) * (x[i] * inverse)
    norm = gl.sqrt(gl.sum(squares, axis=1))
    # The factor of a rotation and the root of HEAD, by which codes are larger than unit vectors, are each other's inverse.
    factor = inverse / gl.maximum(norm, MIN_PEAK)[:, None]
    codes, products, level_squares = (), gl.zeros_like(x[0]), gl.zeros_like(x[0])
    for i in gl.static_range(4):
        z = rotated[i] * factor
        code, level = _nearest(z, K_BITS)
        if V_BITS != K_BITS:
            of_value, level_of_value = _nearest(z, V_BITS)
            is_key = gl.broadcast(role[:, None] == 2, z)[0]
            code, level = gl.where(is_key, code, of_value), gl.where(is_key, level, level_of_value)
        codes = codes + (code,)
        products += z * level
        level_squares += level * level
    product = gl.sum(products, axis=1)
    root: gl.constexpr = HEAD.value**0.5
    return codes, _scale_of(norm, product, gl.sum(level_squares, axis=1), role == 2, HEAD) / root * peak


@gluon.jit
def _bytes_of(x, peak):
    """Return heads as e4m3 of what is left when they are divided by their scale, as it is stored."""
    scale = gl.div_rn(peak, gl.zeros_like(peak) + MAX_CODE)
    stored = scale.to(gl.float16).to(gl.float32)[:, None]
    divisor, codes = gl.where(stored > 0, stored, 1.0), ()
    for i in gl.static_range(4):
        ratio = gl.div_rn(x[i], divisor + gl.zeros_like(x[i]))
        codes = codes + (_to_e4m3(gl.where(stored > 0, ratio, 0.0)),)
    return codes, scale


@gluon.jit
def _store_planes(Code_ptr, lane, first, second, half, is_written):
    """Store codes of 3 bits of a half of a head, of whose coordinates each lane has two that follow each other: a word for eight lanes."""
    word, place = lane // 8 + 4 * half, lane % 8
    # Of a word a byte has the magnitudes of a lane and of the one four places on.
    magnitudes = (first & 3) | ((second & 3) << 4)
    magnitudes |= _of_lane(magnitudes, 4) << 2
    store_global_byte(Code_ptr + word * 4 + place, magnitudes, (is_written & (place < 4)).to(gl.int32))
    signs = ((first >> 2) | (second >> 2 << 4)) << (place % 2 * 8 + 3 - place // 2)
    for bit in gl.static_range(3):
        signs |= _of_lane(signs, 1 << bit)
    store_global_byte(Code_ptr + HEAD // 4 + word * 2 + place, signs >> (place * 8), (is_written & (place < 2)).to(gl.int32))


@gluon.jit
def _of_lane(words, bit):
    """Return what the lane has whose number differs in a bit."""
    return gl.inline_asm_elementwise("shfl.sync.bfly.b32 $0, $1, $2, 31, -1;", "=r,r,r", [words, bit], dtype=gl.int32, is_pure=True, pack=1)
