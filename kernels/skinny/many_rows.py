"""Products of 17 to 32 rows with weight matrices on the tensor cores: x goes through shared memory, from which all warps of a program multiply it.

A warp has tiles of 16 rows of a weight, or of 8 of gate and of up, and a share of their columns; it requests weights while it multiplies. A block of
columns of x is loaded once for all warps, each of which brings 32 columns, times the norm's weight, to shared memory, where the next block has room
too. The norm's scale is applied to the sums.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.ptx.global_memory import as_words
from qtts_compile.kernels.ptx.pdl import announce, wait_for_inputs
from qtts_compile.kernels.ptx.shared_memory import store_shared_2, wait_for_cta
from qtts_compile.kernels.skinny.operands import (
    lanes_layout,
    load_rows,
    load_shared_rows,
    multiply,
    no_sums,
    numbers,
    request,
    store_shared_rows,
    sum_of,
    weigh,
)
from qtts_compile.kernels.skinny.program import add_up, allocate, outputs_of, own_weight, rows_of_tile, rows_of_x, scale_of, store_squares

GROUPS = gl.constexpr(4)  # of eight rows of x


@gluon.jit
def _request_next(w_rows, NUMBER: gl.constexpr, OF_BLOCK: gl.constexpr, SHARES: gl.constexpr):
    """Load 32 columns of a tile that a warp multiplies after ``NUMBER`` others: its tiles take turns, and of each block it has so many columns."""
    chunk: gl.constexpr = NUMBER // len(w_rows)
    return request(w_rows[NUMBER % len(w_rows)], chunk // OF_BLOCK * (OF_BLOCK * SHARES) + chunk % OF_BLOCK * SHARES, 1)


@gluon.jit
def skinny_many_rows_kernel(
    X_ptr, Token_ptr, Norm_ptr, W_ptrs, Bias_ptrs, Residual_ptr, Y_ptrs, M, V, sizes, x_stride, w_strides, residual_stride, eps,
    K: gl.constexpr, WARPS: gl.constexpr, TILES: gl.constexpr, SHARES: gl.constexpr, IN_FLIGHT: gl.constexpr, AHEAD: gl.constexpr,
    IS_SWIGLU: gl.constexpr, HAS_PDL: gl.constexpr,
):  # fmt: skip
    announce(HAS_PDL)
    TILE: gl.constexpr = 8 if IS_SWIGLU else 16  # outputs
    BLOCKS: gl.constexpr = K // (32 * WARPS)
    SIDE_BY_SIDE: gl.constexpr = WARPS // SHARES  # tiles of different warps
    OF_WARP: gl.constexpr = TILES // SIDE_BY_SIDE
    block, place, W_ptr, Y_ptr, size, w_stride = own_weight(W_ptrs, Y_ptrs, sizes, w_strides, TILES * TILE, IS_SWIGLU)
    layout: gl.constexpr = lanes_layout(WARPS)
    warp, g, t, which = numbers(WARPS, layout, 0), numbers(8, layout, 1), numbers(4, layout, 2), numbers(2, layout, 3)
    tile, share = warp // SHARES, warp % SHARES
    w_rows = ()
    for i in gl.static_range(OF_WARP):
        of_tile = rows_of_tile(W_ptrs, w_strides, W_ptr, w_stride, size, block * TILES + i * SIDE_BY_SIDE + tile, g, which, IS_SWIGLU)
        w_rows = w_rows + (of_tile + 16 * share + 4 * t,)
    weights = ()
    for i in gl.static_range(IN_FLIGHT):
        weights = weights + (_request_next(w_rows, i, SIDE_BY_SIDE, SHARES),)
    word = 16 * warp + 4 * t + 0 * which
    norms = ()
    if Norm_ptr is not None:
        norm_row = (as_words(Norm_ptr) + word + 0 * g,)
        for i in gl.static_range(AHEAD):
            norms = norms + (load_rows(norm_row, i * WARPS, 1)[0],)
    # A thread's outputs of tiles side by side, in the order of the sums: rows of weights and, next to each other, of x
    one: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    number = gl.arange(0, SIDE_BY_SIDE * GROUPS * TILE * 8, layout=one)
    group, in_group = number // (TILE * 8), number % (TILE * 8)
    row, first = group % GROUPS * 8 + number % 8, (block * TILES + group // GROUPS) * TILE + in_group // 8
    biases, residuals = (), ()
    for i in gl.static_range(OF_WARP):
        output, bias = first + i * SIDE_BY_SIDE * TILE, 0.0 * number
        for each in gl.static_range(len(W_ptrs)):
            if Bias_ptrs[each] is not None:
                bias += gl.load(Bias_ptrs[each] + output, mask=(output < size) & (place == each), other=0.0).to(gl.float32)
        biases = biases + (bias,)
    wait_for_inputs(HAS_PDL)
    x_rows = rows_of_x(X_ptr, Token_ptr, M, V, x_stride, g, word, GROUPS)
    ahead = ()
    for i in gl.static_range(AHEAD):
        ahead = ahead + (load_rows(x_rows, i * WARPS, 1),)
    if Residual_ptr is not None:
        for i in gl.static_range(OF_WARP):
            output = first + i * SIDE_BY_SIDE * TILE
            is_there = (output < size) & (row < M)
            residuals = residuals + (gl.load(Residual_ptr + row.to(gl.int64) * residual_stride + output, mask=is_there, other=0.0),)

    # Two blocks of x, and later in their place sums of all warps; behind them their squares of x
    BLOCK_BYTES: gl.constexpr = WARPS * GROUPS * 512
    SQUARES: gl.constexpr = 2 * BLOCK_BYTES
    memory, base = allocate(SQUARES + GROUPS * WARPS * 32, WARPS)
    of_lane = base + g * 64 + t * 16 + 0 * which
    zeros = gl.zeros([WARPS, 8, 4, 2], gl.float32, layout=layout)
    squares, sums = no_sums(zeros, GROUPS), ()
    for _ in gl.static_range(OF_WARP):
        sums = sums + (no_sums(zeros, 4 * GROUPS if OF_WARP == 1 else 2 * GROUPS),)
    for i in gl.static_range(BLOCKS):
        x = ahead[0]
        ahead = ahead[1:]
        if i + AHEAD < BLOCKS:
            ahead = ahead + (load_rows(x_rows, (i + AHEAD) * WARPS, 1),)
        if Norm_ptr is not None:
            x, squares = weigh(x, norms[0], squares)
            norms = norms[1:]
            if i + AHEAD < BLOCKS:
                norms = norms + (load_rows(norm_row, (i + AHEAD) * WARPS, 1)[0],)
        store_shared_rows(of_lane + (i % 2 * BLOCK_BYTES + warp * (GROUPS * 512)), x)
        wait_for_cta()  # after which none multiplies the block before, whose room the next one takes
        for chunk in gl.static_range(SIDE_BY_SIDE):
            x = load_shared_rows(of_lane + share * (GROUPS * 512) + (i % 2 * BLOCK_BYTES + chunk * SHARES * GROUPS * 512), GROUPS)
            for j in gl.static_range(OF_WARP):  # tiles take turns, and what is multiplied is dropped
                sums = sums[1:] + (multiply(sums[0], weights[0], x, 0),)
                weights = weights[1:]
                if (i * SIDE_BY_SIDE + chunk) * OF_WARP + j + IN_FLIGHT < BLOCKS * TILES:
                    weights = weights + (_request_next(w_rows, (i * SIDE_BY_SIDE + chunk) * OF_WARP + j + IN_FLIGHT, SIDE_BY_SIDE, SHARES),)
    wait_for_cta()
    scale = 1.0
    for i in gl.static_range(OF_WARP):
        # Sums of two tiles of a warp have their place, so that warps may run ahead by one.
        of_tiles = base + i % 2 * (WARPS * GROUPS * 512)
        for j in gl.static_range(GROUPS * 2):
            store_shared_2(of_tiles + ((tile * (GROUPS * 2) + j) * SHARES + share) * 256 + g * 32 + t * 8 + which * 4, sum_of(sums[i], j, GROUPS))
        if i == 0 and Norm_ptr is not None:
            store_squares(base + SQUARES, squares, warp, g, WARPS)
        wait_for_cta()
        if i == 0 and Norm_ptr is not None:
            scale = scale_of(base + SQUARES, row, eps, K, WARPS)
        address, up = of_tiles + group * SHARES * 512 + in_group % 64 * 4, 0.0
        if IS_SWIGLU:
            up = add_up(address + SHARES * 256, SHARES, 256) * scale
        else:
            address += in_group // 64 * SHARES * 256
        y = outputs_of(add_up(address, SHARES, 256) * scale, up, biases[i], residuals[i] if Residual_ptr is not None else None, IS_SWIGLU)
        output = first + i * SIDE_BY_SIDE * TILE
        gl.store(Y_ptr + row.to(gl.int64) * size + output, y, mask=(output < size) & (row < M))
    memory._keep_alive()
