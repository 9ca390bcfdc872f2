"""Normalise and rotate (RoPE) the heads of one token, with the rounding of eager PyTorch, for kernels of clusters to use."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.instructions import request_bytes
from qtts_compile.kernels.clusters.memory import ARRIVED, COS, GROUP, HEAD, HEAD_WEIGHTS, K_TILE, KEYS, Q_HEADS, ROW, ROWS, SIN, V_TILE, linear_layout
from qtts_compile.kernels.ptx.global_memory import as_words, store_global
from qtts_compile.kernels.ptx.shared_memory import load_shared, load_shared_half, store_shared
from qtts_compile.kernels.ptx.words import high, low, pack
from qtts_compile.kernels.rotary import select_axis

_select_axis = gluon.jit(select_axis.fn)


@gluon.constexpr_function
def roles_layout():
    """Words of the first halves of four heads [4, 32]: a warp has one, and a lane the same word of its second half beside each."""
    return linear_layout([], [[0, 2**i] for i in range(5)], [[1, 0], [2, 0]], [4, 32])


@gluon.jit
def request_head_weights(base, Q_weight_ptr, K_weight_ptr):
    """Request the weights of the norms of queries and keys."""
    request_bytes(base + HEAD_WEIGHTS, Q_weight_ptr, ROW, base + ARRIVED)
    request_bytes(base + HEAD_WEIGHTS + ROW, K_weight_ptr, ROW, base + ARRIVED)


@gluon.jit
def request_angles(base, Cos_ptr, Sin_ptr, stride_axis, AXES: gl.constexpr):
    """Request the cosines and sines of a token, for each axis."""
    for axis in gl.static_range(AXES):
        request_bytes(base + COS + axis * ROW, Cos_ptr + axis * stride_axis, ROW, base + ARRIVED)
        request_bytes(base + SIN + axis * ROW, Sin_ptr + axis * stride_axis, ROW, base + ARRIVED)


@gluon.jit
def _rounded(x):
    return x.to(gl.bfloat16).to(gl.float32)


@gluon.jit
def _product(x, y):
    """Multiply and round, without joining a later addition (FMA)."""
    return _rounded(gl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=gl.float32, is_pure=True, pack=1))


@gluon.jit
def _axis_offset(frequency, HAS_SECTIONS: gl.constexpr, IS_INTERLEAVED: gl.constexpr, AXIS_1: gl.constexpr, AXIS_2: gl.constexpr):
    """Return where in shared memory the axis of each frequency begins."""
    if HAS_SECTIONS:
        return _select_axis(frequency, IS_INTERLEAVED, AXIS_1, AXIS_2) * ROW
    else:
        return frequency * 0


@gluon.jit
def _load_angles(address, frequency, offset, like, IS_INTERLEAVED: gl.constexpr):
    """Load the cosines or sines of frequencies in both halves of a head, for each of four."""
    first = load_shared_half(address + offset + frequency * 2)
    second = first
    if not IS_INTERLEAVED:
        second = load_shared_half(address + HEAD + offset + frequency * 2)
    return gl.broadcast(first[None, :], like)[0], gl.broadcast(second[None, :], like)[0]


@gluon.jit
def rotate_heads(base, q_eps, k_eps, HAS_SECTIONS: gl.constexpr, IS_INTERLEAVED: gl.constexpr, AXIS_1: gl.constexpr, AXIS_2: gl.constexpr):
    """Return what :func:`rotate_words` does of the products in shared memory."""
    layout: gl.constexpr = roles_layout()
    role = gl.arange(0, 4, layout=gl.SliceLayout(1, layout))  # of a warp: two query heads, the key, the value
    word = gl.arange(0, 32, layout=gl.SliceLayout(0, layout))
    address = base + (role * ROW)[:, None] + (word * 4)[None, :]
    a, b = load_shared(address + ROWS), load_shared(address + ROWS + HEAD)
    return rotate_words(base, a, b, q_eps, k_eps, HAS_SECTIONS, IS_INTERLEAVED, AXIS_1, AXIS_2)


@gluon.jit
def load_heads(Q_ptr, K_ptr, V_ptr, text, k_head, q_strides, k_strides, v_strides):
    """Load the words of both halves of two queries, a key and a value, of a text and a key head."""
    Q_ptr += text * q_strides[0] + GROUP * k_head * q_strides[1]
    K_ptr += text * k_strides[0] + k_head * k_strides[1]
    V_ptr += text * v_strides[0] + k_head * v_strides[1]
    layout: gl.constexpr = roles_layout()
    role = gl.arange(0, 4, layout=gl.SliceLayout(1, layout))
    word = gl.arange(0, 32, layout=gl.SliceLayout(0, layout))
    head_ptrs = gl.where(role < 2, as_words(Q_ptr + role * q_strides[1]), gl.where(role == 2, as_words(K_ptr), as_words(V_ptr)))
    ptrs = head_ptrs[:, None] + word[None, :]
    return gl.load(ptrs), gl.load(ptrs + HEAD // 4)


@gluon.jit
def rotate_words(base, a, b, q_eps, k_eps, HAS_SECTIONS: gl.constexpr, IS_INTERLEAVED: gl.constexpr, AXIS_1: gl.constexpr, AXIS_2: gl.constexpr):
    """Return the words of both halves of two queries and a key, normalised and rotated, and of the value as it is."""
    layout: gl.constexpr = roles_layout()
    role = gl.arange(0, 4, layout=gl.SliceLayout(1, layout))
    word = gl.arange(0, 32, layout=gl.SliceLayout(0, layout))
    weight_address = base + HEAD_WEIGHTS + gl.where(role < 2, 0, ROW)[:, None] + (word * 4)[None, :]
    weight_a, weight_b = load_shared(weight_address), load_shared(weight_address + HEAD)
    even_offset = _axis_offset(2 * word, HAS_SECTIONS, IS_INTERLEAVED, AXIS_1, AXIS_2)
    odd_offset = _axis_offset(2 * word + 1, HAS_SECTIONS, IS_INTERLEAVED, AXIS_1, AXIS_2)
    cos_a0, cos_b0 = _load_angles(base + COS, 2 * word, even_offset, a, IS_INTERLEAVED)
    cos_a1, cos_b1 = _load_angles(base + COS, 2 * word + 1, odd_offset, a, IS_INTERLEAVED)
    sin_a0, sin_b0 = _load_angles(base + SIN, 2 * word, even_offset, a, IS_INTERLEAVED)
    sin_a1, sin_b1 = _load_angles(base + SIN, 2 * word + 1, odd_offset, a, IS_INTERLEAVED)
    a0, a1, b0, b1 = low(a), high(a), low(b), high(b)
    scale = gl.rsqrt(gl.sum(a0 * a0 + a1 * a1 + b0 * b0 + b1 * b1, axis=1) / HEAD + gl.where(role < 2, q_eps, k_eps))[:, None]
    a0, a1 = _rounded(low(weight_a) * _rounded(a0 * scale)), _rounded(high(weight_a) * _rounded(a1 * scale))
    b0, b1 = _rounded(low(weight_b) * _rounded(b0 * scale)), _rounded(high(weight_b) * _rounded(b1 * scale))
    rotated_a = pack(_product(a0, cos_a0) - _product(b0, sin_a0), _product(a1, cos_a1) - _product(b1, sin_a1))
    rotated_b = pack(_product(b0, cos_b0) + _product(a0, sin_b0), _product(b1, cos_b1) + _product(a1, sin_b1))
    is_value = gl.broadcast(role[:, None] == 3, a)[0]
    return gl.where(is_value, a, rotated_a), gl.where(is_value, b, rotated_b)


@gluon.jit
def place_heads(base, a, b, k_head_ptr, v_head_ptr, row, rank):
    """Put queries where attention expects them, and key and value into their tile and into ``row`` of what tiles are copies of, where it is here."""
    has_place = (row >= rank * KEYS) & (row < (rank + 1) * KEYS)
    store_heads(base, a, b, (row - rank * KEYS).to(gl.int32), has_place)
    write_heads(a, b, k_head_ptr, v_head_ptr, row, has_place)


@gluon.jit
def store_heads(base, a, b, place, has_place):
    """Put queries where attention expects them, and key and value into their tile if they have a place there."""
    role = gl.arange(0, 4, layout=gl.SliceLayout(1, a.type.layout))
    word = gl.arange(0, 32, layout=gl.SliceLayout(0, a.type.layout))
    target = gl.where(role < 2, Q_HEADS + role * ROW, gl.where(role == 2, K_TILE, V_TILE) + place * ROW)
    target = base + target[:, None] + (word * 4)[None, :]
    is_stored = ((role < 2) | has_place).to(gl.int32)[:, None]
    store_shared(target, a, is_stored)
    store_shared(target + HEAD, b, is_stored)


@gluon.jit
def write_heads(a, b, k_head_ptr, v_head_ptr, row, is_written):
    """Write key and value into a row in global memory."""
    role = gl.arange(0, 4, layout=gl.SliceLayout(1, a.type.layout))
    word = gl.arange(0, 32, layout=gl.SliceLayout(0, a.type.layout))
    row_ptrs = gl.where(role == 2, as_words(k_head_ptr), as_words(v_head_ptr))[:, None] + (row * (HEAD // 2) + word)[None, :]
    is_written = ((role >= 2) & is_written).to(gl.int32)[:, None]
    store_global(row_ptrs, a, is_written)
    store_global(row_ptrs + HEAD // 4, b, is_written)
