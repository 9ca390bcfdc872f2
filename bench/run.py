"""How a job runs: what it is told, the rows it makes, and how they read."""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


class FailedParity(Exception):
    """A result that the model would not have given: no speed of it is told."""


@dataclass(frozen=True)
class Run:
    """How to run a job.

    Attributes:
        job: its name.
        rows: file that receives one JSON object a line, as each row ends.
        folder: where files that outlive the process stand.
        profile: folder for kernel profiles; None for none.
        mode: ``torch.compile``'s mode; None runs without compiling.
        tiny: the embedded model on the CPU, for trying the benchmark itself.
        compile_only: fill the compile caches and leave.
        started: Unix time at which the process was asked for.
        labels: what every row says of itself besides.
        failed: rows so far whose check failed; no figures are told after the first.
    """

    job: str
    rows: str
    folder: str
    profile: str | None
    mode: str | None
    frames: int
    repeats: int
    tiny: bool
    compile_only: bool
    started: float
    labels: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    @property
    def device(self) -> str:
        """Where models are built."""
        return "cpu" if self.tiny else "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """In what they are built."""
        return torch.float32 if self.tiny else torch.bfloat16

    @contextlib.contextmanager
    def row(self, name: str) -> Iterator[dict[str, Any]]:
        """Collect a row, print it and keep it; an exception becomes the row's error, and a failed check leaves it without figures."""
        named: dict[str, Any] = {"job": self.job, "row": f"{name} ahead" if self.compile_only else name, **self.labels}
        row, started = dict(named), time.perf_counter()
        try:
            yield row
            if self.failed and row.keys() & {"figures", "breakdown"}:
                raise FailedParity(f"that of {self.failed[0]!r} failed")
        except Exception as error:
            traceback.print_exc()
            told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if isinstance(error, FailedParity):
                row, told = named, f"parity: {told}"
                self.failed.append(name)
            row |= {"error": told, "traceback": traceback.format_exc()}
        row["seconds"] = time.perf_counter() - started
        with Path(self.rows).open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(describe(row), flush=True)


def last_line(text: str) -> str:
    """Return the last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def describe(row: dict[str, Any]) -> str:
    """Return a row as one line."""
    figures = [f"{label} {shown(value)}" for label, value in row.get("figures", {}).items()]
    parts = [*figures, *(f"{label}: {row[label]}" for label in ("check", "note") if label in row)]
    told = f"FAILED {row['error']}" if "error" in row else row.get("skipped") or "; ".join(parts)
    return f"[{row['seconds']:6.1f} s] {row['job']}, {row['row']}: {told}"


def shown(figure: dict[str, Any]) -> str:
    """Return a figure with its unit."""
    spread = f" ({figure['min']:.2f} to {figure['max']:.2f})" if figure["repeats"] > 1 else ""
    return f"{median(figure)}{spread} {figure['unit']}".rstrip()


def median(figure: dict[str, Any]) -> str:
    """Return a figure's median; what has no unit is a count."""
    return f"{figure['median']:.{2 if figure['unit'] else 0}f}"
