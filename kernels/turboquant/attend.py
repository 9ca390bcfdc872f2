"""Parts of attention over a quantised KV cache, for kernels to use: over codes, on the tensor cores, and over kept tokens.

Tiles are laid out so that what a lane loads is what the tensor cores want from it (the fragments of mma.m16n8k16, PTX ISA): with Triton 3.6 keys and
values never leave their lanes, with another they may go through shared memory. Coordinates are in the order of these fragments, which is a
permutation of the bits of their index.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false
# Triton's stubs do not know its static loops and tuples.

import triton
import triton.language as tl

from qtts_compile.kernels.flash_decoding import (
    LOG2_E,
    as_biases,
    attend,
    count_from_next_look,
    is_attended,
    is_old_key,
    is_queued,
    keys_ahead,
    live_tiles,
    load_biases,
    load_mask,
    load_tile,
    lowest_bit,
    no_keys_yet,
    queue_tiles,
    row_offset,
)
from qtts_compile.kernels.interpreted import IS_INTERPRETED
from qtts_compile.kernels.turboquant.decode import decode_words, load_words, words_of
from qtts_compile.kernels.turboquant.kept import find_kept
from qtts_compile.kernels.turboquant.rotation import rotate_row

KEPT_TILE = tl.constexpr(16)
COLUMNS = tl.constexpr(8)  # rows of queries that the tensor cores take at once


@triton.jit
def load_codes(
    tile, K_codes_ptr, V_codes_ptr, K_scales_ptr, V_scales_ptr, k_stride, v_stride, scale_stride, Mask_ptr, mask_strides, place, S,
    GROUP: tl.constexpr, D: tl.constexpr, MASK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr,
):  # fmt: skip
    """Request a tile of ``BLOCK_N`` keys: the words of keys and of values, their scales, and what the mask says. None of it waits for the other."""
    first = tile.to(tl.int64) * BLOCK_N
    keys = first + tl.arange(0, BLOCK_N)
    K_WIDTH: tl.constexpr = words_of(D, K_BITS)
    k_columns = tl.arange(0, K_WIDTH)[None, :]
    k_words = load_words(K_codes_ptr + keys[:, None] * k_stride, k_columns, (keys < S)[:, None], D, K_BITS, (1, max(1, K_WIDTH // 4)))
    # A value's row is shared by up to eight lanes that are four apart; the four between them have other keys.
    V_WIDTH: tl.constexpr = words_of(D, V_BITS)
    RUN: tl.constexpr = V_WIDTH // value_lanes(V_WIDTH)
    turn = tl.arange(0, BLOCK_N // 4)[None, None, :, None]
    v_keys = first + turn // 4 * 16 + tl.arange(0, 4)[:, None, None, None] * 4 + turn % 4
    v_columns = tl.arange(0, V_WIDTH // RUN)[None, :, None, None] * RUN + tl.arange(0, RUN)[None, None, None, :]
    v_words = load_words(V_codes_ptr + v_keys * v_stride, v_columns, v_keys < S, D, V_BITS, (1, 1, 1, RUN))
    k_scale = tl.load(K_scales_ptr + keys * scale_stride, mask=keys < S, other=0.0)
    v_scale = tl.load(V_scales_ptr + keys * scale_stride, mask=keys < S, other=0.0)
    return k_words, v_words, k_scale, v_scale, load_mask(Mask_ptr, mask_strides, place, keys, keys < S, GROUP, MASK_ROWS)


@triton.jit
def _is_code(keys, S, row, start, SINKS: tl.constexpr, WINDOW: tl.constexpr):
    """Tell which keys are only there as codes, when the new one is at ``row``."""
    is_sink, is_recent = find_kept(keys, row, start, SINKS, WINDOW)
    return is_old_key(keys, S, (row,)) & ~is_sink & ~is_recent


@triton.jit
def look_for_codes(
    look, n_splits, Mask_ptr, mask_strides, place, S, row, start,
    GROUP: tl.constexpr, MASK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, LOOK_AHEAD: tl.constexpr, FLOOR: tl.constexpr,
    SINKS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Return the :func:`live_tiles` of the next ``LOOK_AHEAD`` of this one of ``n_splits``, of keys that are only there as codes."""
    keys = keys_ahead(look, n_splits, BLOCK_N, LOOK_AHEAD)
    biases = load_biases(Mask_ptr, mask_strides, place, keys, keys < S, GROUP, MASK_ROWS, FLOOR)
    return live_tiles(is_attended(biases) & _is_code(keys, S, row, start, SINKS, WINDOW))


