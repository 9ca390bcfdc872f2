"""Draw results: ``python -m bench.plots FILE.json ... [--jobs JOB ...] [-o DIR]``.

``frame.png`` shows ms/frame of every row that has a speed, ``breakdown.png`` where a frame's time goes, a bar for each traced row; of several
files, given in order, the bars stand one below the other: before and after. Without a directory the pictures stand beside the last file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.breakdown import PARTS

COLOURS = {
    "weights floor": "#4c72b0",
    "GEMV overhead": "#a3b8d9",
    "attention": "#dd8452",
    "sampling": "#55a868",
    "rest": "#8c8c8c",
    "idle": "#e6e6e6",
}


class Row(NamedTuple):
    """A row of a file, and what it is called in a picture."""

    label: str
    row: dict[str, Any]


def rows_of(files: Iterable[Path], jobs: Sequence[str] = ()) -> list[Row]:
    """Return the rows of some files of results, of all jobs or in the order of ``jobs``; with several files a row's label names its own.

    Raises ValueError for a job that no file has.
    """
    files = list(files)
    rows = []
    for file in files:
        content = json.loads(file.read_text())
        before = f"{file.stem}: " if len(files) > 1 else ""
        there = [row for job in jobs for row in content["rows"] if row.get("job") == job] if jobs else content["rows"]
        for row in there:
            where = row.get("row", "").removeprefix("frames at ").removeprefix("where a frame's time goes, ")
            job, mode = row.get("job", ""), row.get("mode", "")
            rows.append(Row(f"{before}{job if mode in job else f'{job} ({mode})'}, {where}", row))
    if missing := set(jobs) - {row.get("job") for _, row in rows}:
        raise ValueError(f"no rows of {', '.join(sorted(missing))} in {', '.join(map(str, files))}")
    return rows


def draw_frames(rows: Sequence[Row], title: str, path: Path) -> bool:
    """Draw a bar for the milliseconds of a frame in each row that has them; return whether any has."""
    from matplotlib.figure import Figure

    speeds = [Row(label, row["ms_per_frame"]) for label, row in rows if "ms_per_frame" in row]
    if not speeds:
        return False
    figure = Figure(figsize=(10, 1.2 + 0.35 * len(speeds)), layout="constrained")
    axes = figure.subplots()
    medians = [speed["median"] for _, speed in speeds]
    spread = [[speed["median"] - speed["min"] for _, speed in speeds], [speed["max"] - speed["median"] for _, speed in speeds]]
    bars = axes.barh([label for label, _ in speeds], medians, xerr=spread, color=COLOURS["weights floor"], ecolor="#333333")
    axes.bar_label(bars, [f" {median:.2f}" for median in medians], padding=3)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_xlabel("ms per frame of 80 ms: median, least and greatest")
    axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=150)
    return True


def draw_breakdown(rows: Sequence[Row], title: str, path: Path) -> bool:
    """Draw a stacked bar for each row that says where a frame's time goes; return whether any does."""
    from matplotlib.figure import Figure

    traced = [Row(label, row["breakdown"]) for label, row in rows if "breakdown" in row]
    if not traced:
        return False
    figure = Figure(figsize=(10, 1.8 + 0.5 * len(traced)), layout="constrained")
    axes = figure.subplots()
    labels, left = [label for label, _ in traced], [0.0] * len(traced)
    for part in PARTS:
        widths = [breakdown[part] / 1000 for _, breakdown in traced]
        bars = axes.barh(labels, widths, left=left, color=COLOURS[part], label=part)
        total = max(sum(breakdown.values()) for _, breakdown in traced) / 1000
        axes.bar_label(bars, [f"{width:.2f}" if width > 0.04 * total else "" for width in widths], label_type="center", fontsize=7)
        left = [start + width for start, width in zip(left, widths)]
    axes.invert_yaxis()
    axes.set_xlabel("ms per frame of 80 ms")
    axes.set_title(title, fontsize=9)
    figure.legend(loc="outside lower center", ncols=len(PARTS), fontsize=8)
    figure.savefig(path, dpi=150)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return 1 if there was nothing to draw."""
    parser = argparse.ArgumentParser(prog="python -m bench.plots", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="results, as --json writes them")
    parser.add_argument("--jobs", nargs="+", default=[], metavar="JOB", help="draw these, in this order; all if not given")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="where the pictures go")
    arguments = parser.parse_args(argv)
    for file in arguments.files:
        if not file.is_file():
            parser.error(f"{file}: no such file")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        parser.error("matplotlib is not installed: pip install 'qtts-compile[bench]'")
    directory = arguments.output or arguments.files[-1].parent
    directory.mkdir(parents=True, exist_ok=True)
    try:
        rows = rows_of(arguments.files, arguments.jobs)
    except ValueError as error:
        parser.error(str(error))
    machine = json.loads(arguments.files[-1].read_text())["machine"]
    title = f"{machine['gpu']}, torch {machine['torch']}, triton {machine.get('triton', '-')}, {machine['date']}"
    drawn = [path for name, draw in DRAWINGS.items() if draw(rows, title, path := directory / name)]
    print("\n".join(f"Wrote {path}" for path in drawn) or f"nothing to draw in {', '.join(map(str, arguments.files))}: no row has a speed or a trace")
    return 0 if drawn else 1


DRAWINGS = {"frame.png": draw_frames, "breakdown.png": draw_breakdown}

if __name__ == "__main__":
    sys.exit(main())
