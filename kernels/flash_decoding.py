"""Attention of a few query rows over the keys of a cache, split over the keys (Flash-Decoding, Dao et al., 2023).

What ``decode_attention`` and ``qk_norm_rope_attention`` share. A program serves ``BLOCK_M`` of the ``GROUP * T`` query rows of one key head. Its
``place`` is ``(batch, k_head, first_row, T)``, its ``states`` hold maximum, sum and output of each row's softmax.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportArgumentType=false
# Triton's stubs do not know its static loops and tuples.

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def locate_rows(T, H_k, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the place of this program's rows."""
    row_blocks = tl.cdiv(GROUP * T, BLOCK_M)
    block = tl.program_id(0) // row_blocks
    return (block // H_k).to(tl.int64), (block % H_k).to(tl.int64), tl.program_id(0) % row_blocks * BLOCK_M, T


@triton.jit
def row_offset(place, m, strides, GROUP: tl.constexpr):
    """Return the offset of row ``m`` of a program in a tensor whose strides begin with those of batch, head and token."""
    batch, k_head, first_row, T = place
    row = first_row + m
    return batch * strides[0] + (k_head * GROUP + row // T) * strides[1] + (row % T).to(tl.int64) * strides[2]


@triton.jit
def is_row(place, m, GROUP: tl.constexpr):
    """Tell whether a program's block has a row ``m``."""
    return place[2] + m < GROUP * place[3]


@triton.jit
def load_mask(
    Mask_ptr, mask_strides, place, keys, in_bounds, GROUP: tl.constexpr, MASK_ROWS: tl.constexpr, STAYS: tl.constexpr = False
):  # fmt: skip
    """Request what the mask says of ``keys``: a tensor for each of a program's rows that differ, ``MASK_ROWS`` in turns; without a mask none.

    PTX's compiler moves a request to where its value is used, behind what is computed before, so that memory is waited for once more. One that
    ``STAYS`` does not move behind the next that does. It is volatile: it passes by the L1 cache, which other programs may have filled.
    """
    said = ()
    if Mask_ptr is not None:
        for m in tl.static_range(MASK_ROWS):
            pointers = Mask_ptr + row_offset(place, m, mask_strides, GROUP) + keys * mask_strides[3]
            readable = in_bounds & is_row(place, m, GROUP)
            if Mask_ptr.dtype.element_ty == tl.int1:  # as bytes: to convert them would be to wait for them
                said = said + (tl.load(pointers.to(tl.pointer_type(tl.int8)), mask=readable, other=0, volatile=STAYS),)
            else:
                said = said + (tl.load(pointers, mask=readable, other=float("-inf"), volatile=STAYS),)
    return said


@triton.jit
def as_biases(said, in_bounds, MASK_ROWS: tl.constexpr, FLOOR: tl.constexpr):
    """Return what is added to scores, in float32, after what :func:`load_mask` returned: -inf for an excluded key and out of bounds."""
    biases = ()
    for m in tl.static_range(MASK_ROWS):
        if len(said) == 0:
            bias = tl.where(in_bounds, 0.0, float("-inf"))
        elif said[m].dtype == tl.int8:
            bias = tl.where(in_bounds & (said[m] != 0), 0.0, float("-inf"))
        else:
            bias = said[m].to(tl.float32)
            bias = tl.where(in_bounds, tl.where(bias <= FLOOR, float("-inf"), bias), float("-inf"))
        biases = biases + (bias,)
    return biases


@triton.jit
def load_biases(
    Mask_ptr, mask_strides, place, keys, in_bounds, GROUP: tl.constexpr, MASK_ROWS: tl.constexpr, FLOOR: tl.constexpr, STAYS: tl.constexpr = False
):  # fmt: skip
    """Return :func:`as_biases` of what :func:`load_mask` requests."""
    return as_biases(load_mask(Mask_ptr, mask_strides, place, keys, in_bounds, GROUP, MASK_ROWS, STAYS), in_bounds, MASK_ROWS, FLOOR)


@triton.jit
def is_attended(biases):
    """Tell which keys at least one of the rows attends to."""
    attended = biases[0] != float("-inf")
    for m in tl.static_range(1, len(biases)):
        attended = attended | (biases[m] != float("-inf"))
    return attended


@triton.jit
def no_keys_yet(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the states before the first key."""
    # One tuple entry a row keeps every tensor two-dimensional: in three dimensions Triton lays keys out anew, through shared memory.
    states = ()
    for _ in tl.static_range(BLOCK_M):
        states = states + ((tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32), tl.zeros([BLOCK_D], tl.float32)),)
    return states


@triton.jit
def attend(states, q_rows, k, v, biases):
    """Add keys ``[N, BLOCK_D]`` to the states of the query rows ``[BLOCK_D]``, which are scaled by log2(e)."""
    new_states = ()
    for m in tl.static_range(len(q_rows)):
        row_max, row_sum, out = states[m]
        scores = tl.sum(q_rows[m][None, :] * k.to(tl.float32), axis=1)
        bias = biases[m % len(biases)]
        scores = tl.where(bias == float("-inf"), float("-inf"), scores + bias * LOG2_E)
        new_max = tl.maximum(row_max, tl.max(scores, axis=0))
        # A row without a live key so far has no maximum to subtract: inf - inf would be NaN.
        origin = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale = tl.exp2(row_max - origin)
        weights = tl.exp2(scores - origin)
        out = out * rescale + tl.sum(weights[:, None] * v.to(tl.float32), axis=0)
        new_states = new_states + ((new_max, row_sum * rescale + tl.sum(weights, axis=0), out),)
    return new_states


@triton.jit
def attend_key(states, q_rows, k, v, biases):
    """Add one key ``[BLOCK_D]``, with a scalar bias for each row, to the states of the query rows."""
    new_states = ()
    for m in tl.static_range(len(q_rows)):
        row_max, row_sum, out = states[m]
        score = tl.sum(q_rows[m] * k.to(tl.float32), axis=0)
        bias = biases[m % len(biases)]
        score = tl.where(bias == float("-inf"), float("-inf"), score + bias * LOG2_E)
        new_max = tl.maximum(row_max, score)
        origin = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale = tl.exp2(row_max - origin)
        weight = tl.exp2(score - origin)
        new_states = new_states + ((new_max, row_sum * rescale + weight, out * rescale + weight * v.to(tl.float32)),)
    return new_states


@triton.jit
def load_tile(X_ptr, stride_s, keys, readable, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Request keys or values ``[N, BLOCK_D]`` of the head that begins at ``X_ptr``, zero where they are not readable: it stays, see ``load_mask``."""
    columns = tl.arange(0, BLOCK_D)
    return tl.load(X_ptr + keys[:, None] * stride_s + columns[None, :], mask=readable[:, None] & (columns < D)[None, :], other=0.0, volatile=True)


@triton.jit
def is_old_key(keys, S, skipped):
    """Tell which ``keys`` are in the cache and not among the ``skipped``."""
    is_old = keys < S
    for t in tl.static_range(len(skipped)):
        is_old = is_old & (keys != skipped[t])
    return is_old


@triton.jit
def keys_ahead(look, n_splits, BLOCK_N: tl.constexpr, LOOK_AHEAD: tl.constexpr):
    """Return the keys ``[LOOK_AHEAD, BLOCK_N]`` of the next tiles of this one of ``n_splits``."""
    tiles = tl.program_id(1) + (look * LOOK_AHEAD + tl.arange(0, LOOK_AHEAD)) * n_splits
    return tiles.to(tl.int64)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]


@triton.jit
def live_tiles(attended):
    """Return a bit for each tile of ``attended`` ``[LOOK_AHEAD, N]``: whether a row attends to one of its keys."""
    return tl.sum(tl.max(attended.to(tl.int32), axis=1) << tl.arange(0, attended.shape[0]), axis=0)


@triton.jit
def lowest_bit(bits, NONE: tl.constexpr):
    """Return the number of the lowest bit that is set in an int32 of at most 24 bits, the exponent of its value, or ``NONE``."""
    return tl.where(bits != 0, ((bits & -bits).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127, NONE)


@triton.jit
def pack(x):
    """Return a tile ``[N, D]`` in words of 32 bits, as it was loaded: a loop that carries 16-bit values takes them apart."""
    if x.dtype.primitive_bitwidth == 16:
        low, high = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
        return low.to(tl.uint16, bitcast=True).to(tl.uint32) | (high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    else:
        return x


@triton.jit
def unpack(x, DTYPE: tl.constexpr):
    """Return the tile of :func:`pack`."""
    if DTYPE.primitive_bitwidth == 16:
        low, high = x.to(tl.uint16).to(DTYPE, bitcast=True), (x >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
        return tl.reshape(tl.join(low, high), [x.shape[0], 2 * x.shape[1]])
    else:
        return x


@triton.jit
def request_tile(
    tile, K_ptr, V_ptr, k_stride_s, v_stride_s, Mask_ptr, mask_strides, place, S,
    GROUP: tl.constexpr, D: tl.constexpr, MASK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Request a tile of keys and values, packed, and what the mask says of it. None of it waits for the other.

    What the mask excludes may hold anything, and so may what is beyond ``S``.
    """
    keys = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)[None, :]
    k_pointers, v_pointers = K_ptr + keys[:, None] * k_stride_s + columns, V_ptr + keys[:, None] * v_stride_s + columns
    in_bounds = (keys < S)[:, None]
    if D == BLOCK_D:
        k, v = tl.load(k_pointers, mask=in_bounds), tl.load(v_pointers, mask=in_bounds)
    else:
        in_bounds = in_bounds & (columns < D)
        k, v = tl.load(k_pointers, mask=in_bounds, other=0.0), tl.load(v_pointers, mask=in_bounds, other=0.0)
    return pack(k), pack(v), load_mask(Mask_ptr, mask_strides, place, keys, keys < S, GROUP, MASK_ROWS)


@triton.jit
def queue_tiles(live_bits, is_requested, NONE: tl.constexpr):
    """Return the bits of the tiles to request, and which has been: the first if it ``is_requested`` and live, else ``NONE``.

    Tiles are counted from a look's first, and the bits are those of this look and the next.
    """
    return tl.where(is_requested, live_bits & ~1, live_bits), tl.where(is_requested & ((live_bits & 1) != 0), 0, NONE)


@triton.jit
def is_queued(tile, bits, LOOK_AHEAD: tl.constexpr, NONE: tl.constexpr):
    """Tell whether this look has a tile left, requested or to be."""
    return tl.minimum(tile, lowest_bit(bits, NONE)) < LOOK_AHEAD


@triton.jit
def count_from_next_look(tile, bits, LOOK_AHEAD: tl.constexpr, NONE: tl.constexpr):
    """Return ``tile`` and ``bits`` as they are counted from the next look's first tile."""
    return tl.where(tile < NONE, tile - LOOK_AHEAD, NONE), bits >> LOOK_AHEAD


@triton.jit
def look_ahead(
    look, n_splits, Mask_ptr, mask_strides, place, S, skipped,
    GROUP: tl.constexpr, MASK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, LOOK_AHEAD: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """Return the :func:`live_tiles` of the next ``LOOK_AHEAD`` of this one of ``n_splits``."""
    # One look at the mask of several tiles costs one memory latency instead of one per excluded tile. It does not wait for what is skipped.
    keys = keys_ahead(look, n_splits, BLOCK_N, LOOK_AHEAD)
    biases = load_biases(Mask_ptr, mask_strides, place, keys, keys < S, GROUP, MASK_ROWS, FLOOR)
    return live_tiles(is_attended(biases) & is_old_key(keys, S, skipped))


@triton.jit
def attend_cache(
    states, q_rows, requested, is_requested, live_bits, K_ptr, V_ptr, k_stride_s, v_stride_s, Mask_ptr, mask_strides, place, S, skipped,
    GROUP: tl.constexpr, D: tl.constexpr, MASK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    N_LOOKS: tl.constexpr, LOOK_AHEAD: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """Add the tiles of keys ``split, split + n_splits, ...`` of one head to the states, but for the rows of the cache in ``skipped``.

    ``requested`` is the first of them from :func:`request_tile`, if it ``is_requested``, and ``live_bits`` the first look ahead. Neighbouring tiles
    go to different splits, so that a short filled prefix of a long cache still spreads over the whole GPU.
    """
    NONE: tl.constexpr = 2 * LOOK_AHEAD
    split, n_splits = tl.program_id(1), tl.num_programs(1)
    bits, tile = queue_tiles(live_bits, is_requested, NONE)
    for look in range(N_LOOKS):
        if N_LOOKS > 1:
            next_bits = look_ahead(look + 1, n_splits, Mask_ptr, mask_strides, place, S, skipped, GROUP, MASK_ROWS, BLOCK_N, LOOK_AHEAD, FLOOR)
            bits |= next_bits << LOOK_AHEAD
        while is_queued(tile, bits, LOOK_AHEAD, NONE):
            following = requested  # the next tile is requested before a tile is computed
            next_tile = lowest_bit(bits, NONE)
            if next_tile < NONE:
                following = request_tile(
                    split + (look * LOOK_AHEAD + next_tile) * n_splits, K_ptr, V_ptr, k_stride_s, v_stride_s, Mask_ptr, mask_strides, place, S,
                    GROUP, D, MASK_ROWS, BLOCK_N, BLOCK_D,
                )  # fmt: skip
            if tile < NONE:
                keys = (split + (look * LOOK_AHEAD + tile) * n_splits).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
                biases = as_biases(requested[2], is_old_key(keys, S, skipped), MASK_ROWS, FLOOR)
                k = unpack(requested[0], K_ptr.dtype.element_ty)
                v = unpack(tl.where(is_attended(biases)[:, None], requested[1], 0), V_ptr.dtype.element_ty)
                states = attend(states, q_rows, k, v, biases)
            requested, tile = following, next_tile
            bits &= bits - 1
        tile, bits = count_from_next_look(tile, bits, LOOK_AHEAD, NONE)
    return states


@triton.jit
def store_rows(
    states, Out_ptr, Max_ptr, Sum_ptr, place, split, H_k, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Store the rows ``[B, T, Hq, D]`` from ``place`` on, or with ``Max_ptr`` what a ``split`` contributes to them.

    The programs' blocks are of ``BLOCK_M`` rows, of which this one may have fewer.
    """
    T = place[3]
    columns = tl.arange(0, BLOCK_D)
    n_rows = tl.num_programs(0) // tl.cdiv(GROUP * T, BLOCK_M) * GROUP * T
    for m in tl.static_range(len(states)):
        row_max, row_sum, out = states[m]
        in_rows = is_row(place, m, GROUP)
        out_row = row_offset(place, m, (T * H_k * GROUP, 1, H_k * GROUP), GROUP)
        if Max_ptr is None:
            out = out / tl.where(row_sum == 0, 1.0, row_sum)
        else:
            out_row += split.to(tl.int64) * n_rows
            tl.store(Max_ptr + out_row, row_max, mask=in_rows)
            tl.store(Sum_ptr + out_row, row_sum, mask=in_rows)
            in_rows = in_rows & (row_sum > 0)
        tl.store(Out_ptr + out_row * D + columns, out.to(Out_ptr.dtype.element_ty), mask=(columns < D) & in_rows)
