"""The kernel of ``norm_qkv_attention``: one token of Qwen3's attention, up to what the output projection reads, by a cluster for each key head.

Each of its 16 CTAs multiplies 32 of the 512 rows of two query heads, their key and their value, and sends the results into the shared memory of the
CTAs that attend, of which each has 16 keys of the cache. Where several attend, the first joins what they found. What the next step needs is known
there when it has arrived; all else that is read was requested before. Only the row of the cache and the result go to global memory.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.cluster import (
    WARPS,
    allocate,
    announce,
    arrive_at_cluster,
    cluster_rank,
    everywhere,
    high,
    linear_layout,
    load_shared,
    load_shared_2,
    load_shared_4,
    load_shared_byte,
    load_shared_half,
    low,
    pack,
    prepare_barriers,
    request_bytes,
    store_global,
    store_of_thread,
    store_shared,
    store_shared_2,
    wait_for_bytes,
    wait_for_cluster,
    wait_for_cta,
    wait_for_inputs,
)

HEAD, GROUP = gl.constexpr(128), gl.constexpr(2)  # width of a head, query heads of a key head
KEYS = gl.constexpr(16)  # of a tile of the cache
TILES_IN_FLIGHT = gl.constexpr(4)  # of 256 columns of weights, in 128 registers of a thread
N_WARPS = gl.constexpr(WARPS)
LOG2_E = gl.constexpr(1.4426950408889634)

# Shared memory of a CTA, in bytes
ARRIVED = gl.constexpr(0)  # the barrier for what a CTA attends with, and after it that for what the first one joins
ROWS = gl.constexpr(256)  # products: two query heads, a key, a value
Q_HEADS = gl.constexpr(1280)  # normalised and rotated
SCORES = gl.constexpr(1792)  # [2, 16] float32
MASK = gl.constexpr(1920)
K_TILE = gl.constexpr(2048)
V_TILE = gl.constexpr(6144)
HEAD_WEIGHTS = gl.constexpr(10240)  # of the norms of queries and keys
COS = gl.constexpr(10752)  # of up to three axes
SIN = gl.constexpr(11520)
STATS = gl.constexpr(12288)  # [2, 16 tiles] of maximum and sum
PARTIALS = gl.constexpr(12544)  # [16 tiles, 2, 128] float32
END_OF_PARTIALS = gl.constexpr(28928)
ROW = gl.constexpr(256)  # of a head
BYTES_TO_ATTEND = gl.constexpr((4 + 2 * 16 + 2) * 256)  # products, keys and values, weights of norms
BYTES_OF_PARTIAL = gl.constexpr(2 * (4 * 128 + 8))


def shared_bytes(width: int, tiles: int) -> int:
    """Return the shared memory of a CTA: with x in float32 and a sum of each thread's squares after what attention needs."""
    return (END_OF_PARTIALS.value if tiles > 1 else PARTIALS.value) + 4 * width + 4 * 32 * WARPS


@gluon.constexpr_function
def _weights_layout():
    """Rows and words of weights [32, 128]: a warp has eight whole rows."""
    return gl.BlockedLayout([8, 4], [1, 32], [4, 1], [1, 0], cga_layout=everywhere(2))


