"""Run jobs in processes of their own, each with a time limit, and keep their rows: one that fails costs no other."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.registry import Job
from bench.run import Run, describe, last_line
from qtts_compile.options import MODES

REPOSITORY = Path(__file__).parent.parent
SECONDS_TO_TELL = 0.3  # that a job has to write where it is


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how jobs run."""
    parser.add_argument(
        "--compile-first", action="store_true", help="fill the compile cache with several processes at a time before anything is timed"
    )
    parser.add_argument(
        "--mode", choices=(*MODES, "none"), metavar="MODE", help="torch.compile's in place of each row's own; none compiles nothing (as --tiny does)"
    )
    parser.add_argument("--frames", type=int, default=100, help="frames that each run makes (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="runs that are timed (default: %(default)s)")
    parser.add_argument("--time-limit", type=float, default=300, help="seconds that a process may take (default: %(default)s)")
    parser.add_argument("--budget", type=float, help="seconds in all: what does not fit is stopped or not begun")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "qtts-bench", help="compile caches, checkpoint, logs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as they come")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="write the kernels of a frame, and enter where its time goes into the rows")
    parser.add_argument("--tiny", action="store_true", help="the embedded model on the CPU, which tries the benchmark and measures nothing")


def check_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse what measures nothing, and find the places that the processes write to."""
    arguments.folder, arguments.profile = arguments.folder.resolve(), arguments.profile and arguments.profile.resolve()
    if arguments.mode is None and arguments.tiny:
        arguments.mode = "none"
    if arguments.frames < 1 or arguments.repeats < 3:
        parser.error(f"--frames {arguments.frames} --repeats {arguments.repeats}: at least 1 frame and 3 repeats are needed")


class Bench:
    """Runs jobs in processes and keeps their rows."""

    def __init__(self, arguments: argparse.Namespace, jobs: Mapping[str, Job], machine: dict[str, str], command: str) -> None:
        self.arguments, self.jobs = arguments, jobs
        self.results: dict[str, Any] = {"machine": machine, "command": command, "rows": []}
        self.deadline = time.monotonic() + (arguments.budget or float("inf"))
        self._running: list[subprocess.Popen[bytes]] = []
        self._stopped_by: int | None = None
        arguments.folder.mkdir(parents=True, exist_ok=True)

    def run_all(self) -> list[dict[str, Any]]:
        """Run every job to its end, after compiling ahead where that is asked for, and return the rows."""
        ahead = [name for name, job in self.jobs.items() if job.compiles and not job.skip]
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            if self.arguments.compile_first and ahead:
                self.compile(ahead)
            for name in self.jobs:
                self.run(name)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._stopped_by is not None:
            sys.exit(128 + self._stopped_by)
        return self.results["rows"]

    def compile(self, names: list[str]) -> None:
        """Compile several jobs' code at once. What they tuned while they shared the GPU is thrown away."""
        threads = max(1, (os.cpu_count() or 1) // len(names))
        running = [
            (name, *self._begin(name, compile_only=True, TORCHINDUCTOR_COMPILE_THREADS=str(threads), QTTS_COMPILE_SEARCH="0")) for name in names
        ]
        end = min(self.deadline, time.monotonic() + self.arguments.time_limit)
        for name, process, rows in running:
            self._end(name, process, rows, max(0, end - time.monotonic()))
        for path in (self.arguments.folder / "cache").rglob("*.best_config"):
            path.unlink()

    def run(self, name: str) -> None:
        """Run a job to its end."""
        if self._stopped_by is not None:
            return
        job = self.jobs[name]
        skip = job.skip or ("needs a GPU" if job.needs_gpu and self.arguments.tiny else "")
        if skip:
            self._tell(name, "all", skipped=f"SKIPPED: {skip}")
        elif (left := self.deadline - time.monotonic()) < 20:
            self._tell(name, "all", error=f"not run: {max(0, left):.0f} s of the budget are left")
        else:
            self._end(name, *self._begin(name), min(left, self.arguments.time_limit))

    def _begin(self, name: str, compile_only: bool = False, **variables: str) -> tuple[subprocess.Popen[bytes], Path]:
        arguments, job = self.arguments, self.jobs[name]
        rows = arguments.folder / f"{name}{'-compile' if compile_only else ''}.jsonl"
        rows.unlink(missing_ok=True)
        run = Run(
            job=name,
            rows=str(rows),
            folder=str(arguments.folder),
            profile=str(arguments.profile) if arguments.profile else None,
            mode={None: job.torch_mode, "none": None}.get(arguments.mode, arguments.mode),
            frames=arguments.frames,
            repeats=arguments.repeats,
            tiny=arguments.tiny,
            compile_only=compile_only,
            started=time.time(),
            labels=self._labels(job),
        )
        with rows.with_suffix(".log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "bench.worker", json.dumps({"job": asdict(job), "run": asdict(run)})],
                cwd=REPOSITORY,
                env=os.environ | self._cache(job) | variables,
                stderr=log,
                preexec_fn=os.setpgrp,  # no session of its own: what stops this process must be able to stop that one
            )
        self._running.append(process)
        if self._stopped_by is not None:  # while it began
            _kill(process)
        return process, rows

    def _stop(self, number: int, frame: object) -> None:
        """End what runs and begin nothing more: an exception raised here might strike between a process's beginning and its end."""
        self._stopped_by = number
        _kill(*self._running)

    def _labels(self, job: Job) -> dict[str, Any]:
        return job.labels | ({"size": "tiny"} if self.arguments.tiny and "size" in job.labels else {})

    def _cache(self, job: Job) -> dict[str, str]:
        directory = self.arguments.folder / ("cache" if job.cache == "shared" else "cold-start-cache")
        if job.cache == "emptied":
            shutil.rmtree(directory, ignore_errors=True)
        found = {} if job.cache == "shared" else {"QTTS_COMPILE_CACHE": str(directory / "qtts")}  # a cold start knows no launches that were measured
        return {"TORCHINDUCTOR_CACHE_DIR": str(directory), "TRITON_CACHE_DIR": str(directory / "triton"), **found}

    def _end(self, name: str, process: subprocess.Popen[bytes], rows: Path, limit: float) -> None:
        """Wait for a job, and keep what it has made by its end or by its limit."""
        fault, started, log_path = None, time.monotonic(), rows.with_suffix(".log")
        try:
            if process.wait(limit):
                log = log_path.read_text(errors="replace")
                told = f"exit status {process.returncode}: {last_line(log)}"
                fault = told if self._stopped_by is None else f"stopped by {signal.Signals(self._stopped_by).name}{place(log)}"
        except subprocess.TimeoutExpired:
            _kill(process)
            process.wait()
            fault = f"stopped after the {limit:g} s that its process had{place(log_path.read_text(errors='replace'))}"
        self._running.remove(process)
        self._keep([json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else [])
        if fault:
            self._tell(name, "the rest", time.monotonic() - started, error=fault)

    def _tell(self, job: str, row: str, seconds: float = 0.0, **outcome: str) -> None:
        """Keep and print a row that the job itself did not write."""
        told = {"job": job, "row": row, **self._labels(self.jobs[job]), "seconds": seconds, **outcome}
        self._keep([told])
        print(describe(told), flush=True)

    def _keep(self, rows: list[dict[str, Any]]) -> None:
        self.results["rows"] += rows
        if self.arguments.json:
            self.arguments.json.write_text(json.dumps(self.results, indent=1))


def _kill(*processes: subprocess.Popen[bytes]) -> None:
    """Kill jobs and what they have started, unless they have ended; each first writes to its log where it is."""
    running = [process for process in processes if process.returncode is None]
    for process in running:
        process.send_signal(signal.SIGUSR1)
    time.sleep(SECONDS_TO_TELL)
    for process in running:
        with contextlib.suppress(ProcessLookupError):  # it had not begun to listen, and SIGUSR1 ended it
            os.killpg(process.pid, signal.SIGKILL)


def place(log: str) -> str:
    """Return where a job was that wrote so before it was killed; nothing if it did not come to that."""
    found = re.search(r'most recent call first\):\n +File "(.*)", line (\d+) in (.*)', log)
    return f" in {found[3]} ({found[1]}:{found[2]})" if found else ""


def machine() -> dict[str, str]:
    """Describe the machine from a process of its own: this one holds no memory of the GPU."""
    code = "import json; from bench.machine import describe; print(json.dumps(describe()))"
    return json.loads(subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, stdout=subprocess.PIPE).stdout)
