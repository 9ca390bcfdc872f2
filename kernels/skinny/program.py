"""What a program of a skinny kernel works on and leaves: which weight is its own, rows of x, and outputs, for Gluon kernels."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.ptx.global_memory import as_words
from qtts_compile.kernels.ptx.shared_memory import address_of_memory, load_floats, store_floats


@gluon.jit
def own_weight(W_ptrs, Y_ptrs, sizes, w_strides, OUTPUTS: gl.constexpr, IS_SWIGLU: gl.constexpr):
    """Return the program's place among the blocks of ``OUTPUTS`` of its weight, which weight that is, its pointer, that of y, its rows and stride.

    A program serves one of the weights, of which each has as many programs as it has blocks of rows, or both of a SwiGLU.
    """
    block, place = gl.program_id(0), 0
    W_ptr, Y_ptr, size, w_stride = W_ptrs[0], Y_ptrs[0], sizes[0], w_strides[0]
    if not IS_SWIGLU:
        for i in gl.static_range(1, len(W_ptrs)):
            blocks = (sizes[i - 1] + OUTPUTS - 1) // OUTPUTS
            is_later = (place == i - 1) & (block >= blocks)
            place, block = gl.where(is_later, i, place), gl.where(is_later, block - blocks, block)
            W_ptr, Y_ptr = gl.where(is_later, W_ptrs[i], W_ptr), gl.where(is_later, Y_ptrs[i], Y_ptr)
            size, w_stride = gl.where(is_later, sizes[i], size), gl.where(is_later, w_strides[i], w_stride)
    return block, place, W_ptr, Y_ptr, size, w_stride


@gluon.jit
def rows_of_tile(W_ptrs, w_strides, W_ptr, w_stride, size, tile, g, which, IS_SWIGLU: gl.constexpr):
    """Return pointers to the words of a lane's two rows of a tile: g and g + 8 of a weight, or g of gate and of up."""
    if IS_SWIGLU:
        row = gl.minimum(tile * 8 + g, size - 1).to(gl.int64)
        return gl.where(which == 0, as_words(W_ptrs[0]) + row * (w_strides[0] // 2), as_words(W_ptrs[1]) + row * (w_strides[1] // 2))
    row = gl.minimum(tile * 16 + g + 8 * which, size - 1).to(gl.int64)
    return as_words(W_ptr) + row * (w_stride // 2)


@gluon.jit
def rows_of_x(X_ptr, Token_ptr, M, V, x_stride, g, word, GROUPS: gl.constexpr):
    """Return pointers to words of a lane's row of each eight of x, which with tokens is a table."""
    x_rows, in_table = (), 0 * g == 0
    for j in gl.static_range(GROUPS):
        x_row = gl.minimum(g + 8 * j, M - 1).to(gl.int64)
        if Token_ptr is not None:
            token = gl.load(Token_ptr + x_row)
            in_table, x_row = in_table & (token >= 0) & (token < V), gl.minimum(gl.maximum(token, 0), V - 1)
        x_rows = x_rows + (as_words(X_ptr) + x_row * (x_stride // 2) + word,)
    if Token_ptr is not None:
        gl.device_assert(in_table, "embedding_linear: a token lies outside the table")
    return x_rows


@gluon.jit
def allocate(BYTES: gl.constexpr, WARPS: gl.constexpr):
    """Return all the shared memory of a kernel, to be kept alive to its end, and the address at which it begins."""
    memory = gl.allocate_shared_memory(gl.float32, [BYTES // 4 + 4, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    unused = memory.index(BYTES // 4)
    unused.store(gl.zeros([1], gl.float32, layout=gl.BlockedLayout([1], [32], [WARPS], [0])))  # so that Triton declares the memory
    return memory, address_of_memory()


@gluon.jit
def add_up(address, COUNT: gl.constexpr, NEXT: gl.constexpr):
    """Add up so many float32 at addresses in shared memory, each ``NEXT`` bytes behind the last."""
    total = load_floats(address)
    for i in gl.static_range(1, COUNT):
        total += load_floats(address + i * NEXT)
    return total


@gluon.jit
def store_squares(address, squares, warp, g, WARPS: gl.constexpr):
    """Store the sums of squares of each eight rows of x, of each warp eight numbers."""
    for j in gl.static_range(len(squares)):
        of_row = gl.sum(gl.sum(squares[j], axis=3, keep_dims=True), axis=2, keep_dims=True)
        store_floats(address + (j * WARPS + warp) * 32 + g * 4, of_row)


@gluon.jit
def scale_of(address, row, eps, K: gl.constexpr, WARPS: gl.constexpr):
    """Return by what a norm multiplies rows of x, whose squares :func:`store_squares` stored."""
    return gl.rsqrt(add_up(address + row // 8 * WARPS * 32 + row % 8 * 4, WARPS, 32) / K + eps)


@gluon.jit
def outputs_of(total, up, bias, residual, IS_SWIGLU: gl.constexpr):
    """Return outputs in bfloat16 of sums, rounded where eager PyTorch rounds."""
    y = (total + bias).to(gl.bfloat16)
    if IS_SWIGLU:
        gate = y.to(gl.float32)
        y = ((gate / (1.0 + gl.exp(-gate))).to(gl.bfloat16).to(gl.float32) * up.to(gl.bfloat16).to(gl.float32)).to(gl.bfloat16)
    if residual is not None:
        y = (residual.to(gl.float32) + y.to(gl.float32)).to(gl.bfloat16)
    return y