@gluon.constexpr_function
def _x_layout(width):
    """Words of x [4, width / 8], each once in the CTA."""
    return gl.BlockedLayout([1, width // 256], [1, 32], [4, 1], [1, 0], cga_layout=everywhere(2))


@gluon.constexpr_function
def _threads_layout():
    """As many elements as threads, in every warp."""
    return linear_layout([[1], [2]], [[4 * 2**i] for i in range(5)], [[0], [0]], [128])


@gluon.constexpr_function
def _roles_layout():
    """Words of the first halves of four heads [4, 32]: a warp has one."""
    return linear_layout([], [[0, 2**i] for i in range(5)], [[1, 0], [2, 0]], [4, 32])


@gluon.constexpr_function
def _keys_layout():
    """Words of keys [16, 64]: 16 lanes share one."""
    return linear_layout([[0, 1], [0, 2], [8, 0]], [[0, 4], [0, 8], [0, 16], [0, 32], [1, 0]], [[2, 0], [4, 0]], [16, 64])


@gluon.constexpr_function
def _values_layout():
    """Heads, keys or tiles, and words [2, 16, 64]: a warp has one head and half the words."""
    registers, warps = [[0, 0, 1], [0, 4, 0], [0, 8, 0], [0, 0, 16]], [[1, 0, 0], [0, 0, 32]]
    return linear_layout(registers, [[0, 0, 2], [0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0]], warps, [2, 16, 64])


@gluon.jit
def _send_rows(y, rows, base, n_targets):
    """Send the sums of rows ``[32]``, of which each thread has fours, rounded to bfloat16, to the first CTAs of the cluster: a lane serves one."""
    # $4-7 sums, $8-11 rows, $12-15 base, $16-19 how many CTAs
    gl.inline_asm_elementwise(
        """{
        .reg .pred p; .reg .u32 lane, to, bar; .reg .b32 a, b;
        mov.u32 lane, %laneid;
        setp.lt.u32 p, lane, $16;
        cvt.rn.bf16x2.f32 a, $5, $4;
        cvt.rn.bf16x2.f32 b, $7, $6;
        mad.lo.u32 to, $8, 2, $12;
        @p mapa.shared::cluster.u32 bar, $12, lane;
        @p mapa.shared::cluster.u32 to, to, lane;
        @p st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [to + 256], {a, b}, [bar];
        mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0;
        }""",
        "=r,=r,=r,=r,f,f,f,f,r,r,r,r,r,r,r,r,r,r,r,r", [y, rows, base, n_targets], dtype=gl.int32, is_pure=False, pack=4,
    )  # fmt: skip


@gluon.jit
def _send_partial(even, odd, addresses, barrier):
    """Send columns to the first CTA: the first 8 lanes do, as the others repeat them for other keys."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred p; .reg .u32 lane, to, bar;
        mov.u32 lane, %laneid;
        setp.lt.u32 p, lane, 8;
        mapa.shared::cluster.u32 to, $6, 0;
        mapa.shared::cluster.u32 bar, $8, 0;
        @p st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], {$2, $4, $3, $5}, [bar];
        mov.u32 $0, 0; mov.u32 $1, 0;
        }""",
        "=r,=r,f,f,f,f,r,r,r,r", [even, odd, addresses, barrier], dtype=gl.int32, is_pure=False, pack=2,
    )  # fmt: skip


@gluon.jit
def _send_stats(row_max, row_sum, addresses, barrier):
    """Send maximum and sum to the first CTA: the first two warps have a head each, and lane 0 sends."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred p; .reg .u32 t, to, bar;
        mov.u32 t, %tid.x;
        setp.lt.u32 p, t, 64;
        and.b32 t, t, 31;
        setp.eq.and.u32 p, t, 0, p;
        mapa.shared::cluster.u32 to, $3, 0;
        mapa.shared::cluster.u32 bar, $4, 0;
        @p st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [to], {$1, $2}, [bar];
        mov.u32 $0, 0;
        }""",
        "=r,f,f,r,r", [row_max, row_sum, addresses, barrier], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _load_partial(addresses):
    """Load the even and the odd columns at addresses of which each thread has pairs."""
    return gl.inline_asm_elementwise(
        "ld.shared.v4.f32 {$0, $2, $1, $3}, [$4];", "=f,=f,=f,=f,r,r", [addresses], dtype=(gl.float32, gl.float32), is_pure=False, pack=2
    )


@gluon.jit
def _words(pointer):
    return pointer.to(gl.pointer_type(gl.int32))


@gluon.jit
def _rounded(x):
    return x.to(gl.bfloat16).to(gl.float32)


@gluon.jit
def _product(x, y):
    """Multiply and round, without joining a later addition (FMA)."""
    return _rounded(gl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=gl.float32, is_pure=True, pack=1))


