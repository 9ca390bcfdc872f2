"""Time whole speech on the GPU: this engine beside its peers, batches, memory, the first audio, the decoder, and the cold start.

Run: ``python -m bench.speech [--rows qtts eager ...] [--compile-first] [--json FILE] [--profile DIR]``. Random weights at the published shapes,
bfloat16. Every job is a process of its own with a time limit; each row is checked for what the eager model would say before it is timed, is
printed as it ends, and fails without the others. ``--tiny`` tries the benchmark itself on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.jobs import JOBS, Job, chosen
from bench.timing import COMPILE, SKIPS
from bench.worker import Run, describe, last_line, median

REPOSITORY = Path(__file__).parent.parent


def arguments_of(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.speech", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(JOBS), choices=list(JOBS), metavar="ROWS", help=f"of {', '.join(JOBS)}; all if not given")
    parser.add_argument(
        "--compile-first", action="store_true", help="fill the compile cache with several processes at a time before anything is timed"
    )
    parser.add_argument("--mode", default="reduce-overhead", help="torch.compile's mode for the engine, or none")
    parser.add_argument("--frames", type=int, default=100, help="frames that each run makes")
    parser.add_argument("--repeats", type=int, default=5, help="runs that are timed")
    parser.add_argument("--time-limit", type=float, default=300, help="seconds that a process may take")
    parser.add_argument("--budget", type=float, help="seconds in all: what does not fit is stopped or not begun")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "qtts-bench", help="compile caches, checkpoint, logs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", type=Path, help="folder for the kernels of a frame")
    parser.add_argument("--tiny", action="store_true", help="the embedded model on the CPU, which tries the benchmark and measures nothing")
    arguments = parser.parse_args(argv)
    arguments.folder, arguments.profile = arguments.folder.resolve(), arguments.profile and arguments.profile.resolve()
    if arguments.mode == "none":
        arguments.mode = None
    if arguments.frames < 1 or arguments.repeats < 3:
        parser.error(f"--frames {arguments.frames} --repeats {arguments.repeats}: at least 1 frame and 3 repeats are needed")
    return arguments


class Bench:
    """Runs jobs in processes and keeps their rows."""

    def __init__(self, arguments: argparse.Namespace, machine: dict[str, str], command: str) -> None:
        self.arguments, self.results = arguments, {"machine": machine, "command": command, "rows": []}
        self.deadline = time.monotonic() + (arguments.budget or float("inf"))
        arguments.folder.mkdir(parents=True, exist_ok=True)

    def compile(self, names: list[str]) -> None:
        """Compile several jobs' code at once. What they tuned while they shared the GPU is thrown away."""
        threads = max(1, (os.cpu_count() or 1) // len(names))
        running = [(name, *self._begin(name, compile_only=True, TORCHINDUCTOR_COMPILE_THREADS=str(threads))) for name in names]
        end = min(self.deadline, time.monotonic() + self.arguments.time_limit)
        for name, process, rows in running:
            self._end(name, process, rows, max(0, end - time.monotonic()))
        for path in (self.arguments.folder / "cache").rglob("*.best_config"):
            path.unlink()

    def run(self, name: str) -> None:
        """Run a job to its end."""
        job = JOBS[name]
        if job.needs_gpu and self.arguments.tiny:
            self._keep([{"job": name, "row": "all", "seconds": 0.0, "skipped": "SKIPPED: needs a GPU"}], show=True)
        elif (left := self.deadline - time.monotonic()) < 20:
            self._keep([{"job": name, "row": "all", "seconds": 0.0, "error": f"not run: {max(0, left):.0f} s of the budget are left"}], show=True)
        else:
            self._end(name, *self._begin(name), min(left, self.arguments.time_limit))

    def _begin(self, name: str, compile_only: bool = False, **variables: str) -> tuple[subprocess.Popen[bytes], Path]:
        arguments, job = self.arguments, JOBS[name]
        rows = arguments.folder / f"{name}{'-compile' if compile_only else ''}.jsonl"
        rows.unlink(missing_ok=True)
        run = Run(
            job=name,
            rows=str(rows),
            folder=str(arguments.folder),
            profile=str(arguments.profile) if arguments.profile else None,
            mode=arguments.mode,
            frames=arguments.frames,
            repeats=arguments.repeats,
            tiny=arguments.tiny,
            compile_only=compile_only,
            started=time.time(),
        )
        with rows.with_suffix(".log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "bench.worker", json.dumps(vars(run))],
                cwd=REPOSITORY,
                env=os.environ | self._cache(job) | variables,
                stderr=log,
                preexec_fn=os.setpgrp,  # no session of its own: what stops this process must be able to stop that one
            )
        return process, rows

    def _cache(self, job: Job) -> dict[str, str]:
        directory = self.arguments.folder / ("cache" if job.cache == "shared" else "cold-start-cache")
        if job.cache == "emptied":
            shutil.rmtree(directory, ignore_errors=True)
        return {"TORCHINDUCTOR_CACHE_DIR": str(directory), "TRITON_CACHE_DIR": str(directory / "triton")}

    def _end(self, name: str, process: subprocess.Popen[bytes], rows: Path, limit: float) -> None:
        """Wait for a job, and keep what it has made by its end or by its limit."""
        fault, started = None, time.monotonic()
        try:
            if process.wait(limit):
                fault = f"exit status {process.returncode}: {last_line(rows.with_suffix('.log').read_text(errors='replace'))}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            fault = f"stopped after {limit:g} s"
        self._keep([json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else [])
        if fault:
            self._keep([{"job": name, "row": "the rest", "seconds": time.monotonic() - started, "error": fault}], show=True)

    def _keep(self, rows: list[dict[str, Any]], show: bool = False) -> None:
        self.results["rows"] += rows
        for row in rows if show else ():
            print(describe(row), flush=True)
        if self.arguments.json:
            self.arguments.json.write_text(json.dumps(self.results, indent=1))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as text: a line for each speed, then a line for each other row, then what is missing."""
    titles = {COMPILE: f"{'compile s':>10}", SKIPS: f"{'skips':>6}", "allocated, frames": f"{'GiB':>6}", "reserved, frames": f"{'reserved':>9}"}
    lines = [f"{'rows':12} {'frames':26} {'ms/frame':>9} {'min':>9} {'max':>9} {'audio s/s':>10} " + " ".join(titles.values())]
    for row in rows:
        if speed := row.get("ms_per_frame"):
            of_job = {label: value for other in reversed(rows) if other["job"] == row["job"] for label, value in other.get("figures", {}).items()}
            cells = [f"{median(of_job[label]) if label in of_job else '-':>{len(title)}}" for label, title in titles.items()]
            spread = " ".join(f"{speed[end]:9.2f}" for end in ("median", "min", "max"))
            audio = row["figures"]["audio"]["median"]
            lines.append(f"{row['job']:12} {row['row'].removeprefix('frames at '):26} {spread} {audio:10.2f} {' '.join(cells)}")
    for row in rows:
        if "ms_per_frame" not in row and not row["row"].startswith("compile") and row.get("figures"):
            figures = "; ".join(f"{label} {median(value)} {value['unit']}".rstrip() for label, value in row["figures"].items())
            lines.append(f"{row['job']}, {row['row']}: {figures}")
    lines += [f"{row['job']}, {row['row']}: {row.get('error') or row['skipped']}" for row in rows if "error" in row or "skipped" in row]
    return "\n".join(lines)


def machine() -> dict[str, str]:
    """Describe the machine from a process of its own: this one holds no memory of the GPU."""
    code = "import json; from bench.machine import describe; print(json.dumps(describe()))"
    return json.loads(subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, stdout=subprocess.PIPE).stdout)


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; return the number of rows that failed."""
    arguments = arguments_of(argv)
    here = machine()
    if here["gpu"] == "no GPU" and not arguments.tiny:
        raise SystemExit("bench.speech needs a CUDA GPU; --tiny tries the benchmark itself on a CPU")
    print(json.dumps(here), flush=True)
    bench = Bench(arguments, here, "python -m bench.speech " + " ".join(sys.argv[1:] if argv is None else argv))
    names = chosen(arguments.rows)
    ahead = [name for name in names if JOBS[name].compiles]
    if arguments.compile_first and ahead:
        bench.compile(ahead)
    for name in names:
        bench.run(name)
    print(table(bench.results["rows"]))
    return sum("error" in row for row in bench.results["rows"])


if __name__ == "__main__":
    sys.exit(min(1, main()))
