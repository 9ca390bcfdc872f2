"""RMSNorm over the last dimension (Zhang and Sennrich, 2019), with the rounding of Llama and Qwen3."""

# pyright: reportCallIssue=false
# Triton's stubs type a launch as a call of the kernel itself, without its launch options.

import torch
import triton
import triton.language as tl

from qtts_compile.kernels.checks import check_device, check_float_dtype, check_shape
from qtts_compile.kernels.library import define_op
from qtts_compile.kernels.rows import as_rows, row_blocks, row_offset
from qtts_compile.kernels.sizes import cdiv

MAX_WIDTH = 16384


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise ``x`` ``[..., D]`` by its root mean square over ``D`` and scale it by ``weight`` ``[D]``.

    Computes ``x / sqrt(mean(x**2) + eps)`` in float32, rounds it to ``x.dtype``, then multiplies by ``weight`` in the promoted dtype of
    both, which is the dtype of the result. The result is contiguous.

    Raises ``TypeError`` for a dtype other than bfloat16, float16 and float32, and ``ValueError`` for a weight of another shape or device
    or a ``D`` of 0 or above 16384.
    """
    return torch.ops.qtts.rms_norm.default(x, weight, eps)


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute :func:`rms_norm` in plain PyTorch."""
    wide = x.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * normed.to(x.dtype)).contiguous()


def check_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless :func:`rms_norm` accepts the arguments."""
    check_float_dtype("x", x)
    check_float_dtype("weight", weight)
    if x.dim() == 0 or not 0 < x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"x must have the shape [..., D] with 0 < D <= {MAX_WIDTH}, got {tuple(x.shape)}")
    check_shape("weight", weight, x.shape[-1])
    check_device("weight", weight, "x", x)


@triton.jit
def rms_scale(x, D, eps):
    """Divide the float32 rows ``x`` ``[BLOCK_R, BLOCK_D]``, zero beyond ``D``, by their root mean square."""
    return x * tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]


@triton.jit
def _rms_norm_kernel(X_ptr, W_ptr, Y_ptr, n_rows, D, eps, size_1, size_2, stride_0, stride_1, stride_2, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    in_width = columns < D
    in_bounds = (rows < n_rows)[:, None] & in_width[None, :]
    offsets = row_offset(rows, size_1, size_2, stride_0, stride_1, stride_2)[:, None] + columns[None, :]
    x = tl.load(X_ptr + offsets, mask=in_bounds, other=0.0).to(tl.float32)
    weight = tl.load(W_ptr + columns, mask=in_width, other=0.0).to(tl.float32)
    normed = rms_scale(x, D, eps).to(X_ptr.dtype.element_ty).to(tl.float32)
    y_offsets = rows.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(Y_ptr + y_offsets, (weight[None, :] * normed).to(Y_ptr.dtype.element_ty), mask=in_bounds)


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Launch the kernel of :func:`rms_norm`."""
    y = rms_norm_fake(x, weight, eps)
    if y.numel() == 0:
        return y
    width = x.shape[-1]
    n_rows = x.numel() // width
    rows, layout = as_rows(x)
    block_r, block_d, num_warps = row_blocks(n_rows, width)
    _rms_norm_kernel[(cdiv(n_rows, block_r),)](
        rows, weight.contiguous(), y, n_rows, width, eps, *layout, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=num_warps
    )
    return y


def rms_norm_fake(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Allocate the result of :func:`rms_norm`."""
    return torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)


define_op(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    check=check_rms_norm,
    cuda=rms_norm_triton,
    cpu=rms_norm_reference,
    fake=rms_norm_fake,
)
