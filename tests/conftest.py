"""Shared test setup: where kernels run, and how Hypothesis searches.

``pytest`` runs every kernel test on the CPU, in Triton's interpreter; ``pytest -m gpu`` runs the same tests compiled, on a CUDA device,
and fails without one. The two never share a process, because Triton decides once, when a kernel is defined, whether to interpret it.
``pytest -p tests.ptx.plugin`` runs on the CPU what Triton compiles for a GPU.
"""

import gc
import os
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

sys.path.append(str(Path(__file__).parent / "kernels"))  # for numerics.py and interpreter.py, under any of pytest's import modes

# The test processes share the machine, and small operators run many times slower when several threads wait for each other.
torch.set_num_threads(1)

gc.set_threshold(50_000)  # searching for garbage as often as by default takes an eighth of the time of tests that compile

os.environ["QTTS_COMPILE_SEARCH"] = "0"  # a test's odd shapes are not worth measuring launches for

hypothesis.settings.register_profile(
    "qtts",
    max_examples=20,
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("qtts")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; run with -m gpu")
    config.addinivalue_line("markers", "ptx: what Triton's interpreter cannot run; run with -p tests.ptx.plugin or -m gpu")
    is_simulated = config.pluginmanager.has_plugin("tests.ptx.plugin")  # which runs what Triton compiles
    config.option.markexpr = config.option.markexpr or ("not gpu" if is_simulated else "not gpu and not ptx")
    if is_simulated:
        return
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["TRITON_INTERPRET"] = "1"
        from interpreter import repair_interpreter  # pyright: ignore[reportMissingImports]

        repair_interpreter()
    elif not torch.cuda.is_available():
        raise pytest.UsageError("-m gpu needs a CUDA device, and PyTorch finds none")


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the kernel under test runs: "cpu" (interpreted) or "cuda"."""
    return request.param


@pytest.fixture(scope="module")
def float32_products():
    """TF32 would hide differences of float32 behind its own."""
    backends: tuple[Any, ...] = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before):
        backend.allow_tf32 = allowed
