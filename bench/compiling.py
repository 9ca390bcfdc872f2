"""Compile Triton kernels into its cache on disk in processes without CUDA, which were forked before it started."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any, cast
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget

from qtts_compile.kernels import pdl
from qtts_compile.kernels.clusters import device as clusters
from qtts_compile.kernels.skinny import launch as skinny


class Target:
    """What Triton asks of a driver in order to compile, without a GPU."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling_only(capability: tuple[int, int], limit_s: int) -> Iterator[None]:
    """Let a launch only compile, for a GPU of this ``capability``; KeyboardInterrupt after ``limit_s`` seconds."""
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    triton.runtime.driver.set_active(cast(Any, Target(capability)))
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(limit_s)
    try:
        with (
            mock.patch.object(triton.JITFunction, "run", compile_only),
            mock.patch.object(pdl, "has_pdl", lambda device: capability >= (9, 0)),
            mock.patch.object(skinny, "has_tensor_cores", lambda device: capability >= (8, 0)),
            mock.patch.object(clusters, "has_clusters", lambda device: capability == clusters.HOPPER),
            mock.patch.object(clusters, "have_room", lambda device, compile_kernel: True),
            mock.patch.object(clusters, "divide_memory", lambda kernel: None),
        ):
            yield
    finally:
        signal.alarm(0)
