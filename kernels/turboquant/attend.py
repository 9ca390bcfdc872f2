"""Parts of attention over a quantised KV cache, for kernels to use: over codes and over kept tokens."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false
# Triton's stubs do not know its static loops and tuples.

import triton
import triton.language as tl
from triton import knobs

from qtts_compile.kernels.flash_decoding import LOG2_E, attend, is_attended, is_old_key, load_biases, load_tile, look_ahead, no_keys_yet
from qtts_compile.kernels.turboquant.decode import join_parts, load_parts
from qtts_compile.kernels.turboquant.kept import find_kept
from qtts_compile.kernels.turboquant.rotation import rotate_rows, unrotate_rows

KEPT_TILE = tl.constexpr(16)
COLUMNS = tl.constexpr(8)  # the fewest that the tensor cores take
IS_INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def load_codes(
    tile, K_codes_ptr, V_codes_ptr, K_scales_ptr, V_scales_ptr, k_stride, v_stride, scale_stride, Pairs_ptr,
    Mask_ptr, mask_strides, place, S, row, start,
    GROUP: tl.constexpr, D: tl.constexpr, MASK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, FLOOR: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Return keys and values ``[BLOCK_N, D]`` of a tile without their scales, the biases, and the scales; what is kept elsewhere is excluded."""
    keys = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_sink, is_recent = find_kept(keys, row, start, SINKS, WINDOW)
    is_code = is_old_key(keys, S, (row,)) & ~is_sink & ~is_recent
    biases = load_biases(Mask_ptr, mask_strides, place, keys, is_code, GROUP, MASK_ROWS, FLOOR)
    readable = is_attended(biases)
    k = join_parts(load_parts(K_codes_ptr + keys[:, None] * k_stride, readable[:, None], Pairs_ptr, D, K_BITS))
    v = join_parts(load_parts(V_codes_ptr + keys[:, None] * v_stride, readable[:, None], Pairs_ptr, D, V_BITS))
    k_scale = tl.load(K_scales_ptr + keys * scale_stride, mask=readable, other=0.0).to(tl.float32)
    v_scale = tl.load(V_scales_ptr + keys * scale_stride, mask=readable, other=0.0).to(tl.float32)
    return k, v, biases, k_scale, v_scale


