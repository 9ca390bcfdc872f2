"""Sums of quantised values, weighted by scores of two query heads, for kernels of clusters to use."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.attend import send_columns
from qtts_compile.kernels.clusters.coded_keys import origins_of
from qtts_compile.kernels.clusters.codes import levels_of_codes, places, sum_of_quad, zeros
from qtts_compile.kernels.clusters.heads import roles_layout
from qtts_compile.kernels.clusters.instructions import as_words, load_floats, load_global_2, load_global_half, load_shared_2, store_floats
from qtts_compile.kernels.clusters.memory import (
    ARRIVED,
    CODE_ROW,
    COLUMNS,
    GROUP,
    HEAD,
    KEPT_COLUMNS,
    KEYS,
    N_WARPS,
    PADDED_HEAD,
    SCORES_OF_CODES,
    SUMS,
    score_bytes,
    tiles_of_step,
)
from qtts_compile.kernels.clusters.rotation import unrotate
from qtts_compile.kernels.clusters.words import add_product, low_float16, pack_pairs, transpose_pairs


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
    STRIDE: gl.constexpr = score_bytes(TILES)
    origins, sums = origins_of(base, STRIDE), _no_sums()
    for first in range(0, own_tiles, STEP):
        for i in gl.static_range(STEP // N_WARPS):
            if first + i * N_WARPS < own_tiles:
                sums = _add_tile(base, sums, values[i], first + i * N_WARPS, own_tiles, origins, STRIDE)
        if TILES > STEP:
            if first + STEP < own_tiles:
                values = load_coded_values(Codes_ptr, Scales_ptr, first + STEP, own_tiles, first_slot, STEP)
    _store_sums(base, sums)


@gluon.jit
def _no_sums():
    """Return zeros to begin with: sums of the first and of the second of each pair of columns of a lane's words, for both heads, and of weights."""
    zero = zeros()
    return (zero, zero, zero, zero, zero, zero, zero, zero), (zero, zero, zero, zero, zero, zero, zero, zero), zero


@gluon.jit
def _add_tile(base, sums, values, tile, own_tiles, origins, STRIDE: gl.constexpr):
    """Add a tile of each warp to both heads' sums of rotated values, and to each lane's sum of its head's weights."""
    first, second, scales_first, scales_second = values
    warp, g, t, which = places()
    address = base + SCORES_OF_CODES + g % GROUP * STRIDE + ((tile + warp) * KEYS + 4 * t + which) * 4
    in_tiles = tile + warp < own_tiles
    weights_first = _weights(load_shared_2(address), origins, in_tiles)
    weights_second = _weights(load_shared_2(address + 8), origins, in_tiles)
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
def _weights(scores, origins, in_tiles):
    scores = scores.to(gl.float32, bitcast=True)
    return gl.where(in_tiles, gl.exp2(scores - origins), 0.0)


@gluon.jit
def _scaled(weights, scales):
    return gl.where(weights == 0, 0.0, weights * low_float16(scales))


@gluon.jit
def _store_sums(base, sums):
    """Store each warp's sums of both heads."""
    warp, g, _, head = places()
    total = sum_of_quad(sums[2])
    store_floats(base + SUMS + warp * 8 + g % GROUP * 4, total)
    address = base + COLUMNS + (warp * GROUP + head) * PADDED_HEAD + _offset_of(16 * g)
    for i in gl.static_range(8):
        store_floats(address + 8 * i, sums[0][i])
        store_floats(address + 8 * i + 4, sums[1][i])


@gluon.jit
def sum_of(base, head):
    """Return the sum of the weights of a head's codes."""
    total = load_floats(base + SUMS + head * 4)
    for warp in gl.static_range(1, N_WARPS):
        total += load_floats(base + SUMS + warp * 8 + head * 4)
    return total


@gluon.jit
def _offset_of(column):
    """Return where a column is: after each 16, two are left out, so that lanes meet in few banks."""
    return (column + column // 16 * 2) * 4


@gluon.jit
def store_kept(base, even, odd, head, word):
    """Store both heads' sums of kept values."""
    address = base + KEPT_COLUMNS + head * (4 * HEAD) + word * 8
    store_floats(address, even)
    store_floats(address + 4, odd)


@gluon.jit
def send_all_columns(base, partials):
    """Send both heads' sums of all values, of which those of codes are rotated back, to the first CTA."""
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
    a0, a1, b0, b1 = unrotate(a0, a1, b0, b1)
    factor: gl.constexpr = HEAD.value**-0.5
    partials = partials + (head * 4 * HEAD)[:, None] + (lane * 8)[None, :]
    send_columns(kept_a0 + a0 * factor, kept_a1 + a1 * factor, partials, base + ARRIVED + 8)
    send_columns(kept_b0 + b0 * factor, kept_b1 + b1 * factor, partials + 2 * HEAD, base + ARRIVED + 8)
