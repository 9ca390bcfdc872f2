"""Which slots of a cache an attention reads, and which CTA of a cluster reads them, for kernels of clusters to use."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.memory import ARRIVED, FLAGS, KEYS, N_CTAS, N_WARPS, linear_layout
from qtts_compile.kernels.clusters.tiles import places
from qtts_compile.kernels.ptx.global_memory import as_words


@gluon.jit
def row_of(position, S):
    """Return the row of the cache that is written, counted from the end if negative, and whether there is one; row 0 if not."""
    position = gl.where(position < 0, position + S, position)
    in_cache = (position >= 0) & (position < S)
    return gl.where(in_cache, position, 0).to(gl.int32), in_cache


@gluon.jit
def end_of_codes(row, start, SINKS: gl.constexpr, WINDOW: gl.constexpr):
    """Return from which slot on no codes of tokens before the new one count: tokens in the window are kept, and so are sinks just before it."""
    end = row + 1 - WINDOW
    return gl.maximum(gl.where(end <= start + SINKS, gl.minimum(end, start), end), 0)


@gluon.jit
def live_kept(Mask_ptr, kept_tile, row, start, SINKS: gl.constexpr, WINDOW: gl.constexpr):
    """Tell which rows g and g + 8 of a CTA's tile of kept tokens hold one that is attended to."""
    _, g, _, which = places()
    kept_row = kept_tile * KEYS + g + 8 * which
    age = row % WINDOW - (kept_row - SINKS)
    slot = gl.where(kept_row < SINKS, start + kept_row, row - gl.where(age < 0, age + WINDOW, age))
    is_sink = (slot >= start) & (slot < start + SINKS)
    # The new token is read where recent ones are, and other sinks where sinks are.
    is_live = (kept_row < SINKS + WINDOW) & (slot >= 0) & gl.where(kept_row < SINKS, slot < row, (slot == row) | ~is_sink)
    if Mask_ptr is not None:
        is_live = is_live & gl.load(Mask_ptr + slot, mask=is_live, other=0).to(gl.int1)
    return is_live


@gluon.constexpr_function
def threads_layout():
    """An element of each thread [128]."""
    return linear_layout([], [[2**i] for i in range(5)], [[32], [64]], [32 * N_WARPS.value])


@gluon.jit
def _word_of_thread(rank, S):
    """Return the number of each thread's word in a CTA's share of a mask of up to 8192 bytes, and whether there is one."""
    layout: gl.constexpr = threads_layout()
    n_words = (S // 4 + N_CTAS - 1) // N_CTAS
    thread = gl.arange(0, 32 * N_WARPS, layout=layout)
    word = rank * n_words + thread
    return word, (thread < n_words) & (word < S // 4)


@gluon.jit
def load_behind(Mask_ptr, rank, row, S):
    """Load those words of a CTA's share of a mask that tell of slots behind the new token."""
    word, exists = _word_of_thread(rank, S)
    return gl.load(as_words(Mask_ptr) + word, mask=exists & (4 * word + 3 > row), other=0)


@gluon.jit
def send_flags(words, rank, row, S, base):
    """Send to all CTAs of the cluster, from each warp, whether the words let a slot behind the new token count: a lane serves one."""
    n_before = gl.minimum(gl.maximum(row + 1 - 4 * _word_of_thread(rank, S)[0], 0), 3)
    address = base + FLAGS + rank * (4 * N_WARPS) + gl.arange(0, 32 * N_WARPS, layout=words.type.layout) // 32 * 4
    gl.inline_asm_elementwise(
        """{
        .reg .pred p; .reg .u32 lane, to, bar; .reg .b32 any;
        mov.u32 lane, %laneid;
        setp.lt.u32 p, lane, 16;
        redux.sync.or.b32 any, $1, -1;
        @p mapa.shared::cluster.u32 bar, $3, lane;
        @p mapa.shared::cluster.u32 to, $2, lane;
        @p st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [to], any, [bar];
        mov.u32 $0, 0;
        }""",
        "=r,r,r,r", [words >> (8 * n_before), address, base + ARRIVED], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def any_behind(base):
    """Tell whether any warp of the cluster sent that a slot behind the new token counts."""
    flags = gl.inline_asm_elementwise(
        """{
        .reg .u32 at; .reg .b32 first, second;
        mov.u32 at, %laneid;
        mad.lo.u32 at, at, 8, $1;
        ld.shared.v2.b32 {first, second}, [at];
        or.b32 first, first, second;
        redux.sync.or.b32 $0, first, -1;
        }""",
        "=r,r", [base + FLAGS], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    return flags != 0


@gluon.jit
def any_live(Mask_ptr, is_looked_at):
    """Tell whether the first 16 bytes of a mask let any slot count, if they are looked at."""
    words = Mask_ptr.to(gl.pointer_type(gl.int64))
    first, second = gl.load(words, mask=is_looked_at, other=0, volatile=True), gl.load(words + 1, mask=is_looked_at, other=0, volatile=True)
    return (first | second) != 0


@gluon.jit
def deal(n_tiles, part, PARTS: gl.constexpr):
    """Return the first slot that one of so many CTAs attends to, and how many tiles: as many for each warp, so that the last CTAs may have none."""
    most = (n_tiles + PARTS * N_WARPS - 1) // (PARTS * N_WARPS) * N_WARPS
    return part * most * KEYS, gl.minimum(gl.maximum(n_tiles - part * most, 0), most)
