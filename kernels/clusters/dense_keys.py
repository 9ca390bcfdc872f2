"""Scores of two query heads for keys in bfloat16, for kernels of clusters to use."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.instructions import as_words, load_global_4, load_global_byte, load_shared_2
from qtts_compile.kernels.clusters.memory import GROUP, HEAD, KEYS, LOG2_E, N_WARPS, Q_HEADS, ROW, score_bytes
from qtts_compile.kernels.clusters.peaks import store_peaks, store_tile
from qtts_compile.kernels.clusters.tiles import multiply_tile, places, zeros


@gluon.jit
def load_dense_keys(Keys_ptr, Mask_ptr, tile, own_tiles, first_slot, row):
    """Load a tile of each warp: of the keys g and g + 8 four times four words, and whether they count: the new one is kept, and some are masked."""
    warp, g, t, which = places()
    slot = first_slot + (tile + warp) * KEYS + g + 8 * which
    is_live = ((tile + warp < own_tiles) & (slot != row)).to(gl.int32)
    words = ()
    for i in gl.static_range(4):
        words = words + (load_global_4(as_words(Keys_ptr) + slot * (HEAD // 2) + i * 16 + 4 * t, is_live),)
    if Mask_ptr is not None:
        is_live = load_global_byte(Mask_ptr + slot, is_live)
    return words, is_live


@gluon.jit
def score_dense(base, keys, Keys_ptr, Mask_ptr, own_tiles, first_slot, row, scale, TILES: gl.constexpr):
    """Store the scores of both heads for a CTA's keys, of which ``keys`` are the first of each warp, and the largest scores of each warp."""
    queries, peaks = _load_queries(base), zeros() + float("-inf")
    for first in range(0, own_tiles, N_WARPS):
        peaks = _score_tile(base, queries, keys, first, scale, peaks, score_bytes(TILES, N_WARPS))
        if TILES > N_WARPS:
            if first + N_WARPS < own_tiles:
                keys = load_dense_keys(Keys_ptr, Mask_ptr, first + N_WARPS, own_tiles, first_slot, row)
    store_peaks(base, peaks)


@gluon.jit
def _load_queries(base):
    """Load the queries that the words of a tile meet: eight coordinates of a head."""
    _, g, t, which = places()
    address = base + Q_HEADS + g % GROUP * ROW + t * 16 + which * 4
    queries = ()
    for i in gl.static_range(4):
        queries = queries + (load_shared_2(address + i * 64), load_shared_2(address + i * 64 + 8))
    return queries


@gluon.jit
def _score_tile(base, queries, keys, tile, scale, peaks, STRIDE: gl.constexpr):
    """Store the scores of both heads for a tile of each warp; return each lane's largest, of both heads."""
    words, is_live = keys
    first, second = multiply_tile(words, queries)
    return store_tile(base, first * (scale * LOG2_E), second * (scale * LOG2_E), is_live, tile, peaks, STRIDE)
