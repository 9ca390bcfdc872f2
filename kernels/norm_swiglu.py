"""RMSNorm of a few rows, the gate and up projections that read it, and SwiGLU, in one launch."""

# pyright: reportCallIssue=false
# Triton's stubs type a launch as a call of the kernel itself, without its launch options.

import torch
import triton
import triton.language as tl

from qtts_compile.kernels.checks import check_shape
from qtts_compile.kernels.gemv import (
    as_matrix,
    check_norm_weight,
    check_rows,
    check_weight,
    multiply_rows,
    request_norm_weight,
    request_weights,
)
from qtts_compile.kernels.gemv_launch import launch_of, options_of
from qtts_compile.kernels.launch_table import Launch
from qtts_compile.kernels.library import define_op
from qtts_compile.kernels.pdl import announce, wait_for_inputs
from qtts_compile.kernels.rms_norm import rms_norm_reference
from qtts_compile.kernels.sizes import cdiv
from qtts_compile.kernels.skinny.launch import is_skinny, launch_skinny, serves
from qtts_compile.kernels.swiglu import swiglu_reference


def norm_swiglu(x: torch.Tensor, norm_weight: torch.Tensor | None, gate_weight: torch.Tensor, up_weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return ``silu(n @ gate_weight.T) * (n @ up_weight.T)`` with ``n = rms_norm(x, norm_weight, eps)``.

    ``x`` is ``[..., K]`` of at most 32 rows; a ``norm_weight`` of None multiplies ``x`` itself, whatever ``eps`` is. Both weights are
    ``[N, K]``. The norm is rounded as ``rms_norm``'s or less, at the most precise not at all, the products are summed in float32 and
    rounded to the dtype, one for all arguments, and the rest is rounded as ``swiglu``'s. The result ``[..., N]`` is contiguous. Weights must be at
    rest, as for ``norm_linears``.

    Raises ``TypeError`` for a dtype other than bfloat16, float16 and float32, or two dtypes, and ``ValueError`` for more than 32 rows,
    shapes that do not match, a weight whose rows are not contiguous, different devices, or a norm that ``rms_norm`` refuses.
    """
    return torch.ops.qtts.norm_swiglu.default(x, norm_weight, gate_weight, up_weight, eps)


def norm_swiglu_reference(
    x: torch.Tensor, norm_weight: torch.Tensor | None, gate_weight: torch.Tensor, up_weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Compute :func:`norm_swiglu` in plain PyTorch."""
    normed = x if norm_weight is None else rms_norm_reference(x, norm_weight, eps)
    return swiglu_reference(torch.nn.functional.linear(normed, gate_weight), torch.nn.functional.linear(normed, up_weight))


def check_norm_swiglu(x: torch.Tensor, norm_weight: torch.Tensor | None, gate_weight: torch.Tensor, up_weight: torch.Tensor, eps: float) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless :func:`norm_swiglu` accepts the arguments."""
    check_rows(x)
    check_norm_weight(norm_weight, x, eps)
    check_weight("gate_weight", gate_weight, x)
    check_weight("up_weight", up_weight, x)
    check_shape("up_weight", up_weight, *gate_weight.shape)


@triton.jit
def _norm_swiglu_kernel(
    X_ptr, Norm_ptr, Gate_ptr, Up_ptr, Y_ptr, M, N, x_stride, gate_stride, up_stride, eps,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IN_FLIGHT: tl.constexpr, SPLITS: tl.constexpr,
    IS_ALIGNED: tl.constexpr, HAS_PDL: tl.constexpr,
):  # fmt: skip
    announce(HAS_PDL)
    # One tile holds rows of both weights: first those of the gate, then those of up.
    tile_rows = tl.arange(0, 2 * BLOCK_N)[:, None]
    readable = tl.minimum(tl.program_id(0) * BLOCK_N + tile_rows % BLOCK_N, N - 1).to(tl.int64)
    row_ptrs = tl.where(tile_rows < BLOCK_N, Gate_ptr + readable * gate_stride, Up_ptr + readable * up_stride)
    if IS_ALIGNED:  # Triton 3.8 loses sight of it in tl.where
        row_ptrs = tl.multiple_of(row_ptrs, [16, 16])
    tiles = request_weights(row_ptrs, K, BLOCK_K, IN_FLIGHT)
    norm_tiles = request_norm_weight(Norm_ptr, K, BLOCK_K)
    wait_for_inputs(HAS_PDL)
    products = multiply_rows(X_ptr, x_stride, M, norm_tiles, eps, row_ptrs, tiles, K, BLOCK_M, SPLITS)
    dtype = Y_ptr.dtype.element_ty
    gate, up = tl.split(tl.permute(tl.reshape(products.to(dtype).to(tl.float32), [2, BLOCK_N, BLOCK_M]), (1, 2, 0)))
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    rows = tl.arange(0, BLOCK_M)[None, :]
    tl.store(Y_ptr + rows.to(tl.int64) * N + outputs, (silu * up).to(dtype), mask=(outputs < N) & (rows < M))


def norm_swiglu_triton(
    x: torch.Tensor, norm_weight: torch.Tensor | None, gate_weight: torch.Tensor, up_weight: torch.Tensor, eps: float,
    launch: Launch | None = None,
) -> torch.Tensor:  # fmt: skip
    """Launch the kernel of :func:`norm_swiglu`; a ``launch`` overrides what is chosen for the shapes."""
    y = norm_swiglu_fake(x, norm_weight, gate_weight, up_weight, eps)
    if y.numel() == 0:
        return y
    given, x = x, as_matrix(x)
    weights, outputs = [gate_weight, up_weight], gate_weight.shape[0]
    is_served = serves(x, norm_weight, weights)
    run = lambda weights, launch: norm_swiglu_triton(x, norm_weight, *weights, eps, launch)  # noqa: E731
    launch = launch or launch_of("norm_swiglu", x.shape[0], weights, outputs, run, is_served)
    if launch is None:
        return norm_swiglu_reference(given, norm_weight, gate_weight, up_weight, eps)
    if is_served and is_skinny(launch):
        launch_skinny(x, norm_weight, weights, [None] * 2, None, [y], eps, launch, is_swiglu=True)
        return y
    options = options_of(launch, weights, outputs)
    options["IS_ALIGNED"] = all(weight.data_ptr() % 16 == 0 and weight.stride(0) * weight.itemsize % 16 == 0 for weight in weights)
    _norm_swiglu_kernel[(cdiv(outputs, options["BLOCK_N"]),)](
        x, norm_weight, gate_weight, up_weight, y, x.shape[0], outputs, x.stride(0), gate_weight.stride(0), up_weight.stride(0), eps, **options
    )  # fmt: skip
    return y


def norm_swiglu_fake(
    x: torch.Tensor, norm_weight: torch.Tensor | None, gate_weight: torch.Tensor, up_weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Allocate the result of :func:`norm_swiglu`."""
    return torch.empty((*x.shape[:-1], gate_weight.shape[0]), dtype=x.dtype, device=x.device)


define_op(
    "norm_swiglu(Tensor x, Tensor? norm_weight, Tensor gate_weight, Tensor up_weight, float eps) -> Tensor",
    check=check_norm_swiglu,
    cuda=norm_swiglu_triton,
    cpu=norm_swiglu_reference,
    fake=norm_swiglu_fake,
)
