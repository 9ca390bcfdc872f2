"""A linear layer of a few rows and the residual addition after it, in one launch."""

# pyright: reportCallIssue=false
# Triton's stubs type a launch as a call of the kernel itself, without its launch options.

import torch
import triton
import triton.language as tl

from qtts_compile.kernels.checks import check_like, check_shape
from qtts_compile.kernels.gemv import (
    as_matrix,
    check_rows,
    check_vector,
    check_weight,
    multiply_rows,
    request_weights,
)
from qtts_compile.kernels.gemv_launch import launch_of, options_of
from qtts_compile.kernels.launch_table import Launch
from qtts_compile.kernels.library import define_op
from qtts_compile.kernels.pdl import announce, wait_for_inputs
from qtts_compile.kernels.sizes import cdiv
from qtts_compile.kernels.skinny.launch import is_skinny, launch_skinny, serves


def linear_add(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
    """Return ``residual + (x @ weight.T + bias)`` for ``x`` ``[..., K]`` of at most 32 rows, ``weight`` ``[N, K]`` and ``bias`` ``[N]``.

    Products are summed in float32 with the bias and rounded to the dtype, then added to ``residual`` ``[..., N]`` and rounded. All have one
    dtype. The result is contiguous. ``weight`` and ``bias`` must be at rest: on a GPU of compute capability 9.0 or later they are read
    before earlier kernels of the stream have ended.

    Raises ``TypeError`` for a dtype other than bfloat16, float16 and float32, or two dtypes, and ``ValueError`` for more than 32 rows,
    shapes that do not match, a weight whose rows are not contiguous, or different devices.
    """
    return torch.ops.qtts.linear_add.default(x, weight, bias, residual)


def linear_add_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
    """Compute :func:`linear_add` in plain PyTorch."""
    return (residual + torch.nn.functional.linear(x, weight, bias)).contiguous()


def check_linear_add(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless :func:`linear_add` accepts the arguments."""
    check_rows(x)
    check_weight("weight", weight, x)
    check_vector("bias", bias, weight.shape[0], x)
    check_like("residual", residual, "x", x)
    check_shape("residual", residual, *x.shape[:-1], weight.shape[0])


@triton.jit
def _linear_add_kernel(
    X_ptr, W_ptr, Bias_ptr, Residual_ptr, Y_ptr, M, N, x_stride, w_stride, residual_stride,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IN_FLIGHT: tl.constexpr,
    SPLITS: tl.constexpr, HAS_PDL: tl.constexpr,
):  # fmt: skip
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    readable = tl.minimum(outputs, N - 1)
    row_ptrs = W_ptr + readable.to(tl.int64) * w_stride
    tiles = request_weights(row_ptrs, K, BLOCK_K, IN_FLIGHT)
    bias = 0.0
    if Bias_ptr is not None:
        bias = tl.load(Bias_ptr + readable).to(tl.float32)
    # The next kernel's requests come after this one's. Behind a norm, PTX's compiler converts its weight before the announcement, which waits then.
    announce(HAS_PDL)
    wait_for_inputs(HAS_PDL)
    rows = tl.arange(0, BLOCK_M)[None, :]
    in_bounds = (outputs < N) & (rows < M)
    residual = tl.load(Residual_ptr + rows.to(tl.int64) * residual_stride + outputs, mask=in_bounds, other=0.0).to(tl.float32)
    y = multiply_rows(X_ptr, x_stride, M, (), 0.0, row_ptrs, tiles, K, BLOCK_M, SPLITS) + bias
    dtype = Y_ptr.dtype.element_ty
    y = (residual + y.to(dtype).to(tl.float32)).to(dtype)
    tl.store(Y_ptr + rows.to(tl.int64) * N + outputs, y, mask=in_bounds)


def linear_add_triton(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor,
    launch: Launch | None = None,
) -> torch.Tensor:  # fmt: skip
    """Launch the kernel of :func:`linear_add`; a ``launch`` overrides what is chosen for the shapes."""
    y = linear_add_fake(x, weight, bias, residual)
    if y.numel() == 0:
        return y
    outputs, given = weight.shape[0], (x, weight, bias, residual)
    x, residual = as_matrix(x), as_matrix(residual)
    is_served = serves(x, None, [weight])
    run = lambda weights, launch: linear_add_triton(x, *weights, bias, residual, launch)  # noqa: E731
    launch = launch or launch_of("linear_add", x.shape[0], [weight], outputs, run, is_served)
    if launch is None:
        return linear_add_reference(*given)
    if is_served and is_skinny(launch):
        launch_skinny(x, None, [weight], [bias], residual, [y], 0.0, launch)
        return y
    options = options_of(launch, [weight], outputs)
    _linear_add_kernel[(cdiv(outputs, options["BLOCK_N"]),)](
        x, weight, bias, residual, y, x.shape[0], outputs, x.stride(0), weight.stride(0), residual.stride(0),
        **options,
    )  # fmt: skip
    return y


def linear_add_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
    """Allocate the result of :func:`linear_add`."""
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


define_op(
    "linear_add(Tensor x, Tensor weight, Tensor? bias, Tensor residual) -> Tensor",
    check=check_linear_add,
    cuda=linear_add_triton,
    cpu=linear_add_reference,
    fake=linear_add_fake,
)
