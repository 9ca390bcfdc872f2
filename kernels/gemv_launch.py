"""How the kernels that multiply a few rows with weight matrices are launched."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

from qtts_compile.kernels.pdl import has_pdl

MAX_MULTIPLIED_ROWS = 4  # in half precision more rows go to the tensor cores, whose tiles have at least 8
BYTES_IN_FLIGHT = 256  # of weights for each thread, in 64 registers


class Launch(NamedTuple):
    """Rows of x, outputs and columns of a tile, all powers of two, and warps of a program.

    At least 2 outputs are chosen: 1 failed to compile on Triton 3.6 with an alignment hint that two of the kernels no longer give.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int


# (operator, outputs, width, rows of x up to a power of two) in half precision: what `python -m bench.linears --search` found on an H200.
MEASURED: dict[tuple[str, int, int, int], Launch] = {}


def choose_launch(op: str, rows: int, outputs: int, width: int, dtype: torch.dtype, matrices: int = 1) -> Launch:
    """Choose for ``rows`` rows of x and ``matrices`` weights ``[outputs, width]``, of which a program reads the same rows.

    Shapes that were not measured, of up to 4 rows: about 16 KiB of weights a program, but at least 400 programs, three for each
    multiprocessor of an H200.
    """
    block_m = triton.next_power_of_2(rows)
    whole_row = triton.next_power_of_2(width)
    is_half = dtype.itemsize == 2
    if is_half and (op, outputs, width, block_m) in MEASURED:
        return MEASURED[op, outputs, width, block_m]
    if is_half and rows > MAX_MULTIPLIED_ROWS:
        return Launch(max(8, block_m), 16 // matrices, max(16, min(1024, whole_row)), 8 if width > 1024 else 4)
    # Warps lie along a row, each lane with 16 bytes of half precision.
    num_warps = min(8 if width > 2048 else 4, max(1, whole_row // 256))
    elements = 2048 * num_warps // (1 if is_half else max(2, block_m))
    block_n = max(2, min(elements // (width * matrices), outputs // 400, 8))
    return Launch(block_m, 2 ** (block_n.bit_length() - 1), min(256 * num_warps, whole_row), num_warps)


def launch_options(op: str, rows: int, weights: Sequence[torch.Tensor], outputs: int, **given: int | None) -> dict[str, Any]:
    """Return the constants and launch options of the kernel of ``op`` for ``rows`` rows of x, ``weights`` ``[N, K]`` and ``outputs`` outputs.

    ``given`` may override each field of ``Launch`` that is chosen from the shapes; those that are None do not.
    """
    width, dtype, device = weights[0].shape[1], weights[0].dtype, weights[0].device
    matrices = sum(weight.shape[0] for weight in weights) // outputs
    launch = choose_launch(op, rows, outputs, width, dtype, matrices)
    launch = launch._replace(**{name: value for name, value in given.items() if value is not None})
    tile = launch.block_n * matrices * launch.block_k
    in_flight = BYTES_IN_FLIGHT * 32 * launch.num_warps // (tile * dtype.itemsize)
    return dict(
        K=width,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        BLOCK_K=launch.block_k,
        IN_FLIGHT=max(1, min(in_flight, triton.cdiv(width, launch.block_k))),
        SPLITS=max(1, min(launch.num_warps, launch.block_k // 16)),
        HAS_PDL=has_pdl(device),
        num_warps=launch.num_warps,
        launch_pdl=has_pdl(device),
    )
