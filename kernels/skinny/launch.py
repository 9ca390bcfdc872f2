"""When linear layers of a few rows go to the tensor cores, and how."""

# pyright: reportCallIssue=false
# Triton's stubs type a launch as a call of the kernel itself, without its launch options.

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from qtts_compile.kernels.launch_table import Launch
from qtts_compile.kernels.pdl import pdl_options
from qtts_compile.kernels.sizes import cdiv, next_power_of_2
from qtts_compile.kernels.skinny.kernel import skinny_kernel

MAX_ROWS = 32
TILE, LANES_COLUMNS = 16, 32  # rows of a weight, or of two together, and columns, that a warp multiplies at a time
WIDTHS = 512  # of which a row must be a multiple: 8 warps, each with two loads of 16 bytes for a lane
BYTES_IN_FLIGHT, BYTES_BESIDE_MANY_ROWS = 256, 192  # of weights for each thread, in 64 registers, or in 48 beside more than 16 rows of x
X_REGISTERS = 64  # of x that is requested at once
MAX_REGISTERS = {4: 236, 8: 236, 16: 124}  # of a thread, by warps: about what a multiprocessor has for one program
MAX_TILES = 6  # of a program, each of which makes it longer
MULTIPROCESSORS = 132  # of a Hopper GPU
BYTES_OF_SUMS = 512  # of a warp, of 16 rows of weights and 8 of x: those of a tile and, if there is one, the next
MAX_SHARED_BYTES = 40 * 1024  # beyond 48 KiB Triton has the multiprocessor divide its memory anew between shared memory and L1 cache, which waits


