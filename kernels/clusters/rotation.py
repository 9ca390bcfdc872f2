"""The randomised Hadamard transform of heads whose coordinates the lanes of a warp have, for kernels of clusters to use."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.memory import HEAD
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
def _hadamard(a0, a1, b0, b1):
    """Multiply by the Hadamard matrix: a lane has the columns 2 l and 2 l + 1 of both halves of a head."""
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, a0.type.layout))
    a0, a1, b0, b1 = a0 + a1, a0 - a1, b0 + b1, b0 - b1
    a0, a1, b0, b1 = a0 + b0, a1 + b1, a0 - b0, a1 - b1
    for bit in gl.static_range(5):
        sign = gl.where(lane & (1 << bit) == 0, 1.0, -1.0)[None, :]
        a0, a1 = _with_partner(a0, 1 << bit, sign), _with_partner(a1, 1 << bit, sign)
        b0, b1 = _with_partner(b0, 1 << bit, sign), _with_partner(b1, 1 << bit, sign)
    return a0, a1, b0, b1


@gluon.jit
def _flip(x, column):
    sign = gl.broadcast(_is_minus(column)[None, :], x)[0]
    return gl.where(sign, -x, x)


@gluon.jit
def _flip_all(a0, a1, b0, b1):
    column = 2 * gl.arange(0, 32, layout=gl.SliceLayout(0, a0.type.layout))
    return _flip(a0, column), _flip(a1, column + 1), _flip(b0, column + HEAD // 2), _flip(b1, column + HEAD // 2 + 1)


@gluon.jit
def rotate(a0, a1, b0, b1):
    """Rotate float32 heads as ``turboquant.rotation`` does, but for the factor ``HEAD ** -0.5``."""
    a0, a1, b0, b1 = _flip_all(a0, a1, b0, b1)
    return _hadamard(a0, a1, b0, b1)


@gluon.jit
def unrotate(a0, a1, b0, b1):
    """Invert :func:`rotate`, but for a factor of ``HEAD``."""
    a0, a1, b0, b1 = _hadamard(a0, a1, b0, b1)
    return _flip_all(a0, a1, b0, b1)
