"""Attention of a few query tokens over a long KV cache, split over the keys (Flash-Decoding, Dao et al., 2023)."""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false
# Triton's stubs type a launch as a call of the kernel itself, without its launch options, and do not know its static loops.

import functools

import torch
import triton
import triton.language as tl

from qtts_compile.kernels.checks import check_device, check_float_dtype, check_like, check_rank, check_shape
from qtts_compile.kernels.library import define_op
from qtts_compile.kernels.rows import with_unit_stride

LOG2_E = tl.constexpr(1.4426950408889634)
MAX_SPLITS = 64
PROGRAMS_PER_SM = 4
MAX_TILES_OF_ONE_SPLIT = 2
MAX_LOOK_AHEAD = 8


def decode_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Return ``softmax(q @ k.T * scale + mask) @ v`` for ``q`` ``[B, Hq, T, D]`` and ``k``, ``v`` ``[B, Hk, S, D]``.

    Query heads share key heads in consecutive groups of ``Hq / Hk``. Meant for decoding: the work grows with ``T`` without reuse of the
    keys. ``mask`` broadcasts to ``[B, Hq, T, S]`` (its last dimension is ``S``) and is boolean (True: attend) or additive in any floating
    dtype. A key whose additive mask is at most ``finfo(mask.dtype).min`` is excluded like one whose boolean mask is False; keys that
    every query excludes have no effect whatever they hold, tiles of them are not read, and a row that excludes all its keys gives zeros.

    Everything is computed in float32 and rounded once, to the dtype of ``q``. The result ``[B, Hq, T, D]`` has the strides of a
    transposed contiguous ``[B, T, Hq, D]``, so that ``.transpose(1, 2).reshape(B, T, Hq * D)`` is a view.

    Raises ``TypeError`` for a dtype other than bfloat16, float16 and float32, or an integer mask, and ``ValueError`` for shapes that do
    not match, an ``S`` of 0 or different devices.
    """
    return torch.ops.qtts.decode_attention.default(q, k, v, mask, scale)


def decode_attention_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Compute :func:`decode_attention` in plain PyTorch."""
    batch, q_heads, tokens, width = q.shape
    grouped = (batch, k.shape[1], q_heads // k.shape[1], tokens)
    scores = q.float().reshape(*grouped, width) @ k.float().unsqueeze(2).transpose(-1, -2) * scale
    if mask is not None:
        mask = mask.expand(batch, q_heads, tokens, k.shape[2]).reshape(*grouped, k.shape[2])
        attend = mask if mask.dtype == torch.bool else ~(mask <= torch.finfo(mask.dtype).min)
        bias = 0.0 if mask.dtype == torch.bool else mask.float()
        scores = (scores + bias).masked_fill(~attend, float("-inf"))
        weights = torch.softmax(scores, dim=-1).masked_fill(~attend.any(-1, keepdim=True), 0.0)
    else:
        weights = torch.softmax(scores, dim=-1)
    out = (weights @ v.float().unsqueeze(2)).reshape(q.shape)
    return decode_attention_fake(q, k, v, mask, scale).copy_(out)


def check_decode_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless :func:`decode_attention` accepts the arguments."""
    check_float_dtype("q", q)
    check_like("k", k, "q", q)
    check_like("v", v, "q", q)
    check_rank("q", q, "B, Hq, T, D")
    check_rank("k", k, "B, Hk, S, D")
    batch, q_heads, tokens, width = q.shape
    _, k_heads, keys, _ = k.shape
    check_shape("k", k, batch, k_heads, keys, width)
    check_shape("v", v, batch, k_heads, keys, width)
    if keys == 0 or k_heads == 0 or width == 0 or q_heads % k_heads:
        raise ValueError(f"k must have S > 0 keys, D > 0 and a head count that divides q's {q_heads}, got {tuple(k.shape)}")
    if mask is None:
        return
    if mask.dtype not in (torch.bool, torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise TypeError(f"mask must be bool or floating, got {mask.dtype}; use mask.bool() if its ones mean attend")
    check_device("mask", mask, "q", q)
    check_rank("mask", mask, "B, Hq, T, S")
    if mask.shape[3] != keys or any(size not in (1, full) for size, full in zip(mask.shape, (batch, q_heads, tokens), strict=False)):
        raise ValueError(f"mask must broadcast to {(batch, q_heads, tokens, keys)} with a full last dimension, got {tuple(mask.shape)}")


@triton.jit
def _load_bias(Mask_ptr, offsets, in_bounds, FLOOR: tl.constexpr, IS_BOOL: tl.constexpr):
    """Load what the mask adds to the scores in float32: -inf for an excluded key and out of bounds."""
    if IS_BOOL:
        return tl.where(tl.load(Mask_ptr + offsets, mask=in_bounds, other=0).to(tl.int1), 0.0, float("-inf"))
    else:
        bias = tl.load(Mask_ptr + offsets, mask=in_bounds, other=float("-inf")).to(tl.float32)
        return tl.where(bias <= FLOOR, float("-inf"), bias)


@triton.jit
def _row_offset(row, T, GROUP: tl.constexpr, batch, k_head, stride_b, stride_h, stride_t):
    """Return the offset of query row ``row`` in ``[0, GROUP * T)`` of a key head."""
    return batch * stride_b + (k_head * GROUP + row // T) * stride_h + (row % T).to(tl.int64) * stride_t


@triton.jit
def _attend(row_max, row_sum, out, q, k, v, bias):
    """Add a tile of keys ``[BLOCK_N, BLOCK_D]`` to the online softmax of one query row ``[BLOCK_D]`` that is scaled by log2(e)."""
    scores = tl.sum(q[None, :] * k.to(tl.float32), axis=1)
    scores = tl.where(bias == float("-inf"), float("-inf"), scores + bias * LOG2_E)
    new_max = tl.maximum(row_max, tl.max(scores, axis=0))
    # A row without a live key so far has no maximum to subtract: inf - inf would be NaN.
    origin = tl.where(new_max == float("-inf"), 0.0, new_max)
    rescale = tl.exp2(row_max - origin)
    weights = tl.exp2(scores - origin)
    out = out * rescale + tl.sum(weights[:, None] * v.to(tl.float32), axis=0)
    return new_max, row_sum * rescale + tl.sum(weights, axis=0), out


@triton.jit
def _decode_attention_kernel(
    Q_ptr, K_ptr, V_ptr, Mask_ptr, Out_ptr, Max_ptr, Sum_ptr, T, H_k, S, scale,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    mask_stride_b, mask_stride_h, mask_stride_t, mask_stride_s,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    N_LOOKS: tl.constexpr, LOOK_AHEAD: tl.constexpr, FLOOR: tl.constexpr,
    HAS_MASK: tl.constexpr, IS_BOOL: tl.constexpr, IS_SPLIT: tl.constexpr, IS_ONE_TILE: tl.constexpr,
):  # fmt: skip
    """Serve ``BLOCK_M`` of the ``GROUP * T`` query rows of one key head, over the tiles of keys ``split, split + n_splits, ...``.

    Neighbouring tiles go to different splits, so that a short filled prefix of a long cache still spreads over the whole GPU.
    """
    split = tl.program_id(1)
    n_splits = tl.num_programs(1)
    row_blocks = tl.cdiv(GROUP * T, BLOCK_M)
    first_row = tl.program_id(0) % row_blocks * BLOCK_M
    k_head = (tl.program_id(0) // row_blocks % H_k).to(tl.int64)
    batch = (tl.program_id(0) // row_blocks // H_k).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    in_width = columns < D
    K_ptr += batch * k_stride_b + k_head * k_stride_h
    V_ptr += batch * v_stride_b + k_head * v_stride_h

    # One tuple entry a row keeps every tensor two-dimensional: in three dimensions Triton lays keys out anew, through shared memory.
    q_rows = ()
    states = ()
    for m in tl.static_range(BLOCK_M):
        row = first_row + m
        q_offset = _row_offset(row, T, GROUP, batch, k_head, q_stride_b, q_stride_h, q_stride_t)
        q = tl.load(Q_ptr + q_offset + columns, mask=in_width & (row < GROUP * T), other=0.0).to(tl.float32)
        q_rows = q_rows + (q * (scale * LOG2_E),)
        states = states + ((tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32), tl.zeros([BLOCK_D], tl.float32)),)

    ahead = tl.arange(0, LOOK_AHEAD)
    for look in range(N_LOOKS):
        tiles = split + (look * LOOK_AHEAD + ahead) * n_splits
        if HAS_MASK and not IS_ONE_TILE:
            # One look at the mask of several tiles costs one memory latency instead of one per excluded tile.
            keys = tiles.to(tl.int64)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            is_live = tl.zeros([LOOK_AHEAD], tl.int32)
            for m in tl.static_range(BLOCK_M):
                row = first_row + m
                mask_row = _row_offset(row, T, GROUP, batch, k_head, mask_stride_b, mask_stride_h, mask_stride_t)
                look_bias = _load_bias(Mask_ptr + mask_row, keys * mask_stride_s, (keys < S) & (row < GROUP * T), FLOOR, IS_BOOL)
                is_live = tl.maximum(is_live, tl.max((look_bias != float("-inf")).to(tl.int32), axis=1))
        else:
            is_live = (tiles.to(tl.int64) * BLOCK_N < S).to(tl.int32)
        live_bits = tl.sum(is_live << ahead, axis=0)
        for i in range(LOOK_AHEAD):
            if (live_bits >> i) & 1:
                tile_keys = (split + (look * LOOK_AHEAD + i) * n_splits).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
                readable = tile_keys < S
                biases = ()
                is_read = tl.zeros([BLOCK_N], tl.int32)
                if HAS_MASK:
                    for m in tl.static_range(BLOCK_M):
                        row = first_row + m
                        mask_row = _row_offset(row, T, GROUP, batch, k_head, mask_stride_b, mask_stride_h, mask_stride_t)
                        bias = _load_bias(Mask_ptr + mask_row, tile_keys * mask_stride_s, readable & (row < GROUP * T), FLOOR, IS_BOOL)
                        is_read = tl.maximum(is_read, (bias != float("-inf")).to(tl.int32))
                        biases = biases + (bias,)
                    if not IS_ONE_TILE:
                        readable = is_read > 0
                else:
                    for _ in tl.static_range(BLOCK_M):
                        biases = biases + (tl.where(readable, 0.0, float("-inf")),)
                in_tile = readable[:, None] & in_width[None, :]
                k = tl.load(K_ptr + tile_keys[:, None] * k_stride_s + columns[None, :], mask=in_tile, other=0.0)
                v = tl.load(V_ptr + tile_keys[:, None] * v_stride_s + columns[None, :], mask=in_tile, other=0.0)
                if HAS_MASK and IS_ONE_TILE:
                    # Keys, values and mask were requested together, to wait for memory once; what the mask excludes may hold anything.
                    v = tl.where(tl.expand_dims(is_read, 1) > 0, v.to(tl.float32), 0.0)
                new_states = ()
                for m in tl.static_range(BLOCK_M):
                    row_max, row_sum, out = states[m]
                    new_states = new_states + (_attend(row_max, row_sum, out, q_rows[m], k, v, biases[m]),)
                states = new_states

    n_rows = tl.num_programs(0) // row_blocks * GROUP * T
    for m in tl.static_range(BLOCK_M):
        row = first_row + m
        in_rows = row < GROUP * T
        out_row = _row_offset(row, T, GROUP, batch, k_head, T * H_k * GROUP, 1, H_k * GROUP)
        row_max, row_sum, out = states[m]
        if IS_SPLIT:
            out_row += split.to(tl.int64) * n_rows
            tl.store(Max_ptr + out_row, row_max, mask=in_rows)
            tl.store(Sum_ptr + out_row, row_sum, mask=in_rows)
            in_rows = in_rows & (row_sum > 0)
        else:
            out = out / tl.where(row_sum == 0, 1.0, row_sum)
        tl.store(Out_ptr + out_row * D + columns, out.to(Out_ptr.dtype.element_ty), mask=in_width & in_rows)


@triton.jit
def _combine_kernel(Partial_ptr, Max_ptr, Sum_ptr, Out_ptr, n_rows, n_splits, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, BLOCK_S)
    columns = tl.arange(0, BLOCK_D)
    in_width = columns < D
    split_rows = splits.to(tl.int64) * n_rows + row
    split_max = tl.load(Max_ptr + split_rows, mask=splits < n_splits, other=float("-inf"))
    split_sum = tl.load(Sum_ptr + split_rows, mask=splits < n_splits, other=0.0)
    row_max = tl.max(split_max, axis=0)
    origin = tl.where(row_max == float("-inf"), 0.0, row_max)
    rescale = tl.exp2(split_max - origin)
    row_sum = tl.sum(split_sum * rescale, axis=0)
    in_bounds = (split_sum > 0)[:, None] & in_width[None, :]
    partial = tl.load(Partial_ptr + split_rows[:, None] * D + columns[None, :], mask=in_bounds, other=0.0)
    out = tl.sum(partial * rescale[:, None], axis=0) / tl.where(row_sum == 0, 1.0, row_sum)
    tl.store(Out_ptr + row * D + columns, out.to(Out_ptr.dtype.element_ty), mask=in_width)


@functools.cache
def _sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def choose_splits(n_tiles: int, n_programs: int, device: torch.device) -> int:
    """Choose how many programs share the tiles of one key head: enough to fill the GPU, one if a second launch would not pay."""
    if n_tiles <= MAX_TILES_OF_ONE_SPLIT:
        return 1
    return max(1, min(n_tiles, MAX_SPLITS, PROGRAMS_PER_SM * _sm_count(device) // n_programs))


def decode_attention_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float,
    n_splits: int | None = None, block_n: int | None = None, num_warps: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Launch the kernels of :func:`decode_attention`.

    ``n_splits`` (programs that share the keys of one head), ``block_n`` (keys in a tile) and ``num_warps`` override what is chosen from the
    shapes. One tile is served fastest by few warps: on an H200, 16 keys of 128 take 2.4 us with one warp and 3.6 us with four.
    """
    out = decode_attention_fake(q, k, v, mask, scale)
    if out.numel() == 0:
        return out
    q, k, v = with_unit_stride(q), with_unit_stride(k), with_unit_stride(v)
    if mask is not None:
        mask = (mask.float() if mask.dtype == torch.float64 else mask).expand(*q.shape[:3], k.shape[2])
    batch, q_heads, tokens, width = q.shape
    k_heads, keys = k.shape[1:3]
    group = q_heads // k_heads
    block_d = triton.next_power_of_2(width)
    block_m = min(4, triton.next_power_of_2(group * tokens))
    block_n = block_n or max(16, min(32, 4096 // block_d, triton.next_power_of_2(keys)))
    n_tiles = triton.cdiv(keys, block_n)
    n_programs = batch * k_heads * triton.cdiv(group * tokens, block_m)
    n_splits = n_splits or choose_splits(n_tiles, n_programs, q.device)
    tiles_per_split = triton.cdiv(n_tiles, n_splits)
    look_ahead = min(MAX_LOOK_AHEAD, triton.next_power_of_2(tiles_per_split))
    n_rows = batch * tokens * q_heads
    partial, split_max, split_sum = out, None, None
    if n_splits > 1:
        partial = torch.empty((n_splits, n_rows, width), dtype=torch.float32, device=q.device)
        split_max, split_sum = torch.empty((2, n_splits, n_rows), dtype=torch.float32, device=q.device)
    _decode_attention_kernel[(n_programs, n_splits)](
        q, k, v, mask, partial, split_max, split_sum, tokens, k_heads, keys, scale,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *((0, 0, 0, 0) if mask is None else mask.stride()),
        GROUP=group, D=width, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d,
        N_LOOKS=triton.next_power_of_2(triton.cdiv(tiles_per_split, look_ahead)), LOOK_AHEAD=look_ahead,
        FLOOR=torch.finfo(mask.dtype).min if mask is not None and mask.dtype != torch.bool else 0.0,
        HAS_MASK=mask is not None, IS_BOOL=mask is not None and mask.dtype == torch.bool, IS_SPLIT=n_splits > 1,
        IS_ONE_TILE=n_tiles == 1, num_warps=num_warps or (max(1, block_n * block_d // 2048) if n_tiles == 1 else 4),
    )  # fmt: skip
    if n_splits > 1:
        _combine_kernel[(n_rows,)](
            partial, split_max, split_sum, out, n_rows, n_splits,
            D=width, BLOCK_S=triton.next_power_of_2(n_splits), BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return out


def decode_attention_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Allocate the result of :func:`decode_attention`."""
    batch, heads, tokens, width = q.shape
    return torch.empty((batch, tokens, heads, width), dtype=q.dtype, device=q.device).transpose(1, 2)


define_op(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor",
    check=check_decode_attention,
    cuda=decode_attention_triton,
    cpu=decode_attention_reference,
    fake=decode_attention_fake,
)
