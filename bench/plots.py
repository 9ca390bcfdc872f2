"""Draw results: ``python -m bench.plots FILE.json ... [--jobs JOB ...] [-o DIR]``.

``frame.png`` shows ms/frame of every row that has a speed, ``breakdown.png`` where a frame's time goes, a bar for each traced row; of several
files, given in order, the bars stand one below the other: before and after. Without a directory the pictures stand beside the last file. A picture's
metadata name the files and jobs that it is drawn from, and have a hash of what it shows, by which a test knows whether the files still say so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.breakdown import PARTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "weights floor": "#4c72b0",
    "GEMV overhead": "#a3b8d9",
    "attention": "#dd8452",
    "sampling": "#55a868",
    "rest": "#8c8c8c",
    "idle": "#e6e6e6",
}


class Row(NamedTuple):
    """A row of a file, or the part of it that is drawn, and what it is called in a picture."""

    label: str
    row: dict[str, Any]


class Drawing(NamedTuple):
    """What of a row a picture shows, and how."""

    field: str
    draw: Callable[[Sequence[Row], str], Figure]


class Content(NamedTuple):
    """What a picture shows, and what its metadata say of that."""

    rows: list[Row]
    title: str
    description: str


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


def content_of(name: str, files: Sequence[Path], jobs: Sequence[str] = ()) -> Content:
    """Return what a picture of :data:`DRAWINGS` shows of files and jobs, as of :func:`rows_of`; it may be nothing."""
    field = DRAWINGS[name].field
    rows = [Row(label, row[field]) for label, row in rows_of(files, jobs) if field in row]
    machine = json.loads(files[-1].read_text())["machine"]
    title = f"{machine['gpu']}, torch {machine['torch']}, triton {machine.get('triton', '-')}, {machine['date']}"
    digest = hashlib.sha256(json.dumps([title, rows]).encode()).hexdigest()
    return Content(rows, title, json.dumps({"files": [file.name for file in files], "jobs": list(jobs), "sha256": digest}))


def draw_frames(speeds: Sequence[Row], title: str) -> Figure:
    """Draw a bar for the milliseconds of a frame in each row."""
    from matplotlib.figure import Figure

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
    return figure


def draw_breakdown(traced: Sequence[Row], title: str) -> Figure:
    """Draw a stacked bar for each row that says where a frame's time goes."""
    from matplotlib.figure import Figure

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
    return figure


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
        contents = {name: content_of(name, arguments.files, arguments.jobs) for name in DRAWINGS}
    except ValueError as error:
        parser.error(str(error))
    drawn = []
    for name, (rows, title, description) in contents.items():
        if rows:
            DRAWINGS[name].draw(rows, title).savefig(directory / name, dpi=150, metadata={"Description": description})
            drawn.append(directory / name)
    print("\n".join(f"Wrote {path}" for path in drawn) or f"nothing to draw in {', '.join(map(str, arguments.files))}: no row has a speed or a trace")
    return 0 if drawn else 1


DRAWINGS = {"frame.png": Drawing("ms_per_frame", draw_frames), "breakdown.png": Drawing("breakdown", draw_breakdown)}

if __name__ == "__main__":
    sys.exit(main())
