"""SwiGLU gating (Shazeer, 2020): ``silu(gate) * up``."""

# pyright: reportCallIssue=false
# Triton's stubs type a launch as a call of the kernel itself, without its launch options.

import torch
import triton
import triton.language as tl

from qtts_compile.kernels.checks import check_float_dtype, check_like, check_shape
from qtts_compile.kernels.library import define_op
from qtts_compile.kernels.rows import as_rows, row_offset
from qtts_compile.kernels.sizes import cdiv

BLOCK_D = 512


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up`` for ``gate`` and ``up`` ``[..., D]`` of one dtype.

    ``silu(gate)`` is computed in float32 and rounded to the dtype, and so is the product. The result is contiguous.

    Raises ``TypeError`` for a dtype other than bfloat16, float16 and float32, or two dtypes, and ``ValueError`` for different shapes or
    devices.
    """
    return torch.ops.qtts.swiglu.default(gate, up)


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Compute :func:`swiglu` in plain PyTorch."""
    return (torch.nn.functional.silu(gate) * up).contiguous()


def check_swiglu(gate: torch.Tensor, up: torch.Tensor) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless :func:`swiglu` accepts the arguments."""
    check_float_dtype("gate", gate)
    check_like("up", up, "gate", gate)
    if gate.dim() == 0:
        raise ValueError("gate must have the shape [..., D], got ()")
    check_shape("up", up, *gate.shape)


@triton.jit
def _swiglu_kernel(
    Gate_ptr, Up_ptr, Y_ptr, D,
    gate_size_1, gate_size_2, gate_stride_0, gate_stride_1, gate_stride_2,
    up_size_1, up_size_2, up_stride_0, up_stride_1, up_stride_2,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_bounds = columns < D
    gate_row = row_offset(row, gate_size_1, gate_size_2, gate_stride_0, gate_stride_1, gate_stride_2)
    up_row = row_offset(row, up_size_1, up_size_2, up_stride_0, up_stride_1, up_stride_2)
    gate = tl.load(Gate_ptr + gate_row + columns, mask=in_bounds, other=0.0).to(tl.float32)
    up = tl.load(Up_ptr + up_row + columns, mask=in_bounds, other=0.0).to(tl.float32)
    dtype = Y_ptr.dtype.element_ty
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(Y_ptr + row.to(tl.int64) * D + columns, (silu * up).to(dtype), mask=in_bounds)


def swiglu_triton(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Launch the kernel of :func:`swiglu`."""
    y = swiglu_fake(gate, up)
    if y.numel() == 0:
        return y
    width = gate.shape[-1]
    gate_rows, gate_layout = as_rows(gate)
    up_rows, up_layout = as_rows(up)
    grid = (gate.numel() // width, cdiv(width, BLOCK_D))
    _swiglu_kernel[grid](gate_rows, up_rows, y, width, *gate_layout, *up_layout, BLOCK_D=BLOCK_D, num_warps=4)
    return y


def swiglu_fake(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Allocate the result of :func:`swiglu`."""
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


define_op("swiglu(Tensor gate, Tensor up) -> Tensor", check=check_swiglu, cuda=swiglu_triton, cpu=swiglu_reference, fake=swiglu_fake)
