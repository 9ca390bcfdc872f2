"""Which lane has what of a warp's tile of 16 slots, as matrices for the tensor cores, for kernels of clusters to use.

In the matrices of ``mma.m16n8k16`` a lane has the group g = lane / 4 and the place t = lane % 4 in it.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.memory import GROUP, ROW, linear_layout
from qtts_compile.kernels.ptx.shared_memory import load_shared_2
from qtts_compile.kernels.ptx.words import add_product


def _over_groups(op: str) -> str:
    """Return PTX that joins, by an instruction, what the lanes of the same place t have."""
    return f"""{{
        .reg .f32 x, y;
        shfl.sync.bfly.b32 y, $1, 4, 31, -1;
        {op}.f32 x, $1, y;
        shfl.sync.bfly.b32 y, x, 8, 31, -1;
        {op}.f32 x, x, y;
        shfl.sync.bfly.b32 y, x, 16, 31, -1;
        {op}.f32 $0, x, y;
        }}"""


MAX_OF_GROUPS, SUM_OF_GROUPS = gl.constexpr(_over_groups("max")), gl.constexpr(_over_groups("add"))


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
def load_queries(address, NEXT_LANE: gl.constexpr, NEXT_STEP: gl.constexpr):
    """Load the words of the query g % 2 that :func:`multiply_tile` needs: at each of four steps a lane has four, which follow each other.

    The arguments say how many bytes behind those of a lane, and of a step, the words of the next begin.
    """
    _, g, t, which = places()
    address = address + g % GROUP * ROW + t * NEXT_LANE + which * 4
    queries = ()
    for i in gl.static_range(4):
        queries = queries + (load_shared_2(address + i * NEXT_STEP), load_shared_2(address + i * NEXT_STEP + 8))
    return queries


@gluon.jit
def multiply_tile(words, queries):
    """Return the products of the keys g and g + 8, four times four words of two bfloat16, with both heads' queries that they meet."""
    # Four sums each, so that fewer products wait for each other.
    first, second = (), ()
    for i in gl.static_range(2):
        for j in gl.static_range(2):
            both = add_product(zeros(), zeros(), words[i][2 * j], words[i][2 * j + 1], queries[2 * i + j])
            both = add_product(both[0], both[1], words[i + 2][2 * j], words[i + 2][2 * j + 1], queries[2 * i + j + 4])
            first, second = first + (both[0],), second + (both[1],)
    return (first[0] + first[1]) + (first[2] + first[3]), (second[0] + second[1]) + (second[2] + second[3])


@gluon.jit
def max_of_groups(x):
    """Return the maximum of what the eight lanes of the same place have, to each of them."""
    return gl.inline_asm_elementwise(MAX_OF_GROUPS, "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def sum_of_groups(x):
    """Return the sum of what the eight lanes of the same place have, to each of them."""
    return gl.inline_asm_elementwise(SUM_OF_GROUPS, "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def each(pair):
    """Return two tensors: a lane's first number twice, and its second."""
    return gl.inline_asm_elementwise(
        "{ mov.b32 $0, $4; mov.b32 $1, $4; mov.b32 $2, $5; mov.b32 $3, $5; }",
        "=&f,=&f,=&f,=&f,f,f", [pair], dtype=(gl.float32, gl.float32), is_pure=True, pack=2,
    )  # fmt: skip
