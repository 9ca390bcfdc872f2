"""RMSNorm of a few rows and the linear layers that read it, in one launch: the norm is computed anew by every program."""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's stubs type a launch as a call of the kernel itself, without its launch options, and do not know its static loops.

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from qtts_compile.kernels.gemv import (
    as_matrix,
    check_norm_weight,
    check_rows,
    check_vector,
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

MAX_WEIGHTS = 3


def norm_linears(
    x: torch.Tensor, norm_weight: torch.Tensor | None, weights: list[torch.Tensor], biases: list[torch.Tensor | None], eps: float
) -> list[torch.Tensor]:
    """Return ``rms_norm(x, norm_weight, eps) @ weight.T + bias`` for each of one to three ``weights`` ``[N_i, K]`` and ``biases`` ``[N_i]``.

    ``x`` is ``[..., K]`` of at most 32 rows; a ``norm_weight`` of None multiplies ``x`` itself, whatever ``eps`` is. The norm is rounded as
    ``rms_norm``'s or less, at the most precise not at all; products are summed in float32 with the bias and rounded to the dtype, one for all
    arguments. The results ``[..., N_i]`` are contiguous. Weights and biases must be at rest: on a GPU of compute capability 9.0 or later
    they are read before earlier kernels of the stream have ended.

    Raises ``TypeError`` for a dtype other than bfloat16, float16 and float32, or two dtypes, and ``ValueError`` for more than 32 rows or
    3 weights, shapes that do not match, a weight whose rows are not contiguous, different devices, or a norm that ``rms_norm`` refuses.
    """
    return torch.ops.qtts.norm_linears.default(x, norm_weight, weights, biases, eps)


def norm_linears_reference(
    x: torch.Tensor, norm_weight: torch.Tensor | None, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], eps: float
) -> list[torch.Tensor]:
    """Compute :func:`norm_linears` in plain PyTorch."""
    normed = x if norm_weight is None else rms_norm_reference(x, norm_weight, eps)
    return [torch.nn.functional.linear(normed, weight, bias).contiguous() for weight, bias in zip(weights, biases, strict=True)]


def check_norm_linears(
    x: torch.Tensor, norm_weight: torch.Tensor | None, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], eps: float
) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless :func:`norm_linears` accepts the arguments."""
    check_rows(x)
    check_norm_weight(norm_weight, x, eps)
    if not 0 < len(weights) <= MAX_WEIGHTS:
        raise ValueError(f"weights must be 1 to {MAX_WEIGHTS} tensors, got {len(weights)}; call norm_linears once for each few of them")
    if len(biases) != len(weights):
        raise ValueError(f"biases must hold a tensor or None for each of the {len(weights)} weights, got {len(biases)}")
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        check_weight(f"weights[{i}]", weight, x)
        check_vector(f"biases[{i}]", bias, weight.shape[0], x)


@triton.jit
def _norm_linears_kernel(
    X_ptr, Norm_ptr, W_ptrs, Bias_ptrs, Y_ptrs, M, sizes, x_stride, w_strides, eps,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IN_FLIGHT: tl.constexpr,
    SPLITS: tl.constexpr, HAS_PDL: tl.constexpr,
):  # fmt: skip
    announce(HAS_PDL)
    # A program serves one of the weights, of which each has as many programs as it has blocks of rows.
    W_ptr, Y_ptr, N, w_stride = W_ptrs[0], Y_ptrs[0], sizes[0], w_strides[0]
    place, block = 0, tl.program_id(0)
    for i in tl.static_range(1, len(W_ptrs)):
        blocks = tl.cdiv(sizes[i - 1], BLOCK_N)
        is_later = (place == i - 1) & (block >= blocks)
        place = tl.where(is_later, i, place)
        block = tl.where(is_later, block - blocks, block)
        W_ptr = tl.where(is_later, W_ptrs[i], W_ptr)
        Y_ptr = tl.where(is_later, Y_ptrs[i], Y_ptr)
        N = tl.where(is_later, sizes[i], N)
        w_stride = tl.where(is_later, w_strides[i], w_stride)
    outputs = block * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    readable = tl.minimum(outputs, N - 1)
    row_ptrs = W_ptr + readable.to(tl.int64) * w_stride
    tiles = request_weights(row_ptrs, K, BLOCK_K, IN_FLIGHT)
    norm_tiles = request_norm_weight(Norm_ptr, K, BLOCK_K)
    bias = tl.zeros([BLOCK_N, 1], tl.float32)
    for i in tl.static_range(len(W_ptrs)):
        if Bias_ptrs[i] is not None:
            bias += tl.load(Bias_ptrs[i] + readable, mask=(readable >= 0) & (place == i), other=0.0).to(tl.float32)
    wait_for_inputs(HAS_PDL)
    y = bias + multiply_rows(X_ptr, x_stride, M, norm_tiles, eps, row_ptrs, tiles, K, BLOCK_M, SPLITS)
    rows = tl.arange(0, BLOCK_M)[None, :]
    tl.store(Y_ptr + rows.to(tl.int64) * N + outputs, y.to(Y_ptr.dtype.element_ty), mask=(outputs < N) & (rows < M))


def norm_linears_triton(
    x: torch.Tensor, norm_weight: torch.Tensor | None, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], eps: float,
    launch: Launch | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """Launch the kernel of :func:`norm_linears`; a ``launch`` overrides what is chosen for the shapes."""
    ys = norm_linears_fake(x, norm_weight, weights, biases, eps)
    if ys[0].numel() == 0:
        return ys
    given, x = x, as_matrix(x)
    is_served = serves(x, norm_weight, weights)
    sizes = [weight.shape[0] for weight in weights]
    run = lambda weights, launch: norm_linears_triton(x, norm_weight, weights, biases, eps, launch)  # noqa: E731
    launch = launch or launch_of("norm_linears", x.shape[0], weights, sum(sizes), run, is_served)
    if launch is None:
        return norm_linears_reference(given, norm_weight, weights, biases, eps)
    if is_served and is_skinny(launch):
        launch_skinny(x, norm_weight, weights, biases, None, ys, eps, launch)
        return ys
    options = options_of(launch, weights, sum(sizes))
    _norm_linears_kernel[(sum(cdiv(size, options["BLOCK_N"]) for size in sizes),)](
        x, norm_weight, tuple(weights), tuple(biases), tuple(ys), x.shape[0], tuple(sizes), x.stride(0),
        tuple(weight.stride(0) for weight in weights), eps, **options,
    )  # fmt: skip
    return ys


def norm_linears_fake(
    x: torch.Tensor, norm_weight: torch.Tensor | None, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], eps: float
) -> list[torch.Tensor]:
    """Allocate the results of :func:`norm_linears`."""
    return [torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device) for weight in weights]


define_op(
    "norm_linears(Tensor x, Tensor? norm_weight, Tensor[] weights, Tensor?[] biases, float eps) -> Tensor[]",
    check=check_norm_linears,
    cuda=norm_linears_triton,
    cpu=norm_linears_reference,
    fake=norm_linears_fake,
)
