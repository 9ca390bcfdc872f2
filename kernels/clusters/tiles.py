"""Which lane has what of a warp's tile of 16 slots, as matrices for the tensor cores, for kernels of clusters to use.

In the matrices of ``mma.m16n8k16`` a lane has the group g = lane / 4 and the place t = lane % 4 in it.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.memory import linear_layout
from qtts_compile.kernels.clusters.words import add_product


def _over_quad(op: str) -> str:
    """Return PTX that joins the pairs of four lanes by an instruction, and gives each lane the result twice."""
    return f"""{{
        .reg .f32 x, y;
        {op}.f32 x, $2, $3;
        shfl.sync.bfly.b32 y, x, 1, 31, -1;
        {op}.f32 x, x, y;
        shfl.sync.bfly.b32 y, x, 2, 31, -1;
        {op}.f32 $0, x, y;
        mov.b32 $1, $0;
        }}"""


MAX_OF_QUAD, SUM_OF_QUAD = gl.constexpr(_over_quad("max")), gl.constexpr(_over_quad("add"))


@gluon.constexpr_function
def lanes_layout():
    """Two numbers of each lane [4, 32, 2]."""
    return linear_layout([[0, 0, 1]], [[0, 2**i, 0] for i in range(5)], [[1, 0, 0], [2, 0, 0]], [4, 32, 2])


@gluon.jit
def places():
    """Return each number's warp, g, t, and which of the lane's two it is."""
    layout: gl.constexpr = lanes_layout()
    warp = gl.arange(0, 4, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    which = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    lane = gl.expand_dims(gl.expand_dims(lane, 0), 2)
    which = gl.expand_dims(gl.expand_dims(which, 0), 1)
    return gl.expand_dims(gl.expand_dims(warp, 1), 2) + 0 * lane + 0 * which, lane // 4 + 0 * which, lane % 4 + 0 * which, which


@gluon.jit
def zeros():
    layout: gl.constexpr = lanes_layout()
    return gl.zeros([4, 32, 2], gl.float32, layout=layout)


@gluon.jit
def multiply_tile(words, queries):
    """Return the products of the keys g and g + 8, four times four words of two bfloat16, with both heads' queries that they meet."""
    # Two sums each, so that half as many products wait for each other.
    first, second, more_first, more_second = zeros(), zeros(), zeros(), zeros()
    for i in gl.static_range(4):
        first, second = add_product(first, second, words[i][0], words[i][1], queries[2 * i])
        more_first, more_second = add_product(more_first, more_second, words[i][2], words[i][3], queries[2 * i + 1])
    return first + more_first, second + more_second


@gluon.jit
def max_of_quad(pairs):
    """Return the maximum of the pairs of four lanes, to each of them."""
    return gl.inline_asm_elementwise(MAX_OF_QUAD, "=&f,=&f,f,f", [pairs], dtype=gl.float32, is_pure=True, pack=2)


@gluon.jit
def sum_of_quad(pairs):
    """Return the sum of the pairs of four lanes, to each of them."""
    return gl.inline_asm_elementwise(SUM_OF_QUAD, "=&f,=&f,f,f", [pairs], dtype=gl.float32, is_pure=True, pack=2)


@gluon.jit
def each(pair):
    """Return two tensors: a lane's first number twice, and its second."""
    return gl.inline_asm_elementwise(
        "{ mov.b32 $0, $4; mov.b32 $1, $4; mov.b32 $2, $5; mov.b32 $3, $5; }",
        "=&f,=&f,=&f,=&f,f,f", [pair], dtype=(gl.float32, gl.float32), is_pure=True, pack=2,
    )  # fmt: skip
