"""Attention of two query heads over bfloat16 keys and values, for kernels of clusters to use: tiles of a cache, and one in shared memory."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.memory import HEAD, K_TILE, KEYS, LOG2_E, N_WARPS, Q_HEADS, ROW, V_TILE
from qtts_compile.kernels.clusters.softmax import exchange, masked, meet, meet_first, nothing, of_own_head
from qtts_compile.kernels.clusters.tiles import load_queries, multiply_tile, places
from qtts_compile.kernels.ptx.global_memory import as_words, load_global_4, load_global_byte
from qtts_compile.kernels.ptx.shared_memory import load_shared_2_each, load_shared_4_each
from qtts_compile.kernels.ptx.words import add_product, transpose_pairs


@gluon.jit
def load_tile(Keys_ptr, Values_ptr, Mask_ptr, tile, own_tiles, first_slot, row):
    """Load a tile of each warp: four times four words of the keys g and g + 8, whether they count, and four words of both halves of values.

    Values are pairs of 2 t and 2 t + 1, then of 2 t + 8 and 2 t + 9. The new token does not count.
    """
    warp, g, t, which = places()
    first_slot += (tile + warp) * KEYS
    slot, in_tiles = first_slot + g + 8 * which, tile + warp < own_tiles
    is_live = (in_tiles & (slot != row)).to(gl.int32)
    keys = ()
    for i in gl.static_range(4):
        keys = keys + (load_global_4(as_words(Keys_ptr) + slot * (HEAD // 2) + i * 16 + 4 * t, is_live),)
    if Mask_ptr is not None:
        is_live = load_global_byte(Mask_ptr + slot, is_live)
    ptrs, in_tiles = as_words(Values_ptr) + (first_slot + 2 * t + which) * (HEAD // 2) + 4 * g, in_tiles.to(gl.int32)
    first = load_global_4(ptrs, in_tiles) + load_global_4(ptrs + HEAD // 4, in_tiles)
    second = load_global_4(ptrs + 4 * HEAD, in_tiles) + load_global_4(ptrs + 4 * HEAD + HEAD // 4, in_tiles)
    return keys, is_live, first, second


@gluon.jit
def attend_to_tiles(
    base, tile, Keys_ptr, Values_ptr, Mask_ptr, own_tiles, first_slot, row, scale, TILES: gl.constexpr, IS_AHEAD: gl.constexpr = True
):
    """Return what each warp finds in a CTA's tiles, of which ``tile`` is its first.

    A tile is requested before the one before it is attended to, or, if not ``IS_AHEAD``, after that: in half the registers, so that other CTAs have
    room beside this one.
    """
    queries, found = load_queries(base + Q_HEADS, 16, 64), nothing(8)
    for first in range(0, own_tiles, N_WARPS):
        keys, is_live, v_first, v_second = tile
        if TILES > N_WARPS and IS_AHEAD:
            if first + N_WARPS < own_tiles:
                tile = load_tile(Keys_ptr, Values_ptr, Mask_ptr, first + N_WARPS, own_tiles, first_slot, row)
        found = _attend(found, queries, keys, is_live, v_first, v_second, scale)
        if TILES > N_WARPS and not IS_AHEAD:
            if first + N_WARPS < own_tiles:
                tile = load_tile(Keys_ptr, Values_ptr, Mask_ptr, first + N_WARPS, own_tiles, first_slot, row)
    return found


@gluon.jit
def attend_to_one_round(base, tile, scale):
    """Return what each warp finds in its only tile, which may not be there."""
    keys, is_live, v_first, v_second = tile
    return _attend((), load_queries(base + Q_HEADS, 16, 64), keys, is_live, v_first, v_second, scale)


@gluon.jit
def attend_to_shared_tile(base, is_live, scale):
    """Return what each warp finds in the tile in shared memory; of the columns it has two words g of its quarter."""
    return meet_shared_tile(nothing(2), load_queries(base + Q_HEADS, 16, 64), base, is_live, scale)


@gluon.jit
def meet_shared_tile(found, queries, base, is_live, scale):
    """Return what was found with a tile in shared memory; ``base`` is where that would begin if the tile were its first."""
    warp, g, t, which = places()
    # Keys with odd g read the other of two blocks at a time, as lanes of two keys would meet in the same banks.
    address, is_odd, loaded = base + K_TILE + (g + 8 * which) * ROW + t * 16, g % 2, ()
    for i in gl.static_range(4):
        loaded = loaded + (load_shared_4_each(address + i // 2 * 128 + (i % 2 ^ is_odd) * 64),)
    keys = ()
    for i in gl.static_range(4):
        keys = keys + (_either(is_odd, loaded[i ^ 1], loaded[i]),)
    address = base + V_TILE + (2 * t + which) * ROW + warp * (ROW // N_WARPS) + g * 8
    first, second = load_shared_2_each(address), load_shared_2_each(address + 8 * ROW)
    return _attend(found, queries, keys, is_live, first, second, scale)


@gluon.jit
def _either(condition, first, second):
    words = ()
    for i in gl.static_range(4):
        words = words + (gl.where(condition != 0, first[i], second[i]),)
    return words


@gluon.jit
def _attend(found, queries, keys, is_live, v_first, v_second, scale):
    """Return what was found with a tile; ``found`` may be () for nothing."""
    first, second = multiply_tile(keys, queries)
    scores = (masked(first * (scale * LOG2_E), second * (scale * LOG2_E), is_live),)
    if len(found) == 0:
        found, of_tiles = meet_first(scores, len(v_first))
    else:
        found, of_tiles = meet(found, scores)
    peaks, sums, old_even, old_odd = found
    first, second = of_tiles[0]
    weights_first, weights_second = exchange(first, second)
    weights = of_own_head(weights_first, weights_second)
    rest_first, rest_second = exchange(_rest_of(first), _rest_of(second))
    rest = of_own_head(rest_first, rest_second)
    ones = weights * 0 + 0x3F803F80  # of bfloat16
    sums, other = add_product(sums, sums, ones, ones, weights)
    sums, other = add_product(sums, other, ones, ones, rest)
    even, odd = (), ()
    for i in gl.static_range(len(v_first)):
        # A value that counts for neither head may be anything.
        a_first = transpose_pairs(gl.where(weights_first != 0, v_first[i], 0))
        a_second = transpose_pairs(gl.where(weights_second != 0, v_second[i], 0))
        both = add_product(old_even[i], old_odd[i], a_first, a_second, weights)
        both = add_product(both[0], both[1], a_first, a_second, rest)
        even, odd = even + (both[0],), odd + (both[1],)
    return peaks, sums, even, odd


@gluon.jit
def _rest_of(weights):
    """Return what rounding to bfloat16 takes from weights."""
    return weights - weights.to(gl.bfloat16).to(gl.float32)
