"""Write the tables of README.md and bench/README.md from bench/results: ``python -m bench.readme``, or with ``--check`` only tell whether they agree.

A table stands between ``<!-- bench: TABLE FILE -->`` and ``<!-- end -->``: a name in bench/tables.py and the file of bench/results that it
reads, without its ending. The text around is written by hand.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.result_files import Results
from bench.tables import TABLES

HERE = Path(__file__).parent
MEASUREMENTS = HERE / "README.md"
PAGES = [HERE.parent / "README.md", MEASUREMENTS]
BLOCK = re.compile(r"^<!-- bench: (?P<table>\S+) (?P<file>\S+) -->\n.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)


def generated(text: str) -> str:
    """Return a page's ``text`` with every table as the results have it.

    Raises LookupError for a marker that names no table or no file, or does not end.
    """
    if text.count("<!-- bench:") != len(BLOCK.findall(text)):
        raise LookupError("README has a marker that is not `<!-- bench: TABLE FILE -->`, or has no `<!-- end -->` of its own")

    def block(match: re.Match[str]) -> str:
        if match["table"] not in TABLES:
            raise LookupError(f"README names a table {match['table']!r}; there are {', '.join(TABLES)}")
        return f"<!-- bench: {match['table']} {match['file']} -->\n{TABLES[match['table']](Results(match['file']))}<!-- end -->"

    return BLOCK.sub(block, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return 1 if a page differed and was only checked."""
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if the tables differ from the results")
    arguments = parser.parse_args(argv)
    before = {page: page.read_text() for page in PAGES}
    differ = {page: text for page in PAGES if (text := generated(before[page])) != before[page]}
    if not differ:
        print("README.md and bench/README.md agree with bench/results")
        return 0
    names = " and ".join(os.path.relpath(page) for page in differ)
    if arguments.check:
        print(f"{names}: other tables than bench/results has; run `make readme`", file=sys.stderr)
        return 1
    for page, text in differ.items():
        page.write_text(text)
    print(f"{names} written from bench/results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
