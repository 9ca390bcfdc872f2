"""Device-side asserts of kernels: after one a process cannot use its GPU any more, so that each trips in a process of its own."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
sys.path[:0] = ["tests/kernels", "tests/kernels/turboquant"]
import torch
{setup}
{call}
torch.cuda.synchronize()
print("as it should be", flush=True)
{spoil}
{call}
torch.cuda.synchronize()
"""


def assert_trips(setup: str, call: str, spoil: str, message: str) -> None:
    """Assert that a ``call`` succeeds after its ``setup``, and after what ``spoil`` does to it ends in an error whose output has the ``message``."""
    script = SCRIPT.format(setup=setup, call=call, spoil=spoil)
    result = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    output = result.stdout + result.stderr
    assert "as it should be" in result.stdout, output
    assert result.returncode != 0 and message in output, output
