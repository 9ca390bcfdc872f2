"""Attention of two query heads over a tile of 16 keys, and of a cluster over all its tiles, for kernels of clusters to use."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.instructions import (
    as_words,
    load_floats,
    load_shared_2,
    load_shared_4,
    load_shared_byte,
    store_floats,
    wait_for_bytes,
    wait_for_cta,
)
from qtts_compile.kernels.clusters.memory import (
    ARRIVED,
    GROUP,
    HEAD,
    K_TILE,
    KEYS,
    LOG2_E,
    MASK,
    PARTIALS,
    Q_HEADS,
    ROW,
    SCORES,
    STATS,
    V_TILE,
    linear_layout,
)
from qtts_compile.kernels.clusters.words import high, low, pack


@gluon.constexpr_function
def keys_layout():
    """Words of keys [16, 64]: 16 lanes share one."""
    return linear_layout([[0, 1], [0, 2], [8, 0]], [[0, 4], [0, 8], [0, 16], [0, 32], [1, 0]], [[2, 0], [4, 0]], [16, 64])


@gluon.constexpr_function
def _values_layout():
    """Heads, keys or tiles, and words [2, 16, 64]: a warp has one head and half the words."""
    registers, warps = [[0, 0, 1], [0, 4, 0], [0, 8, 0], [0, 0, 16]], [[1, 0, 0], [0, 0, 32]]
    return linear_layout(registers, [[0, 0, 2], [0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0]], warps, [2, 16, 64])


@gluon.jit
def places_of_pairs():
    """Return head, and key or tile, of pairs that share a thread's values, and head and word of their columns."""
    layout: gl.constexpr = _values_layout()
    pairs: gl.constexpr = gl.SliceLayout(2, layout)
    columns: gl.constexpr = gl.SliceLayout(1, layout)
    head, key_or_tile = gl.arange(0, GROUP, layout=gl.SliceLayout(1, pairs)), gl.arange(0, KEYS, layout=gl.SliceLayout(0, pairs))
    head_of_columns, word = gl.arange(0, GROUP, layout=gl.SliceLayout(1, columns)), gl.arange(0, HEAD // 2, layout=gl.SliceLayout(0, columns))
    return head, key_or_tile, head_of_columns[:, None] + 0 * word[None, :], 0 * head_of_columns[:, None] + word[None, :]


@gluon.jit
def load_keys(base):
    """Load the tile's keys, and both queries."""
    layout: gl.constexpr = keys_layout()
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout))
    word = gl.arange(0, HEAD // 2, layout=gl.SliceLayout(0, layout))
    k = load_shared_4(base + K_TILE + (key * ROW)[:, None] + (word * 4)[None, :])
    return k, load_shared_4(base + Q_HEADS + word * 4), load_shared_4(base + Q_HEADS + ROW + word * 4)


@gluon.jit
def load_values(base, head, key, value_words):
    """Load the tile's values."""
    address = gl.expand_dims((head * 0)[:, None] + (key * ROW)[None, :], 2) + gl.expand_dims(value_words, 1) * 4
    return load_shared_2(base + V_TILE + address)


@gluon.jit
def store_scores(address, STRIDE: gl.constexpr, keys, is_live, scale):
    """Store the scores of both heads, ``STRIDE`` bytes from each other, in units of log2, and -inf for keys that are not live."""
    k, q_0, q_1 = keys
    key = gl.arange(0, KEYS, layout=is_live.type.layout)
    scores_0 = gl.sum(low(k) * low(q_0)[None, :] + high(k) * high(q_0)[None, :], axis=1) * (scale * LOG2_E)
    scores_1 = gl.sum(low(k) * low(q_1)[None, :] + high(k) * high(q_1)[None, :], axis=1) * (scale * LOG2_E)
    store_floats(address + key * 4, gl.where(is_live, scores_0, float("-inf")))
    store_floats(address + STRIDE + key * 4, gl.where(is_live, scores_1, float("-inf")))


@gluon.jit
def store_no_scores(address, STRIDE: gl.constexpr):
    """Store scores of keys that are not there, as :func:`store_scores` does."""
    layout: gl.constexpr = keys_layout()
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout))
    nothing = key * 0.0 - float("inf")
    store_floats(address + key * 4, nothing)
    store_floats(address + STRIDE + key * 4, nothing)


@gluon.jit
def origin_of(peak):
    """Return what scores are counted from before they become weights: the largest, or zero if none counts."""
    return gl.where(peak == float("-inf"), 0.0, peak)


@gluon.jit
def sum_values(scores, row_max, v):
    """Return the weights of keys, and both heads' sums of the even and the odd columns of values."""
    weights = gl.exp2(scores - origin_of(row_max)[:, None])
    is_attended, v = gl.broadcast(gl.expand_dims(scores != float("-inf"), 2), v)
    v = gl.where(is_attended, v, 0)
    shares = gl.expand_dims(weights, 2)
    return weights, gl.sum(shares * low(v), axis=1), gl.sum(shares * high(v), axis=1)


