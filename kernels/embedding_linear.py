"""A linear layer of a few rows that are looked up in an embedding table, in one launch: the rows are read where they lie."""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's stubs type a launch as a call of the kernel itself, without its launch options, and do not know its static loops.

import torch
import triton
import triton.language as tl

from qtts_compile.kernels.checks import check_device, check_float_dtype, check_rank
from qtts_compile.kernels.gemv import check_vector, check_weight, multiply_rows, request_weights
from qtts_compile.kernels.gemv_launch import launch_of, options_of
from qtts_compile.kernels.launch_table import Launch
from qtts_compile.kernels.library import define_op
from qtts_compile.kernels.pdl import announce, wait_for_inputs
from qtts_compile.kernels.sizes import cdiv
from qtts_compile.kernels.skinny import launch as skinny


def embedding_linear(tokens: torch.Tensor, table: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return ``table[tokens] @ weight.T + bias`` for ``tokens`` ``[...]`` int64, ``table`` ``[V, K]``, ``weight`` ``[N, K]`` and ``bias`` ``[N]``.

    There are at most 32 tokens. Products are summed in float32 with the bias and rounded to the dtype, one for all but the tokens. The result
    ``[..., N]`` is contiguous. ``weight`` and ``bias`` must be at rest: on a GPU of compute capability 9.0 or later they are read before earlier
    kernels of the stream have ended.

    Raises ``TypeError`` for a dtype other than bfloat16, float16 and float32, two dtypes, or tokens that are not int64, and ``ValueError`` for
    more than 32 tokens, shapes that do not match, rows that are not contiguous, or different devices. A token outside ``[0, V)`` is an
    ``IndexError`` on the CPU and trips a device-side assert on the GPU.
    """
    return torch.ops.qtts.embedding_linear.default(tokens, table, weight, bias)


def embedding_linear_reference(tokens: torch.Tensor, table: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute :func:`embedding_linear` in plain PyTorch."""
    return torch.nn.functional.linear(torch.nn.functional.embedding(tokens, table), weight, bias).contiguous()


def check_embedding_linear(tokens: torch.Tensor, table: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless :func:`embedding_linear` accepts the arguments."""
    check_float_dtype("table", table)
    if tokens.dtype != torch.int64:
        raise TypeError(f"tokens must be int64, got {tokens.dtype}; convert them with .long()")
    check_device("tokens", tokens, "table", table)
    if tokens.numel() > skinny.MAX_ROWS:
        what = f"{skinny.MAX_ROWS} tokens, got {tokens.numel()} in {tuple(tokens.shape)}"
        raise ValueError(f"there must be at most {what}; use torch.nn.functional for more")
    check_rank("table", table, "V, K")
    if 0 in table.shape or (table.shape[1] > 1 and table.stride(1) != 1):
        raise ValueError(f"table must be [V, K] with V, K > 0 and contiguous rows, got {tuple(table.shape)} with strides {table.stride()}")
    check_weight("weight", weight, table)
    check_vector("bias", bias, weight.shape[0], table)


@triton.jit
def _embedding_linear_kernel(
    Token_ptr, Table_ptr, W_ptr, Bias_ptr, Y_ptr, M, N, V, table_stride, w_stride,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IN_FLIGHT: tl.constexpr,
    SPLITS: tl.constexpr, HAS_PDL: tl.constexpr,
):  # fmt: skip
    announce(HAS_PDL)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    readable = tl.minimum(outputs, N - 1)
    row_ptrs = W_ptr + readable.to(tl.int64) * w_stride
    tiles = request_weights(row_ptrs, K, BLOCK_K, IN_FLIGHT)
    bias = 0.0
    if Bias_ptr is not None:
        bias = tl.load(Bias_ptr + readable).to(tl.float32)
    wait_for_inputs(HAS_PDL)
    rows = tl.arange(0, BLOCK_M)[None, :]
    tokens = tl.load(Token_ptr + rows, mask=rows < M, other=0)
    tl.device_assert((tokens >= 0) & (tokens < V), "embedding_linear: a token lies outside the table")
    y = multiply_rows(Table_ptr, table_stride, M, (), 0.0, row_ptrs, tiles, K, BLOCK_M, SPLITS, Token_ptr) + bias
    tl.store(Y_ptr + rows.to(tl.int64) * N + outputs, y.to(Y_ptr.dtype.element_ty), mask=(outputs < N) & (rows < M))


def embedding_linear_triton(
    tokens: torch.Tensor, table: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
    launch: Launch | None = None,
) -> torch.Tensor:  # fmt: skip
    """Launch the kernel of :func:`embedding_linear`; a ``launch`` overrides what is chosen for the shapes."""
    y = embedding_linear_fake(tokens, table, weight, bias)
    if y.numel() == 0:
        return y
    outputs, rows = weight.shape[0], tokens.numel()
    run = lambda weights, launch: embedding_linear_triton(tokens, table, *weights, bias, launch)  # noqa: E731
    is_served = skinny.serves(table, None, [weight], tokens)
    launch = launch or launch_of("embedding_linear", rows, [weight], outputs, run, is_served)
    if launch is None:
        return embedding_linear_reference(tokens, table, weight, bias)
    if is_served and skinny.is_skinny(launch):
        skinny.launch_skinny(table, None, [weight], [bias], None, [y], 0.0, launch, tokens=tokens.contiguous())
        return y
    options = options_of(launch, [weight], outputs)
    _embedding_linear_kernel[(cdiv(outputs, options["BLOCK_N"]),)](
        tokens.contiguous(), table, weight, bias, y, rows, outputs, table.shape[0], table.stride(0), weight.stride(0),
        **options, debug=True, sanitize_overflow=False,
    )  # fmt: skip
    return y


def embedding_linear_fake(tokens: torch.Tensor, table: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Allocate the result of :func:`embedding_linear`."""
    return torch.empty((*tokens.shape, weight.shape[0]), dtype=table.dtype, device=table.device)


define_op(
    "embedding_linear(Tensor tokens, Tensor table, Tensor weight, Tensor? bias) -> Tensor",
    check=check_embedding_linear,
    cuda=embedding_linear_triton,
    cpu=embedding_linear_reference,
    fake=embedding_linear_fake,
)
