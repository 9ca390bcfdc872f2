"""What it costs to go from one step of a frame to the next, which reads what all programs of the last wrote.

Run: ``python -m bench.boundaries [--json FILE]``. A step normalises a vector: each program reads all of it and writes a part. Steps are kernels of a
CUDA graph, with and without programmatic dependent launch (PDL), or rounds of one persistent kernel with a barrier of all its programs between them.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# Triton's stubs type a launch as a call of the kernel itself, without its launch options.

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
import triton.language as tl

from bench.machine import describe
from bench.result_files import command_of
from qtts_compile.kernels.launch_search import microseconds
from qtts_compile.kernels.pdl import announce, has_pdl, wait_for_inputs

WIDTH, STEPS, EPS = 1024, 400, 1e-6
PROGRAMS = ((132, 4), (132, 8), (264, 4), (1024, 1))


@triton.jit
def _step(X_ptr, Y_ptr, eps, WIDTH: tl.constexpr, SHARE: tl.constexpr):
    columns = tl.program_id(0) * SHARE + tl.arange(0, SHARE)
    # Past the L1 cache, where a persistent program would find what it read two rounds ago.
    x = tl.load(X_ptr + tl.arange(0, WIDTH), cache_modifier=".cg")
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
    own = tl.load(X_ptr + columns, mask=columns < WIDTH, cache_modifier=".cg")
    tl.store(Y_ptr + columns, own * scale, mask=columns < WIDTH)


@triton.jit
def _kernel(X_ptr, Y_ptr, eps, WIDTH: tl.constexpr, SHARE: tl.constexpr, HAS_PDL: tl.constexpr):
    announce(HAS_PDL)
    wait_for_inputs(HAS_PDL)
    _step(X_ptr, Y_ptr, eps, WIDTH, SHARE)


@triton.jit
def _persistent_kernel(X_ptr, Y_ptr, Arrived_ptr, steps, eps, WIDTH: tl.constexpr, SHARE: tl.constexpr):
    for step in range(0, steps, 2):
        _step(X_ptr, Y_ptr, eps, WIDTH, SHARE)
        _barrier(Arrived_ptr, step + 1)
        _step(Y_ptr, X_ptr, eps, WIDTH, SHARE)
        _barrier(Arrived_ptr, step + 2)


@triton.jit
def _barrier(Arrived_ptr, step):
    tl.atomic_add(Arrived_ptr, 1, sem="release")
    while tl.atomic_add(Arrived_ptr, 0, sem="acquire") < step * tl.num_programs(0):
        pass


def kernels(programs: int, warps: int, pdl: bool) -> float:
    """Return the microseconds of a step that is a kernel."""
    x, y = (torch.randn(WIDTH, device="cuda") for _ in range(2))
    constants = dict(WIDTH=WIDTH, SHARE=triton.next_power_of_2(triton.cdiv(WIDTH, programs)), HAS_PDL=pdl, launch_pdl=pdl, num_warps=warps)

    def run(inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        for _ in range(10):
            _kernel[(programs,)](*inputs, EPS, **constants)
            _kernel[(programs,)](*inputs[::-1], EPS, **constants)

    return median(microseconds(run, [(x, y)])) / 20


def persistent(programs: int, warps: int) -> float:
    """Return the microseconds of a step that is a round of one kernel."""
    x, y = (torch.randn(WIDTH, device="cuda") for _ in range(2))
    share = triton.next_power_of_2(triton.cdiv(WIDTH, programs))

    def us(steps: int) -> float:
        arrived = torch.zeros(1, dtype=torch.int32, device="cuda")
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        _persistent_kernel[(programs,)](
            x, y, arrived, steps, EPS, WIDTH=WIDTH, SHARE=share, num_warps=warps, launch_cooperative_grid=True
        )  # fmt: skip
        end.record()
        end.synchronize()
        return 1000 * start.elapsed_time(end)

    us(2)
    return median((us(2 * STEPS) - us(STEPS)) / STEPS for _ in range(9))


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("bench.boundaries needs a CUDA GPU")
    result: dict[str, Any] = {"machine": describe(), "triton": triton.__version__, "rows": []}
    result["command"] = command_of("boundaries", argv)
    print(f"{'us a step':22} {'kernels':>8} {'PDL':>8} {'persistent':>10}")
    for programs, warps in PROGRAMS:
        pdl = kernels(programs, warps, True) if has_pdl(torch.device("cuda", 0)) else None
        row = dict(programs=programs, warps=warps, kernels_us=kernels(programs, warps, False), pdl_us=pdl, persistent_us=persistent(programs, warps))
        result["rows"].append(row)
        cells = [f"{row[name]:8.2f}" if row[name] is not None else f"{'-':>8}" for name in ("kernels_us", "pdl_us", "persistent_us")]
        print(f"{programs:5} x {warps:2} warps        {' '.join(cells)}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