@gluon.jit
def attend(base, scale, head, key, value_words, HAS_MASK: gl.constexpr):
    """Return maxima and sums of both heads' softmax over the keys of the tile, and their even and odd columns of values."""
    keys = load_keys(base)
    v = load_values(base, head, key, value_words)  # they are multiplied later, and requested here too
    layout: gl.constexpr = keys_layout()
    scored = gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout))
    is_live = scored >= 0
    if HAS_MASK:
        is_live = load_shared_byte(base + MASK + scored) != 0
    store_scores(base + SCORES, 4 * KEYS, keys, is_live, scale)
    wait_for_cta()
    scores = load_floats(base + SCORES + (head * 4 * KEYS)[:, None] + (key * 4)[None, :])
    row_max = gl.max(scores, axis=1)
    weights, even, odd = sum_values(scores, row_max, v)
    return row_max, gl.sum(weights, axis=1), even, odd


@gluon.jit
def send_partial(even, odd, addresses, barrier):
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


def _send_pair(is_sent: str) -> str:
    """Return PTX by which lanes of the first two warps send two float32 to the first CTA; ``is_sent`` narrows p down to them, t is the thread."""
    return f"""{{
        .reg .pred p; .reg .u32 t, to, bar;
        mov.u32 t, %tid.x;
        setp.lt.u32 p, t, 64;
        {is_sent}
        mapa.shared::cluster.u32 to, $3, 0;
        mapa.shared::cluster.u32 bar, $4, 0;
        @p st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [to], {{$1, $2}}, [bar];
        mov.u32 $0, 0;
        }}"""


FROM_EACH_LANE = gl.constexpr(_send_pair(""))
FROM_FIRST_LANES = gl.constexpr(_send_pair("and.b32 t, t, 31; setp.eq.and.u32 p, t, 0, p;"))


@gluon.jit
def send_columns(first, second, addresses, barrier):
    """Send two columns that follow each other to the first CTA: the first two warps do, as the others repeat them."""
    gl.inline_asm_elementwise(FROM_EACH_LANE, "=r,f,f,r,r", [first, second, addresses, barrier], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def send_stats(row_max, row_sum, addresses, barrier):
    """Send maximum and sum to the first CTA: the first two warps have a head each, and lane 0 sends."""
    gl.inline_asm_elementwise(FROM_FIRST_LANES, "=r,f,f,r,r", [row_max, row_sum, addresses, barrier], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _load_partial(addresses):
    """Load the even and the odd columns at addresses of which each thread has pairs."""
    return gl.inline_asm_elementwise(
        "ld.shared.v4.f32 {$0, $2, $1, $3}, [$4];", "=f,=f,=f,=f,r,r", [addresses], dtype=(gl.float32, gl.float32), is_pure=False, pack=2
    )


@gluon.jit
def join(base, head, tile, value_words, N_TILES: gl.constexpr):
    """Return the sums and columns of both heads over all tiles, once what the CTAs send has arrived."""
    wait_for_bytes(base + ARRIVED + 8)
    stats_address = base + STATS + (head * 128)[:, None] + (tile * 8)[None, :]
    tile_max, tile_sum = load_floats(stats_address), load_floats(stats_address + 4)
    address = gl.expand_dims((head * 4 * HEAD)[:, None] + (tile * 4 * GROUP * HEAD)[None, :], 2) + gl.expand_dims(value_words, 1) * 8
    even, odd = _load_partial(base + PARTIALS + address)
    tile_max = gl.where((head * 0)[:, None] + tile[None, :] < N_TILES, tile_max, float("-inf"))
    row_max = gl.max(tile_max, axis=1)
    weights = gl.exp2(tile_max - origin_of(row_max)[:, None])
    row_sum = gl.sum(gl.where(weights != 0, tile_sum * weights, 0.0), axis=1)
    is_counted, even = gl.broadcast(gl.expand_dims(weights != 0, 2), even)
    shares = gl.expand_dims(weights, 2)
    even = gl.sum(gl.where(is_counted, even * shares, 0.0), axis=1)
    return row_sum, even, gl.sum(gl.where(is_counted, odd * shares, 0.0), axis=1)


@gluon.jit
def store_result(Out_ptr, k_head, row_sum, even, odd):
    """Store both heads' columns, divided by the sums of their weights; zeros where nothing counts."""
    _, _, head, word = places_of_pairs()
    divisor = gl.convert_layout(gl.where(row_sum == 0, 1.0, row_sum), gl.SliceLayout(1, even.type.layout), assert_trivial=True)[:, None]
    gl.store(as_words(Out_ptr) + k_head * HEAD + head * (HEAD // 2) + word, pack(even / divisor, odd / divisor))
