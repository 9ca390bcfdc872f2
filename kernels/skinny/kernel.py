"""Products of up to 32 rows with weight matrices on the tensor cores: the weights go from global memory to the registers that multiply them.

For ``norm_linears``, ``norm_swiglu``, ``linear_add`` and ``embedding_linear`` in bfloat16. A program goes over tiles of 16 rows of a weight, or of 8
of gate and of up, and requests the next ones while it multiplies. It loads x, and applies the norm's weight to it, once if its registers hold it;
where it would load it often see :mod:`many_rows`. The norm's scale is applied to the sums, so that no product waits for it.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.ptx.global_memory import as_words
from qtts_compile.kernels.ptx.pdl import announce, wait_for_inputs
from qtts_compile.kernels.ptx.shared_memory import store_shared_2, wait_for_cta
from qtts_compile.kernels.skinny.operands import lanes_layout, load_rows, multiply, no_sums, numbers, request, requested_together, sum_of, weigh
from qtts_compile.kernels.skinny.program import add_up, allocate, outputs_of, own_weight, rows_of_tile, rows_of_x, scale_of, store_squares


@gluon.jit
def _request_step(w_rows, STEP: gl.constexpr, STEPS: gl.constexpr, CHUNKS: gl.constexpr):
    """Load a step's words of a tile, all of whose steps come before the next one's."""
    return request(w_rows[STEP // STEPS], STEP % STEPS, CHUNKS)


@gluon.jit
def skinny_kernel(
    X_ptr, Token_ptr, Norm_ptr, W_ptrs, Bias_ptrs, Residual_ptr, Y_ptrs, M, V, sizes, x_stride, w_strides, residual_stride, eps,
    K: gl.constexpr, WARPS: gl.constexpr, GROUPS: gl.constexpr, TILES: gl.constexpr, CHUNKS: gl.constexpr, IN_FLIGHT: gl.constexpr,
    X_STEPS: gl.constexpr, IS_SWIGLU: gl.constexpr, HAS_PDL: gl.constexpr,
):  # fmt: skip
    announce(HAS_PDL)
    TILE: gl.constexpr = 8 if IS_SWIGLU else 16  # outputs
    STEPS: gl.constexpr = K // (32 * CHUNKS * WARPS)  # of a tile
    ROUNDS: gl.constexpr = STEPS // X_STEPS  # of loading x
    block, place, W_ptr, Y_ptr, size, w_stride = own_weight(W_ptrs, Y_ptrs, sizes, w_strides, TILES * TILE, IS_SWIGLU)
    layout: gl.constexpr = lanes_layout(WARPS)
    warp, g, t, which = numbers(WARPS, layout, 0), numbers(8, layout, 1), numbers(4, layout, 2), numbers(2, layout, 3)
    word = (warp * (K // WARPS // 2) + 4 * t).to(gl.int64)
    w_rows = ()
    for tile in gl.static_range(TILES):
        w_rows = w_rows + (rows_of_tile(W_ptrs, w_strides, W_ptr, w_stride, size, block * TILES + tile, g, which, IS_SWIGLU) + word,)
    steps = ()
    for step in gl.static_range(IN_FLIGHT):
        steps = steps + (_request_step(w_rows, step, STEPS, CHUNKS),)
    norms = ()
    if Norm_ptr is not None:
        norm_row = (as_words(Norm_ptr) + word + 0 * g + 0 * which,)
        for round in gl.static_range(ROUNDS):
            norms = norms + (load_rows(norm_row, round * X_STEPS * CHUNKS, X_STEPS * CHUNKS)[0],)
    # A thread's outputs of a tile, in the order of the sums: rows of weights and, next to each other, of x
    one: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    number = gl.arange(0, GROUPS * TILE * 8, layout=one)
    in_group = number % (TILE * 8)
    row, first = number // (TILE * 8) * 8 + number % 8, block * (TILES * TILE) + in_group // 8
    biases, residuals = (), ()
    for tile in gl.static_range(TILES):
        bias = 0.0 * number
        for each in gl.static_range(len(W_ptrs)):
            if Bias_ptrs[each] is not None:
                is_biased = (first + tile * TILE < size) & (place == each)
                bias += gl.load(Bias_ptrs[each] + first + tile * TILE, mask=is_biased, other=0.0).to(gl.float32)
        biases = biases + (bias,)
    wait_for_inputs(HAS_PDL)
    if Residual_ptr is not None:
        for tile in gl.static_range(TILES):
            output = first + tile * TILE
            is_there = (output < size) & (row < M)
            residuals = residuals + (gl.load(Residual_ptr + row.to(gl.int64) * residual_stride + output, mask=is_there, other=0.0),)
    x_rows = rows_of_x(X_ptr, Token_ptr, M, V, x_stride, g, word + 0 * which, GROUPS)

    # Sums of two tiles have their place, so that warps may run ahead by one.
    SUMS_BYTES: gl.constexpr = GROUPS * 2 * WARPS * 256
    SQUARES: gl.constexpr = min(TILES, 2) * SUMS_BYTES
    memory, base = allocate(SQUARES + GROUPS * WARPS * 32, WARPS)
    scale, zeros = 1.0, gl.zeros([WARPS, 8, 4, 2], gl.float32, layout=layout)
    for tile in gl.static_range(TILES):
        sums, squares = no_sums(zeros, 4 * GROUPS), no_sums(zeros, GROUPS)
        for round in gl.static_range(ROUNDS):
            if tile == 0 or ROUNDS > 1:
                x = requested_together(load_rows(x_rows, round * X_STEPS * CHUNKS, X_STEPS * CHUNKS))
                if Norm_ptr is not None:
                    # Registers hold the norm's weight for the first tile alone.
                    norm = norms[round] if tile == 0 else load_rows(norm_row, round * X_STEPS * CHUNKS, X_STEPS * CHUNKS)[0]
                    x, squares = weigh(x, norm, squares)
            for i in gl.static_range(X_STEPS):
                sums = multiply(sums, steps[(tile * ROUNDS + round) * X_STEPS + i], x, i * CHUNKS)
                if (tile * ROUNDS + round) * X_STEPS + i + IN_FLIGHT < TILES * STEPS:
                    steps = steps + (_request_step(w_rows, (tile * ROUNDS + round) * X_STEPS + i + IN_FLIGHT, STEPS, CHUNKS),)
        # The sums of all warps, and their squares of x, are added up.
        of_tile = base + tile % 2 * SUMS_BYTES
        for i in gl.static_range(GROUPS * 2):
            store_shared_2(of_tile + (i * WARPS + warp) * 256 + g * 32 + t * 8 + which * 4, sum_of(sums, i, GROUPS))
        if tile == 0 and Norm_ptr is not None:
            store_squares(base + SQUARES, squares, warp, g, WARPS)
        wait_for_cta()
        if tile == 0 and Norm_ptr is not None:
            scale = scale_of(base + SQUARES, row, eps, K, WARPS)
        address = of_tile + number // (TILE * 8) * WARPS * 512 + in_group % 64 * 4
        if not IS_SWIGLU:
            address += in_group // 64 * WARPS * 256
        total, up = add_up(address, WARPS, 256) * scale, 0.0
        if IS_SWIGLU:
            up = add_up(address + WARPS * 256, WARPS, 256) * scale
        y = outputs_of(total, up, biases[tile], residuals[tile] if Residual_ptr is not None else None, IS_SWIGLU)
        gl.store(Y_ptr + row.to(gl.int64) * size + first + tile * TILE, y, mask=(first + tile * TILE < size) & (row < M))
    memory._keep_alive()
