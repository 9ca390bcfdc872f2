"""Per-head RMSNorm of queries and keys, rotary embedding and KV-cache write in one launch: all that precedes attention in a Qwen3 layer."""

# pyright: reportCallIssue=false
# Triton's stubs type a launch as a call of the kernel itself, without its launch options.

import torch
import triton
import triton.language as tl

from qtts_compile.kernels.checks import check_device, check_float_dtype, check_like, check_rank, check_shape
from qtts_compile.kernels.kv_write import assert_in_cache, cache_row, check_kv_write
from qtts_compile.kernels.library import define_op
from qtts_compile.kernels.pdl import announce, pdl_options, wait_for_inputs
from qtts_compile.kernels.rms_norm import rms_norm_reference
from qtts_compile.kernels.rotary import as_angles, check_rotary, empty_rotated, head_blocks, load_angles, rotary_reference, rotate
from qtts_compile.kernels.rows import with_unit_stride
from qtts_compile.kernels.sizes import cdiv


def qk_norm_rope_kv_write(
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
) -> torch.Tensor:
    """Return ``q`` normalised and rotated; write ``k``, normalised and rotated, and ``v`` into the caches at ``position``.

    ``q`` is ``[B, Hq, T, D]``, ``k`` and ``v`` are ``[B, Hk, T, D]``, the caches ``[B, Hk, S, D]``, ``position`` int64 ``[T]``. The steps
    are those of ``rms_norm`` with weights ``[D]`` (skipped for a weight of ``None``), ``rotary`` and ``kv_write``, rounded in between as
    they round. The result has the strides of ``rotary``'s.

    Raises ``TypeError`` or ``ValueError`` as those three do, and ``TypeError`` for a weight whose dtype would promote the result beyond
    ``q.dtype``.
    """
    return torch.ops.qtts.qk_norm_rope_kv_write.default(
        q, k, v, q_weight, k_weight, q_eps, k_eps, cos, sin, sections, interleaved, k_cache, v_cache, position
    )