@gluon.jit
def _axis_offset(frequency, HAS_SECTIONS: gl.constexpr, IS_INTERLEAVED: gl.constexpr, AXIS_1: gl.constexpr, AXIS_2: gl.constexpr):
    """Return where in shared memory the axis of each frequency begins; see rotary's ``select_axis``."""
    if HAS_SECTIONS:
        if IS_INTERLEAVED:
            is_axis_1 = (frequency % 3 == 1) & (frequency < AXIS_1)
            is_axis_2 = (frequency % 3 == 2) & (frequency < AXIS_2)
            axis = gl.where(is_axis_1, 1, gl.where(is_axis_2, 2, 0))
        else:
            axis = (frequency >= AXIS_1).to(gl.int32) + (frequency >= AXIS_2).to(gl.int32)
        return axis * ROW
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
def _request_angles(base, Cos_ptr, Sin_ptr, stride_axis, AXES: gl.constexpr):
    for axis in gl.static_range(AXES):
        request_bytes(base + COS + axis * ROW, Cos_ptr + axis * stride_axis, ROW, base + ARRIVED)
        request_bytes(base + SIN + axis * ROW, Sin_ptr + axis * stride_axis, ROW, base + ARRIVED)


@gluon.jit
def _share_x(base, x, norm):
    """Store x, times the weight of its norm, in float32: its even columns, its odd columns, then a sum of each thread's squares."""
    N_WORDS: gl.constexpr = x.shape[0] * x.shape[1]
    place = gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, x.type.layout))[:, None] * x.shape[1]
    address = base + 4 * (place + gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, x.type.layout))[None, :])
    even, odd = low(x), high(x)
    store_shared_2(address, even * low(norm))
    store_shared_2(address + 4 * N_WORDS, odd * high(norm))
    squares = gl.reshape(even * even + odd * odd, [x.shape[0], 32, x.shape[1] // 32])
    store_of_thread(base + 8 * N_WORDS, gl.sum(squares, axis=2))


@gluon.jit
def _multiply(base, w_ptrs, tiles, words, eps, K: gl.constexpr):
    """Return the products of 32 rows of weights with the normalised x that :func:`_share_x` stored; ``tiles`` are the first of them."""
    # The threads' squares are added up beside the products, in every warp.
    squares_layout: gl.constexpr = _threads_layout()
    thread = gl.arange(0, 32 * N_WARPS, layout=squares_layout)
    squares = load_shared_4(base + 4 * K + thread * 4).to(gl.float32, bitcast=True)
    layout: gl.constexpr = w_ptrs.type.layout
    sums = gl.zeros([32, 128], gl.float32, layout=layout)
    for tile in gl.static_range(K // 256):
        address = base + tile * 512 + words * 4
        even, odd = load_shared_4(address).to(gl.float32, bitcast=True), load_shared_4(address + 2 * K).to(gl.float32, bitcast=True)
        sums += low(tiles[tile]) * even[None, :]
        sums += high(tiles[tile]) * odd[None, :]
        if tile + TILES_IN_FLIGHT < K // 256:
            tiles = tiles + (gl.load(w_ptrs + (tile + TILES_IN_FLIGHT) * 128, eviction_policy="evict_first"),)
    return gl.sum(sums, axis=1) * gl.rsqrt(gl.sum(squares, axis=0) / K + eps)


@gluon.jit
def _prepare_heads(
    base, k_head_ptr, v_head_ptr, position, rank, q_eps, k_eps,
    HAS_SECTIONS: gl.constexpr, IS_INTERLEAVED: gl.constexpr, AXIS_1: gl.constexpr, AXIS_2: gl.constexpr,
):  # fmt: skip
    """Normalise and rotate queries and key, put key and value into their tile, and write them into the cache, each where there is a place for it."""
    layout: gl.constexpr = _roles_layout()
    role = gl.arange(0, 4, layout=gl.SliceLayout(1, layout))  # of a warp: two query heads, the key, the value
    word = gl.arange(0, 32, layout=gl.SliceLayout(0, layout))
    address = base + (role * ROW)[:, None] + (word * 4)[None, :]
    a, b = load_shared(address + ROWS), load_shared(address + ROWS + HEAD)
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
    a, b = gl.where(is_value, a, rotated_a), gl.where(is_value, b, rotated_b)
    place = (position - rank * KEYS).to(gl.int32)
    has_place = (position >= rank * KEYS) & (position < (rank + 1) * KEYS)
    target = gl.where(role < 2, Q_HEADS + role * ROW, gl.where(role == 2, K_TILE, V_TILE) + place * ROW)
    target = base + target[:, None] + (word * 4)[None, :]
    is_stored = ((role < 2) | has_place).to(gl.int32)[:, None]
    store_shared(target, a, is_stored)
    store_shared(target + HEAD, b, is_stored)
    row_ptrs = gl.where(role == 2, _words(k_head_ptr), _words(v_head_ptr))[:, None] + (position * (HEAD // 2) + word)[None, :]
    is_written = ((role >= 2) & has_place).to(gl.int32)[:, None]
    store_global(row_ptrs, a, is_written)
    store_global(row_ptrs + HEAD // 4, b, is_written)


@gluon.jit
def _attend(base, scale, head, key, value_words, HAS_MASK: gl.constexpr):
    """Return maxima and sums of both heads' softmax over the keys of the tile, and their even and odd columns of values."""
    layout: gl.constexpr = _keys_layout()
    scored = gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout))
    word = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    # What is multiplied later is requested here too.
    k = load_shared_4(base + K_TILE + (scored * ROW)[:, None] + (word * 4)[None, :])
    q_0, q_1 = load_shared_4(base + Q_HEADS + word * 4), load_shared_4(base + Q_HEADS + ROW + word * 4)
    v_address = gl.expand_dims((head * 0)[:, None] + (key * ROW)[None, :], 2) + gl.expand_dims(value_words, 1) * 4
    v = load_shared_2(base + V_TILE + v_address)
    is_live = scored >= 0
    if HAS_MASK:
        is_live = load_shared_byte(base + MASK + scored) != 0
    scores_0 = gl.sum(low(k) * low(q_0)[None, :] + high(k) * high(q_0)[None, :], axis=1) * (scale * LOG2_E)
    scores_1 = gl.sum(low(k) * low(q_1)[None, :] + high(k) * high(q_1)[None, :], axis=1) * (scale * LOG2_E)
    store_shared(base + SCORES + scored * 4, gl.where(is_live, scores_0, float("-inf")).to(gl.int32, bitcast=True), scored * 0 + 1)
    store_shared(base + SCORES + 4 * KEYS + scored * 4, gl.where(is_live, scores_1, float("-inf")).to(gl.int32, bitcast=True), scored * 0 + 1)
    wait_for_cta()
    scores = load_shared(base + SCORES + (head * 4 * KEYS)[:, None] + (key * 4)[None, :]).to(gl.float32, bitcast=True)
    row_max = gl.max(scores, axis=1)
    origin = gl.where(row_max == float("-inf"), 0.0, row_max)
    weights = gl.exp2(scores - origin[:, None])
    is_attended, v = gl.broadcast(gl.expand_dims(scores != float("-inf"), 2), v)
    v = gl.where(is_attended, v, 0)
    shares = gl.expand_dims(weights, 2)
    return row_max, gl.sum(weights, axis=1), gl.sum(shares * low(v), axis=1), gl.sum(shares * high(v), axis=1)


@gluon.jit
def _join(base, head, tile, value_words, N_TILES: gl.constexpr):
    """Return the sums and columns of both heads over all tiles, once what the CTAs send has arrived."""
    wait_for_bytes(base + ARRIVED + 8)
    stats_address = base + STATS + (head * 128)[:, None] + (tile * 8)[None, :]
    tile_max, tile_sum = load_shared(stats_address).to(gl.float32, bitcast=True), load_shared(stats_address + 4).to(gl.float32, bitcast=True)
    address = gl.expand_dims((head * 4 * HEAD)[:, None] + (tile * 4 * GROUP * HEAD)[None, :], 2) + gl.expand_dims(value_words, 1) * 8
    even, odd = _load_partial(base + PARTIALS + address)
    tile_max = gl.where((head * 0)[:, None] + tile[None, :] < N_TILES, tile_max, float("-inf"))
    row_max = gl.max(tile_max, axis=1)
    origin = gl.where(row_max == float("-inf"), 0.0, row_max)
    weights = gl.exp2(tile_max - origin[:, None])
    row_sum = gl.sum(gl.where(weights != 0, tile_sum * weights, 0.0), axis=1)
    is_counted, even = gl.broadcast(gl.expand_dims(weights != 0, 2), even)
    shares = gl.expand_dims(weights, 2)
    even = gl.sum(gl.where(is_counted, even * shares, 0.0), axis=1)
    return row_sum, even, gl.sum(gl.where(is_counted, odd * shares, 0.0), axis=1)


@gluon.jit
def norm_qkv_attention_kernel(
    X_ptr, Norm_ptr, Q_proj_ptr, K_proj_ptr, V_proj_ptr, Q_weight_ptr, K_weight_ptr, Cos_ptr, Sin_ptr, K_cache_ptr, V_cache_ptr,
    Position_ptr, Mask_ptr, Out_ptr, eps, q_eps, k_eps, scale, k_stride_h, v_stride_h, stride_axis,
    K: gl.constexpr, N_TILES: gl.constexpr, HAS_SECTIONS: gl.constexpr, IS_INTERLEAVED: gl.constexpr, AXIS_1: gl.constexpr, AXIS_2: gl.constexpr,
    SHARED_BYTES: gl.constexpr, HAS_PDL: gl.constexpr,
):  # fmt: skip
    announce(HAS_PDL)
    memory, base = allocate(SHARED_BYTES)
    AXES: gl.constexpr = 3 if HAS_SECTIONS else 1
    BYTES_OF_MASK: gl.constexpr = 0 if Mask_ptr is None else KEYS
    X: gl.constexpr = END_OF_PARTIALS if N_TILES > 1 else PARTIALS
    prepare_barriers(base + ARRIVED, BYTES_TO_ATTEND + 2 * ROW * AXES + BYTES_OF_MASK, N_TILES * BYTES_OF_PARTIAL)
    k_head, rank = gl.program_id(0), cluster_rank()
    attends = rank < N_TILES

    # Requests that wait for no other kernel.
    layout: gl.constexpr = _weights_layout()
    rows = gl.arange(0, 32, layout=gl.SliceLayout(1, layout))
    words = gl.arange(0, 128, layout=gl.SliceLayout(0, layout))
    part = rank // 4  # two query heads, the key, the value
    first_row = rank % 4 * 32 + gl.where(part < GROUP, GROUP * k_head + part, k_head) * HEAD
    W_ptr = gl.where(part < GROUP, Q_proj_ptr, gl.where(part == GROUP, K_proj_ptr, V_proj_ptr)) + first_row * K
    w_ptrs = _words(W_ptr) + (rows * (K // 2))[:, None] + words[None, :]
    tiles = ()
    for tile in gl.static_range(min(TILES_IN_FLIGHT, K // 256)):
        tiles = tiles + (gl.load(w_ptrs + tile * 128, eviction_policy="evict_first"),)
    x_layout: gl.constexpr = _x_layout(K)
    share = gl.arange(0, N_WARPS, layout=gl.SliceLayout(1, x_layout)) * (K // 2 // N_WARPS)
    x_words = share[:, None] + gl.arange(0, K // 2 // N_WARPS, layout=gl.SliceLayout(0, x_layout))[None, :]
    norm = gl.load(_words(Norm_ptr) + x_words)
    position = gl.load(Position_ptr, volatile=True)
    position = gl.where(position < 0, position + N_TILES * KEYS, position)
    if attends:
        request_bytes(base + HEAD_WEIGHTS, Q_weight_ptr, ROW, base + ARRIVED)
        request_bytes(base + HEAD_WEIGHTS + ROW, K_weight_ptr, ROW, base + ARRIVED)
    arrive_at_cluster()
    wait_for_inputs(HAS_PDL)

    # x first, then what attention needs. Of the row that is written nothing is used, whatever was read.
    x = gl.load(_words(X_ptr) + x_words)
    k_head_ptr = K_cache_ptr + k_head.to(gl.int64) * k_stride_h
    v_head_ptr = V_cache_ptr + k_head.to(gl.int64) * v_stride_h
    if attends:
        request_bytes(base + K_TILE, k_head_ptr + rank * (KEYS * HEAD), KEYS * ROW, base + ARRIVED)
        request_bytes(base + V_TILE, v_head_ptr + rank * (KEYS * HEAD), KEYS * ROW, base + ARRIVED)
        if Mask_ptr is not None:
            request_bytes(base + MASK, Mask_ptr.to(gl.int64) + rank * KEYS, KEYS, base + ARRIVED)
        _request_angles(base, Cos_ptr, Sin_ptr, stride_axis, AXES)
    _share_x(base + X, x, norm)
    wait_for_cta()
    y = _multiply(base + X, w_ptrs, tiles, words, eps, K)
    wait_for_cluster()
    _send_rows(y, rank * 32 + rows, base, N_TILES)

    if attends:
        wait_for_bytes(base + ARRIVED)
        _prepare_heads(base, k_head_ptr, v_head_ptr, position, rank, q_eps, k_eps, HAS_SECTIONS, IS_INTERLEAVED, AXIS_1, AXIS_2)
        wait_for_cta()
        values_layout: gl.constexpr = _values_layout()
        pairs_layout: gl.constexpr = gl.SliceLayout(2, values_layout)
        columns_layout: gl.constexpr = gl.SliceLayout(1, values_layout)
        head = gl.arange(0, GROUP, layout=gl.SliceLayout(1, pairs_layout))
        key_or_tile = gl.arange(0, KEYS, layout=gl.SliceLayout(0, pairs_layout))
        head_of_columns = gl.arange(0, GROUP, layout=gl.SliceLayout(1, columns_layout))
        word = gl.arange(0, HEAD // 2, layout=gl.SliceLayout(0, columns_layout))
        value_words = (head_of_columns * 0)[:, None] + word[None, :]
        row_max, row_sum, even, odd = _attend(base, scale, head, key_or_tile, value_words, Mask_ptr is not None)
        if N_TILES > 1:
            partials = base + PARTIALS + rank * (4 * GROUP * HEAD) + (head_of_columns * 4 * HEAD)[:, None] + (word * 8)[None, :]
            _send_partial(even, odd, partials, base + ARRIVED + 8)
            _send_stats(row_max, row_sum, base + STATS + rank * 8 + head * 128, base + ARRIVED + 8)
        if rank == 0:
            if N_TILES > 1:
                row_sum, even, odd = _join(base, head, key_or_tile, value_words, N_TILES)
            divisor = gl.convert_layout(gl.where(row_sum == 0, 1.0, row_sum), gl.SliceLayout(1, columns_layout), assert_trivial=True)[:, None]
            out_ptrs = _words(Out_ptr) + k_head * HEAD + (head_of_columns * (HEAD // 2))[:, None] + word[None, :]
            gl.store(out_ptrs, pack(even / divisor, odd / divisor))
            gl.device_assert((position >= 0) & (position < N_TILES * KEYS), "kv_write: position is out of range")
    memory._keep_alive()
