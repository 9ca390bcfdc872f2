"""Rotary position embedding (Su et al., 2021), with one axis or the three axes of M-RoPE (Wang et al., 2024, Qwen2-VL)."""

# pyright: reportCallIssue=false
# Triton's stubs type a launch as a call of the kernel itself, without its launch options.

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from qtts_compile.kernels.checks import check_float_dtype, check_like, check_rank, check_shape
from qtts_compile.kernels.library import define_op
from qtts_compile.kernels.rows import with_unit_stride
from qtts_compile.kernels.sizes import cdiv, next_power_of_2


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool) -> torch.Tensor:
    """Rotate ``x`` ``[B, H, T, D]`` by the angles whose ``cos`` and ``sin`` are given: ``x * cos + rotate_half(x) * sin``.

    Both products and their sum are rounded to the dtype, which all arguments share. ``rotate_half`` maps the halves ``(x1, x2)`` of ``D``
    to ``(-x2, x1)``. The result has the strides of ``torch.empty_like(x)``, or is contiguous if their last is not 1.

    With no ``sections``, ``cos`` and ``sin`` are ``[B or 1, T, D]``. With three, whose sum is ``D / 2``, they are ``[3, B or 1, T, D]``
    and each frequency index ``f`` in ``[0, D / 2)`` reads one axis:

    - ``interleaved``: axis 1 if ``f % 3 == 1`` and ``f < 3 * sections[1]``, axis 2 if ``f % 3 == 2`` and ``f < 3 * sections[2]``, else
      axis 0; the second half of ``D`` reads the angles of the first half (Qwen3-Omni, Qwen3-TTS);
    - otherwise: axis ``i`` in the ``i``-th of three consecutive pieces of length ``sections[i]``, in either half of ``D`` (Qwen2-VL).

    Raises ``TypeError`` for a dtype other than bfloat16, float16 and float32, or two dtypes, and ``ValueError`` for shapes or sections
    other than the above and different devices.
    """
    return torch.ops.qtts.rotary.default(x, cos, sin, sections, interleaved)


def rotary_qk(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply :func:`rotary` to ``q`` ``[B, Hq, T, D]`` and ``k`` ``[B, Hk, T, D]`` in one launch."""
    return torch.ops.qtts.rotary_qk.default(q, k, cos, sin, sections, interleaved)


def rotary_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool) -> torch.Tensor:
    """Compute :func:`rotary` in plain PyTorch."""
    cos = _select_axes(cos, sections, interleaved).unsqueeze(1)
    sin = _select_axes(sin, sections, interleaved).unsqueeze(1)
    x1, x2 = x.chunk(2, dim=-1)
    return empty_rotated(x).copy_(x * cos + torch.cat((-x2, x1), dim=-1) * sin)


def rotary_qk_reference(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute :func:`rotary_qk` in plain PyTorch."""
    return rotary_reference(q, cos, sin, sections, interleaved), rotary_reference(k, cos, sin, sections, interleaved)


def _select_axes(angles: torch.Tensor, sections: list[int], interleaved: bool) -> torch.Tensor:
    if not sections:
        return angles
    if not interleaved:
        return torch.cat([piece[i % 3] for i, piece in enumerate(angles.split(sections * 2, dim=-1))], dim=-1)
    half = angles.shape[-1] // 2
    selected = angles[0, ..., :half].clone()
    for axis in (1, 2):
        frequencies = slice(axis, 3 * sections[axis], 3)
        selected[..., frequencies] = angles[axis, ..., :half][..., frequencies]
    return torch.cat((selected, selected), dim=-1)


def check_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool, name: str = "x") -> None:
    """Raise ``TypeError`` or ``ValueError`` unless :func:`rotary` accepts the arguments."""
    check_float_dtype(name, x)
    check_rank(name, x, "B, H, T, D")
    batch, _, tokens, width = x.shape
    if width % 2 or width == 0:
        raise ValueError(f"{name} must have an even head dimension D > 0, got {tuple(x.shape)}")
    if sections and (len(sections) != 3 or min(sections) < 0 or 2 * sum(sections) != width):
        raise ValueError(f"sections must be empty or three counts whose sum is D / 2 = {width // 2}, got {list(sections)}")
    if interleaved and not sections:
        raise ValueError("interleaved=True needs three sections, got none")
    axes = (3,) if sections else ()
    for label, angles in (("cos", cos), ("sin", sin)):
        check_like(label, angles, name, x)
        if tuple(angles.shape) not in ((*axes, batch, tokens, width), (*axes, 1, tokens, width)):
            raise ValueError(f"{label} must have the shape {(*axes, batch, tokens, width)} (or 1 for the batch), got {tuple(angles.shape)}")


