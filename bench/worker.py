"""One job in a process of its own: ``python -m bench.worker JSON``. On SIGUSR1 it writes to its log where it is, be it in a call to CUDA."""

from __future__ import annotations

import faulthandler
import json
import signal
import sys

from bench.registry import Job
from bench.run import Run

if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    given = json.loads(sys.argv[1])
    Job(**given["job"]).run(Run(**given["run"]))
