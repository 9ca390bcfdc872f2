"""Tests of kernels that Triton's interpreter cannot run, on what Triton compiles for a GPU, simulated (tests/ptx): in a process that compiles."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = ("tests/kernels/test_words.py", "tests/kernels/test_skinny.py")


def test_what_runs_on_ptx_alone(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-p", "tests.ptx.plugin", "-p", "no:cacheprovider", "-m", "ptx and not gpu", *FILES]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:]
    assert re.search(r"= 6 passed, \d+ deselected", result.stdout), result.stdout[-500:]


def test_all_of_these_are_run():
    marked = {str(path.relative_to(ROOT)) for path in (ROOT / "tests/kernels").rglob("test_*.py") if "pytest.mark.ptx" in path.read_text()}
    assert marked == set(FILES)
