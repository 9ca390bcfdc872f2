"""Device-side asserts of kernels: after one a process cannot use its GPU any more, so that each trips in a process of its own."""

import subprocess
import sys
from pathlib import Path


def assert_trips(script: str, message: str) -> None:
    """Assert that a script ends in an error whose output has the ``message``."""
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0 and message in result.stdout + result.stderr
