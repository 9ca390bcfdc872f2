"""Scores of two query heads for quantised keys, for kernels of clusters to use."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.instructions import as_words, load_global_4, load_global_byte, load_global_half, load_shared_2, store_shared
from qtts_compile.kernels.clusters.memory import CODE_ROW, GROUP, HEAD, KEYS, LOG2_E, N_WARPS, Q_ROTATED, ROW, score_bytes, tiles_of_step
from qtts_compile.kernels.clusters.peaks import store_peaks, store_tile
from qtts_compile.kernels.clusters.rotation import rotate
from qtts_compile.kernels.clusters.tiles import each, multiply_tile, places, zeros
from qtts_compile.kernels.clusters.words import high, levels_of_codes, low, low_float16, pack
from qtts_compile.kernels.turboquant.kept import find_kept

_find_kept = gluon.jit(find_kept.fn)


@gluon.jit
def store_rotated(base, a, b):
    """Rotate the first two of four heads, queries, and store them."""
    head = gl.arange(0, 4, layout=gl.SliceLayout(1, a.type.layout))
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, a.type.layout))
    a0, a1, b0, b1 = rotate(low(a), high(a), low(b), high(b))
    address = base + Q_ROTATED + (head * ROW)[:, None] + (lane * 4)[None, :]
    is_query, factor = (head < GROUP).to(gl.int32)[:, None], HEAD.value**-0.5
    store_shared(address, pack(a0 * factor, a1 * factor), is_query)
    store_shared(address + HEAD, pack(b0 * factor, b1 * factor), is_query)


@gluon.jit
def load_coded_keys(
    Codes_ptr, Scales_ptr, Mask_ptr, first_tile, own_tiles, first_slot, row, start, SINKS: gl.constexpr, WINDOW: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    """Load as many of a CTA's tiles of keys as one step takes, those that are there, from ``first_tile`` on."""
    keys = ()
    for i in gl.static_range(0, STEP, N_WARPS):
        keys = keys + (_load_tile(Codes_ptr, Scales_ptr, Mask_ptr, first_tile + i, own_tiles, first_slot, row, start, SINKS, WINDOW),)
    return keys


@gluon.jit
def _load_tile(Codes_ptr, Scales_ptr, Mask_ptr, tile, own_tiles, first_slot, row, start, SINKS: gl.constexpr, WINDOW: gl.constexpr):
    """Load a tile of each warp: four words of the keys g and g + 8, their scales, and whether they count: kept tokens and what is masked do not."""
    warp, g, t, which = places()
    slot = first_slot + (tile + warp) * KEYS + g + 8 * which
    is_sink, is_recent = _find_kept(slot, row, start, SINKS, WINDOW)
    is_loaded = ((tile + warp < own_tiles) & ~is_sink & ~is_recent).to(gl.int32)
    words = load_global_4(as_words(Codes_ptr) + slot * (CODE_ROW // 4) + 4 * t, is_loaded)
    scales = load_global_half(Scales_ptr + slot, is_loaded)
    if Mask_ptr is not None:
        is_loaded = load_global_byte(Mask_ptr + slot, is_loaded)
    return words, scales, is_loaded


@gluon.jit
def score_codes(
    base, keys, Codes_ptr, Scales_ptr, Mask_ptr, own_tiles, first_slot, row, start, scale,
    SINKS: gl.constexpr, WINDOW: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """Store the scores of both heads for a CTA's keys, of which ``keys`` are the first step, and the largest scores of each warp."""
    STEP: gl.constexpr = tiles_of_step(TILES)
    STRIDE: gl.constexpr = score_bytes(TILES, STEP)
    queries, peaks = _load_queries(base), zeros() + float("-inf")
    for first in range(0, own_tiles, STEP):
        for i in gl.static_range(STEP // N_WARPS):
            if first + i * N_WARPS < own_tiles:
                peaks = _score_tile(base, queries, keys[i], first + i * N_WARPS, scale, peaks, STRIDE)
        if TILES > STEP:
            if first + STEP < own_tiles:
                keys = load_coded_keys(Codes_ptr, Scales_ptr, Mask_ptr, first + STEP, own_tiles, first_slot, row, start, SINKS, WINDOW, STEP)
    store_peaks(base, peaks)


@gluon.jit
def _load_queries(base):
    """Load the rotated queries that the words of a tile meet: eight coordinates of a head."""
    _, g, t, which = places()
    address = base + Q_ROTATED + g % GROUP * ROW + t * 64 + which * 4
    queries = ()
    for i in gl.static_range(8):
        queries = queries + (load_shared_2(address + i * 8),)
    return queries


@gluon.jit
def _score_tile(base, queries, keys, tile, scale, peaks, STRIDE: gl.constexpr):
    """Store the scores of both heads for a tile of each warp; return each lane's largest, of both heads."""
    words, scales, is_live = keys
    levels = ()
    for i in gl.static_range(4):
        levels = levels + (levels_of_codes(words[i]),)
    first, second = multiply_tile(levels, queries)
    unit_first, unit_second = each(low_float16(scales) * (scale * LOG2_E))
    return store_tile(base, first * unit_first, second * unit_second, is_live, tile, peaks, STRIDE)
