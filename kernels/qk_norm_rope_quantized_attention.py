"""A decode step over a quantised KV cache in two launches: per-head RMSNorm, rotary embedding, quantisation, attention.

Keys and values stay packed: the query is rotated as they were (arXiv 2504.19874), the sum of values is rotated back at the end.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportArgumentType=false
# Triton's stubs type a launch as a call of the kernel itself, without its launch options, and do not know its static loops and tuples.

import torch
import triton
import triton.language as tl

from qtts_compile.kernels.decode_attention import check_mask, decode_attention_fake, decode_attention_reference
from qtts_compile.kernels.flash_decoding import (
    LOG2_E,
    attend_key,
    is_attended,
    is_row,
    load_biases,
    locate_rows,
    no_keys_yet,
    row_offset,
    store_rows,
)
from qtts_compile.kernels.flash_decoding_launch import Partials, expand_mask, have_room, mask_strides, plan_launch
from qtts_compile.kernels.heads_attention import launch_coded_heads
from qtts_compile.kernels.kv_write import assert_in_cache, cache_row
from qtts_compile.kernels.library import define_op
from qtts_compile.kernels.norm_rotate import load_angles, load_head, load_weight, norm_rotate
from qtts_compile.kernels.pdl import announce, wait_for_inputs
from qtts_compile.kernels.qk_norm_rope_attention import check_qk_norm_rope_attention
from qtts_compile.kernels.rms_norm import rms_norm_reference
from qtts_compile.kernels.rotary import as_angles, rotary_reference
from qtts_compile.kernels.rows import with_unit_stride
from qtts_compile.kernels.sizes import cdiv, next_power_of_2
from qtts_compile.kernels.turboquant.attend import (
    COLUMNS,
    KEPT_TILE,
    attend_codes,
    attend_kept,
    load_codes,
    load_kept,
    look_for_codes,
    rotated,
    store_columns,
)
from qtts_compile.kernels.turboquant.combine import combine
from qtts_compile.kernels.turboquant.format import Format
from qtts_compile.kernels.turboquant.kept import check_buffers
from qtts_compile.kernels.turboquant.read import quantized_kv_read_reference
from qtts_compile.kernels.turboquant.write import quantized_kv_write_reference, write_vector

MAX_PARTS = 8  # programs for the kept tokens of a query head
DENSE_BITS = tl.constexpr(16)  # of kept tokens, at least: they are not rotated
RESIDENT_PROGRAMS = 8  # of a multiprocessor, with the registers that each takes


def qk_norm_rope_quantized_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    q_eps: float,
    k_eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    sections: list[int],
    interleaved: bool,
    k_codes: torch.Tensor,
    v_codes: torch.Tensor,
    scales: torch.Tensor,
    kept: torch.Tensor,
    position: torch.Tensor,
    start: torch.Tensor,
    sinks: int,
    format: str,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Write one new token into a quantised cache and return the attention of its queries ``q`` over it.

    ``q`` is ``[B, Hq, 1, D]``, ``k`` and ``v`` are ``[B, Hk, 1, D]``; the arguments from ``k_codes`` on are those of ``quantized_kv_write``
    and ``quantized_kv_read``, with ``position`` ``[1]`` as ``last``, the others those of ``qk_norm_rope_attention``, with the same rounding
    of queries and keys. Attention is computed in float32 over what ``quantized_kv_read`` decodes, before it is rounded, and over the new
    token as it is; on a GPU rotated queries and the weights of codes are rounded to the dtype, for the tensor cores. ``mask``
    ``[B, Hq, 1, S]`` counts slots. ``kept`` must have room for a recent token. The result ``[B, Hq, 1, D]`` has the strides of
    ``decode_attention``'s.

    ``position``, ``start`` and the weights of the norms must be at rest, as for ``qk_norm_rope_attention``.

    Raises ``TypeError`` or ``ValueError`` as those do, and ``ValueError`` for more than one token.
    """
    return torch.ops.qtts.qk_norm_rope_quantized_attention.default(
        q, k, v, q_weight, k_weight, q_eps, k_eps, cos, sin, sections, interleaved,
        k_codes, v_codes, scales, kept, position, start, sinks, format, mask, scale,
    )  # fmt: skip


