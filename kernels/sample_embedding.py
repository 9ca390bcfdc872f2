"""Draw of one token a row and its row of an embedding table, in one launch: the next layer need not wait for a look-up of its own."""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's stubs type a launch as a call of the kernel itself, without its launch options.

import torch
import triton
import triton.language as tl

from qtts_compile.kernels.checks import check_device, check_float_dtype, check_rank
from qtts_compile.kernels.library import define_op
from qtts_compile.kernels.pdl import announce
from qtts_compile.kernels.sample import check_sample, draw_arguments, draw_token, sample_fake, sample_reference
from qtts_compile.kernels.sizes import next_power_of_2

MAX_WIDTH = 16384


def sample_embedding(
    logits: torch.Tensor,
    controls: torch.Tensor,
    seed: torch.Tensor,
    offset: torch.Tensor,
    seen: torch.Tensor | None,
    blocked: torch.Tensor | None,
    table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens, int64 ``[B]``, that :func:`qtts_compile.kernels.sample.sample` draws, and ``table[tokens]``, contiguous ``[B, D]``.

    ``table`` is ``[N, D]`` of bfloat16, float16 or float32, with a row for each of the V columns of the logits: N of at least V, D in [1, 16384].

    Raises what ``sample`` raises, ``TypeError`` for another dtype of the table, and ``ValueError`` for another shape of it, rows that are not
    contiguous, or different devices.
    """
    return torch.ops.qtts.sample_embedding.default(logits, controls, seed, offset, seen, blocked, table)


def sample_embedding_reference(
    logits: torch.Tensor,
    controls: torch.Tensor,
    seed: torch.Tensor,
    offset: torch.Tensor,
    seen: torch.Tensor | None,
    blocked: torch.Tensor | None,
    table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute :func:`sample_embedding` in plain PyTorch."""
    tokens = sample_reference(logits, controls, seed, offset, seen, blocked)
    return tokens, torch.nn.functional.embedding(tokens, table)


def check_sample_embedding(
    logits: torch.Tensor,
    controls: torch.Tensor,
    seed: torch.Tensor,
    offset: torch.Tensor,
    seen: torch.Tensor | None,
    blocked: torch.Tensor | None,
    table: torch.Tensor,
) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless :func:`sample_embedding` accepts the arguments."""
    check_sample(logits, controls, seed, offset, seen, blocked)
    check_float_dtype("table", table)
    check_rank("table", table, "N, D")
    check_device("table", table, "logits", logits)
    if table.shape[0] < logits.shape[1]:
        raise ValueError(f"table must have a row for each of the {logits.shape[1]} tokens, got {tuple(table.shape)}")
    if not 0 < table.shape[1] <= MAX_WIDTH or (table.shape[1] > 1 and table.stride(1) != 1):
        raise ValueError(
            f"table must be [N, D] with 0 < D <= {MAX_WIDTH} and contiguous rows, got {tuple(table.shape)} with strides {table.stride()}"
        )


@triton.jit
def _sample_embedding_kernel(
    Logits_ptr, Controls_ptr, Seed_ptr, Offset_ptr, Seen_ptr, Blocked_ptr, V, strides, Token_ptr, Table_ptr, Y_ptr, table_stride,
    BLOCK: tl.constexpr, SHIFT: tl.constexpr, HAS_PDL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    announce(HAS_PDL)
    row = tl.program_id(0).to(tl.int64)
    token = draw_token(Logits_ptr, Controls_ptr, Seed_ptr, Offset_ptr, Seen_ptr, Blocked_ptr, V, strides, row, BLOCK, SHIFT, HAS_PDL).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    embedding = tl.load(Table_ptr + token * table_stride + columns, mask=columns < D)
    tl.store(Y_ptr + row * D + columns, embedding, mask=columns < D)
    tl.store(Token_ptr + row, token)


def sample_embedding_triton(
    logits: torch.Tensor, controls: torch.Tensor, seed: torch.Tensor, offset: torch.Tensor, seen: torch.Tensor | None,
    blocked: torch.Tensor | None, table: torch.Tensor, num_warps: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Launch the kernel of :func:`sample_embedding`; ``num_warps`` overrides what is chosen from V."""
    tokens, y = sample_embedding_fake(logits, controls, seed, offset, seen, blocked, table)
    if tokens.numel() > 0:
        arguments, options = draw_arguments(logits, controls, seed, offset, seen, blocked, num_warps)
        width = table.shape[1]
        _sample_embedding_kernel[(logits.shape[0],)](
            *arguments, tokens, table, y, table.stride(0), **options, D=width, BLOCK_D=next_power_of_2(width)
        )  # fmt: skip
    return tokens, y


def sample_embedding_fake(
    logits: torch.Tensor,
    controls: torch.Tensor,
    seed: torch.Tensor,
    offset: torch.Tensor,
    seen: torch.Tensor | None,
    blocked: torch.Tensor | None,
    table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate the results of :func:`sample_embedding`."""
    tokens = sample_fake(logits, controls, seed, offset, seen, blocked)
    return tokens, torch.empty(logits.shape[0], table.shape[1], dtype=table.dtype, device=table.device)


define_op(
    "sample_embedding(Tensor logits, Tensor controls, Tensor seed, Tensor offset, Tensor? seen, Tensor? blocked, Tensor table) -> (Tensor, Tensor)",
    check=check_sample_embedding,
    cuda=sample_embedding_triton,
    cpu=sample_embedding_reference,
    fake=sample_embedding_fake,
)
