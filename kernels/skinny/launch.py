"""When linear layers of a few rows go to the tensor cores, and the launch of the kernels."""

# pyright: reportCallIssue=false
# Triton's stubs type a launch as a call of the kernel itself, without its launch options.

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from qtts_compile.kernels.launch_table import Launch
from qtts_compile.kernels.pdl import pdl_options
from qtts_compile.kernels.sizes import cdiv
from qtts_compile.kernels.skinny.choice import BYTES_IN_FLIGHT, LANES_COLUMNS, MAX_ROWS, TILE, blocks_ahead, column_shares, is_of_many_rows, x_steps
from qtts_compile.kernels.skinny.kernel import skinny_kernel
from qtts_compile.kernels.skinny.many_rows import skinny_many_rows_kernel

WIDTHS = 512  # of which a row must be a multiple: 8 warps, each with two loads of 16 bytes for a lane


@functools.cache
def has_tensor_cores(device: torch.device) -> bool:
    """Tell whether a device multiplies matrices of bfloat16 (Ampere and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def serves_rows_of(dtype: torch.dtype, width: int, device: torch.device) -> bool:
    """Tell whether the kernels multiply rows of a width, if they are aligned."""
    return has_tensor_cores(device) and dtype == torch.bfloat16 and width % WIDTHS == 0


def serves(x: torch.Tensor, norm_weight: torch.Tensor | None, weights: Sequence[torch.Tensor], tokens: torch.Tensor | None = None) -> bool:
    """Tell whether the kernels can multiply ``x`` ``[M, K]`` with ``weights`` ``[N, K]``: in bfloat16, with rows of 16 aligned bytes.

    With ``tokens`` x is a table of any size, of which they multiply their rows.
    """
    rows = x.shape[0] if tokens is None else tokens.numel()
    if rows > MAX_ROWS or not serves_rows_of(x.dtype, x.shape[1], x.device):
        return False
    is_aligned = all(row.data_ptr() % 16 == 0 and row.stride(0) % 8 == 0 for row in [x, *weights])
    return is_aligned and (norm_weight is None or norm_weight.data_ptr() % 16 == 0)


def is_skinny(launch: Launch) -> bool:
    """Tell whether a launch that was measured for what is served is one of these kernels, whose rows of x are 8, 16 or 32."""
    return launch.block_m >= 8


def launch_skinny(
    x: torch.Tensor, norm_weight: torch.Tensor | None, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None],
    residual: torch.Tensor | None, ys: Sequence[torch.Tensor], eps: float, launch: Launch, is_swiglu: bool = False,
    tokens: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Launch a kernel for what :func:`serves` allows: ``x`` ``[M, K]``, and ``ys`` ``[M, N]`` of each weight or, as SwiGLU, of both.

    With contiguous ``tokens`` x is a table ``[V, K]`` of which it multiplies their rows.

    A step is ``block_k`` columns of 16 rows of a weight, or of 8 of both; a program serves ``block_n`` outputs. Where x goes through shared memory a
    block of x has so many columns, and a warp has as many steps of 32 columns in flight.

    Raises:
        ValueError: if the launch does not fit.
    """
    rows, width = x.shape[0] if tokens is None else tokens.numel(), x.shape[1]
    tiles, uneven = divmod(launch.block_n * (2 if is_swiglu else 1), TILE)
    chunks, odd = divmod(launch.block_k, LANES_COLUMNS * launch.num_warps)
    if uneven or odd or width % launch.block_k or rows > launch.block_m:
        what = f"{rows} rows of {width} columns"
        raise ValueError(f"{launch} does not fit {what}; delete the table of launches that it is from, in the folder of QTTS_COMPILE_CACHE")
    steps = width // launch.block_k
    if is_of_many_rows(launch):
        kernel, how = skinny_many_rows_kernel, dict(SHARES=column_shares(tiles, launch.num_warps), AHEAD=blocks_ahead(tiles, launch.num_warps, steps))
    else:
        kernel, how = skinny_kernel, dict(GROUPS=launch.block_m // 8, CHUNKS=chunks, X_STEPS=x_steps(launch, width))
    in_flight = min(launch.in_flight or max(1, BYTES_IN_FLIGHT // (32 * chunks)), steps * tiles)
    kernel[(sum(cdiv(y.shape[-1], launch.block_n) for y in ys),)](
        x, tokens, norm_weight, tuple(weights), tuple(biases), residual, tuple(ys), rows, x.shape[0], tuple(weight.shape[0] for weight in weights),
        x.stride(0), tuple(weight.stride(0) for weight in weights), 0 if residual is None else residual.stride(0), eps,
        K=width, WARPS=launch.num_warps, TILES=tiles, IN_FLIGHT=in_flight, **how, IS_SWIGLU=is_swiglu, num_warps=launch.num_warps,
        **pdl_options(x.device), debug=tokens is not None, sanitize_overflow=False,
    )  # fmt: skip
