"""Time whole speech on the GPU: this engine beside its peers, batches, memory, the first audio, the decoder, and the cold start.

Run: ``python -m bench.speech [--rows qtts eager ...] [--compile-first] [--json FILE] [--profile DIR]``. Random weights at the published shapes,
bfloat16. Every job is a process of its own with a time limit; each row is checked for what the eager model would say before it is timed, is
printed as it ends, and fails without the others. ``--tiny`` tries the benchmark itself on a CPU. The rows are named cases of the modes that
``qtts bench`` knows: ``hybrid`` and ``faster`` are here the peers' ("qwen3-tts-triton:hybrid", "faster-qwen3-tts"), ``qtts`` is its "hybrid".
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from bench.processes import Bench, add_options, check_options, machine
from bench.registry import ROWS, Job, chosen
from bench.result_files import command_of
from bench.run import median
from bench.timing import COMPILE, SKIPS


def arguments_of(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.speech", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROWS", help=f"of {', '.join(ROWS)}; all if not given")
    add_options(parser)
    arguments = parser.parse_args(argv)
    check_options(parser, arguments)
    return arguments


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as text: a line for each speed, then a line for each other row, then what is missing."""
    titles = {COMPILE: "compile s", SKIPS: "skips", "allocated, frames": "GiB", "reserved, frames": "reserved"}
    titles |= {"cache": "KV MiB", "keys and values read": "MB read", "floor": "floor ms"}
    width = max([12, *(len(row["job"]) for row in rows if "ms_per_frame" in row)])
    heads = f"{'rows':{width}} {'frames':26} {'ms/frame':>9} {'min':>9} {'max':>9} {'audio s/s':>10}"
    lines = [" ".join([heads, *(f"{title:>9}" for title in titles.values())])] if any("ms_per_frame" in row for row in rows) else []
    for row in rows:
        if speed := row.get("ms_per_frame"):
            known = {label: value for other in reversed(rows) if other["job"] == row["job"] for label, value in other.get("figures", {}).items()}
            known |= row["figures"]
            cells = [f"{median(known[label]) if label in known else '-':>9}" for label in titles]
            spread = " ".join(f"{speed[end]:9.2f}" for end in ("median", "min", "max"))
            audio = row["figures"]["audio"]["median"]
            lines.append(f"{row['job']:{width}} {row['row'].removeprefix('frames at '):26} {spread} {audio:10.2f} {' '.join(cells)}")
    for row in rows:
        if "ms_per_frame" not in row and not row["row"].startswith("compile") and row.get("figures"):
            figures = "; ".join(f"{label} {median(value)} {value['unit']}".rstrip() for label, value in row["figures"].items())
            lines.append(f"{row['job']}, {row['row']}: {figures}")
    lines += [f"{row['job']}, {row['row']}: FAILED {row['error']}" for row in rows if "error" in row]
    lines += [f"{row['job']}, {row['row']}: {row['skipped']}" for row in rows if "skipped" in row]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; return the number of rows that failed."""
    arguments = arguments_of(argv)
    return run(arguments, chosen(arguments.rows), command_of("speech", argv))


def run(arguments: argparse.Namespace, jobs: dict[str, Job], command: str) -> int:
    """Run jobs, print their rows as they end and then a table, and return the number of rows that failed."""
    here = machine()
    if here["gpu"] == "no GPU" and not arguments.tiny:
        raise SystemExit(f"{command.split(' --')[0].strip()} needs a CUDA GPU and torch sees none; --tiny tries the benchmark itself on a CPU")
    print(json.dumps(here), flush=True)
    rows = Bench(arguments, jobs, here, command).run_all()
    print(table(rows))
    return sum("error" in row for row in rows)


if __name__ == "__main__":
    sys.exit(min(1, main()))