@triton.jit
def attend_codes(
    q_rows, n_splits, K_codes_ptr, V_codes_ptr, K_scales_ptr, V_scales_ptr, k_stride, v_stride, scale_stride, Pairs_ptr,
    Mask_ptr, mask_strides, place, S, row, start,
    GROUP: tl.constexpr, D: tl.constexpr, MASK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, N_LOOKS: tl.constexpr, LOOK_AHEAD: tl.constexpr,
    FLOOR: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Return the states of rotated queries after what is only there as codes, in this one's tiles of ``n_splits`` programs of one head.

    With a half-precision ``DTYPE`` queries and weights are rounded to it, and all rows, which then share their biases, go to the tensor cores
    at once; with None nothing is rounded.
    """
    states = no_keys_yet(len(q_rows), D)
    together = no_rows_yet(D)
    q_columns = tl.zeros([D, COLUMNS], tl.float32)
    for m in tl.static_range(len(q_rows)):
        q_columns = tl.where((tl.arange(0, COLUMNS) == m)[None, :], q_rows[m][:, None], q_columns)
    live_bits = look_ahead(0, n_splits, Mask_ptr, mask_strides, place, S, (row,), GROUP, MASK_ROWS, BLOCK_N, LOOK_AHEAD, FLOOR)
    for look in range(N_LOOKS):
        next_bits = 0
        if N_LOOKS > 1:
            next_bits = look_ahead(look + 1, n_splits, Mask_ptr, mask_strides, place, S, (row,), GROUP, MASK_ROWS, BLOCK_N, LOOK_AHEAD, FLOOR)
        for i in range(LOOK_AHEAD):
            if (live_bits >> i) & 1:
                tile = tl.program_id(1) + (look * LOOK_AHEAD + i) * n_splits
                k, v, biases, k_scale, v_scale = load_codes(
                    tile, K_codes_ptr, V_codes_ptr, K_scales_ptr, V_scales_ptr, k_stride, v_stride, scale_stride, Pairs_ptr,
                    Mask_ptr, mask_strides, place, S, row, start, GROUP, D, MASK_ROWS, BLOCK_N, FLOOR, K_BITS, V_BITS, SINKS, WINDOW,
                )  # fmt: skip
                if DTYPE is None:
                    states = attend(states, q_rows, k, v, biases, k_scale, v_scale)
                else:
                    together = attend_together(together, q_columns, k, v, biases[0], k_scale, v_scale, DTYPE)
        live_bits = next_bits
    if DTYPE is not None:
        states = apart(together, len(q_rows))
    return states


@triton.jit
def no_rows_yet(D: tl.constexpr):
    """Return the states of :func:`attend_together` before the first key."""
    return tl.full([COLUMNS], float("-inf"), tl.float32), tl.zeros([COLUMNS], tl.float32), tl.zeros([D, COLUMNS], tl.float32)


@triton.jit
def attend_together(states, q_columns, k, v, bias, k_scale, v_scale, DTYPE: tl.constexpr):
    """Add keys ``[N, D]``, with one bias ``[N]`` for all, to the states of queries ``[D, COLUMNS]``, on the tensor cores in ``DTYPE``."""
    row_max, row_sum, out = states
    scores = tl.dot(_rounded(k, DTYPE), _rounded(q_columns, DTYPE)) * k_scale[:, None]
    scores = tl.where((bias == float("-inf"))[:, None], float("-inf"), scores + (bias * LOG2_E)[:, None])
    new_max = tl.maximum(row_max, tl.max(scores, axis=0))
    origin = tl.where(new_max == float("-inf"), 0.0, new_max)
    rescale = tl.exp2(row_max - origin)
    weights = tl.exp2(scores - origin[None, :])
    row_sum = row_sum * rescale + tl.sum(weights, axis=0)
    out = tl.dot(tl.trans(_rounded(v, DTYPE)), _rounded(weights * v_scale[:, None], DTYPE), out * rescale[None, :])
    return new_max, row_sum, out


@triton.jit
def apart(states, ROWS: tl.constexpr):
    """Return the states of the first rows of :func:`attend_together`, one by one."""
    row_max, row_sum, out = states
    rows = ()
    for m in tl.static_range(ROWS):
        is_row = tl.arange(0, COLUMNS) == m
        largest = tl.max(tl.where(is_row, row_max, float("-inf")), axis=0)
        rows = rows + ((largest, tl.sum(tl.where(is_row, row_sum, 0.0), axis=0), tl.sum(tl.where(is_row[None, :], out, 0.0), axis=1)),)
    return rows


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    if IS_INTERPRETED:  # it would multiply the bits of bfloat16
        return x.to(DTYPE).to(tl.float32)
    else:
        return x.to(DTYPE)


@triton.jit
def attend_kept(
    q_rows, part, K_kept_ptr, V_kept_ptr, kept_stride, Mask_ptr, mask_strides, place, row, start,
    GROUP: tl.constexpr, D: tl.constexpr, MASK_ROWS: tl.constexpr, FLOOR: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr,
    N_PARTS: tl.constexpr,
):  # fmt: skip
    """Return the states of queries after one of ``N_PARTS`` parts of the sinks and recent tokens, the new one excepted."""
    states = no_keys_yet(len(q_rows), D)
    for tile in range(part, (SINKS + WINDOW + KEPT_TILE - 1) // KEPT_TILE, N_PARTS):
        rows = (tl.arange(0, KEPT_TILE) + tile * KEPT_TILE).to(tl.int64)
        age = (row % WINDOW - (rows - SINKS) + WINDOW) % WINDOW
        slots = tl.where(rows < SINKS, start + rows, row - age)
        is_sink, _ = find_kept(slots, row, start, SINKS, WINDOW)
        is_there = (rows < SINKS + WINDOW) & (slots >= 0) & (slots < row) & (is_sink == (rows < SINKS))
        biases = load_biases(Mask_ptr, mask_strides, place, slots, is_there, GROUP, MASK_ROWS, FLOOR)
        readable = is_attended(biases)
        k = load_tile(K_kept_ptr, kept_stride, rows, readable, D, D)
        v = load_tile(V_kept_ptr, kept_stride, rows, readable, D, D)
        states = attend(states, q_rows, k, v, biases)
    return states


@triton.jit
def rotated(x, BITS: tl.constexpr):
    """Rotate one row ``[D]`` as codes of so many bits are."""
    if BITS < 8:
        x = tl.reshape(rotate_rows(x[None, :]), [x.shape[0]])
    return x


@triton.jit
def unrotated(states, BITS: tl.constexpr):
    """Rotate the sums of values in states back."""
    rows = ()
    for m in tl.static_range(len(states)):
        row_max, row_sum, out = states[m]
        if BITS < 8:
            out = tl.reshape(unrotate_rows(out[None, :]), [out.shape[0]])
        rows = rows + ((row_max, row_sum, out),)
    return rows
