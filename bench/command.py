"""Measure Qwen3-TTS on this machine's GPU: kernels, frames of 80 ms, or whole speech from a text to a waveform.

Every row is a process's, is checked against what the eager model would choose (a kernel: against float64) before it is timed, and tells no
speed if that fails; the command then ends with status 1. Random weights at the published shapes, bfloat16; no download.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from bench.processes import add_options, check_options
from bench.registry import BATCHES, METRICS, MODES, POSITIONS, SIZES, Case, Job, checkpoint_job, frame_job, modes_named, whole_job
from bench.speech import run

LEVELS = {
    "kernels": "each kernel at every published shape: us, TB/s, share of the floor, beside cuBLAS and Inductor",
    "frame": "ms/frame of each mode, batch and position",
    "e2e": "text to waveform of each mode: load, compile, first audio, x real time, VRAM",
}
READ_BY = {"modes": ("frame", "e2e"), "sizes": ("frame", "e2e"), "batch": ("kernels", "frame"), "positions": ("frame",), "cases": ("kernels",)}


def arguments_of(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="qtts bench", description=__doc__, epilog=_epilog(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("levels", nargs="*", metavar="LEVEL", help="; ".join(f"{name}: {what}" for name, what in LEVELS.items()) + " (default: all)")
    parser.add_argument("--modes", nargs="+", metavar="MODE", help="of those below, or all, ours, peers (default: all)")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, metavar="SIZE", help="of the model: 0.6b, 1.7b (default: 1.7b)")
    batch = f"texts together; of kernels: rows, but for those of the audio decoder (default: {_listed(BATCHES)})"
    parser.add_argument("--batch", nargs="+", type=int, metavar="N", help=batch)
    parser.add_argument("--positions", nargs="+", type=int, metavar="N", help=f"tokens before the frames (default: {_listed(POSITIONS)})")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="kernels: names of shapes (default: all)")
    add_options(parser)
    parser.set_defaults(time_limit=900)
    arguments = parser.parse_args(argv)
    arguments.levels = arguments.levels or list(LEVELS)
    for level in arguments.levels:
        if level not in LEVELS:
            parser.error(f"{level!r} is no level; there are {', '.join(LEVELS)}")
    for name, readers in READ_BY.items():
        if getattr(arguments, name) and not set(readers) & set(arguments.levels):
            parser.error(f"--{name} is for {' and '.join(readers)}, and {' and '.join(arguments.levels)} would ignore it: leave it out")
    try:
        arguments.modes = modes_named(arguments.modes or ["all"])
    except ValueError as error:
        parser.error(f"--modes: {error}")
    if arguments.cases:
        from bench.kernel_cases import KERNEL_CASES

        for name in arguments.cases:
            if name not in KERNEL_CASES:
                parser.error(f"--cases {name!r}: no such shape; there are {', '.join(KERNEL_CASES)}")
    for name, low, high in (("batch", 1, 32), ("positions", 25, 32000)):
        for value in getattr(arguments, name) or ():
            if not low <= value <= high:
                parser.error(f"--{name} {value}: give {low} to {high}")
    check_options(parser, arguments)
    arguments.sizes = ["tiny"] if arguments.tiny else arguments.sizes or ["1.7b"]
    return arguments


def jobs_of(arguments: argparse.Namespace) -> dict[str, Job]:
    """Return the jobs that the command line asks for, by name, in order."""
    batches = arguments.batch or (BATCHES[:1] if arguments.tiny else BATCHES)
    positions = tuple(arguments.positions or (POSITIONS[:1] if arguments.tiny else POSITIONS))
    jobs: dict[str, Job] = {}
    for level in arguments.levels:
        if level == "kernels":
            jobs |= _kernel_jobs(batches, arguments.cases)
        for size in arguments.sizes if level != "kernels" else ():
            if level == "e2e":
                jobs[f"checkpoint-{size}"] = checkpoint_job(size)
            for mode in arguments.modes:
                if level == "e2e":
                    jobs[f"e2e {mode} {size}"] = whole_job(mode, size)
                for batch in batches if level == "frame" else ():
                    job = frame_job(mode, Case(size, batch, slots=0, positions=positions), arguments.frames)
                    jobs[f"frame {mode} {size} batch {batch}"] = job
    return jobs


def _kernel_jobs(batches: Sequence[int], names: Sequence[str] | None) -> dict[str, Job]:
    """Return the jobs of the kernels: one for each number of rows, and one for those that have their own."""
    from bench.kernel_cases import KERNEL_CASES

    own = [name for name in names or KERNEL_CASES if KERNEL_CASES[name].own_rows]
    others = [name for name in names or KERNEL_CASES if name not in own]
    given = {f"kernels rows {rows}": {"rows": rows, "cases": others} for rows in batches if others} | (
        {"kernels own rows": {"cases": own}} if own else {}
    )
    return {name: Job("bench.kernels:kernels", each, torch_mode="max-autotune-no-cudagraphs") for name, each in given.items()}


def main(argv: Sequence[str]) -> int:
    """Run from the command line; return 0, or 1 if a row failed."""
    arguments = arguments_of(argv)
    return min(1, run(arguments, jobs_of(arguments), "qtts bench " + shlex.join(argv)))


def _listed(values: Sequence[int]) -> str:
    return " ".join(map(str, values))


def _epilog() -> str:
    width = max(map(len, MODES))
    modes = [f"  {name:{width}}  {mode.what}{f' [{mode.absent}]' if mode.absent else ''}" for name, mode in MODES.items()]
    metrics = [f"  {name:{width}}  {what}" for name, what in METRICS.items()]
    return "\n".join(["modes:", *modes, "", "metrics:", *metrics])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
