"""Rows of the kernels: each at every published shape, beside PyTorch's own kernels and what Inductor makes of the same formula.

A CUDA graph launches a kernel over and over on sets of arguments that together are four times the size of the L2 cache, so that weights and
cached keys come from memory, as in a frame. A result is checked against the formula in float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from bench.kernel_cases import KERNEL_CASES, KernelCase
from bench.linears import is_accurate, widened
from bench.reads import copy_bandwidth
from bench.run import FailedParity, Run
from bench.timing import figure, milliseconds
from qtts_compile.kernels.launch_search import microseconds


class WrongResult(FailedParity):
    """A kernel's result that the formula would not give."""


def kernels(run: Run, rows: int = 1, cases: Sequence[str] = tuple(KERNEL_CASES)) -> None:
    """Check and time every case with so many ``rows`` of x, texts spoken together, or with rows of its own."""
    for case in map(KERNEL_CASES.__getitem__, cases):
        for count in case.own_rows or (rows,):
            torch.compiler.reset()
            run.failed.clear()  # a kernel's failure is its own
            with run.row(f"{case.name}, rows: {count}") as row, torch.inference_mode():
                if case.most_rows is not None and count > case.most_rows:
                    row["skipped"] = f"takes {case.most_rows} at a time"
                else:
                    measure(run, case, count, row)


def measure(run: Run, case: KernelCase, rows: int, row: dict[str, Any]) -> None:
    """Enter the times of one case."""
    size = run.dtype.itemsize
    copies = 1 if run.tiny else case.copies(rows, size)
    sets = case.arguments(rows, run.device, run.dtype, copies)
    row["check"] = check(case, sets[0])
    row["figures"] = {"kernel": timed(run, case.kernel, sets)}
    if read := case.read_bytes(rows, size):
        row["figures"]["read"] = figure(read / 1e6, "MB")
        if not run.tiny:
            us = row["figures"]["kernel"]["median"]
            row["figures"]["achieved"] = figure(read / us / 1e6, "TB/s")
            row["figures"]["of the floor"] = figure(100 * read / copy_bandwidth() / 1e6 / us, "%")
    if case.library:
        row["figures"]["PyTorch's own"] = timed(run, case.library, sets)
    if run.mode is None or not case.is_compiled:
        return
    inductor = torch.compile(case.reference, fullgraph=True, dynamic=False, mode=run.mode)
    row["figures"]["Inductor"] = timed(run, inductor, sets)


def timed(run: Run, function: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    """Return the figure of the microseconds of a call."""

    def call(arguments: Any) -> Any:
        return function(*arguments)

    if run.tiny:
        return figure([1000 * milliseconds(partial(call, sets[0])) for _ in range(run.repeats)], "us")
    for arguments in sets[:3]:  # compiles, and lets Inductor choose
        call(arguments)
    return figure(microseconds(call, sets, run.repeats), "us")


def check(case: KernelCase, arguments: tuple[Any, ...]) -> str:
    """Check the kernel's results, and say how.

    Raises :class:`WrongResult`.
    """
    apart = [tuple(value.clone() if isinstance(value, torch.Tensor) else value for value in arguments) for _ in range(2)]
    ys = case.outputs(case.kernel, apart[0])
    references = case.outputs(case.reference, apart[1])
    if not ys[0].is_floating_point():
        if not all(map(torch.equal, ys, references)):
            raise WrongResult(f"{case.op} chooses {ys}, and the formula {references}")
        return "equal to the formula's"
    wide = tuple(value if place in case.fixed else widened(value) for place, value in enumerate(arguments))
    if not is_accurate(ys, references, case.outputs(case.reference, wide)):
        raise WrongResult(f"{case.op} is further from float64 than twice what PyTorch's own {ys[0].dtype} is")
    return "about as near to float64 as PyTorch's own"
