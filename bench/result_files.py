"""The files of bench/results, and what every table made of one needs."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# How a run was kept in bounds and where it wrote does not change what it measured.
UNSHOWN = ("--json", "--table", "--folder", "--profile", "--budget", "--time-limit")


class Results:
    """One file of bench/results."""

    def __init__(self, name: str) -> None:
        self.name = name
        file = RESULTS / f"{name}.json"
        if not file.is_file():
            raise LookupError(
                f"README names results {name!r} and there is no {file}; there are {', '.join(sorted(path.stem for path in RESULTS.glob('*.json')))}"
            )
        content = json.loads(file.read_text())
        self.machine, self.rows = content["machine"], content["rows"]
        self.command = shown_command(content["command"])

    @property
    def source(self) -> str:
        """A sentence on where, when and how."""
        versions = ", ".join(f"{name} {self.machine[name]}" for name in ("torch", "triton", "transformers"))
        return f"{self.machine['gpu']}, {versions}, {self.machine['date']}: `{self.command}` (`bench/results/{self.name}.json`)."

    def row(self, **wanted: str) -> dict[str, Any]:
        """Return the row that has these values.

        Raises LookupError unless there is exactly one, and where it failed.
        """
        found = [row for row in self.rows if all(row.get(key) == value for key, value in wanted.items())]
        if len(found) != 1 or "error" in found[0] or found[0].get("ms", 0) is None:
            what = found[0].get("error", "a failed check") if len(found) == 1 else f"{len(found)} rows"
            raise LookupError(f"bench/results/{self.name}.json, {wanted}: {what}; measure it again, or take it out of README")
        return found[0]

    def figure(self, job: str, row: str, label: str, end: str = "median") -> float:
        """Return a figure of a row."""
        return self.row(job=job, row=row)["figures"][label][end]

    def told(self, level: str) -> list[dict[str, Any]]:
        """Return the rows of a level of ``qtts bench`` that have a figure of speed.

        Raises LookupError if there are none.
        """
        speed = {"kernels": "kernel", "frame": "frame", "e2e": "x real time"}[level]
        found = [row for row in self.rows if row["job"].split()[0] == level and speed in row.get("figures", {})]
        if not found:
            raise LookupError(f"bench/results/{self.name}.json has no rows of `qtts bench {level}`")
        return found

    def package(self, name: str) -> str:
        """Return a package with the version it had."""
        return f"{name} {self.machine[name]}"


def command_of(module: str, argv: Sequence[str] | None) -> str:
    """Return the shell command of a module of ``bench`` with these arguments; None: with those of this process."""
    return shlex.join(["python", "-m", f"bench.{module}", *(sys.argv[1:] if argv is None else argv)])


def shown_command(command: str) -> str:
    """Return a command without the options that do not change what it measures."""
    words, shown = iter(shlex.split(command)), []
    for word in words:
        if word in UNSHOWN:
            next(words, None)
        else:
            shown.append(word)
    return shlex.join(shown)


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    lines = (titles, ["---"] * len(titles), *rows)
    return "\n".join(f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|" for cells in lines)
