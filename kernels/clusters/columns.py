"""What the warps of a CTA found in its tiles, joined and sent to the first CTA of the cluster, for kernels of clusters to use."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.heads import roles_layout
from qtts_compile.kernels.clusters.join import inverse_of, send_columns, send_found, send_stats
from qtts_compile.kernels.clusters.memory import (
    ARRIVED,
    COLUMNS,
    GROUP,
    HEAD,
    KEPT_COLUMNS,
    KEPT_STATS,
    N_WARPS,
    PADDED_HEAD,
    PARTIALS,
    PEAKS,
    STATS,
    SUMS,
)
from qtts_compile.kernels.clusters.rotation import unrotate_half, with_other_half
from qtts_compile.kernels.clusters.softmax import origin_of
from qtts_compile.kernels.clusters.tiles import places
from qtts_compile.kernels.ptx.global_memory import as_words, store_global
from qtts_compile.kernels.ptx.shared_memory import load_floats_2, load_floats_4, store_floats, store_shared_2_each, wait_for_cta
from qtts_compile.kernels.ptx.words import pack


@gluon.jit
def store_found_in_tiles(base, found, column, NEXT: gl.constexpr):
    """Store what each warp found in tiles: a lane's first four words begin at a ``column``, its others ``NEXT`` bytes behind it."""
    peaks, sums, even, odd = found
    warp, _, _, head = places()
    store_floats(base + PEAKS + head * (4 * N_WARPS) + warp * 4, peaks)
    store_floats(base + SUMS + head * (4 * N_WARPS) + warp * 4, sums)
    address = base + COLUMNS + (warp * GROUP + head) * PADDED_HEAD + _offset_of(column)
    for i in gl.static_range(8):
        store_shared_2_each(address + i // 4 * NEXT + i % 4 * 8, even[i], odd[i])


@gluon.jit
def _offset_of(column):
    """Return where a column is: after each 16, two are left out, so that lanes meet in few banks."""
    return (column + column // 16 * 2) * 4


@gluon.jit
def store_found_in_shared_tile(base, found):
    """Store what the warps found in the tile in shared memory."""
    peaks, sums, even, odd = found
    warp, g, _, head = places()
    store_shared_2_each(base + KEPT_STATS + head * 8, peaks, sums)
    address = base + KEPT_COLUMNS + head * (4 * HEAD) + (16 * warp + 2 * g) * 8
    for i in gl.static_range(2):
        store_shared_2_each(address + i * 8, even[i], odd[i])


@gluon.jit
def keep_or_send(base, rank, found, has_more):
    """Store what the warps found in the tile in shared memory for :func:`send_all`, or send it if the CTA has found no more than that."""
    if has_more:
        store_found_in_shared_tile(base, found)
    else:
        send_found(base, rank, found)


@gluon.jit
def _roles():
    """Return the head of each warp, which half of its columns the warp sends, and the lanes, which have two columns each."""
    layout: gl.constexpr = roles_layout()
    warp = gl.arange(0, N_WARPS, layout=gl.SliceLayout(1, layout))
    return warp % GROUP, warp // GROUP, gl.arange(0, 32, layout=gl.SliceLayout(0, layout))


@gluon.jit
def _place_of_columns(head, half, lane):
    """Return where the two columns of a lane are among those of both heads."""
    return (head * (4 * HEAD) + half * (2 * HEAD))[:, None] + (lane * 8)[None, :]


@gluon.jit
def _send(base, part, target, head, place, even, odd, peak, total):
    send_columns(even, odd, base + PARTIALS + part * (4 * GROUP * HEAD) + place, base + ARRIVED + 8, target)
    send_stats(peak, total, base + STATS + part * 8 + head * 128, base + ARRIVED + 8, target)


@gluon.jit
def send_nothing(base, part, target):
    """Send to the CTA that joins that nothing counts, so that a CTA need not attend in order to leave."""
    head, half, lane = _roles()
    layout: gl.constexpr = roles_layout()
    zeros = gl.zeros([4, 32], gl.float32, layout=layout)
    _send(base, part, target, head, _place_of_columns(head, half, lane), zeros, zeros, head * 0.0 - float("inf"), head * 0.0)


@gluon.jit
def send_all(base, part, target, has_kept, IS_ROTATED: gl.constexpr):
    """Send what the warps stored, as what one of the CTAs of a pair found, to the one that joins, which has the rank ``target``."""
    wait_for_cta()
    head, half, lane = _roles()
    even, odd, peak, total = _join_warps(base, has_kept, IS_ROTATED)
    _send(base, part, target, head, _place_of_columns(head, half, lane), even, odd, peak, total)


@gluon.jit
def store_all(base, Out_ptr, pair, IS_ROTATED: gl.constexpr):
    """Store what the warps stored of tiles and of the shared one as the result of a pair of a text and a key head, whose only CTA this is."""
    wait_for_cta()
    head, half, lane = _roles()
    even, odd, _, total = _join_warps(base, True, IS_ROTATED)
    inverse = inverse_of(total)[:, None]
    ptrs = as_words(Out_ptr) + pair * HEAD + (head * (HEAD // 2) + half * (HEAD // 4))[:, None] + lane[None, :]
    store_global(ptrs, pack(even * inverse, odd * inverse), (lane >= 0).to(gl.int32)[None, :])


@gluon.jit
def _join_warps(base, has_kept, IS_ROTATED: gl.constexpr):
    """Return what the warps stored: of tiles, rotated back if it is of rotated values, and of the shared one if ``has_kept``."""
    layout: gl.constexpr = roles_layout()
    head, half, lane = _roles()
    peaks, sums = load_floats_4(base + PEAKS + head * (4 * N_WARPS)), load_floats_4(base + SUMS + head * (4 * N_WARPS))
    peak = gl.maximum(gl.maximum(peaks[0], peaks[1]), gl.maximum(peaks[2], peaks[3]))
    kept_peak, kept_total = head * 0.0 - float("inf"), head * 0.0
    if has_kept:
        kept_peak, kept_total = load_floats_2(base + KEPT_STATS + head * 8)
    peak = gl.maximum(peak, kept_peak)
    origin = origin_of(peak)
    kept_factor = gl.exp2(kept_peak - origin)
    total = kept_total * kept_factor
    address = base + COLUMNS + (head * PADDED_HEAD)[:, None] + _offset_of(2 * lane)[None, :]
    own_half = (half * (PADDED_HEAD // 2))[:, None]
    even, odd = gl.zeros([4, 32], gl.float32, layout=layout), gl.zeros([4, 32], gl.float32, layout=layout)
    for i in gl.static_range(N_WARPS):
        factor = gl.exp2(peaks[i] - origin)
        total += sums[i] * factor
        own = address + i * GROUP * PADDED_HEAD
        new_even, new_odd = load_floats_2(own + own_half)
        if IS_ROTATED:
            other_even, other_odd = load_floats_2(own + PADDED_HEAD // 2 - own_half)
            new_even, new_odd = with_other_half(new_even, other_even, half), with_other_half(new_odd, other_odd, half)
        even, odd = even + new_even * factor[:, None], odd + new_odd * factor[:, None]
    if IS_ROTATED:
        even, odd = unrotate_half(base, even, odd, half)
    if has_kept:
        kept_even, kept_odd = load_floats_2(base + KEPT_COLUMNS + _place_of_columns(head, half, lane))
        even, odd = even + kept_even * kept_factor[:, None], odd + kept_odd * kept_factor[:, None]
    return even, odd, peak, total
