"""What the tensor cores multiply, as the lanes of skinny kernels load it, for Gluon kernels.

In ``mma.m16n8k16`` sixteen rows of a weight are the left factor and eight rows of x the right one. A lane has the group g = lane / 4 and the place
t = lane % 4 in it; of each 32 columns, a "chunk", it loads the eight from 8 t on, of weights and of x alike, and takes the columns of two products
from them: in which order columns are added up is of no matter.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.ptx.shared_memory import load_shared_2_pairs, store_shared_2_pairs
from qtts_compile.kernels.ptx.words import add_product, high, low, multiply_pairs


@gluon.constexpr_function
def lanes_layout(warps):
    """Two numbers of each lane: [warps, 8 groups, 4 places, 2]."""
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]]
    return gl.DistributedLinearLayout([[0, 0, 0, 1]], lanes, [[2**i, 0, 0, 0] for i in range(warps.bit_length() - 1)], [], [warps, 8, 4, 2])


@gluon.constexpr_function
def _along(layout, axis):
    """Return the layout of numbers along an axis of four."""
    for other in (3, 2, 1, 0):
        if other != axis:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def numbers(SIZE: gl.constexpr, layout: gl.constexpr, AXIS: gl.constexpr):
    """Return the numbers from 0 on along an axis of four."""
    of_axis: gl.constexpr = _along(layout, AXIS)
    numbers = gl.arange(0, SIZE, layout=of_axis)
    for other in gl.static_range(4):
        if other != AXIS:
            numbers = gl.expand_dims(numbers, other)
    return numbers


@gluon.jit
def _load_4(pointers):
    """Load four words, of weights that nothing reads again, at each pointer."""
    return gl.inline_asm_elementwise(
        "ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,l", [pointers.to(gl.int64)], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _load_2_pairs(pointers):
    """Load two pairs of words at the pointer that a lane has twice."""
    return gl.inline_asm_elementwise(
        "ld.global.v4.b32 {$0, $1, $2, $3}, [$4]; // $5",
        "=r,=r,=r,=r,l,l", [pointers.to(gl.int64)], dtype=(gl.int32, gl.int32), is_pure=False, pack=2,
    )  # fmt: skip


@gluon.jit
def request(Row_ptrs, step, CHUNKS: gl.constexpr):
    """Load a step's words of 16 rows of a weight."""
    words = ()
    for chunk in gl.static_range(CHUNKS):
        words = words + (_load_4(Row_ptrs + (step * CHUNKS + chunk) * 16),)
    return words


@gluon.jit
def load_rows(Row_ptrs, first, CHUNKS: gl.constexpr):
    """Load chunks of each group of eight rows of x, or of a norm's weight."""
    groups = ()
    for j in gl.static_range(len(Row_ptrs)):
        words = ()
        for chunk in gl.static_range(CHUNKS):
            words = words + (_load_2_pairs(Row_ptrs[j] + (first + chunk) * 16),)
        groups = groups + (words,)
    return groups


@gluon.jit
def store_shared_rows(addresses, xs):
    """Store 32 columns of each group of eight rows of x, the words of a lane where it has an address twice, each group 512 bytes behind the last."""
    for j in gl.static_range(len(xs)):
        store_shared_2_pairs(addresses + j * 512, xs[j][0][0], xs[j][0][1])


@gluon.jit
def load_shared_rows(addresses, GROUPS: gl.constexpr):
    """Load what :func:`store_shared_rows` stored, as :func:`load_rows` does."""
    groups = ()
    for j in gl.static_range(GROUPS):
        groups = groups + ((load_shared_2_pairs(addresses + j * 512),),)
    return groups


@gluon.jit
def requested_together(xs):
    """Return x, whose first word needs all: in the SASS a request would move to where its words are multiplied, and memory be waited for again."""
    every = xs[0][0][0]
    for j in gl.static_range(len(xs)):
        for chunk in gl.static_range(len(xs[j])):
            every |= xs[j][chunk][0] | xs[j][chunk][1]
    # A word has less than 64 bits.
    nothing = gl.inline_asm_elementwise("{ popc.b32 $0, $1; shr.u32 $0, $0, 6; }", "=r,r", [every], dtype=gl.int32, is_pure=True, pack=1)
    groups = ()
    for j in gl.static_range(len(xs)):
        words = ((xs[j][0][0] | nothing, xs[j][0][1] | nothing),)
        for chunk in gl.static_range(1, len(xs[j])):
            words = words + (xs[j][chunk],)
        groups = groups + (words,)
    return groups


@gluon.jit
def weigh(xs, norm, squares):
    """Return x times a norm's weight, and its squares added to those so far."""
    products, new_squares = (), ()
    for j in gl.static_range(len(xs)):
        words, square = (), squares[j]
        for chunk in gl.static_range(len(norm)):
            pairs = ()
            for half in gl.static_range(2):
                x, weight = xs[j][chunk][half], norm[chunk][half]
                square += low(x) * low(x) + high(x) * high(x)
                pairs = pairs + (multiply_pairs(x, weight),)
            words = words + (pairs,)
        products, new_squares = products + (words,), new_squares + (square,)
    return products, new_squares


@gluon.jit
def multiply(sums, words, xs, FIRST_CHUNK: gl.constexpr):
    """Return the sums of a tile with a step's products added: of each eight rows of x two, or four, those of the rows g and g + 8 of the tile.

    Where there are four, each of two products of a chunk goes to sums of its own, so that fewer wait for each other.
    """
    PARTS: gl.constexpr = len(sums) // (2 * len(xs))
    new = ()
    for i in gl.static_range(len(sums) // 2):
        first, second = sums[2 * i], sums[2 * i + 1]
        for chunk in gl.static_range(len(words)):
            for product in gl.static_range(i % PARTS, 2, PARTS):
                x = xs[i // PARTS][FIRST_CHUNK + chunk][product]
                first, second = add_product(first, second, words[chunk][2 * product], words[chunk][2 * product + 1], x)
        new = new + (first, second)
    return new


@gluon.jit
def no_sums(zeros, COUNT: gl.constexpr):
    """Return so many sums of no products."""
    sums = ()
    for _ in gl.static_range(COUNT):
        sums = sums + (zeros,)
    return sums


@gluon.jit
def sum_of(sums, number, GROUPS: gl.constexpr):
    """Return the sum of a tile with that number: of each eight rows of x that of the rows g, then that of the rows g + 8."""
    PARTS: gl.constexpr = len(sums) // (2 * GROUPS)
    total = sums[number // 2 * (2 * PARTS) + number % 2]
    if PARTS == 2:
        total += sums[number // 2 * 4 + 2 + number % 2]
    return total
