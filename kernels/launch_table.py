"""Launch parameters that were measured: those shipped for a GPU, and those found on this machine, which come first.

A table is a JSON object of ``{"op numbers outputs x width, rows": [block_m, block_n, block_k, num_warps, in_flight]}``, one file for each GPU; the
last number may be missing.
"""

import contextlib
import functools
import json
import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from qtts_compile import user_cache

log = logging.getLogger(__name__)
SHIPPED = Path(__file__).parent / "launches"


class Launch(NamedTuple):
    """Rows of x, outputs and columns of a tile, warps of a program, and how many tiles it requests before it needs the first.

    All but the last are powers of two, but for the outputs of a launch of :mod:`skinny`, which says what it means there.

    Where ``in_flight`` is 0 a rule chooses it. Fewer tiles take fewer registers, which leaves room for the programs of the next kernel. At least 2
    outputs are chosen: 1 failed to compile on Triton 3.6 with an alignment hint that two of the kernels no longer give.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    in_flight: int = 0


class Shape(NamedTuple):
    """What launch parameters depend on: operator, numbers, outputs that programs share, width of a row, rows of x up to a power of two.

    Numbers are "16 bit" or "32 bit", or "bfloat16" where :mod:`skinny` serves them.
    """

    op: str
    numbers: str
    outputs: int
    width: int
    rows: int

    def __str__(self) -> str:
        return f"{self.op} {self.numbers} {self.outputs} x {self.width}, {self.rows}"


def lookup(shape: Shape, device: torch.device) -> Launch | None:
    """Return the launch parameters that were measured for a shape on a GPU of this kind, if any were."""
    return None if device.type != "cuda" else _table(_gpu(device)).get(str(shape))


def remember(shape: Shape, device: torch.device, launch: Launch) -> None:
    """Use ``launch`` for a shape from now on in this process."""
    _table(_gpu(device))[str(shape)] = launch


def keep(shape: Shape, device: torch.device, launch: Launch) -> None:
    """Use ``launch`` for a shape from now on, in this process and, where the cache folder can be written, in later ones."""
    remember(shape, device, launch)
    gpu = _gpu(device)
    path = _found(gpu)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written whole, so that no other process reads a part of it.
        unfinished.write_text(json.dumps(_read(path) | {str(shape): launch}, indent=1, sort_keys=True))
        unfinished.replace(path)
    except OSError as error:
        log.warning("what was found for %s on %s is not kept for later processes: %s; set QTTS_COMPILE_CACHE to a writable folder", shape, gpu, error)
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def file_name(gpu: str) -> str:
    """Return the name of a GPU's table, by the name that CUDA gives the GPU."""
    return re.sub(r"\W+", "-", gpu.lower()).strip("-") + ".json"


@functools.cache
def _gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@functools.cache
def _table(gpu: str) -> dict[str, Launch]:
    return _read(SHIPPED / file_name(gpu)) | _read(_found(gpu))


def _found(gpu: str) -> Path:
    # What one Triton compiles well, or at all, another may not.
    return user_cache.folder() / "launches" / f"triton-{triton.__version__}" / file_name(gpu)


def _read(path: Path) -> dict[str, Launch]:
    """Return a table; an unreadable one is warned of and counts as empty."""
    try:
        return {shape: _valid(shape, *launch) for shape, launch in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("%s is no table of launch parameters and is left out: %s: %s; delete it", path, type(error).__name__, error)
        return {}


def _valid(shape: str, *values: int) -> Launch:
    launch = Launch(*values)
    if not all(type(value) is int and value > 0 for value in launch[:4]):
        raise ValueError(f"{launch[:4]} are not numbers above 0")
    is_skinny = " bfloat16 " in shape and launch.block_m >= 8  # of which a program may serve any number of outputs
    if not all(value & (value - 1) == 0 for value in (launch._replace(block_n=1) if is_skinny else launch)[:4]):
        raise ValueError(f"{launch[:4]} are not powers of two")
    if type(launch.in_flight) is not int or launch.in_flight < 0:
        raise ValueError(f"{launch.in_flight} is no number of tiles")
    return launch