def qk_norm_rope_kv_write_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    q_eps: float, k_eps: float, cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool,
    k_cache: torch.Tensor, v_cache: torch.Tensor, position: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Compute :func:`qk_norm_rope_kv_write` in plain PyTorch."""
    q_normed = q if q_weight is None else rms_norm_reference(q, q_weight, q_eps)
    k_normed = k if k_weight is None else rms_norm_reference(k, k_weight, k_eps)
    k_cache[:, :, position] = rotary_reference(k_normed, cos, sin, sections, interleaved)
    v_cache[:, :, position] = v
    return empty_rotated(q).copy_(rotary_reference(q_normed, cos, sin, sections, interleaved))


def check_qk_norm_rope_kv_write(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    q_eps: float, k_eps: float, cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool,
    k_cache: torch.Tensor, v_cache: torch.Tensor, position: torch.Tensor,
) -> None:  # fmt: skip
    """Raise ``TypeError`` or ``ValueError`` unless :func:`qk_norm_rope_kv_write` accepts the arguments."""
    check_rotary(q, cos, sin, sections, interleaved, "q")
    check_like("k", k, "q", q)
    check_rank("k", k, "B, Hk, T, D")
    check_shape("k", k, q.shape[0], k.shape[1], *q.shape[2:])
    check_kv_write(k_cache, k, position, "k_cache")
    check_kv_write(v_cache, v, position, "v_cache")
    check_shape("v_cache", v_cache, *k_cache.shape)
    check_like("v_cache", v_cache, "k_cache", k_cache)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is None:
            continue
        check_float_dtype(name, weight)
        if torch.promote_types(weight.dtype, q.dtype) != q.dtype:
            raise TypeError(f"{name} of dtype {weight.dtype} would promote the result beyond q's {q.dtype}; convert it with .to(q.dtype)")
        check_shape(name, weight, q.shape[-1])
        check_device(name, weight, "q", q)


@triton.jit
def _norm_rotate(
    X_ptr, W_ptr, in_bounds, cos_1, cos_2, sin_1, sin_2, eps, HALF: tl.constexpr, BLOCK_F: tl.constexpr, HAS_WEIGHT: tl.constexpr
):  # fmt: skip
    """Normalise and rotate the heads at ``X_ptr`` ``[BLOCK_H, BLOCK_F]``, pointers to their first halves."""
    dtype: tl.constexpr = X_ptr.dtype.element_ty
    x_1 = tl.load(X_ptr, mask=in_bounds, other=0.0).to(tl.float32)
    x_2 = tl.load(X_ptr + HALF, mask=in_bounds, other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        frequency = tl.arange(0, BLOCK_F)
        in_half = frequency < HALF
        weight_1 = tl.load(W_ptr + frequency, mask=in_half, other=0.0).to(tl.float32)[None, :]
        weight_2 = tl.load(W_ptr + HALF + frequency, mask=in_half, other=0.0).to(tl.float32)[None, :]
        scale = tl.rsqrt(tl.sum(x_1 * x_1 + x_2 * x_2, axis=1) / (2 * HALF) + eps)[:, None]
        x_1 = (weight_1 * (x_1 * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        x_2 = (weight_2 * (x_2 * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    return rotate(x_1, x_2, cos_1, cos_2, sin_1, sin_2, dtype)


@triton.jit
def _qk_norm_rope_kv_write_kernel(
    Q_ptr, K_ptr, V_ptr, Q_weight_ptr, K_weight_ptr, Cos_ptr, Sin_ptr, Out_ptr, K_cache_ptr, V_cache_ptr, Position_ptr,
    T, H_q, H_k, S, q_eps, k_eps, stride_position,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t,
    out_stride_b, out_stride_h, out_stride_t, kc_stride_b, kc_stride_h, kc_stride_s, vc_stride_b, vc_stride_h, vc_stride_s,
    angle_stride_axis, angle_stride_b, angle_stride_t,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr,
    HAS_SECTIONS: tl.constexpr, IS_INTERLEAVED: tl.constexpr, AXIS_1: tl.constexpr, AXIS_2: tl.constexpr,
    HAS_Q_WEIGHT: tl.constexpr, HAS_K_WEIGHT: tl.constexpr, HAS_PDL: tl.constexpr,
):  # fmt: skip
    announce(HAS_PDL)
    wait_for_inputs(HAS_PDL)
    batch = (tl.program_id(0) // T).to(tl.int64)
    token = (tl.program_id(0) % T).to(tl.int64)
    head_block = tl.program_id(1)
    q_blocks = tl.cdiv(H_q, BLOCK_H)
    frequency = tl.arange(0, BLOCK_F)[None, :]
    in_half = frequency < HALF
    cos_1, cos_2, sin_1, sin_2 = load_angles(
        Cos_ptr, Sin_ptr, batch * angle_stride_b + token * angle_stride_t, angle_stride_axis,
        HALF, BLOCK_F, HAS_SECTIONS, IS_INTERLEAVED, AXIS_1, AXIS_2,
    )  # fmt: skip
    if head_block < q_blocks:
        heads = (head_block * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
        in_bounds = (heads < H_q) & in_half
        q_ptrs = Q_ptr + batch * q_stride_b + heads * q_stride_h + token * q_stride_t + frequency
        q_1, q_2 = _norm_rotate(q_ptrs, Q_weight_ptr, in_bounds, cos_1, cos_2, sin_1, sin_2, q_eps, HALF, BLOCK_F, HAS_Q_WEIGHT)
        out_ptrs = Out_ptr + batch * out_stride_b + heads * out_stride_h + token * out_stride_t + frequency
        tl.store(out_ptrs, q_1, mask=in_bounds)
        tl.store(out_ptrs + HALF, q_2, mask=in_bounds)
    else:
        heads = ((head_block - q_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
        in_bounds = (heads < H_k) & in_half
        row, in_cache = cache_row(Position_ptr, token, stride_position, S)
        v_ptrs = V_ptr + batch * v_stride_b + heads * v_stride_h + token * v_stride_t + frequency
        v_1 = tl.load(v_ptrs, mask=in_bounds)
        v_2 = tl.load(v_ptrs + HALF, mask=in_bounds)
        k_ptrs = K_ptr + batch * k_stride_b + heads * k_stride_h + token * k_stride_t + frequency
        k_1, k_2 = _norm_rotate(k_ptrs, K_weight_ptr, in_bounds, cos_1, cos_2, sin_1, sin_2, k_eps, HALF, BLOCK_F, HAS_K_WEIGHT)
        writable = in_bounds & in_cache
        k_cache_ptrs = K_cache_ptr + batch * kc_stride_b + heads * kc_stride_h + row * kc_stride_s + frequency
        v_cache_ptrs = V_cache_ptr + batch * vc_stride_b + heads * vc_stride_h + row * vc_stride_s + frequency
        tl.store(k_cache_ptrs, k_1, mask=writable)
        tl.store(k_cache_ptrs + HALF, k_2, mask=writable)
        tl.store(v_cache_ptrs, v_1, mask=writable)
        tl.store(v_cache_ptrs + HALF, v_2, mask=writable)
        assert_in_cache(in_cache)


def qk_norm_rope_kv_write_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    q_eps: float, k_eps: float, cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool,
    k_cache: torch.Tensor, v_cache: torch.Tensor, position: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Launch the kernel of :func:`qk_norm_rope_kv_write`."""
    out = empty_rotated(q)
    batch, q_heads, tokens, width = q.shape
    k_heads = k.shape[1]
    if batch * tokens * (q_heads + k_heads) == 0:
        return out
    q, k, v = with_unit_stride(q), with_unit_stride(k), with_unit_stride(v)
    angles = as_angles(cos, sin, sections, interleaved)
    block_h, block_f = head_blocks(max(q_heads, k_heads), width)
    grid = (batch * tokens, cdiv(q_heads, block_h) + cdiv(k_heads, block_h))
    _qk_norm_rope_kv_write_kernel[grid](
        q, k, v, None if q_weight is None else q_weight.contiguous(), None if k_weight is None else k_weight.contiguous(),
        angles.cos, angles.sin, out, k_cache, v_cache, position,
        tokens, q_heads, k_heads, k_cache.shape[2], q_eps, k_eps, position.stride(0),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3],
        angles.stride_axis, angles.stride_batch, angles.stride_token,
        HALF=width // 2, BLOCK_H=block_h, BLOCK_F=block_f, **angles.constants,
        HAS_Q_WEIGHT=q_weight is not None, HAS_K_WEIGHT=k_weight is not None,
        **pdl_options(q.device), num_warps=4, enable_fp_fusion=False, debug=True, sanitize_overflow=False,
    )  # fmt: skip
    return out


def qk_norm_rope_kv_write_fake(q: torch.Tensor, *_: object) -> torch.Tensor:
    """Allocate the result of :func:`qk_norm_rope_kv_write`."""
    return empty_rotated(q)


define_op(
    "qk_norm_rope_kv_write(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, float q_eps, float k_eps, "
    "Tensor cos, Tensor sin, int[] sections, bool interleaved, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor position) -> Tensor",
    check=check_qk_norm_rope_kv_write,
    cuda=qk_norm_rope_kv_write_triton,
    cpu=qk_norm_rope_kv_write_reference,
    fake=qk_norm_rope_kv_write_fake,
)
