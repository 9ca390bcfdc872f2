"""One job in a process of its own: ``python -m bench.worker JSON``."""

from __future__ import annotations

import json
import sys

from bench.registry import Job
from bench.run import Run

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    Job(**given["job"]).run(Run(**given["run"]))
