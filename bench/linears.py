"""Time the linear kernels of a few rows at the published shapes, in a CUDA graph whose launches find none of their weights in the L2 cache.

Run: ``python -m bench.linears [--rows 1 2 4 8 16 32] [--cases NAME ...] [--search] [--json FILE]``. Beside each kernel
stands what it replaces: cuBLAS, with the norm, SwiGLU and addition as kernels of their own. A result is checked before it is timed.
``--search`` tries launch parameters, and ``--table FILE`` writes the best as a table for kernels/launches.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import triton
from torch.nn.functional import embedding, linear

from bench.compiling import compiling_only
from bench.machine import describe
from bench.reads import copy_bandwidth
from bench.result_files import command_of
from qtts_compile.kernels.embedding_linear import embedding_linear_reference, embedding_linear_triton
from qtts_compile.kernels.gemv_launch import SERVED, candidates, choose_launch
from qtts_compile.kernels.launch_search import COLD_BYTES, microseconds
from qtts_compile.kernels.launch_table import Launch, Shape, lookup
from qtts_compile.kernels.linear_add import linear_add_reference, linear_add_triton
from qtts_compile.kernels.norm_linears import norm_linears_reference, norm_linears_triton
from qtts_compile.kernels.norm_swiglu import norm_swiglu_reference, norm_swiglu_triton
from qtts_compile.kernels.rms_norm import rms_norm
from qtts_compile.kernels.swiglu import swiglu

EPS = 1e-6
COMPILE_LIMIT_S = 40
KERNELS = {"norm_linears": norm_linears_triton, "norm_swiglu": norm_swiglu_triton, "linear_add": linear_add_triton}
KERNELS["embedding_linear"] = embedding_linear_triton
REFERENCES = {"norm_linears": norm_linears_reference, "norm_swiglu": norm_swiglu_reference, "linear_add": linear_add_reference}
REFERENCES["embedding_linear"] = embedding_linear_reference


ROWS = (1, 2, 4, 8, 16, 32)  # of talkers and code predictors: texts


class Case(NamedTuple):
    """Weights ``[N, width]`` for each N in ``sizes`` (for ``norm_swiglu``, of gate and of up)."""

    name: str
    op: str
    width: int
    sizes: tuple[int, ...]
    has_norm: bool = True
    has_bias: bool = False
    rows: tuple[int, ...] = ROWS  # that models have, of bfloat16

    @property
    def outputs(self) -> int:
        """How many outputs the programs of a launch share."""
        return self.sizes[0] if self.op == "norm_swiglu" else sum(self.sizes)

    @property
    def matrices(self) -> int:
        """How many weights a program reads the same rows of."""
        return sum(self.sizes) // self.outputs

    @property
    def weight_bytes(self) -> int:
        """How much one launch reads in bfloat16."""
        return 2 * self.width * sum(self.sizes)


# The talker of the 0.6B model has the shapes of the code predictor.
CASES = [
    Case("talker qkv", "norm_linears", 2048, (2048, 1024, 1024)),
    Case("talker o", "linear_add", 2048, (2048,)),
    Case("talker gate/up", "norm_swiglu", 2048, (6144, 6144)),
    Case("talker down", "linear_add", 6144, (2048,)),
    Case("predictor qkv", "norm_linears", 1024, (2048, 1024, 1024)),
    Case("predictor o", "linear_add", 2048, (1024,)),
    Case("predictor gate/up", "norm_swiglu", 1024, (3072, 3072)),
    Case("predictor down", "linear_add", 3072, (1024,)),
    Case("talker head", "norm_linears", 2048, (3072,)),
    Case("talker head, 0.6B", "norm_linears", 1024, (3072,)),
    Case("predictor head", "norm_linears", 1024, (2048,)),
    Case("projection", "norm_linears", 2048, (1024,), has_norm=False, has_bias=True),
    Case("embedding, projection", "embedding_linear", 2048, (1024,), has_norm=False, has_bias=True),
    # The audio decoder's transformer has a row for a frame, its upsampling layers 2 and 4; more frames than one are PyTorch's.
    Case("decoder qkv", "norm_linears", 512, (1024, 1024, 1024), rows=(1,)),
    Case("decoder o, down", "norm_linears", 1024, (512,), has_norm=False, rows=(1,)),
    Case("decoder gate/up", "norm_swiglu", 512, (1024, 1024), rows=(1,)),
    Case("decoder output", "norm_linears", 512, (1024,), has_bias=True, rows=(1,)),
    Case("decoder pointwise", "norm_linears", 4096, (1024,), has_norm=False, has_bias=True, rows=(2, 4)),
]


def build_arguments(case: Case, rows: int, device: str, copies: int = 1, dtype: torch.dtype = torch.bfloat16) -> list[tuple[Any, ...]]:
    """Return random arguments of the operator: ``copies`` sets of weights, each with the same x and residual, which the L2 cache may hold."""
    new = partial(torch.randn, dtype=dtype, device=device)
    x, residual = new(rows, case.width), new(rows, case.outputs)
    sets = []
    for _ in range(copies):
        weights = [new(size, case.width) * case.width**-0.5 for size in case.sizes]
        norm_weight = new(case.width) if case.has_norm else None
        biases = [new(size) if case.has_bias else None for size in case.sizes]
        if case.op == "embedding_linear":
            sets.append((torch.arange(rows, device=device), x, weights[0], biases[0]))
        elif case.op == "linear_add":
            sets.append((x, weights[0], None, residual))
        elif case.op == "norm_swiglu":
            sets.append((x, norm_weight, *weights, EPS))
        else:
            sets.append((x, norm_weight, weights, biases, EPS))
    return sets


def call_library(case: Case, x: torch.Tensor, *others: Any) -> Any:
    """Compute the case by cuBLAS and a kernel for each other step."""
    if case.op == "embedding_linear":
        table, weight, bias = others
        return linear(embedding(x, table), weight, bias)
    if case.op == "linear_add":
        weight, bias, residual = others
        return residual + linear(x, weight, bias)
    norm_weight, first, second, eps = others
    normed = x if norm_weight is None else rms_norm(x, norm_weight, eps)
    if case.op == "norm_swiglu":
        return swiglu(linear(normed, first), linear(normed, second))
    return [linear(normed, weight, bias) for weight, bias in zip(first, second, strict=True)]


def shape_of(case: Case, rows: int) -> Shape:
    """Return the shape under which a table has the launch of a case."""
    return Shape(case.op, SERVED, case.outputs, case.width, triton.next_power_of_2(rows))


def chosen_launch(case: Case, rows: int) -> Launch:
    """Return what the kernel of a case is launched with on this GPU."""
    return lookup(shape_of(case, rows), torch.device("cuda", 0)) or choose_launch(rows, *_dimensions(case))


def tried_launches(case: Case, rows: int) -> list[Launch]:
    """Return what a search of the case tries."""
    return candidates(rows, *_dimensions(case))


def _dimensions(case: Case) -> tuple[int, int, torch.dtype, int, bool]:
    return case.outputs, case.width, torch.bfloat16, case.matrices, True


def compile_launch(job: tuple[tuple[int, int], Case, int, Launch]) -> bool:
    """Compile one launch into Triton's cache on disk, in a process without CUDA; return whether that worked in time."""
    capability, case, rows, launch = job
    try:
        with compiling_only(capability, COMPILE_LIMIT_S):
            KERNELS[case.op](*build_arguments(case, rows, "cpu")[0], launch)
        return True
    except (KeyboardInterrupt, triton.TritonError):
        return False


