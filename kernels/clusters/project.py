"""Products of a few rows of weights with a row that is normalised in passing, for kernels of clusters to use."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.memory import GROUP, HEAD, N_WARPS, TILES_IN_FLIGHT, everywhere, linear_layout
from qtts_compile.kernels.ptx.global_memory import as_words
from qtts_compile.kernels.ptx.shared_memory import load_shared_4, store_of_thread, store_shared_2
from qtts_compile.kernels.ptx.words import high, low


@gluon.constexpr_function
def weights_layout():
    """Rows and words of weights [32, 128]: a warp has eight whole rows."""
    return gl.BlockedLayout([8, 4], [1, 32], [4, 1], [1, 0], cga_layout=everywhere(2))


@gluon.constexpr_function
def x_layout_of(width):
    """Words of x [4, width / 8], each once in the CTA."""
    return gl.BlockedLayout([1, width // 256], [1, 32], [4, 1], [1, 0], cga_layout=everywhere(2))


@gluon.constexpr_function
def _threads_layout():
    """As many elements as threads, in every warp."""
    return linear_layout([[1], [2]], [[4 * 2**i] for i in range(5)], [[0], [0]], [128])


@gluon.jit
def request_rows(Q_proj_ptr, K_proj_ptr, V_proj_ptr, k_head, rank, K: gl.constexpr):
    """Return pointers to the words of the 32 rows of weights that a CTA of the cluster of a key head multiplies, and the first tiles of them."""
    layout: gl.constexpr = weights_layout()
    rows = gl.arange(0, 32, layout=gl.SliceLayout(1, layout))
    words = gl.arange(0, 128, layout=gl.SliceLayout(0, layout))
    part = rank // 4  # two query heads, the key, the value
    first_row = rank % 4 * 32 + gl.where(part < GROUP, GROUP * k_head + part, k_head) * HEAD
    W_ptr = gl.where(part < GROUP, Q_proj_ptr, gl.where(part == GROUP, K_proj_ptr, V_proj_ptr)) + first_row * K
    w_ptrs = as_words(W_ptr) + (rows * (K // 2))[:, None] + words[None, :]
    tiles = ()
    for tile in gl.static_range(min(TILES_IN_FLIGHT, K // 256)):
        tiles = tiles + (gl.load(w_ptrs + tile * 128, eviction_policy="evict_first"),)
    return w_ptrs, tiles


@gluon.jit
def words_of_x(K: gl.constexpr):
    """Return which words of x a thread shares."""
    layout: gl.constexpr = x_layout_of(K)
    share = gl.arange(0, N_WARPS, layout=gl.SliceLayout(1, layout)) * (K // 2 // N_WARPS)
    return share[:, None] + gl.arange(0, K // 2 // N_WARPS, layout=gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def share_x(base, x, norm):
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
def multiply(base, w_ptrs, tiles, eps, K: gl.constexpr):
    """Return the products of 32 rows of weights with the normalised x that :func:`share_x` stored; ``tiles`` are the first of them."""
    # The threads' squares are added up beside the products, in every warp.
    squares_layout: gl.constexpr = _threads_layout()
    thread = gl.arange(0, 32 * N_WARPS, layout=squares_layout)
    squares = load_shared_4(base + 4 * K + thread * 4).to(gl.float32, bitcast=True)
    layout: gl.constexpr = w_ptrs.type.layout
    words = gl.arange(0, 128, layout=gl.SliceLayout(0, layout))
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
def send_rows(y, rank, base, n_targets):
    """Send the sums of a CTA's rows ``[32]``, of which a thread has fours, as bfloat16 to the first CTAs of the cluster: a lane serves one."""
    rows = rank * 32 + gl.arange(0, 32, layout=y.type.layout)
    # $4-7 sums, $8-11 rows, $12-15 base, $16-19 how many CTAs; 256 is ROWS
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
