"""Sums of quantised values, weighted by scores of two query heads, for kernels of clusters to use."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.columns import no_sums, store_sums, weights_of_tile
from qtts_compile.kernels.clusters.instructions import as_words, load_global_2, load_global_half
from qtts_compile.kernels.clusters.memory import CODE_ROW, KEYS, N_WARPS, score_bytes, tiles_of_step
from qtts_compile.kernels.clusters.peaks import origins_of
from qtts_compile.kernels.clusters.tiles import places
from qtts_compile.kernels.clusters.words import add_product, levels_of_codes, low_float16, pack_pairs, transpose_pairs


@gluon.jit
def load_coded_values(Codes_ptr, Scales_ptr, first_tile, own_tiles, first_slot, STEP: gl.constexpr):
    """Load as many of a CTA's tiles of values as one step takes, those that are there, from ``first_tile`` on."""
    values = ()
    for i in gl.static_range(0, STEP, N_WARPS):
        values = values + (_load_tile(Codes_ptr, Scales_ptr, first_tile + i, own_tiles, first_slot),)
    return values


@gluon.jit
def _load_tile(Codes_ptr, Scales_ptr, tile, own_tiles, first_slot):
    """Load a tile of each warp: the words 2 g and 2 g + 1 of the values 4 t to 4 t + 3, in pairs, and their scales."""
    warp, g, t, which = places()
    in_tiles = tile + warp < own_tiles
    slot = first_slot + (tile + warp) * KEYS + 4 * t + which
    ptrs, is_loaded = as_words(Codes_ptr) + slot * (CODE_ROW // 4) + 2 * g, in_tiles.to(gl.int32)
    first, second = load_global_2(ptrs, is_loaded), load_global_2(ptrs + CODE_ROW // 2, is_loaded)
    return first, second, load_global_half(Scales_ptr + slot, is_loaded), load_global_half(Scales_ptr + slot + 2, is_loaded)


@gluon.jit
def sum_codes(base, values, Codes_ptr, Scales_ptr, own_tiles, first_slot, TILES: gl.constexpr):
    """Store each warp's sums of both heads of a CTA's values, of which ``values`` are the first step, and of their weights."""
    STEP: gl.constexpr = tiles_of_step(TILES)
    STRIDE: gl.constexpr = score_bytes(TILES, STEP)
    origins, sums = origins_of(base, STRIDE), no_sums()
    for first in range(0, own_tiles, STEP):
        for i in gl.static_range(STEP // N_WARPS):
            if first + i * N_WARPS < own_tiles:
                sums = _add_tile(base, sums, values[i], first + i * N_WARPS, own_tiles, origins, STRIDE)
        if TILES > STEP:
            if first + STEP < own_tiles:
                values = load_coded_values(Codes_ptr, Scales_ptr, first + STEP, own_tiles, first_slot, STEP)
    store_sums(base, sums, 16 * places()[1], 4 * 8)


@gluon.jit
def _add_tile(base, sums, values, tile, own_tiles, origins, STRIDE: gl.constexpr):
    """Add a tile of each warp to both heads' sums of rotated values, and to each lane's sum of its head's weights."""
    first, second, scales_first, scales_second = values
    weights_first, weights_second = weights_of_tile(base, tile, own_tiles, origins, STRIDE)
    weights = pack_pairs(_scaled(weights_first, scales_first), _scaled(weights_second, scales_second))
    even, odd = (), ()
    for word in gl.static_range(2):
        levels, others = levels_of_codes(first[word]), levels_of_codes(second[word])
        for pair in gl.static_range(4):
            old_even, old_odd = sums[0][4 * word + pair], sums[1][4 * word + pair]
            both = add_product(old_even, old_odd, transpose_pairs(levels[pair]), transpose_pairs(others[pair]), weights)
            even, odd = even + (both[0],), odd + (both[1],)
    return even, odd, sums[2] + weights_first + weights_second


@gluon.jit
def _scaled(weights, scales):
    return gl.where(weights == 0, 0.0, weights * low_float16(scales))
