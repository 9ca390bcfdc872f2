"""Attention of a few query tokens over a KV cache."""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false
# Triton's stubs type a launch as a call of the kernel itself, without its launch options, and do not know its static loops.

import torch
import triton
import triton.language as tl

from qtts_compile.kernels.checks import check_device, check_float_dtype, check_like, check_rank, check_shape
from qtts_compile.kernels.flash_decoding import (
    LOG2_E,
    attend,
    attend_cache,
    is_attended,
    is_row,
    load_biases,
    load_tile,
    locate_rows,
    look_ahead,
    no_keys_yet,
    request_tile,
    row_offset,
    store_rows,
)
from qtts_compile.kernels.flash_decoding_launch import Partials, expand_mask, mask_strides, plan_launch
from qtts_compile.kernels.library import define_op
from qtts_compile.kernels.pdl import announce, wait_for_inputs
from qtts_compile.kernels.rows import with_unit_stride


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
    check_mask(mask, q, keys)


def check_mask(mask: torch.Tensor | None, q: torch.Tensor, keys: int) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``mask`` is None or one for ``q`` ``[B, Hq, T, D]`` and so many keys."""
    if mask is None:
        return
    batch, q_heads, tokens, _ = q.shape
    if mask.dtype not in (torch.bool, torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise TypeError(f"mask must be bool or floating, got {mask.dtype}; use mask.bool() if its ones mean attend")
    check_device("mask", mask, "q", q)
    check_rank("mask", mask, "B, Hq, T, S")
    if mask.shape[3] != keys or any(size not in (1, full) for size, full in zip(mask.shape, (batch, q_heads, tokens), strict=False)):
        raise ValueError(f"mask must broadcast to {(batch, q_heads, tokens, keys)} with a full last dimension, got {tuple(mask.shape)}")


@triton.jit
def _decode_attention_kernel(
    Q_ptr, K_ptr, V_ptr, Mask_ptr, Out_ptr, Max_ptr, Sum_ptr, H_k, S, scale, q_strides, k_strides, v_strides, mask_strides,
    T: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASK_ROWS: tl.constexpr, N_LOOKS: tl.constexpr, LOOK_AHEAD: tl.constexpr, FLOOR: tl.constexpr, IS_ONE_TILE: tl.constexpr,
    HAS_PDL: tl.constexpr,
):  # fmt: skip
    announce(HAS_PDL)
    place = locate_rows(T, H_k, GROUP, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    K_ptr += place[0] * k_strides[0] + place[1] * k_strides[1]
    V_ptr += place[0] * v_strides[0] + place[1] * v_strides[1]
    wait_for_inputs(HAS_PDL)
    q_rows = ()
    for m in tl.static_range(BLOCK_M):
        in_bounds = (columns < D) & is_row(place, m, GROUP)
        q = tl.load(Q_ptr + row_offset(place, m, q_strides, GROUP) + columns, mask=in_bounds, other=0.0).to(tl.float32)
        q_rows = q_rows + (q * (scale * LOG2_E),)
    states = no_keys_yet(BLOCK_M, BLOCK_D)
    if IS_ONE_TILE:
        # Keys, values and mask are requested together, to wait for memory once; what the mask excludes may hold anything.
        keys = tl.arange(0, BLOCK_N).to(tl.int64)
        biases = load_biases(Mask_ptr, mask_strides, place, keys, keys < S, GROUP, MASK_ROWS, FLOOR)
        k = load_tile(K_ptr, k_strides[2], keys, keys < S, D, BLOCK_D)
        v = load_tile(V_ptr, v_strides[2], keys, keys < S, D, BLOCK_D)
        states = attend(states, q_rows, k, tl.where(is_attended(biases)[:, None], v, 0.0), biases)
    else:
        live_bits = look_ahead(0, tl.num_programs(1), Mask_ptr, mask_strides, place, S, (), GROUP, MASK_ROWS, BLOCK_N, LOOK_AHEAD, FLOOR)
        is_live = (live_bits & 1) != 0
        requested = request_tile(
            tl.program_id(1), K_ptr, V_ptr, k_strides[2], v_strides[2], Mask_ptr, mask_strides, place, tl.where(is_live, S, 0),
            GROUP, D, MASK_ROWS, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        states = attend_cache(
            states, q_rows, requested, is_live, live_bits, K_ptr, V_ptr, k_strides[2], v_strides[2], Mask_ptr, mask_strides, place, S, (),
            GROUP, D, MASK_ROWS, BLOCK_N, BLOCK_D, N_LOOKS, LOOK_AHEAD, FLOOR,
        )  # fmt: skip
    store_rows(states, Out_ptr, Max_ptr, Sum_ptr, place, tl.program_id(1), H_k, GROUP, D, BLOCK_M, BLOCK_D)


def decode_attention_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float,
    n_splits: int | None = None, block_n: int | None = None, num_warps: int | None = None, block_m: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Launch the kernels of :func:`decode_attention`; see :func:`plan_launch` for what overrides its choices."""
    out = decode_attention_fake(q, k, v, mask, scale)
    if out.numel() == 0:
        return out
    q, k, v = with_unit_stride(q), with_unit_stride(k), with_unit_stride(v)
    mask = expand_mask(mask, q, k.shape[2])
    grid, options = plan_launch(q, k, mask, n_splits, block_n, num_warps, block_m)
    partials = Partials.empty(out, grid[1])
    _decode_attention_kernel[grid](
        q, k, v, mask, *partials, k.shape[1], k.shape[2], scale,
        q.stride(), k.stride(), v.stride(), mask_strides(mask), **options,
    )  # fmt: skip
    return partials.combine(out)


def decode_attention_fake(q: torch.Tensor, *_: object) -> torch.Tensor:
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