@functools.cache
def has_tensor_cores(device: torch.device) -> bool:
    """Tell whether a device multiplies matrices of bfloat16 (Ampere and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def serves_rows_of(dtype: torch.dtype, width: int, device: torch.device) -> bool:
    """Tell whether the kernel multiplies rows of a width, if they are aligned."""
    return has_tensor_cores(device) and dtype == torch.bfloat16 and width % WIDTHS == 0


def serves(x: torch.Tensor, norm_weight: torch.Tensor | None, weights: Sequence[torch.Tensor], tokens: torch.Tensor | None = None) -> bool:
    """Tell whether the kernel can multiply ``x`` ``[M, K]`` with ``weights`` ``[N, K]``: in bfloat16, with rows of 16 aligned bytes.

    With ``tokens`` x is a table of any size, of which it multiplies their rows.
    """
    rows = x.shape[0] if tokens is None else tokens.numel()
    if rows > MAX_ROWS or not serves_rows_of(x.dtype, x.shape[1], x.device):
        return False
    is_aligned = all(row.data_ptr() % 16 == 0 and row.stride(0) % 8 == 0 for row in [x, *weights])
    return is_aligned and (norm_weight is None or norm_weight.data_ptr() % 16 == 0)


def is_skinny(launch: Launch) -> bool:
    """Tell whether a launch that was measured for what is served is one of this kernel, whose rows of x are 8, 16 or 32."""
    return launch.block_m >= 8


def choose_launch(rows: int, outputs: int, width: int, matrices: int) -> Launch:
    """Choose by rule: one program for each multiprocessor of an H200, if that gives each no more tiles than it may have."""
    tiles = min(MAX_TILES, cdiv(outputs * matrices, TILE * MULTIPROCESSORS))
    return _launch(rows, width, matrices, 8, tiles, BYTES_IN_FLIGHT if rows <= 16 else BYTES_BESIDE_MANY_ROWS)


def candidates(rows: int, outputs: int, width: int, matrices: int) -> list[Launch]:
    """Return what a search tries, the rule's choice first: programs that a GPU runs together, with as much in flight as their registers hold."""
    launches, groups = [choose_launch(rows, outputs, width, matrices)], _groups(rows)
    few = {cdiv(outputs * matrices, TILE * MULTIPROCESSORS * share // 2) for share in (1, 2, 4)}
    for num_warps in (4, 8, 16) if width <= 1024 else (8, 16):
        if width % (LANES_COLUMNS * num_warps * 2):
            continue
        for tiles in (tiles for tiles in sorted({1, *few}) if tiles <= MAX_TILES):
            for bytes_of_thread in (128, 256, 512) if groups < 4 else (128, 192, 256):
                launch = _launch(rows, width, matrices, num_warps, tiles, bytes_of_thread)
                of_sums = groups * num_warps * BYTES_OF_SUMS * min(tiles, 2)
                if _registers(launch, width, tiles) <= MAX_REGISTERS[num_warps] and of_sums <= MAX_SHARED_BYTES:
                    launches.append(launch)
    return list(dict.fromkeys(launches))


def _registers(launch: Launch, width: int, tiles: int) -> int:
    """Estimate how many registers a thread needs."""
    groups, of_warp, chunks = launch.block_m // 8, width // (LANES_COLUMNS * launch.num_warps), launch.block_k // (LANES_COLUMNS * launch.num_warps)
    is_held = _x_steps(groups, chunks, of_warp // chunks) == of_warp // chunks
    of_x = 4 * groups * (of_warp if is_held else 2 * chunks)
    if is_held and groups == 4:
        of_x += 20 * tiles  # found by compiling: spills begin with so many
    return 8 * chunks * launch.in_flight + of_x + 8 * groups + 24


def _x_steps(groups: int, chunks: int, steps: int) -> int:
    """Return for how many of a tile's steps x is loaded at a time: it is loaded once if for all."""
    of_step = 4 * groups * chunks
    if of_step * steps <= X_REGISTERS:
        return steps
    together = max(1, (X_REGISTERS if groups < 4 else X_REGISTERS // 2) // of_step)  # 4 groups have sums in 32 registers, where 2 have 16
    return max(each for each in range(1, together + 1) if steps % each == 0)


def _groups(rows: int) -> int:
    return next_power_of_2(cdiv(rows, 8))


def _launch(rows: int, width: int, matrices: int, num_warps: int, tiles: int, bytes_of_thread: int) -> Launch:
    of_warp = width // (LANES_COLUMNS * num_warps)
    chunks = 4 if of_warp % 4 == 0 and rows <= 16 else 2  # so many columns of more rows of x take too many registers
    in_flight = min(bytes_of_thread // (32 * chunks), of_warp // chunks * tiles)
    return Launch(8 * _groups(rows), tiles * TILE // matrices, LANES_COLUMNS * num_warps * chunks, num_warps, in_flight)


def launch_skinny(
    x: torch.Tensor, norm_weight: torch.Tensor | None, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None],
    residual: torch.Tensor | None, ys: Sequence[torch.Tensor], eps: float, launch: Launch, is_swiglu: bool = False,
    tokens: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Launch the kernel for what :func:`serves` allows: ``x`` ``[M, K]``, and ``ys`` ``[M, N]`` of each weight or, as SwiGLU, of both.

    With contiguous ``tokens`` x is a table ``[V, K]`` of which it multiplies their rows.

    A step is ``block_k`` columns of 16 rows of a weight, or of 8 of both; a program serves ``block_n`` outputs.

    Raises:
        ValueError: if the launch does not fit.
    """
    rows, width = x.shape[0] if tokens is None else tokens.numel(), x.shape[1]
    rows_of_program = launch.block_n * (2 if is_swiglu else 1)
    if width % launch.block_k or launch.block_k % (LANES_COLUMNS * launch.num_warps) or rows_of_program % TILE or rows > launch.block_m:
        what = f"{rows} rows of {width} columns"
        raise ValueError(f"{launch} does not fit {what}; delete the table of launches that it is from, in the folder of QTTS_COMPILE_CACHE")
    chunks = launch.block_k // (LANES_COLUMNS * launch.num_warps)
    tiles, steps, groups = rows_of_program // TILE, width // launch.block_k, launch.block_m // 8
    in_flight = launch.in_flight or max(1, BYTES_IN_FLIGHT // (32 * chunks))
    skinny_kernel[(sum(cdiv(y.shape[-1], launch.block_n) for y in ys),)](
        x, tokens, norm_weight, tuple(weights), tuple(biases), residual, tuple(ys), rows, x.shape[0], tuple(weight.shape[0] for weight in weights),
        x.stride(0), tuple(weight.stride(0) for weight in weights), 0 if residual is None else residual.stride(0), eps,
        K=width, WARPS=launch.num_warps, GROUPS=groups, TILES=tiles, CHUNKS=chunks, IN_FLIGHT=min(in_flight, steps * tiles),
        X_STEPS=_x_steps(groups, chunks, steps), IS_SWIGLU=is_swiglu, num_warps=launch.num_warps,
        **pdl_options(x.device), debug=tokens is not None, sanitize_overflow=False,
    )  # fmt: skip
