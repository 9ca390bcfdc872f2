"""Sums of values in bfloat16, weighted by scores of two query heads, for kernels of clusters to use."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.columns import no_sums, store_sums, weights_of_tile
from qtts_compile.kernels.clusters.instructions import as_words, load_global_4
from qtts_compile.kernels.clusters.memory import HEAD, KEYS, N_WARPS, PADDED_HEAD, score_bytes
from qtts_compile.kernels.clusters.peaks import origins_of
from qtts_compile.kernels.clusters.tiles import places
from qtts_compile.kernels.clusters.words import add_product, pack_pairs, transpose_pairs


@gluon.jit
def load_dense_values(Values_ptr, tile, own_tiles, first_slot):
    """Load a tile of each warp: four words of both halves of the values 4 t to 4 t + 3, in pairs."""
    warp, g, t, which = places()
    slot = first_slot + (tile + warp) * KEYS + 4 * t + which
    ptrs, is_loaded = as_words(Values_ptr) + slot * (HEAD // 2) + 4 * g, (tile + warp < own_tiles).to(gl.int32)
    first = load_global_4(ptrs, is_loaded) + load_global_4(ptrs + HEAD // 4, is_loaded)
    second = load_global_4(ptrs + HEAD, is_loaded) + load_global_4(ptrs + HEAD + HEAD // 4, is_loaded)
    return first, second


@gluon.jit
def sum_dense(base, values, Values_ptr, own_tiles, first_slot, TILES: gl.constexpr):
    """Store each warp's sums of both heads of a CTA's values, of which ``values`` are the first of each warp, and of their weights."""
    STRIDE: gl.constexpr = score_bytes(TILES, N_WARPS)
    origins, sums = origins_of(base, STRIDE), no_sums()
    for first in range(0, own_tiles, N_WARPS):
        sums = _add_tile(base, sums, values, first, own_tiles, origins, STRIDE)
        if TILES > N_WARPS:
            if first + N_WARPS < own_tiles:
                values = load_dense_values(Values_ptr, first + N_WARPS, own_tiles, first_slot)
    store_sums(base, sums, 8 * places()[1], PADDED_HEAD // 2)


@gluon.jit
def _add_tile(base, sums, values, tile, own_tiles, origins, STRIDE: gl.constexpr):
    """Add a tile of each warp to both heads' sums of values, and to each lane's sum of its head's weights."""
    first, second = values
    weights_first, weights_second = weights_of_tile(base, tile, own_tiles, origins, STRIDE)
    # A value that does not count may be anything.
    live_first, live_second = weights_first != 0, weights_second != 0
    weights = pack_pairs(weights_first, weights_second)
    rest = pack_pairs(_rest_of(weights_first), _rest_of(weights_second))
    even, odd = (), ()
    for i in gl.static_range(8):
        v_first, v_second = transpose_pairs(gl.where(live_first, first[i], 0)), transpose_pairs(gl.where(live_second, second[i], 0))
        both = add_product(sums[0][i], sums[1][i], v_first, v_second, weights)
        both = add_product(both[0], both[1], v_first, v_second, rest)
        even, odd = even + (both[0],), odd + (both[1],)
    return even, odd, sums[2] + weights_first + weights_second


@gluon.jit
def _rest_of(weights):
    """Return what rounding to bfloat16 takes from weights."""
    return weights - weights.to(gl.bfloat16).to(gl.float32)