def check_rotary_qk(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless :func:`rotary_qk` accepts the arguments."""
    check_rotary(q, cos, sin, sections, interleaved, "q")
    check_rank("k", k, "B, Hk, T, D")
    check_shape("k", k, q.shape[0], k.shape[1], *q.shape[2:])
    check_like("k", k, "q", q)


class Angles(NamedTuple):
    """``cos`` and ``sin`` as the kernels take them: of equal strides, with the constants that select their axes."""

    cos: torch.Tensor
    sin: torch.Tensor
    stride_axis: int
    stride_batch: int
    stride_token: int
    constants: dict[str, int | bool]


def as_angles(cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool) -> Angles:
    """Prepare ``cos`` and ``sin`` for :func:`load_angles`."""
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    first, second, third = sections or (0, 0, 0)
    constants = {
        "HAS_SECTIONS": bool(sections),
        "IS_INTERLEAVED": interleaved,
        "AXIS_1": 3 * second if interleaved else first,
        "AXIS_2": 3 * third if interleaved else first + second,
    }
    stride_axis = cos.stride(0) if sections else 0
    stride_batch = cos.stride(-3) if cos.shape[-3] > 1 else 0
    return Angles(cos, sin, stride_axis, stride_batch, cos.stride(-2), constants)


@triton.jit
def select_axis(frequency, IS_INTERLEAVED: tl.constexpr, AXIS_1: tl.constexpr, AXIS_2: tl.constexpr):
    """Return the axis, 0 to 2, that each frequency index in ``[0, D / 2)`` reads."""
    if IS_INTERLEAVED:
        is_axis_1 = (frequency % 3 == 1) & (frequency < AXIS_1)
        is_axis_2 = (frequency % 3 == 2) & (frequency < AXIS_2)
        return tl.where(is_axis_1, 1, tl.where(is_axis_2, 2, 0))
    else:
        return (frequency >= AXIS_1).to(tl.int32) + (frequency >= AXIS_2).to(tl.int32)


@triton.jit
def load_angles(
    Cos_ptr, Sin_ptr, offset, stride_axis, HALF: tl.constexpr, BLOCK_F: tl.constexpr,
    HAS_SECTIONS: tl.constexpr, IS_INTERLEAVED: tl.constexpr, AXIS_1: tl.constexpr, AXIS_2: tl.constexpr,
):  # fmt: skip
    """Load ``cos`` and ``sin`` ``[BLOCK_F]`` in float32 for the first and the second half of ``D`` of the token at ``offset``."""
    frequency = tl.arange(0, BLOCK_F)
    in_half = frequency < HALF
    first = offset + frequency
    if HAS_SECTIONS:
        first += select_axis(frequency, IS_INTERLEAVED, AXIS_1, AXIS_2).to(tl.int64) * stride_axis
    cos_1 = tl.load(Cos_ptr + first, mask=in_half, other=0.0).to(tl.float32)
    sin_1 = tl.load(Sin_ptr + first, mask=in_half, other=0.0).to(tl.float32)
    if IS_INTERLEAVED:
        return cos_1, cos_1, sin_1, sin_1
    else:
        cos_2 = tl.load(Cos_ptr + first + HALF, mask=in_half, other=0.0).to(tl.float32)
        sin_2 = tl.load(Sin_ptr + first + HALF, mask=in_half, other=0.0).to(tl.float32)
        return cos_1, cos_2, sin_1, sin_2


@triton.jit
def rotate(x_1, x_2, cos_1, cos_2, sin_1, sin_2, dtype: tl.constexpr):
    """Rotate the float32 halves ``[BLOCK_H, BLOCK_F]`` and return them in ``dtype``, to which each product is rounded as well."""
    y_1 = (x_1 * cos_1[None, :]).to(dtype).to(tl.float32) - (x_2 * sin_1[None, :]).to(dtype).to(tl.float32)
    y_2 = (x_2 * cos_2[None, :]).to(dtype).to(tl.float32) + (x_1 * sin_2[None, :]).to(dtype).to(tl.float32)
    return y_1.to(dtype), y_2.to(dtype)


@triton.jit
def _rotate_heads(
    X_ptr, Y_ptr, x_offset, y_offset, x_stride_h, y_stride_h, head_block, H, cos_1, cos_2, sin_1, sin_2,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    heads = head_block * BLOCK_H + tl.arange(0, BLOCK_H)
    frequency = tl.arange(0, BLOCK_F)
    in_bounds = (heads < H)[:, None] & (frequency < HALF)[None, :]
    heads = heads.to(tl.int64)[:, None]
    x_ptrs = X_ptr + x_offset + heads * x_stride_h + frequency[None, :]
    y_ptrs = Y_ptr + y_offset + heads * y_stride_h + frequency[None, :]
    x_1 = tl.load(x_ptrs, mask=in_bounds, other=0.0).to(tl.float32)
    x_2 = tl.load(x_ptrs + HALF, mask=in_bounds, other=0.0).to(tl.float32)
    y_1, y_2 = rotate(x_1, x_2, cos_1, cos_2, sin_1, sin_2, Y_ptr.dtype.element_ty)
    tl.store(y_ptrs, y_1, mask=in_bounds)
    tl.store(y_ptrs + HALF, y_2, mask=in_bounds)


@triton.jit
def _rotary_qk_kernel(
    Q_ptr, K_ptr, Cos_ptr, Sin_ptr, Q_out_ptr, K_out_ptr, T, H_q, H_k,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t,
    qo_stride_b, qo_stride_h, qo_stride_t, ko_stride_b, ko_stride_h, ko_stride_t,
    angle_stride_axis, angle_stride_b, angle_stride_t,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr,
    HAS_SECTIONS: tl.constexpr, IS_INTERLEAVED: tl.constexpr, AXIS_1: tl.constexpr, AXIS_2: tl.constexpr, HAS_K: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // T).to(tl.int64)
    token = (tl.program_id(0) % T).to(tl.int64)
    head_block = tl.program_id(1)
    q_blocks = tl.cdiv(H_q, BLOCK_H)
    cos_1, cos_2, sin_1, sin_2 = load_angles(
        Cos_ptr, Sin_ptr, batch * angle_stride_b + token * angle_stride_t, angle_stride_axis,
        HALF, BLOCK_F, HAS_SECTIONS, IS_INTERLEAVED, AXIS_1, AXIS_2,
    )  # fmt: skip
    if head_block < q_blocks:
        _rotate_heads(
            Q_ptr, Q_out_ptr, batch * q_stride_b + token * q_stride_t, batch * qo_stride_b + token * qo_stride_t,
            q_stride_h, qo_stride_h, head_block, H_q, cos_1, cos_2, sin_1, sin_2, HALF, BLOCK_H, BLOCK_F,
        )  # fmt: skip
    elif HAS_K:
        _rotate_heads(
            K_ptr, K_out_ptr, batch * k_stride_b + token * k_stride_t, batch * ko_stride_b + token * ko_stride_t,
            k_stride_h, ko_stride_h, head_block - q_blocks, H_k, cos_1, cos_2, sin_1, sin_2, HALF, BLOCK_H, BLOCK_F,
        )  # fmt: skip


def empty_rotated(x: torch.Tensor) -> torch.Tensor:
    """Allocate a rotated ``x``: strides of ``torch.empty_like(x)``, or contiguous if that would leave the last dimension strided."""
    y = torch.empty_like(x)
    return y if y.stride(-1) == 1 else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def head_blocks(heads: int, width: int) -> tuple[int, int]:
    """Choose ``(BLOCK_H, BLOCK_F)`` of the kernels that give a program some heads of one token, about 512 elements, for 4 warps."""
    block_f = next_power_of_2(width // 2)
    return max(1, min(256 // block_f, next_power_of_2(heads))), block_f


def _launch(
    q: torch.Tensor, k: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    q_out = empty_rotated(q)
    k_out = None if k is None else empty_rotated(k)
    batch, q_heads, tokens, width = q.shape
    k_heads = 0 if k is None else k.shape[1]
    if batch * tokens * (q_heads + k_heads) == 0:
        return q_out, k_out
    q = with_unit_stride(q)
    k = None if k is None else with_unit_stride(k)
    angles = as_angles(cos, sin, sections, interleaved)
    block_h, block_f = head_blocks(max(q_heads, k_heads), width)
    grid = (batch * tokens, cdiv(q_heads, block_h) + cdiv(k_heads, block_h))
    no_strides = (0, 0, 0)
    _rotary_qk_kernel[grid](
        q, k, angles.cos, angles.sin, q_out, k_out, tokens, q_heads, k_heads,
        *q.stride()[:3], *(no_strides if k is None else k.stride()[:3]),
        *q_out.stride()[:3], *(no_strides if k_out is None else k_out.stride()[:3]),
        angles.stride_axis, angles.stride_batch, angles.stride_token,
        HALF=width // 2, BLOCK_H=block_h, BLOCK_F=block_f, HAS_K=k is not None, **angles.constants,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return q_out, k_out


def rotary_triton(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool) -> torch.Tensor:
    """Launch the kernel of :func:`rotary`."""
    return _launch(x, None, cos, sin, sections, interleaved)[0]


def rotary_qk_triton(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel of :func:`rotary_qk`."""
    q_out, k_out = _launch(q, k, cos, sin, sections, interleaved)
    assert k_out is not None
    return q_out, k_out


def rotary_fake(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool) -> torch.Tensor:
    """Allocate the result of :func:`rotary`."""
    return empty_rotated(x)


def rotary_qk_fake(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate the results of :func:`rotary_qk`."""
    return empty_rotated(q), empty_rotated(k)


define_op(
    "rotary(Tensor x, Tensor cos, Tensor sin, int[] sections, bool interleaved) -> Tensor",
    check=check_rotary,
    cuda=rotary_triton,
    cpu=rotary_reference,
    fake=rotary_fake,
)
define_op(
    "rotary_qk(Tensor q, Tensor k, Tensor cos, Tensor sin, int[] sections, bool interleaved) -> (Tensor, Tensor)",
    check=check_rotary_qk,
    cuda=rotary_qk_triton,
    cpu=rotary_qk_reference,
    fake=rotary_qk_fake,
)