def is_accurate(ys: Any, references: Any, oracles: Any) -> bool:
    """Tell whether results, a tensor or a list of them, are about as near to float64 as those of eager PyTorch."""
    if isinstance(ys, list):
        return all(is_accurate(*each) for each in zip(ys, references, oracles, strict=True))
    budget = 2 * ((references - oracles).abs().max() + torch.finfo(ys.dtype).eps * oracles.abs().max())
    return bool((ys - oracles).abs().max() <= budget)


def widened(value: Any) -> Any:
    """Return arguments with every floating tensor in float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    return [widened(item) for item in value] if isinstance(value, (list, tuple)) else value


def measure(case: Case, rows: int, launches: Sequence[Launch], rounds: int = 9) -> dict[str, Any]:
    """Check and time a case with each of the launch parameters."""
    copies = math.ceil(COLD_BYTES / case.weight_bytes)
    sets = build_arguments(case, rows, "cuda", copies)
    references, oracles = (REFERENCES[case.op](*arguments) for arguments in (sets[0], widened(sets[0])))
    timed = []
    for launch in launches:
        if is_accurate(KERNELS[case.op](*sets[0], launch), references, oracles):
            times = microseconds(lambda arguments, launch=launch: KERNELS[case.op](*arguments, launch), sets, rounds)
            timed.append(dict(launch=launch, us=median(times), us_min=min(times), us_max=max(times)))
        else:
            print(f"{case.name}, {rows} rows: WRONG RESULT with {launch}", file=sys.stderr, flush=True)
    library = median(microseconds(lambda arguments: call_library(case, *arguments), sets, rounds))
    shape = dict(case=case.name, op=case.op, rows=rows, outputs=case.outputs, width=case.width, weight_bytes=case.weight_bytes)
    return shape | dict(
        floor_us=case.weight_bytes / copy_bandwidth() / 1e6, library_us=library, launches=sorted(timed, key=lambda entry: entry["us"])
    )


def report(row: dict[str, Any], chosen: Launch) -> str:
    """Return a line on the launch that the kernel chooses, and after a search one on the best."""

    def speed(entry: dict[str, Any]) -> str:
        return f"{entry['us']:8.2f} {row['weight_bytes'] / entry['us'] / 1e6:6.2f} {row['floor_us'] / entry['us']:6.0%}"

    entries = row["launches"]
    of_chosen = [speed(entry) for entry in entries if entry["launch"] == chosen] or [f"{'wrong or not compiled':>22}"]
    line = f"{row['case']:20} {row['rows']:4} {of_chosen[0]} {row['floor_us']:8.2f} {row['library_us']:10.2f}   {tuple(chosen)}"
    if len(entries) > 1:
        line += f"\n{f'best of {len(entries)}':>25} {speed(entries[0])}"
        line += f"{'':21}{tuple(entries[0]['launch'])}"
    return line


def table_of(rows: list[dict[str, Any]]) -> str:
    """Return the best launches as a table for kernels/launches."""
    cases = {case.name: case for case in CASES}
    best = {shape_of(cases[row["case"]], row["rows"]): list(row["launches"][0]["launch"]) for row in rows if row["launches"]}
    lines = [f"{json.dumps(str(shape))}: {launch}" for shape, launch in sorted(best.items())]
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1], choices=ROWS, metavar="ROWS")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], default=[case.name for case in CASES], metavar="NAME")
    parser.add_argument("--search", action="store_true", help="try other launch parameters too")
    parser.add_argument("--table", type=Path, help="where to write the best launches")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    started = time.perf_counter()
    # Compiling is what a search spends its time on. Processes that are forked before CUDA starts do it without one.
    with multiprocessing.get_context("fork").Pool(max(1, (os.cpu_count() or 1) - 1)) as pool:
        if not torch.cuda.is_available():
            raise SystemExit("bench.linears needs a CUDA GPU")
        capability = torch.cuda.get_device_capability()
        plan = []
        for rows in arguments.rows:
            for case in CASES:
                if case.name in arguments.cases and rows in case.rows:
                    tried = tried_launches(case, rows) if arguments.search else []
                    plan.append((case, rows, list(dict.fromkeys([chosen_launch(case, rows), *tried]))))
        compiled = pool.imap(compile_launch, [(capability, case, rows, launch) for case, rows, launches in plan for launch in launches])
        result: dict[str, Any] = {"machine": describe(), "command": command_of("linears", argv), "rows": []}
        print(f"{'case':20} {'rows':>4} {'us':>8} {'TB/s':>6} {'floor':>6} {'floor us':>8} {'library us':>10}   launch", flush=True)
        for case, rows, launches in plan:
            usable = [launch for launch, is_compiled in [(launch, next(compiled)) for launch in launches] if is_compiled]
            row = measure(case, rows, usable)
            print(report(row, launches[0]), flush=True)
            result["rows"].append(row)
            if arguments.json:
                arguments.json.write_text(json.dumps(result, indent=1))
            if arguments.table:
                arguments.table.write_text(table_of(result["rows"]))
    print(f"{sum(len(launches) for _, _, launches in plan)} launches compiled and timed in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