def qk_norm_rope_quantized_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    q_eps: float, k_eps: float, cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool,
    k_codes: torch.Tensor, v_codes: torch.Tensor, scales: torch.Tensor, kept: torch.Tensor, position: torch.Tensor, start: torch.Tensor,
    sinks: int, format: str, mask: torch.Tensor | None, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Compute :func:`qk_norm_rope_quantized_attention` in plain PyTorch."""
    q, k = (
        rotary_reference(x if weight is None else rms_norm_reference(x, weight, eps), cos, sin, sections, interleaved)
        for x, weight, eps in ((q, q_weight, q_eps), (k, k_weight, k_eps))
    )
    last = position % k_codes.shape[2]
    quantized_kv_write_reference(k, v, k_codes, v_codes, scales, kept, position, last, start, sinks, format)
    keys, values = quantized_kv_read_reference(k_codes, v_codes, scales, kept, last, start, sinks, format)
    return decode_attention_reference(q, keys, values, mask, scale)


def check_qk_norm_rope_quantized_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    q_eps: float, k_eps: float, cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool,
    k_codes: torch.Tensor, v_codes: torch.Tensor, scales: torch.Tensor, kept: torch.Tensor, position: torch.Tensor, start: torch.Tensor,
    sinks: int, format: str, mask: torch.Tensor | None, scale: float,
) -> None:  # fmt: skip
    """Raise ``TypeError`` or ``ValueError`` unless :func:`qk_norm_rope_quantized_attention` accepts the arguments."""
    check_buffers(k_codes, v_codes, scales, kept, position, start, sinks, format, name_of_last="position")
    if kept.shape[3] <= sinks:
        raise ValueError(f"kept must have room for the new token beside its {sinks} sinks, got {tuple(kept.shape)}; call quantized_kv_write")
    check_qk_norm_rope_attention(q, k, v, q_weight, k_weight, q_eps, k_eps, cos, sin, sections, interleaved, kept[0], kept[1], position, None, scale)
    check_mask(mask, q, k_codes.shape[2])


@triton.jit
def _queries(q_heads, q_weight, q_eps, angles, scale, D: tl.constexpr, BITS: tl.constexpr):
    """Return the rows of queries, scaled by log2(e), for keys of so many bits: rotated if the keys are."""
    q_rows = ()
    for m in tl.static_range(len(q_heads)):
        q_rows = q_rows + (rotated(norm_rotate(q_heads[m], q_weight, q_eps, angles, D).to(tl.float32) * (scale * LOG2_E), BITS),)
    return q_rows


@triton.jit
def _qk_norm_rope_quantized_attention_kernel(
    Q_ptr, K_ptr, V_ptr, Q_weight_ptr, K_weight_ptr, Cos_ptr, Sin_ptr, K_codes_ptr, V_codes_ptr, Scales_ptr, Kept_ptr, Position_ptr, Start_ptr,
    Mask_ptr, Out_ptr, Max_ptr, Sum_ptr, H_k, S, q_eps, k_eps, scale, stride_start,
    q_strides, k_strides, v_strides, k_codes_strides, v_codes_strides, scales_strides, kept_strides, mask_strides, angle_strides,
    T: tl.constexpr, HAS_SECTIONS: tl.constexpr, IS_INTERLEAVED: tl.constexpr, AXIS_1: tl.constexpr, AXIS_2: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASK_ROWS: tl.constexpr, N_LOOKS: tl.constexpr, LOOK_AHEAD: tl.constexpr, FLOOR: tl.constexpr, IS_ONE_TILE: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr,
    N_PARTS: tl.constexpr, KEPT_M: tl.constexpr, HAS_PDL: tl.constexpr,
):  # fmt: skip
    announce(HAS_PDL)
    place = locate_rows(T, H_k, GROUP, BLOCK_M)
    batch, k_head, first_row, _ = place
    columns = tl.arange(0, D)
    partners = (columns + D // 2) % D
    q_weight = load_weight(Q_weight_ptr, columns, partners, D)
    k_weight = load_weight(K_weight_ptr, columns, partners, D)
    K_codes_ptr += batch * k_codes_strides[0] + k_head * k_codes_strides[1]
    V_codes_ptr += batch * v_codes_strides[0] + k_head * v_codes_strides[1]
    K_scales_ptr = Scales_ptr + batch * scales_strides[1] + k_head * scales_strides[2]
    V_scales_ptr = K_scales_ptr + scales_strides[0]
    K_kept_ptr = Kept_ptr + batch * kept_strides[1] + k_head * kept_strides[2]
    V_kept_ptr = K_kept_ptr + kept_strides[0]
    row, in_cache = cache_row(Position_ptr, 0, 0, S)
    start = tl.load(Start_ptr + batch * stride_start)
    wait_for_inputs(HAS_PDL)

    # Codes, kept tokens, the new token and the writes each have programs of their own: in one, its single warp would go through all that code.
    BLOCKS: tl.constexpr = BLOCK_M // KEPT_M
    n_splits = tl.num_programs(1) - (N_PARTS + 1) * BLOCKS - 2
    split = tl.program_id(1)
    offset = batch * angle_strides[1]
    angles = load_angles(Cos_ptr + offset, Sin_ptr + offset, angle_strides[0], columns, D, HAS_SECTIONS, IS_INTERLEAVED, AXIS_1, AXIS_2)
    # What is known to be needed is requested before anything is computed, to wait for memory once.
    if split < n_splits:
        q_heads = ()
        for m in tl.static_range(BLOCK_M):
            q_heads = q_heads + (load_head(Q_ptr + row_offset(place, m, q_strides, GROUP), is_row(place, m, GROUP), columns, partners),)
        is_early = split * BLOCK_N < row  # before the new token, where tiles are seldom excluded
        codes = load_codes(
            split, K_codes_ptr, V_codes_ptr, K_scales_ptr, V_scales_ptr, k_codes_strides[2], v_codes_strides[2],
            scales_strides[3], Mask_ptr, mask_strides, place, tl.where(is_early, S, 0), GROUP, D, MASK_ROWS, BLOCK_N, K_BITS, V_BITS,
        )  # fmt: skip
        live_bits = look_for_codes(
            0, n_splits, Mask_ptr, mask_strides, place, S, row, start, GROUP, MASK_ROWS, BLOCK_N, LOOK_AHEAD, FLOOR, SINKS, WINDOW
        )
        if N_LOOKS > 1 or live_bits != 0:
            q_rows = _queries(q_heads, q_weight, q_eps, angles, scale, D, K_BITS)
            states = attend_codes(
                q_rows, codes, is_early, live_bits, n_splits, K_codes_ptr, V_codes_ptr, K_scales_ptr, V_scales_ptr,
                k_codes_strides[2], v_codes_strides[2], scales_strides[3],
                Mask_ptr, mask_strides, place, S, row, start, GROUP, D, MASK_ROWS, BLOCK_N, N_LOOKS, LOOK_AHEAD, FLOOR,
                K_BITS, V_BITS, SINKS, WINDOW, Q_ptr.dtype.element_ty,
            )  # fmt: skip
            store_columns(states, Out_ptr, Max_ptr, Sum_ptr, place, H_k, GROUP, D, BLOCK_M, V_BITS)
        else:
            store_rows(no_keys_yet(BLOCK_M, D), Out_ptr, Max_ptr, Sum_ptr, place, split, H_k, GROUP, D, BLOCK_M, D)
    elif split < tl.num_programs(1) - 2:
        part = (split - n_splits) // BLOCKS
        own_place = batch, k_head, first_row + (split - n_splits) % BLOCKS * KEPT_M, T
        OWN_MASK_ROWS: tl.constexpr = min(MASK_ROWS, KEPT_M)
        q_heads = ()
        for m in tl.static_range(KEPT_M):
            q_heads = q_heads + (load_head(Q_ptr + row_offset(own_place, m, q_strides, GROUP), is_row(own_place, m, GROUP), columns, partners),)
        if part < N_PARTS:
            kept = load_kept(
                part, K_kept_ptr, V_kept_ptr, kept_strides[3], Mask_ptr, mask_strides, own_place, row, start,
                GROUP, D, OWN_MASK_ROWS, FLOOR, SINKS, WINDOW,
            )  # fmt: skip
            q_rows = _queries(q_heads, q_weight, q_eps, angles, scale, D, DENSE_BITS)
            row_states = attend_kept(
                q_rows, kept, part, K_kept_ptr, V_kept_ptr, kept_strides[3], Mask_ptr, mask_strides, own_place, row, start,
                GROUP, D, OWN_MASK_ROWS, FLOOR, SINKS, WINDOW, N_PARTS,
            )  # fmt: skip
        else:
            key = load_head(K_ptr + batch * k_strides[0] + k_head * k_strides[1], True, columns, partners)
            value = tl.load(V_ptr + batch * v_strides[0] + k_head * v_strides[1] + columns, volatile=True)
            biases = load_biases(Mask_ptr, mask_strides, own_place, row, in_cache, GROUP, OWN_MASK_ROWS, FLOOR, True)
            q_rows = _queries(q_heads, q_weight, q_eps, angles, scale, D, DENSE_BITS)
            k = norm_rotate(key, k_weight, k_eps, angles, D)
            row_states = attend_key(no_keys_yet(KEPT_M, D), q_rows, k, tl.where(is_attended(biases), value, 0.0), biases)
        store_rows(row_states, Out_ptr, Max_ptr, Sum_ptr, own_place, n_splits + part, H_k, GROUP, D, BLOCK_M, D)
    elif first_row == 0:
        is_key = split == tl.num_programs(1) - 2
        if is_key:
            x = norm_rotate(load_head(K_ptr + batch * k_strides[0] + k_head * k_strides[1], True, columns, partners), k_weight, k_eps, angles, D)
        else:
            x = tl.load(V_ptr + batch * v_strides[0] + k_head * v_strides[1] + columns)
        Code_ptr = tl.where(is_key, K_codes_ptr + row * k_codes_strides[2], V_codes_ptr + row * v_codes_strides[2])
        Scale_ptr = tl.where(is_key, K_scales_ptr, V_scales_ptr) + row * scales_strides[3]
        Kept_ptr = tl.where(is_key, K_kept_ptr, V_kept_ptr)
        if K_BITS == V_BITS or is_key:
            write_vector(x, is_key, Code_ptr, Scale_ptr, Kept_ptr, kept_strides[3], in_cache, row, row, start, K_BITS, SINKS, WINDOW)
        else:
            write_vector(x, is_key, Code_ptr, Scale_ptr, Kept_ptr, kept_strides[3], in_cache, row, row, start, V_BITS, SINKS, WINDOW)
    assert_in_cache(in_cache)


def qk_norm_rope_quantized_attention_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    q_eps: float, k_eps: float, cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool,
    k_codes: torch.Tensor, v_codes: torch.Tensor, scales: torch.Tensor, kept: torch.Tensor, position: torch.Tensor, start: torch.Tensor,
    sinks: int, format: str, mask: torch.Tensor | None, scale: float,
    n_splits: int | None = None, block_n: int | None = None, num_warps: int | None = None, block_m: int | None = None, parts: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Launch the kernels of :func:`qk_norm_rope_quantized_attention`; see :func:`plan_launch` for what overrides its choices.

    ``block_m`` is at most 8, the rows that the tensor cores take at once, and ``block_n`` at least 16. Chosen are all rows of a key head, 32 keys
    and one warp: with more, a tile goes through shared memory on its way to the tensor cores. ``parts`` is that of
    :func:`qk_norm_rope_attention_triton`.
    """
    out = decode_attention_fake(q)
    if out.numel() == 0:
        return out
    q, k, v = with_unit_stride(q), with_unit_stride(k), with_unit_stride(v)
    mask = expand_mask(mask, q, k_codes.shape[2])
    angles = as_angles(cos, sin, sections, interleaved)
    if parts is not None or (n_splits, block_n, num_warps, block_m) == (None,) * 4:
        heads, cache = (q, k, v, q_weight, k_weight), (k_codes, v_codes, scales, kept)
        if launch_coded_heads(*heads, q_eps, k_eps, angles, *cache, position, start, sinks, format, mask, scale, out, parts):
            return out
    parsed = Format.parse(format)
    block_m = block_m or min(COLUMNS.value, next_power_of_2(q.shape[1] // k.shape[1]))
    block_n, num_warps = block_n or 32, num_warps or 1
    if block_m > COLUMNS.value or block_n < 16:
        raise ValueError(f"block_m must be at most {COLUMNS.value} and block_n at least 16, got {block_m} and {block_n}")
    kept_tiles = cdiv(kept.shape[3], KEPT_TILE.value)
    grid, options = plan_launch(q, k_codes, mask, n_splits, block_n, num_warps, block_m, other_splits=min(MAX_PARTS, kept_tiles) + 1)
    n_parts, kept_m = _choose_parts(kept_tiles, grid, block_m, q.device)
    partials = Partials.empty(out, grid[1] + n_parts + 1)
    _qk_norm_rope_quantized_attention_kernel[grid[0], grid[1] + (n_parts + 1) * (block_m // kept_m) + 2](
        q, k, v, q_weight, k_weight, angles.cos, angles.sin, k_codes, v_codes, scales, kept, position, start,
        mask, *partials, k.shape[1], k_codes.shape[2], q_eps, k_eps, scale, start.stride(0),
        q.stride(), k.stride(), v.stride(), k_codes.stride(), v_codes.stride(), scales.stride(), kept.stride(), mask_strides(mask),
        (angles.stride_axis, angles.stride_batch, angles.stride_token), **angles.constants, **options,
        K_BITS=parsed.k_bits, V_BITS=parsed.v_bits, SINKS=sinks, WINDOW=kept.shape[3] - sinks,
        N_PARTS=n_parts, KEPT_M=kept_m, debug=True, sanitize_overflow=False,
    )  # fmt: skip
    return combine(partials, out, grid[1], parsed.v_bits)


def _choose_parts(kept_tiles: int, grid: tuple[int, int], block_m: int, device: torch.device) -> tuple[int, int]:
    """Choose how many programs share the kept tokens and how many rows each serves: one tile and one row if all programs have room at once."""
    n_parts = min(MAX_PARTS, kept_tiles)
    if have_room(grid[0] * (grid[1] + (n_parts + 1) * block_m + 2), device, RESIDENT_PROGRAMS):
        return n_parts, 1
    return min(MAX_PARTS, cdiv(kept_tiles, 2)), block_m


define_op(
    "qk_norm_rope_quantized_attention(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, float q_eps, float k_eps, "
    "Tensor cos, Tensor sin, int[] sections, bool interleaved, "
    "Tensor(a!) k_codes, Tensor(b!) v_codes, Tensor(c!) scales, Tensor(d!) kept, Tensor position, Tensor start, "
    "int sinks, str format, Tensor? mask, float scale) -> Tensor",
    check=check_qk_norm_rope_quantized_attention,
    cuda=qk_norm_rope_quantized_attention_triton,
    cpu=qk_norm_rope_quantized_attention_reference,
    fake=decode_attention_fake,
)
