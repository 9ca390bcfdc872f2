"""Hand over to the benchmarks, which stand in a checkout beside the package and are not installed with it."""

import sys
from collections.abc import Sequence
from pathlib import Path

import qtts_compile
from qtts_compile.cli.common import UsageError


def bench(argv: Sequence[str]) -> int:
    """Measure kernels, frames or whole speech on this machine's GPU (from a checkout)."""
    checkout = Path(qtts_compile.__file__).parent.parent
    if not (checkout / "bench" / "command.py").is_file():
        raise UsageError(f"bench: the benchmarks are not installed with the package ({checkout}); run `make bench` in a checkout of its sources")
    sys.path.insert(0, str(checkout))
    from bench.command import main

    return main(argv)
