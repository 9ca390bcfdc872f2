"""How the kernels that multiply a few rows with weight matrices are launched."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from qtts_compile.kernels.gemv import MAX_ROWS
from qtts_compile.kernels.launch_search import can_search, search
from qtts_compile.kernels.launch_table import Launch, Shape, lookup
from qtts_compile.kernels.pdl import pdl_options
from qtts_compile.kernels.sizes import cdiv, next_power_of_2
from qtts_compile.kernels.skinny import choice as skinny

MAX_MULTIPLIED_ROWS = 2  # in half precision more rows go to the tensor cores, whose tiles have at least 8
BYTES_IN_FLIGHT = 256  # of weights for each thread, in 64 registers
SERVED = "bfloat16"  # of shapes in launch tables
MIN_SEARCHED_BYTES = 1e6  # of weights: with less to read, launches differ by nothing that can be measured


def launch_of(
    op: str, rows: int, weights: Sequence[torch.Tensor], outputs: int, run: Callable[[Sequence[torch.Tensor], Launch], object],
    is_served: bool = False,
) -> Launch | None:  # fmt: skip
    """Return the launch parameters of ``op`` for ``rows`` rows of x, ``weights`` ``[N, K]`` and ``outputs`` outputs; None leaves many to PyTorch.

    They are measured ones, and measured first by ``run``, which launches the kernel with other weights, if this GPU has none and can do so now. Else
    a rule chooses. What the tensor cores' kernels :mod:`skinny` serve has launches of its own, of any kernel.
    """
    if rows > MAX_ROWS and not is_served:
        return None
    width, dtype, device = weights[0].shape[1], weights[0].dtype, weights[0].device
    matrices = _matrices(weights, outputs)
    shape = Shape(op, SERVED if is_served else f"{8 * dtype.itemsize} bit", outputs, width, next_power_of_2(rows))
    launch = lookup(shape, device)
    if launch is None and outputs * matrices * width * dtype.itemsize >= MIN_SEARCHED_BYTES and can_search(device):
        launch = search(shape, candidates(rows, outputs, width, dtype, matrices, is_served), weights, run)
    return launch or choose_launch(rows, outputs, width, dtype, matrices, is_served)


def options_of(launch: Launch, weights: Sequence[torch.Tensor], outputs: int) -> dict[str, Any]:
    """Return the constants and launch options of a kernel on ``gemv`` that is launched so."""
    return _constants(launch, weights[0].shape[1], _matrices(weights, outputs), weights[0].itemsize) | pdl_options(weights[0].device)


def _matrices(weights: Sequence[torch.Tensor], outputs: int) -> int:
    return sum(weight.shape[0] for weight in weights) // outputs


@functools.cache
def _constants(launch: Launch, width: int, matrices: int, itemsize: int) -> dict[str, Any]:
    in_flight = launch.in_flight or tiles_in_flight(launch, BYTES_IN_FLIGHT, width, matrices, itemsize)
    return dict(
        K=width,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        BLOCK_K=launch.block_k,
        IN_FLIGHT=min(in_flight, cdiv(width, launch.block_k)),
        SPLITS=max(1, min(launch.num_warps, launch.block_k // 16)),
        num_warps=launch.num_warps,
    )


def tiles_in_flight(launch: Launch, bytes_of_thread: int, width: int, matrices: int, itemsize: int) -> int:
    """Return how many tiles of weights take at most so many bytes of each thread: at least one, and no more than there are in a row."""
    tile = launch.block_n * matrices * launch.block_k * itemsize
    return max(1, min(bytes_of_thread * 32 * launch.num_warps // tile, cdiv(width, launch.block_k)))


def choose_launch(rows: int, outputs: int, width: int, dtype: torch.dtype, matrices: int = 1, is_served: bool = False) -> Launch:
    """Choose by rule for ``rows`` rows of x and ``matrices`` weights ``[outputs, width]``, of which a program reads the same rows.

    For 1 or 2 rows: about 16 KiB of weights a program, but at least 400 programs, three for each multiprocessor of an H200.
    """
    if is_served and rows > 1:
        return skinny.choose_launch(rows, outputs, width, matrices)
    block_m = next_power_of_2(rows)
    whole_row = next_power_of_2(width)
    is_half = dtype.itemsize == 2
    if is_half and rows > MAX_MULTIPLIED_ROWS:
        return Launch(max(8, block_m), 16 // matrices, max(16, min(1024, whole_row)), 8 if rows > 8 and width > 1024 else 4)
    # Warps lie along a row, each lane with 16 bytes of half precision.
    num_warps = min(8 if width > 2048 else 4, max(1, whole_row // 256))
    elements = 2048 * num_warps // (1 if is_half else max(2, block_m))
    block_n = max(2, min(elements // (width * matrices), outputs // 400, 8))
    return Launch(block_m, 2 ** (block_n.bit_length() - 1), min(256 * num_warps, whole_row), num_warps)


def candidates(rows: int, outputs: int, width: int, dtype: torch.dtype, matrices: int = 1, is_served: bool = False) -> list[Launch]:
    """Return what a search tries, the rule's choice first: a thread reads 16 bytes of a row at a time."""
    launches = [choose_launch(rows, outputs, width, dtype, matrices, is_served)]
    if is_served:
        launches += skinny.candidates(rows, outputs, width, matrices)
        if rows > MAX_MULTIPLIED_ROWS:
            return list(dict.fromkeys(launches))
    block_m = next_power_of_2(rows)
    whole_row, lane = next_power_of_2(width), 16 // dtype.itemsize
    if rows <= 4 or dtype.itemsize > 2:
        for num_warps in (1, 2, 4, 8):
            for block_n in (2, 4, 8, 16):
                in_thread = block_n * matrices * width / (32 * num_warps)
                if 16 <= in_thread <= 256 and outputs / block_n >= 200 and 32 * lane * num_warps <= whole_row:
                    launches.append(Launch(block_m, block_n, 32 * lane * num_warps, num_warps))
    if rows > 2 and dtype.itemsize == 2:
        for num_warps in (2, 4, 8):
            for tile_rows, columns in ((8, 128), (8, 256), (16, 128), (16, 256), (32, 128)):
                if outputs * matrices / tile_rows >= 60:
                    launches.append(Launch(max(8, block_m), tile_rows // matrices, min(columns * num_warps, whole_row), num_warps))
    return list(dict.fromkeys(launches))
