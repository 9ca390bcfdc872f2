"""Sums of values of tiles, weighted by scores of two query heads, from warps to the first CTA, for kernels of clusters to use."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.attend import places_of_pairs, send_columns, send_partial, send_stats, sum_values
from qtts_compile.kernels.clusters.heads import roles_layout
from qtts_compile.kernels.clusters.instructions import load_floats, load_shared_2, store_floats, wait_for_cta
from qtts_compile.kernels.clusters.memory import (
    ALL_SCORES,
    ARRIVED,
    COLUMNS,
    GROUP,
    HEAD,
    KEPT_COLUMNS,
    KEYS,
    N_WARPS,
    PADDED_HEAD,
    PARTIALS,
    SCORES_OF_TILES,
    STATS,
    SUMS,
)
from qtts_compile.kernels.clusters.peaks import largest_of
from qtts_compile.kernels.clusters.rotation import unrotate
from qtts_compile.kernels.clusters.tiles import places, sum_of_quad, zeros


@gluon.jit
def no_sums():
    """Return zeros to begin with: sums of the first and of the second of each pair of columns of a lane's words, for both heads, and of weights."""
    zero = zeros()
    return (zero, zero, zero, zero, zero, zero, zero, zero), (zero, zero, zero, zero, zero, zero, zero, zero), zero


@gluon.jit
def weights_of_tile(base, tile, own_tiles, origins, STRIDE: gl.constexpr):
    """Return the weights of the keys 4 t, 4 t + 1 and 4 t + 2, 4 t + 3 of a tile of each warp, in pairs, for the head g % 2; zeros where none is."""
    warp, g, t, which = places()
    address = base + SCORES_OF_TILES + g % GROUP * STRIDE + ((tile + warp) * KEYS + 4 * t + which) * 4
    in_tiles = tile + warp < own_tiles
    first = _weights(load_shared_2(address), origins, in_tiles)
    second = _weights(load_shared_2(address + 8), origins, in_tiles)
    return first, second


@gluon.jit
def _weights(scores, origins, in_tiles):
    scores = scores.to(gl.float32, bitcast=True)
    return gl.where(in_tiles, gl.exp2(scores - origins), 0.0)


@gluon.jit
def store_sums(base, sums, column, NEXT: gl.constexpr):
    """Store each warp's sums of both heads: a lane's first four words begin at a ``column``, its others ``NEXT`` bytes behind it."""
    warp, g, _, head = places()
    total = sum_of_quad(sums[2])
    store_floats(base + SUMS + warp * 8 + g % GROUP * 4, total)
    address = base + COLUMNS + (warp * GROUP + head) * PADDED_HEAD + _offset_of(column)
    for i in gl.static_range(8):
        word = address + i // 4 * NEXT + i % 4 * 8
        store_floats(word, sums[0][i])
        store_floats(word + 4, sums[1][i])


@gluon.jit
def _offset_of(column):
    """Return where a column is: after each 16, two are left out, so that lanes meet in few banks."""
    return (column + column // 16 * 2) * 4


@gluon.jit
def sum_kept(base, head, key_or_tile, v, own_tiles, STRIDE: gl.constexpr):
    """Return the largest score of both heads, and of the kept tokens the sums of weights and of the even and the odd columns of values."""
    scores = load_floats(base + ALL_SCORES + (head * STRIDE)[:, None] + (key_or_tile * 4)[None, :])
    row_max = gl.max(scores, axis=1)
    if own_tiles > 0:
        row_max = largest_of(base, head, row_max)
    weights, even, odd = sum_values(scores, row_max, v)
    return row_max, gl.sum(weights, axis=1), even, odd


@gluon.jit
def send_sums(base, rank, row_max, row_sum, even, odd, own_tiles, IS_ROTATED: gl.constexpr):
    """Send what :func:`sum_kept` returned, with what :func:`store_sums` stored of tiles added to it, to the first CTA."""
    head, _, head_of_columns, word = places_of_pairs()
    partials = base + PARTIALS + rank * (4 * GROUP * HEAD)
    if own_tiles > 0:
        _store_kept(base, even, odd, head_of_columns, word)
        wait_for_cta()
        _send_all_columns(base, partials, IS_ROTATED)
        row_sum += _sum_of(base, head)
    else:
        send_partial(even, odd, partials + head_of_columns * (4 * HEAD) + word * 8, base + ARRIVED + 8)
    send_stats(row_max, row_sum, base + STATS + rank * 8 + head * 128, base + ARRIVED + 8)


@gluon.jit
def _sum_of(base, head):
    """Return the sum of the weights of a head's tiles."""
    total = load_floats(base + SUMS + head * 4)
    for warp in gl.static_range(1, N_WARPS):
        total += load_floats(base + SUMS + warp * 8 + head * 4)
    return total


@gluon.jit
def _store_kept(base, even, odd, head, word):
    """Store both heads' sums of kept values."""
    address = base + KEPT_COLUMNS + head * (4 * HEAD) + word * 8
    store_floats(address, even)
    store_floats(address + 4, odd)


@gluon.jit
def _send_all_columns(base, partials, IS_ROTATED: gl.constexpr):
    """Send both heads' sums of all values, of which those of tiles are rotated back if they must be, to the first CTA."""
    layout: gl.constexpr = roles_layout()
    head = gl.arange(0, 4, layout=gl.SliceLayout(1, layout)) % GROUP
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, layout))
    address = base + COLUMNS + (head * PADDED_HEAD)[:, None] + _offset_of(2 * lane)[None, :]
    second_half = PADDED_HEAD // 2
    a0, a1 = load_floats(address), load_floats(address + 4)
    b0, b1 = load_floats(address + second_half), load_floats(address + second_half + 4)
    kept_address = base + KEPT_COLUMNS + (head * 4 * HEAD)[:, None] + (lane * 8)[None, :]
    kept_a0, kept_a1 = load_floats(kept_address), load_floats(kept_address + 4)
    kept_b0, kept_b1 = load_floats(kept_address + 2 * HEAD), load_floats(kept_address + 2 * HEAD + 4)
    for warp in gl.static_range(1, N_WARPS):
        own = address + warp * GROUP * PADDED_HEAD
        a0 += load_floats(own)
        a1 += load_floats(own + 4)
        b0 += load_floats(own + second_half)
        b1 += load_floats(own + second_half + 4)
    if IS_ROTATED:
        factor: gl.constexpr = HEAD.value**-0.5
        a0, a1, b0, b1 = unrotate(a0 * factor, a1 * factor, b0 * factor, b1 * factor)
    partials = partials + (head * 4 * HEAD)[:, None] + (lane * 8)[None, :]
    send_columns(kept_a0 + a0, kept_a1 + a1, partials, base + ARRIVED + 8)
    send_columns(kept_b0 + b0, kept_b1 + b1, partials + 2 * HEAD, base + ARRIVED + 8)
