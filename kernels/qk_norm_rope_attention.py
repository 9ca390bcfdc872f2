"""Per-head RMSNorm of queries and keys, rotary embedding, KV-cache write and attention of a decode step in one launch, or two for long caches."""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
# Triton's stubs type a launch as a call of the kernel itself, without its launch options, and do not know its static loops and tuples.

import torch
import triton
import triton.language as tl

from qtts_compile.kernels.decode_attention import check_decode_attention, decode_attention_fake, decode_attention_reference
from qtts_compile.kernels.flash_decoding import (
    LOG2_E,
    attend,
    attend_cache,
    attend_key,
    is_attended,
    is_old_key,
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
from qtts_compile.kernels.heads_attention import launch_heads
from qtts_compile.kernels.kv_write import assert_in_cache, cache_row
from qtts_compile.kernels.library import define_op
from qtts_compile.kernels.norm_rotate import load_angles, load_head, load_weight, norm_rotate
from qtts_compile.kernels.pdl import announce, wait_for_inputs
from qtts_compile.kernels.qk_norm_rope_kv_write import check_qk_norm_rope_kv_write, qk_norm_rope_kv_write_reference
from qtts_compile.kernels.rotary import as_angles
from qtts_compile.kernels.rows import with_unit_stride

MAX_TOKENS = 2


def qk_norm_rope_attention(
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
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    position: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Write the new keys and values into the caches and return the attention of ``q`` over them, for 1 or 2 tokens.

    ``q`` is ``[B, Hq, T, D]``, ``k`` and ``v`` are ``[B, Hk, T, D]``, the caches ``[B, Hk, S, D]``, ``position`` int64 ``[T]``. The steps are
    those of ``qk_norm_rope_kv_write`` and ``decode_attention``, with the arguments and the rounding of both: queries and keys are rounded to the
    dtype after the norm, its weight and each product of the rotation, attention is computed in float32 and rounded once. The result
    ``[B, Hq, T, D]`` has the strides of ``decode_attention``'s.

    ``position`` and the weights of the norms must be at rest: on a GPU of compute capability 9.0 or later they are read before earlier kernels of
    this package in the stream have ended. Other kernels do not let those that follow begin early.

    Raises ``TypeError`` or ``ValueError`` as those two do, and ``ValueError`` for more than 2 tokens or a weight that is not contiguous.
    """
    return torch.ops.qtts.qk_norm_rope_attention.default(
        q, k, v, q_weight, k_weight, q_eps, k_eps, cos, sin, sections, interleaved, k_cache, v_cache, position, mask, scale
    )


def qk_norm_rope_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    q_eps: float, k_eps: float, cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool,
    k_cache: torch.Tensor, v_cache: torch.Tensor, position: torch.Tensor, mask: torch.Tensor | None, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Compute :func:`qk_norm_rope_attention` in plain PyTorch."""
    q = qk_norm_rope_kv_write_reference(q, k, v, q_weight, k_weight, q_eps, k_eps, cos, sin, sections, interleaved, k_cache, v_cache, position)
    return decode_attention_reference(q, k_cache, v_cache, mask, scale)


def check_qk_norm_rope_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    q_eps: float, k_eps: float, cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool,
    k_cache: torch.Tensor, v_cache: torch.Tensor, position: torch.Tensor, mask: torch.Tensor | None, scale: float,
) -> None:  # fmt: skip
    """Raise ``TypeError`` or ``ValueError`` unless :func:`qk_norm_rope_attention` accepts the arguments."""
    check_qk_norm_rope_kv_write(q, k, v, q_weight, k_weight, q_eps, k_eps, cos, sin, sections, interleaved, k_cache, v_cache, position)
    check_decode_attention(q, k_cache, v_cache, mask, scale)
    if q.shape[2] > MAX_TOKENS:
        raise ValueError(f"q must have at most {MAX_TOKENS} tokens, got {q.shape[2]} in {tuple(q.shape)}; call qk_norm_rope_kv_write for more")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and weight.stride(0) != 1:  # a copy made in passing would not be complete when the kernel reads it
            raise ValueError(f"{name} must be contiguous, got the stride {weight.stride(0)}; call .contiguous() on it beforehand")


@triton.jit
def _qk_norm_rope_attention_kernel(
    Q_ptr, K_ptr, V_ptr, Q_weight_ptr, K_weight_ptr, Cos_ptr, Sin_ptr, K_cache_ptr, V_cache_ptr, Position_ptr, Mask_ptr,
    Out_ptr, Max_ptr, Sum_ptr, H_k, S, q_eps, k_eps, scale, stride_position,
    q_strides, k_strides, v_strides, k_cache_strides, v_cache_strides, mask_strides, angle_strides,
    T: tl.constexpr, HAS_SECTIONS: tl.constexpr, IS_INTERLEAVED: tl.constexpr, AXIS_1: tl.constexpr, AXIS_2: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASK_ROWS: tl.constexpr, N_LOOKS: tl.constexpr, LOOK_AHEAD: tl.constexpr, FLOOR: tl.constexpr, IS_ONE_TILE: tl.constexpr,
    HAS_PDL: tl.constexpr,
):  # fmt: skip
    announce(HAS_PDL)
    place = locate_rows(T, H_k, GROUP, BLOCK_M)
    batch, k_head, first_row, _ = place
    columns = tl.arange(0, BLOCK_D)
    partners = (columns + D // 2) % D
    in_width = columns < D
    K_cache_ptr += batch * k_cache_strides[0] + k_head * k_cache_strides[1]
    V_cache_ptr += batch * v_cache_strides[0] + k_head * v_cache_strides[1]
    q_weight = load_weight(Q_weight_ptr, columns, partners, D)
    k_weight = load_weight(K_weight_ptr, columns, partners, D)
    rows, in_cache = (), ()
    for t in tl.static_range(T):
        row, is_in_cache = cache_row(Position_ptr, t, stride_position, S)
        rows = rows + (row,)
        in_cache = in_cache + (is_in_cache,)
    wait_for_inputs(HAS_PDL)

    # All that is known to be needed is requested together, to wait for memory once.
    q_heads = ()
    for m in tl.static_range(BLOCK_M):
        in_bounds = in_width & is_row(place, m, GROUP)
        q_heads = q_heads + (load_head(Q_ptr + row_offset(place, m, q_strides, GROUP), in_bounds, columns, partners, IS_ONE_TILE),)
    angles, k_heads, values = (), (), ()
    for t in tl.static_range(T):
        offset = batch * angle_strides[1] + t * angle_strides[2]
        angles = angles + (load_angles(
            Cos_ptr + offset, Sin_ptr + offset, angle_strides[0], columns, D, HAS_SECTIONS, IS_INTERLEAVED, AXIS_1, AXIS_2, IS_ONE_TILE
        ),)  # fmt: skip
        k_head_ptr = K_ptr + batch * k_strides[0] + k_head * k_strides[1] + t * k_strides[2]
        k_heads = k_heads + (load_head(k_head_ptr, in_width, columns, partners, IS_ONE_TILE),)
        value_ptrs = V_ptr + batch * v_strides[0] + k_head * v_strides[1] + t * v_strides[2] + columns
        values = values + (tl.load(value_ptrs, mask=in_width, other=0.0, volatile=IS_ONE_TILE),)
    if IS_ONE_TILE:
        keys = tl.arange(0, BLOCK_N).to(tl.int64)
        k_tile = load_tile(K_cache_ptr, k_cache_strides[2], keys, keys < S, D, BLOCK_D)
        v_tile = load_tile(V_cache_ptr, v_cache_strides[2], keys, keys < S, D, BLOCK_D)
        biases = load_biases(Mask_ptr, mask_strides, place, keys, keys < S, GROUP, MASK_ROWS, FLOOR)
    else:
        is_early = tl.program_id(1) * BLOCK_N < rows[0]  # before a new token, where tiles are seldom excluded
        for t in tl.static_range(1, T):
            is_early = is_early | (tl.program_id(1) * BLOCK_N < rows[t])
        requested = request_tile(
            tl.program_id(1), K_cache_ptr, V_cache_ptr, k_cache_strides[2], v_cache_strides[2], Mask_ptr, mask_strides, place,
            tl.where(is_early, S, 0), GROUP, D, MASK_ROWS, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        live_bits = look_ahead(0, tl.num_programs(1), Mask_ptr, mask_strides, place, S, rows, GROUP, MASK_ROWS, BLOCK_N, LOOK_AHEAD, FLOOR)

    q_rows = ()
    for m in tl.static_range(BLOCK_M):
        q_rows = q_rows + (norm_rotate(q_heads[m], q_weight, q_eps, angles[m % T], D).to(tl.float32) * (scale * LOG2_E),)
    states = no_keys_yet(BLOCK_M, BLOCK_D)
    # The last split has the fewest tiles to read. The last of several tokens at one position stays in the cache.
    if Max_ptr is None or tl.program_id(1) == tl.num_programs(1) - 1:
        for t in tl.static_range(T):
            is_kept = in_cache[t]
            for later in tl.static_range(t + 1, T):
                is_kept = is_kept & (rows[t] != rows[later])
            k = norm_rotate(k_heads[t], k_weight, k_eps, angles[t], D)
            writable = in_width & is_kept & (first_row == 0)
            tl.store(K_cache_ptr + rows[t] * k_cache_strides[2] + columns, k, mask=writable)
            tl.store(V_cache_ptr + rows[t] * v_cache_strides[2] + columns, values[t], mask=writable)
            token_biases = ()
            if IS_ONE_TILE:
                for m in tl.static_range(MASK_ROWS):
                    bias = tl.sum(tl.where(keys == rows[t], biases[m], 0.0), axis=0)
                    token_biases = token_biases + (tl.where(is_kept, bias, float("-inf")),)
            else:
                token_biases = load_biases(Mask_ptr, mask_strides, place, rows[t], is_kept, GROUP, MASK_ROWS, FLOOR)
            states = attend_key(states, q_rows, k, tl.where(is_attended(token_biases), values[t], 0.0), token_biases)

    # The rows that are written, by another program perhaps, are not read: their keys and values came from the tokens.
    if IS_ONE_TILE:
        is_old = is_old_key(keys, S, rows)
        old_biases = ()
        for m in tl.static_range(MASK_ROWS):
            old_biases = old_biases + (tl.where(is_old, biases[m], float("-inf")),)
        states = attend(states, q_rows, k_tile, tl.where(is_attended(old_biases)[:, None], v_tile, 0.0), old_biases)
    else:
        states = attend_cache(
            states, q_rows, requested, is_early, live_bits,
            K_cache_ptr, V_cache_ptr, k_cache_strides[2], v_cache_strides[2], Mask_ptr, mask_strides, place, S, rows,
            GROUP, D, MASK_ROWS, BLOCK_N, BLOCK_D, N_LOOKS, LOOK_AHEAD, FLOOR,
        )  # fmt: skip
    store_rows(states, Out_ptr, Max_ptr, Sum_ptr, place, tl.program_id(1), H_k, GROUP, D, BLOCK_M, BLOCK_D)
    for t in tl.static_range(T):
        assert_in_cache(in_cache[t])


def qk_norm_rope_attention_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    q_eps: float, k_eps: float, cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool,
    k_cache: torch.Tensor, v_cache: torch.Tensor, position: torch.Tensor, mask: torch.Tensor | None, scale: float,
    n_splits: int | None = None, block_n: int | None = None, num_warps: int | None = None, block_m: int | None = None, parts: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Launch the kernels of :func:`qk_norm_rope_attention`; see :func:`plan_launch` for what overrides its choices.

    ``block_m`` must be a multiple of the number of tokens, which take turns in the rows of a program. ``parts`` gives each key head of each text so
    many thread blocks of a cluster, in one launch (:func:`launch_heads`), which is also chosen if nothing is overridden; 0 excludes it.
    """
    out = decode_attention_fake(q)
    if out.numel() == 0:
        return out
    if block_m is not None and block_m % q.shape[2]:
        raise ValueError(f"block_m must be a multiple of the {q.shape[2]} tokens of q, got {block_m}")
    q, k, v = with_unit_stride(q), with_unit_stride(k), with_unit_stride(v)
    mask = expand_mask(mask, q, k_cache.shape[2])
    angles = as_angles(cos, sin, sections, interleaved)
    if parts is not None or (n_splits, block_n, num_warps, block_m) == (None,) * 4:
        if launch_heads(q, k, v, q_weight, k_weight, q_eps, k_eps, angles, k_cache, v_cache, position, mask, scale, out, parts):
            return out
    grid, options = plan_launch(q, k_cache, mask, n_splits, block_n, num_warps, block_m)
    partials = Partials.empty(out, grid[1])
    _qk_norm_rope_attention_kernel[grid](
        q, k, v, q_weight, k_weight, angles.cos, angles.sin, k_cache, v_cache, position, mask, *partials,
        k.shape[1], k_cache.shape[2], q_eps, k_eps, scale, position.stride(0),
        q.stride(), k.stride(), v.stride(), k_cache.stride(), v_cache.stride(), mask_strides(mask),
        (angles.stride_axis, angles.stride_batch, angles.stride_token),
        **angles.constants, **options, debug=True, sanitize_overflow=False,
    )  # fmt: skip
    return partials.combine(out)


define_op(
    "qk_norm_rope_attention(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, float q_eps, float k_eps, "
    "Tensor cos, Tensor sin, int[] sections, bool interleaved, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor position, Tensor? mask, float scale) -> Tensor",
    check=check_qk_norm_rope_attention,
    cuda=qk_norm_rope_attention_triton,
    cpu=qk_norm_rope_attention_reference,
    fake=decode_attention_fake,
)
