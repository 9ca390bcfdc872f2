"""The randomised Hadamard transform of heads whose coordinates the lanes of a warp have, for kernels of clusters to use."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.live import threads_layout
from qtts_compile.kernels.clusters.memory import HEAD, N_WARPS, SIGNS
from qtts_compile.kernels.ptx.shared_memory import load_shared, store_shared
from qtts_compile.kernels.ptx.words import high, low
from qtts_compile.kernels.turboquant.rotation import is_minus

_is_minus = gluon.jit(is_minus.fn)


@gluon.jit
def _with_partner(x, lane_bit, sign):
    """Replace what two lanes have by its sum where the ``sign`` is 1, and by the difference where it is -1."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 y; shfl.sync.bfly.b32 y, $1, $2, 31, -1; fma.rn.f32 $0, $1, $3, y; }",
        "=f,f,r,f", [x, lane_bit, sign], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _over_lanes(x):
    """Multiply by the Hadamard matrix what the lanes of a warp have."""
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, x.type.layout))
    for bit in gl.static_range(5):
        x = _with_partner(x, 1 << bit, gl.where(lane & (1 << bit) == 0, 1.0, -1.0)[None, :])
    return x


@gluon.jit
def store_signs(base):
    """Store the signs of a rotation as the highest bits of bfloat16, for all later rotations."""
    layout: gl.constexpr = threads_layout()
    word = gl.arange(0, 32 * N_WARPS, layout=layout) % (HEAD // 2)
    signs = gl.where(_is_minus(2 * word), 0x8000, 0) | (_is_minus(2 * word + 1).to(gl.int32) << 31)
    store_shared(base + SIGNS + word * 4, signs, word * 0 + 1)


@gluon.jit
def _signs(base, half, like):
    """Return the signs of a half of a head, in the columns' places."""
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, like.type.layout))
    return load_shared(base + SIGNS + half * HEAD + (lane * 4)[None, :])


@gluon.jit
def rotate(base, a, b):
    """Rotate heads as ``turboquant.rotation`` does, but for the factor ``HEAD ** -0.5``: of words l of both halves, return the columns in float32."""
    a, b = a ^ _signs(base, 0, a), b ^ _signs(base, 1, b)
    a0, a1, b0, b1 = low(a), high(a), low(b), high(b)
    a0, a1, b0, b1 = a0 + a1, a0 - a1, b0 + b1, b0 - b1
    return _over_lanes(a0 + b0), _over_lanes(a1 + b1), _over_lanes(a0 - b0), _over_lanes(a1 - b1)


@gluon.jit
def with_other_half(own, other, half):
    """Return the part in a rotation back of a column of each half of a head."""
    return gl.where(half[:, None] == 0, own + other, other - own)


@gluon.jit
def unrotate_half(base, even, odd, half):
    """Rotate back columns of which each warp has a half, from :func:`with_other_half`."""
    root: gl.constexpr = HEAD.value**-0.5
    even, odd = _over_lanes((even + odd) * root), _over_lanes((even - odd) * root)
    signs = _signs(base, half[:, None], even)
    return _flipped(even, signs << 16), _flipped(odd, signs)


@gluon.jit
def _flipped(x, signs):
    """Return float32 with the highest bits of words as their signs' change."""
    return (x.to(gl.int32, bitcast=True) ^ (signs & -0x80000000)).to(gl.float32, bitcast=True)
