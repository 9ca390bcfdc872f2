"""Attention of two query heads over codes of keys and values, of 3 or 4 bits each or e4m3 of 8, for kernels of clusters to use."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.memory import BYTES_OF_BIT, GROUP, HEAD, KEYS, LOG2_E, N_WARPS, Q_HEADS, Q_ROTATED, ROW
from qtts_compile.kernels.clusters.rotation import rotate
from qtts_compile.kernels.clusters.softmax import exchange, masked, meet, meet_first, nothing, of_own_head
from qtts_compile.kernels.clusters.tiles import each, load_queries, multiply_tile, places, sum_of_groups
from qtts_compile.kernels.ptx.global_memory import as_words, load_global_1, load_global_2, load_global_4, load_global_byte, load_global_half
from qtts_compile.kernels.ptx.shared_memory import store_shared
from qtts_compile.kernels.ptx.words import add_product, codes_of_planes, levels_of_codes, low_float16, numbers_of_bytes, pack, transpose_pairs
from qtts_compile.kernels.turboquant.kept import find_kept

_find_kept = gluon.jit(find_kept.fn)


@gluon.jit
def store_rotated(base, a, b):
    """Rotate the first two of four heads, queries, and store them."""
    head = gl.arange(0, 4, layout=gl.SliceLayout(1, a.type.layout))
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, a.type.layout))
    a0, a1, b0, b1 = rotate(base, a, b)
    address = base + Q_ROTATED + (head * ROW)[:, None] + (lane * 4)[None, :]
    is_query, factor = (head < GROUP).to(gl.int32)[:, None], HEAD.value**-0.5
    store_shared(address, pack(a0 * factor, a1 * factor), is_query)
    store_shared(address + HEAD, pack(b0 * factor, b1 * factor), is_query)


@gluon.jit
def load_coded_tiles(
    pointers, Mask_ptr, first_tile, own_tiles, first_slot, row, start, SINKS: gl.constexpr, WINDOW: gl.constexpr, STEP: gl.constexpr,
    K_BITS: gl.constexpr, V_BITS: gl.constexpr,
):  # fmt: skip
    """Load as many of a CTA's tiles as one step takes, those that are there, from ``first_tile`` on.

    The pointers are those to codes of keys and of values, and to scales of keys and of values.
    """
    tiles = ()
    for i in gl.static_range(0, STEP, N_WARPS):
        tiles = tiles + (_load_tile(pointers, Mask_ptr, first_tile + i, own_tiles, first_slot, row, start, SINKS, WINDOW, K_BITS, V_BITS),)
    return tiles


@gluon.jit
def _load_tile(
    pointers, Mask_ptr, tile, own_tiles, first_slot, row, start, SINKS: gl.constexpr, WINDOW: gl.constexpr, K_BITS: gl.constexpr, V_BITS: gl.constexpr
):
    """Load a tile of each warp: codes and scales of the keys g and g + 8, whether they count, and the scales of their values; codes of values.

    Of a key a lane has the 32 coordinates from 32 t on. Values are the 16 coordinates from 16 g on of pairs of 2 t and 2 t + 1, then of 2 t + 8 and
    2 t + 9. Kept tokens do not count, nor does what is masked.
    """
    K_codes_ptr, V_codes_ptr, K_scales_ptr, V_scales_ptr = pointers
    warp, g, t, which = places()
    first_slot += (tile + warp) * KEYS
    slot, in_tiles = first_slot + g + 8 * which, tile + warp < own_tiles
    is_sink, is_recent = _find_kept(slot, row, start, SINKS, WINDOW)
    is_live = (in_tiles & ~is_sink & ~is_recent).to(gl.int32)
    keys = _load_key(K_codes_ptr + slot * (BYTES_OF_BIT * K_BITS), t, is_live, K_BITS)
    k_scales, v_scales = load_global_half(K_scales_ptr + slot, is_live), load_global_half(V_scales_ptr + slot, is_live)
    if Mask_ptr is not None:
        is_live = load_global_byte(Mask_ptr + slot, is_live)
    ptrs, in_tiles = V_codes_ptr + (first_slot + 2 * t + which) * (BYTES_OF_BIT * V_BITS), in_tiles.to(gl.int32)
    values = _load_value(ptrs, g, in_tiles, V_BITS), _load_value(ptrs + 8 * BYTES_OF_BIT * V_BITS, g, in_tiles, V_BITS)
    return keys, k_scales, is_live, v_scales, values[0], values[1]


@gluon.jit
def _load_key(Row_ptrs, t, is_live, BITS: gl.constexpr):
    """Load the words of a lane's 32 coordinates: of 3 bits two of magnitudes and one of signs, of 8 bits eight."""
    words = as_words(Row_ptrs)
    if BITS == 8:
        return load_global_4(words + 8 * t, is_live) + load_global_4(words + 8 * t + 4, is_live)
    elif BITS == 4:
        return load_global_4(words + 4 * t, is_live)
    else:
        return load_global_2(words + 2 * t, is_live) + (load_global_1(words + HEAD // 16 + t, is_live),)


@gluon.jit
def _load_value(Row_ptrs, g, is_there, BITS: gl.constexpr):
    """Load the words of a lane's 16 coordinates: of 3 bits one of magnitudes and one whose lower half holds signs, of 8 bits four."""
    words = as_words(Row_ptrs)
    if BITS == 8:
        return load_global_4(words + 4 * g, is_there)
    elif BITS == 4:
        return load_global_2(words + 2 * g, is_there)
    else:
        return load_global_1(words + g, is_there), load_global_half(Row_ptrs + HEAD // 4 + 2 * g, is_there)


@gluon.jit
def _levels_of_key(words, BITS: gl.constexpr):
    """Return four times eight coordinates, as four words of two bfloat16."""
    if BITS == 3:
        words = codes_of_planes(words[0], words[2]) + codes_of_planes(words[1], words[2] >> 16)
    return _levels_of_words(words, BITS)


@gluon.jit
def _levels_of_value(words, BITS: gl.constexpr):
    """Return two times eight coordinates, as four words of two bfloat16."""
    if BITS == 3:
        words = codes_of_planes(words[0], words[1])
    return _levels_of_words(words, BITS)


@gluon.jit
def _levels_of_words(words, BITS: gl.constexpr):
    """Return the coordinates, eight at a time, that words of codes stand for: of 8 bits two words have as many as one of the others."""
    levels = ()
    if BITS == 8:
        for i in gl.static_range(0, len(words), 2):
            levels = levels + (numbers_of_bytes(words[i]) + numbers_of_bytes(words[i + 1]),)
    else:
        for i in gl.static_range(len(words)):
            levels = levels + (levels_of_codes(words[i], BITS),)
    return levels


@gluon.jit
def _load_queries(base, BITS: gl.constexpr):
    """Load the queries that meet keys of so many bits: those of 8 are not rotated."""
    place: gl.constexpr = Q_HEADS if BITS == 8 else Q_ROTATED
    return load_queries(base + place, 64, 16)


@gluon.jit
def attend_to_codes(
    base, tiles, pointers, Mask_ptr, own_tiles, first_slot, row, start, scale, SINKS: gl.constexpr, WINDOW: gl.constexpr, TILES: gl.constexpr,
    STEP: gl.constexpr, K_BITS: gl.constexpr, V_BITS: gl.constexpr, IS_AHEAD: gl.constexpr = True,
):  # fmt: skip
    """Return what each warp finds in a CTA's tiles, of which ``tiles`` are the first step; columns are those of rotated values, but for 8 bits.

    For ``IS_AHEAD`` see :func:`dense_tiles.attend_to_tiles`.
    """
    queries, found = _load_queries(base, K_BITS), nothing(8)
    for first in range(0, own_tiles, STEP):
        step = tiles
        if TILES > STEP and IS_AHEAD:
            if first + STEP < own_tiles:
                tiles = load_coded_tiles(pointers, Mask_ptr, first + STEP, own_tiles, first_slot, row, start, SINKS, WINDOW, STEP, K_BITS, V_BITS)
        if STEP > N_WARPS:
            if first + N_WARPS < own_tiles:
                found = _attend(found, queries, step, scale, K_BITS, V_BITS)
            else:
                found = _attend(found, queries, (step[0],), scale, K_BITS, V_BITS)
        else:
            found = _attend(found, queries, step, scale, K_BITS, V_BITS)
        if TILES > STEP and not IS_AHEAD:
            if first + STEP < own_tiles:
                tiles = load_coded_tiles(pointers, Mask_ptr, first + STEP, own_tiles, first_slot, row, start, SINKS, WINDOW, STEP, K_BITS, V_BITS)
    peaks, sums, even, odd = found
    return peaks, sum_of_groups(sums), even, odd


@gluon.jit
def attend_to_one_round(base, tiles, scale, K_BITS: gl.constexpr, V_BITS: gl.constexpr):
    """Return what each warp finds in its only tile, which may not be there."""
    peaks, sums, even, odd = _attend((), _load_queries(base, K_BITS), tiles, scale, K_BITS, V_BITS)
    return peaks, sum_of_groups(sums), even, odd


@gluon.jit
def _attend(found, queries, tiles, scale, K_BITS: gl.constexpr, V_BITS: gl.constexpr):
    """Return what was found with tiles, which are met together; ``found`` may be () for nothing."""
    scores = ()
    for i in gl.static_range(len(tiles)):
        keys, k_scales, is_live, _, _, _ = tiles[i]
        first, second = multiply_tile(_levels_of_key(keys, K_BITS), queries)
        unit_first, unit_second = each(low_float16(k_scales) * (scale * LOG2_E))
        scores = scores + (masked(first * unit_first, second * unit_second, is_live),)
    if len(found) == 0:
        found, weights = meet_first(scores, 8)
    else:
        found, weights = meet(found, scores)
    peaks, sums, even, odd = found
    for i in gl.static_range(len(tiles)):
        first, second = weights[i]
        even, odd = _weighed(even, odd, first, second, tiles[i], V_BITS)
        sums += first + second
    return peaks, sums, even, odd


@gluon.jit
def _weighed(old_even, old_odd, first, second, tile, BITS: gl.constexpr):
    """Return the sums of the columns of values with those of a tile, by the weights of the keys g and g + 8."""
    _, _, _, v_scales, v_first, v_second = tile
    scale_first, scale_second = each(low_float16(v_scales))
    weights_first, weights_second = exchange(_scaled(first, scale_first), _scaled(second, scale_second))
    weights = of_own_head(weights_first, weights_second)
    levels, others = _levels_of_value(v_first, BITS), _levels_of_value(v_second, BITS)
    even, odd = (), ()
    for word in gl.static_range(2):
        for pair in gl.static_range(4):
            a_first, a_second = transpose_pairs(levels[word][pair]), transpose_pairs(others[word][pair])
            both = add_product(old_even[4 * word + pair], old_odd[4 * word + pair], a_first, a_second, weights)
            even, odd = even + (both[0],), odd + (both[1],)
    return even, odd


@gluon.jit
def _scaled(weights, scales):
    return gl.where(weights == 0, 0.0, weights * scales)
