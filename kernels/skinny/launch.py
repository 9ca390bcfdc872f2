"""When linear layers of a few rows go to the tensor cores, and how."""

# pyright: reportCallIssue=false
# Triton's stubs type a launch as a call of the kernel itself, without its launch options.

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from qtts_compile.kernels.launch_table import Launch
from qtts_compile.kernels.pdl import pdl_options
from qtts_compile.kernels.sizes import cdiv
from qtts_compile.kernels.skinny.kernel import skinny_kernel

MAX_ROWS = 16
TILE, LANES_COLUMNS = 16, 32  # rows of a weight, or of two together, and columns, that a warp multiplies at a time
WIDTHS = 512  # of which a row must be a multiple: 8 warps, each with two loads of 16 bytes for a lane
BYTES_IN_FLIGHT = 256  # of weights for each thread, in 64 registers
X_REGISTERS = 64  # of x that is requested at once
MAX_REGISTERS = {4: 236, 8: 236, 16: 124}  # of a thread, by warps: about what a multiprocessor has for one program
MAX_TILES = 6  # of a program, each of which makes it longer
MULTIPROCESSORS = 132  # of a Hopper GPU
BYTES_OF_SUMS = 2 * 512  # of a warp, of 16 rows of weights and 8 of x, of one tile and the next
MAX_SHARED_BYTES = 40 * 1024  # beyond 48 KiB Triton has the multiprocessor divide its memory anew between shared memory and L1 cache, which waits


@functools.cache
def has_tensor_cores(device: torch.device) -> bool:
    """Tell whether a device multiplies matrices of bfloat16 (Ampere and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def serves(x: torch.Tensor, norm_weight: torch.Tensor | None, weights: Sequence[torch.Tensor]) -> bool:
    """Tell whether the kernel can multiply ``x`` ``[M, K]`` with ``weights`` ``[N, K]``: in bfloat16, with rows of 16 aligned bytes."""
    if not has_tensor_cores(x.device) or x.dtype != torch.bfloat16 or x.shape[0] > MAX_ROWS or x.shape[1] % WIDTHS:
        return False
    is_aligned = all(row.data_ptr() % 16 == 0 and row.stride(0) % 8 == 0 for row in [x, *weights])
    return is_aligned and (norm_weight is None or norm_weight.data_ptr() % 16 == 0)


def is_skinny(launch: Launch) -> bool:
    """Tell whether a launch that was measured for what is served is one of this kernel, whose rows of x are 8 or 16."""
    return launch.block_m >= 8


def choose_launch(rows: int, outputs: int, width: int, matrices: int) -> Launch:
    """Choose by rule: one program for each multiprocessor of an H200, if that gives each no more tiles than it may have."""
    return _launch(rows, width, matrices, 8, min(MAX_TILES, cdiv(outputs * matrices, TILE * MULTIPROCESSORS)), BYTES_IN_FLIGHT)


def candidates(rows: int, outputs: int, width: int, matrices: int) -> list[Launch]:
    """Return what a search tries, the rule's choice first: programs that a GPU runs together, with as much in flight as their registers hold."""
    launches, groups = [choose_launch(rows, outputs, width, matrices)], _groups(rows)
    few = {cdiv(outputs * matrices, TILE * MULTIPROCESSORS * share // 2) for share in (1, 2, 4)}
    for num_warps in (4, 8, 16) if width <= 1024 else (8, 16):
        if width % (LANES_COLUMNS * num_warps * 2) or groups * num_warps * BYTES_OF_SUMS > MAX_SHARED_BYTES:
            continue
        for tiles in (tiles for tiles in sorted({1, *few}) if tiles <= MAX_TILES):
            for bytes_of_thread in (128, 256, 512):
                launch = _launch(rows, width, matrices, num_warps, tiles, bytes_of_thread)
                of_warp, chunks = width // (LANES_COLUMNS * num_warps), launch.block_k // (LANES_COLUMNS * num_warps)
                of_x = 4 * groups * (of_warp if of_warp * 4 * groups <= X_REGISTERS else 2 * chunks)
                if 8 * chunks * launch.in_flight + of_x + 8 * groups + 24 <= MAX_REGISTERS[num_warps]:
                    launches.append(launch)
    return list(dict.fromkeys(launches))


def _groups(rows: int) -> int:
    return cdiv(rows, 8)


def _launch(rows: int, width: int, matrices: int, num_warps: int, tiles: int, bytes_of_thread: int) -> Launch:
    of_warp = width // (LANES_COLUMNS * num_warps)
    chunks = 4 if of_warp % 4 == 0 else 2
    in_flight = min(bytes_of_thread // (32 * chunks), of_warp // chunks * tiles)
    return Launch(8 * _groups(rows), tiles * TILE // matrices, LANES_COLUMNS * num_warps * chunks, num_warps, in_flight)


def launch_skinny(
    x: torch.Tensor, norm_weight: torch.Tensor | None, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None],
    residual: torch.Tensor | None, ys: Sequence[torch.Tensor], eps: float, launch: Launch, is_swiglu: bool = False,
) -> None:  # fmt: skip
    """Launch the kernel for what :func:`serves` allows: ``x`` ``[M, K]``, and ``ys`` ``[M, N]`` of each weight or, as SwiGLU, of both.

    A step is ``block_k`` columns of 16 rows of a weight, or of 8 of both; a program serves ``block_n`` outputs.

    Raises:
        ValueError: if the launch does not fit.
    """
    width = x.shape[1]
    rows_of_program = launch.block_n * (2 if is_swiglu else 1)
    if width % launch.block_k or launch.block_k % (LANES_COLUMNS * launch.num_warps) or rows_of_program % TILE or x.shape[0] > launch.block_m:
        what = f"{x.shape[0]} rows of {width} columns"
        raise ValueError(f"{launch} does not fit {what}; delete the table of launches that it is from, in the folder of QTTS_COMPILE_CACHE")
    chunks = launch.block_k // (LANES_COLUMNS * launch.num_warps)
    tiles, steps, groups = rows_of_program // TILE, width // launch.block_k, launch.block_m // 8
    in_flight = launch.in_flight or max(1, BYTES_IN_FLIGHT // (32 * chunks))
    together = max(1, X_REGISTERS // (4 * chunks * groups))
    skinny_kernel[(sum(cdiv(y.shape[-1], launch.block_n) for y in ys),)](
        x, norm_weight, tuple(weights), tuple(biases), residual, tuple(ys), x.shape[0], tuple(weight.shape[0] for weight in weights),
        x.stride(0), tuple(weight.stride(0) for weight in weights), 0 if residual is None else residual.stride(0), eps,
        K=width, WARPS=launch.num_warps, GROUPS=groups, TILES=tiles, CHUNKS=chunks, IN_FLIGHT=min(in_flight, steps * tiles),
        X_STEPS=max(each for each in range(1, together + 1) if steps % each == 0), IS_SWIGLU=is_swiglu, num_warps=launch.num_warps,
        **pdl_options(x.device),
    )  # fmt: skip