@triton.jit
def attend_codes(
    q_rows, loaded, is_loaded, live_bits, n_splits, K_codes_ptr, V_codes_ptr, K_scales_ptr, V_scales_ptr, k_stride, v_stride, scale_stride,
    Mask_ptr, mask_strides, place, S, row, start,
    GROUP: tl.constexpr, D: tl.constexpr, MASK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, N_LOOKS: tl.constexpr, LOOK_AHEAD: tl.constexpr,
    FLOOR: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Return the states of rotated queries ``[D]`` after what is only there as codes, in this one's tiles of ``n_splits`` programs of one head.

    ``loaded`` is the first of them, if it ``is_loaded``, and ``live_bits`` the first look ahead. Queries and weights are rounded to ``DTYPE``. The
    states are maxima ``[COLUMNS]``, sums ``[COLUMNS]`` and outputs ``[D, COLUMNS]`` of which row i is coordinate :func:`value_coordinate` (i).
    """
    # Not as columns from the start: Triton would compute the rotation in their layout, which each value takes eight times.
    q = tl.zeros([COLUMNS, D], tl.float32)
    for m in tl.static_range(len(q_rows)):
        q = tl.where((tl.arange(0, COLUMNS) == m)[:, None], in_key_order(q_rows[m], 1, D), q)
    q = tl.trans(_rounded(q, DTYPE))
    states = tl.full([COLUMNS], float("-inf"), tl.float32), tl.zeros([COLUMNS], tl.float32), tl.zeros([D, COLUMNS], tl.float32)
    NONE: tl.constexpr = 2 * LOOK_AHEAD
    bits, tile = queue_tiles(live_bits, is_loaded, NONE)
    for look in range(N_LOOKS):
        if N_LOOKS > 1:
            next_bits = look_for_codes(
                look + 1, n_splits, Mask_ptr, mask_strides, place, S, row, start, GROUP, MASK_ROWS, BLOCK_N, LOOK_AHEAD, FLOOR, SINKS, WINDOW
            )
            bits |= next_bits << LOOK_AHEAD
        while is_queued(tile, bits, LOOK_AHEAD, NONE):
            following = loaded  # the next tile is requested before a tile is computed
            next_tile = lowest_bit(bits, NONE)
            if next_tile < NONE:
                following = load_codes(
                    tl.program_id(1) + (look * LOOK_AHEAD + next_tile) * n_splits, K_codes_ptr, V_codes_ptr, K_scales_ptr, V_scales_ptr,
                    k_stride, v_stride, scale_stride, Mask_ptr, mask_strides, place, S, GROUP, D, MASK_ROWS, BLOCK_N, K_BITS, V_BITS,
                )  # fmt: skip
            if tile < NONE:
                keys = (tl.program_id(1) + (look * LOOK_AHEAD + tile) * n_splits).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
                biases = as_biases(loaded[4], _is_code(keys, S, row, start, SINKS, WINDOW), MASK_ROWS, FLOOR)
                states = attend_tile(states, q, loaded, biases, K_BITS, V_BITS, DTYPE)
            loaded, tile = following, next_tile
            bits &= bits - 1
        tile, bits = count_from_next_look(tile, bits, LOOK_AHEAD, NONE)
    return states


@triton.jit
def attend_tile(states, q, loaded, biases, K_BITS: tl.constexpr, V_BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Add a tile of :func:`load_codes` to the states of queries ``[D, COLUMNS]``, which are scaled by log2(e).

    Whatever codes hold is finite, and without a scale it counts for nothing.
    """
    k_words, v_words, k_scale, v_scale, _ = loaded
    readable = is_attended(biases)
    k_scale = tl.where(readable, k_scale.to(tl.float32), 0.0)
    v_scale = tl.where(readable, v_scale.to(tl.float32), 0.0)
    row_max, row_sum, out = states
    N: tl.constexpr = k_scale.shape[0]
    D: tl.constexpr = q.shape[0]
    scores = _dot(in_key_order(decode_words(k_words, K_BITS, DTYPE), N, D), q) * k_scale[:, None]
    scores = _biased(scores, biases)
    new_max = tl.maximum(row_max, tl.max(scores, axis=0))
    # A row without a live key so far has no maximum to subtract: inf - inf would be NaN.
    origin = tl.where(new_max == float("-inf"), 0.0, new_max)
    rescale = tl.exp2(row_max - origin)
    weights = tl.exp2(scores - origin[None, :])
    row_sum = row_sum * rescale + tl.sum(weights, axis=0)
    values = in_value_order(decode_words(v_words, V_BITS, DTYPE), N, D, value_lanes(words_of(D, V_BITS)))
    out *= rescale[None, :]
    if DTYPE == tl.float16:  # in units of the largest scale, or small ones would vanish
        unit = tl.maximum(tl.max(v_scale, axis=0), 1e-30)
        out += _dot(values, _rounded(weights * (v_scale / unit)[:, None], DTYPE)) * unit
    else:
        out = _dot(values, _rounded(weights * v_scale[:, None], DTYPE), out)
    return new_max, row_sum, out


@triton.jit
def _biased(scores, biases):
    """Add the biases, which take turns among the columns, to scores ``[N, COLUMNS]``."""
    turns = tl.arange(0, COLUMNS) % len(biases)
    bias = tl.broadcast_to(biases[0][:, None], scores.shape)
    for m in tl.static_range(1, len(biases)):
        bias = tl.where((turns == m)[None, :], biases[m][:, None], bias)
    return tl.where(bias == float("-inf"), float("-inf"), scores + bias * LOG2_E)


@triton.jit
def in_key_order(x, N: tl.constexpr, D: tl.constexpr):
    """Permute the coordinates of ``N`` rows, ``[N, D]``: each of four lanes has a quarter, of which the tensor cores take four at a time."""
    return tl.reshape(tl.permute(tl.reshape(x, [N, 4, D // 16, 4]), (0, 2, 1, 3)), [N, D])


@triton.constexpr_function
def value_lanes(width):
    """Return how many lanes share a value that has so many words."""
    return min(8, width)


@triton.jit
def in_value_order(x, N: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr):
    """Transpose ``N`` values as :func:`load_codes` loads them, ``[4, LANES, N / 4, D / LANES]``, into the order of their keys: ``[D, N]``."""
    x = tl.permute(tl.reshape(x, [4, LANES, N // 16, 4, D // LANES]), (4, 1, 2, 0, 3))
    return tl.reshape(x, [D, N])


@triton.jit
def value_coordinate(i, D: tl.constexpr, LANES: tl.constexpr):
    """Return the coordinate that :func:`in_value_order` puts in the place ``i``."""
    return i % LANES * (D // LANES) + i // LANES


@triton.jit
def store_columns(states, Out_ptr, Max_ptr, Sum_ptr, place, H_k, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, V_BITS: tl.constexpr):
    """Store what a split of :func:`attend_codes` contributes, rotated as values are."""
    row_max, row_sum, out = states
    _, _, first_row, T = place
    columns = tl.arange(0, COLUMNS)
    in_rows = (columns < BLOCK_M) & (first_row + columns < GROUP * T)
    n_rows = tl.num_programs(0) // tl.cdiv(GROUP * T, BLOCK_M) * GROUP * T
    out_rows = tl.program_id(1).to(tl.int64) * n_rows + row_offset(place, columns, (T * H_k * GROUP, 1, H_k * GROUP), GROUP)
    tl.store(Max_ptr + out_rows, row_max, mask=in_rows)
    tl.store(Sum_ptr + out_rows, row_sum, mask=in_rows)
    coordinates = value_coordinate(tl.arange(0, D), D, value_lanes(words_of(D, V_BITS)))
    tl.store(Out_ptr + out_rows[None, :] * D + coordinates[:, None], out, mask=(in_rows & (row_sum > 0))[None, :])


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    if IS_INTERPRETED:  # it would multiply the bits of bfloat16
        return x.to(DTYPE).to(tl.float32)
    else:
        return x.to(DTYPE)


@triton.jit
def _dot(a, b, c=None):
    if IS_INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c)
    else:
        return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def load_kept(
    tile, K_kept_ptr, V_kept_ptr, kept_stride, Mask_ptr, mask_strides, place, row, start,
    GROUP: tl.constexpr, D: tl.constexpr, MASK_ROWS: tl.constexpr, FLOOR: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Load a tile of the sinks and recent tokens, the new one excepted: keys, values ``[KEPT_TILE, D]`` and their biases.

    All rows are read, without waiting for what tells which of them hold a token that is attended to.
    """
    rows = tl.arange(0, KEPT_TILE) + tile * KEPT_TILE
    in_kept = rows < SINKS + WINDOW
    k = load_tile(K_kept_ptr, kept_stride, rows.to(tl.int64), in_kept, D, D)
    v = load_tile(V_kept_ptr, kept_stride, rows.to(tl.int64), in_kept, D, D)
    row, start = row.to(tl.int32), start.to(tl.int32)
    age = row % WINDOW - (rows - SINKS)
    slots = tl.where(rows < SINKS, start + rows, row - tl.where(age < 0, age + WINDOW, age))
    is_sink, _ = find_kept(slots, row, start, SINKS, WINDOW)
    is_there = in_kept & (slots >= 0) & (slots < row) & (is_sink == (rows < SINKS))
    return k, v, load_biases(Mask_ptr, mask_strides, place, slots.to(tl.int64), is_there, GROUP, MASK_ROWS, FLOOR, True)


@triton.jit
def attend_kept(
    q_rows, loaded, part, K_kept_ptr, V_kept_ptr, kept_stride, Mask_ptr, mask_strides, place, row, start,
    GROUP: tl.constexpr, D: tl.constexpr, MASK_ROWS: tl.constexpr, FLOOR: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr,
    N_PARTS: tl.constexpr,
):  # fmt: skip
    """Return the states of queries after one of ``N_PARTS`` parts of the kept tokens, of which the first tile is ``loaded``."""
    k, v, biases = loaded
    states = attend(no_keys_yet(len(q_rows), D), q_rows, k, tl.where(is_attended(biases)[:, None], v, 0.0), biases)
    N_TILES: tl.constexpr = (SINKS + WINDOW + KEPT_TILE - 1) // KEPT_TILE
    if N_TILES > N_PARTS:
        for tile in range(part + N_PARTS, N_TILES, N_PARTS):
            k, v, biases = load_kept(
                tile, K_kept_ptr, V_kept_ptr, kept_stride, Mask_ptr, mask_strides, place, row, start, GROUP, D, MASK_ROWS, FLOOR, SINKS, WINDOW
            )
            states = attend(states, q_rows, k, tl.where(is_attended(biases)[:, None], v, 0.0), biases)
    return states


@triton.jit
def rotated(x, BITS: tl.constexpr):
    """Rotate one row ``[D]`` as codes of so many bits are."""
    if BITS < 8:
        x = rotate_row(x)
    return x
