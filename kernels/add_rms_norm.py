"""Residual addition followed by RMSNorm, in one pass over the row."""

# pyright: reportCallIssue=false
# Triton's stubs type a launch as a call of the kernel itself, without its launch options.

import torch
import triton
import triton.language as tl

from qtts_compile.kernels.checks import check_like, check_shape
from qtts_compile.kernels.library import define_op
from qtts_compile.kernels.rms_norm import check_rms_norm, rms_norm_reference, rms_scale
from qtts_compile.kernels.rows import as_rows, row_blocks, row_offset
from qtts_compile.kernels.sizes import cdiv


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(rms_norm(sum, weight, eps), sum)`` with ``sum = residual + x``.

    ``x`` and ``residual`` are ``[..., D]`` of one dtype, to which the sum is rounded before it is normalised; the rest is as in
    ``rms_norm``. Both results are contiguous.

    Raises ``TypeError`` or ``ValueError`` as ``rms_norm`` does, and when ``residual`` differs from ``x`` in shape, dtype or device.
    """
    return torch.ops.qtts.add_rms_norm.default(x, residual, weight, eps)


def add_rms_norm_reference(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute :func:`add_rms_norm` in plain PyTorch."""
    total = (residual + x).contiguous()
    return rms_norm_reference(total, weight, eps), total


def check_add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless :func:`add_rms_norm` accepts the arguments."""
    check_rms_norm(x, weight, eps)
    check_like("residual", residual, "x", x)
    check_shape("residual", residual, *x.shape)


@triton.jit
def _add_rms_norm_kernel(
    X_ptr, Residual_ptr, W_ptr, Y_ptr, Sum_ptr, n_rows, D, eps,
    x_size_1, x_size_2, x_stride_0, x_stride_1, x_stride_2,
    r_size_1, r_size_2, r_stride_0, r_stride_1, r_stride_2,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    in_width = columns < D
    in_bounds = (rows < n_rows)[:, None] & in_width[None, :]
    x_offsets = row_offset(rows, x_size_1, x_size_2, x_stride_0, x_stride_1, x_stride_2)[:, None] + columns[None, :]
    r_offsets = row_offset(rows, r_size_1, r_size_2, r_stride_0, r_stride_1, r_stride_2)[:, None] + columns[None, :]
    x = tl.load(X_ptr + x_offsets, mask=in_bounds, other=0.0).to(tl.float32)
    residual = tl.load(Residual_ptr + r_offsets, mask=in_bounds, other=0.0).to(tl.float32)
    weight = tl.load(W_ptr + columns, mask=in_width, other=0.0).to(tl.float32)
    total = (residual + x).to(X_ptr.dtype.element_ty)
    offsets = rows.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(Sum_ptr + offsets, total, mask=in_bounds)
    normed = rms_scale(total.to(tl.float32), D, eps).to(X_ptr.dtype.element_ty).to(tl.float32)
    tl.store(Y_ptr + offsets, (weight[None, :] * normed).to(Y_ptr.dtype.element_ty), mask=in_bounds)


def add_rms_norm_triton(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel of :func:`add_rms_norm`."""
    y, total = add_rms_norm_fake(x, residual, weight, eps)
    if y.numel() == 0:
        return y, total
    width = x.shape[-1]
    n_rows = x.numel() // width
    x_rows, x_layout = as_rows(x)
    residual_rows, residual_layout = as_rows(residual)
    block_r, block_d, num_warps = row_blocks(n_rows, width)
    _add_rms_norm_kernel[(cdiv(n_rows, block_r),)](
        x_rows, residual_rows, weight.contiguous(), y, total, n_rows, width, eps, *x_layout, *residual_layout,
        BLOCK_R=block_r, BLOCK_D=block_d, num_warps=num_warps,
    )  # fmt: skip
    return y, total


def add_rms_norm_fake(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate the results of :func:`add_rms_norm`."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return torch.empty(x.shape, dtype=dtype, device=x.device), torch.empty(x.shape, dtype=x.dtype, device=x.device)


define_op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor normed, Tensor sum)",
    check=check_add_rms_norm,
    cuda=add_rms_norm_triton,
    cpu=add_rms_norm_reference,
    fake=add_rms_norm_fake,
)
