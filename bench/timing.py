"""Take times and memory, and write what the GPU ran."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch

GIB = 1024**3
COMPILE, SKIPS = "compile and capture", "launches without a CUDA graph"  # figures


def figure(values: Iterable[float] | float, unit: str) -> dict[str, Any]:
    """Return median, least and greatest of what was measured."""
    values = [values] if isinstance(values, (int, float)) else list(values)
    return {"unit": unit, "median": median(values), "min": min(values), "max": max(values), "repeats": len(values)}


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(call: Callable[[], Any], calls: int = 1) -> float:
    """Return the time from an idle GPU to an idle GPU that one of ``calls`` calls in a row takes."""
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize()
    return 1000 * (time.perf_counter() - start) / calls


def repeated(call: Callable[[], Any], repeats: int, warmup: int = 3) -> dict[str, Any]:
    """Return the figure of ``repeats`` timed calls after ``warmup`` others."""
    for _ in range(warmup):
        call()
    return figure([milliseconds(call) for _ in range(repeats)], "ms")


def forget_memory_peak() -> None:
    """Begin to watch memory anew."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory(what: str) -> dict[str, Any]:
    """Return the peaks of PyTorch's allocator since :func:`forget_memory_peak`, and what the whole device has in use now, by ``what``."""
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved(), "in use on the device": total - free}
    return {f"{name}, {what}": figure(size / GIB, "GiB") for name, size in peaks.items()}


def write_kernels(path: Path, call: Callable[[], Any], calls: int, unit: str, rows: int = 25) -> None:
    """Write the GPU kernels of ``calls`` calls, longest first, in time per call, and how long the GPU was busy in all."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as run:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    kernels = [event for event in run.key_averages() if event.self_device_time_total > 0]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels) / calls
    lines = [f"GPU time per {unit}: {total / 1000:.3f} ms in {sum(event.count for event in kernels) / calls:.0f} kernels", ""]
    lines.append(f"{'us per ' + unit:>12} {'%':>6} {'launches':>9} {'us each':>9}  kernel")
    for event in kernels[:rows]:
        time_us = event.self_device_time_total / calls
        lines.append(
            f"{time_us:12.1f} {100 * time_us / total:6.2f} {event.count / calls:9.1f} {event.self_device_time_total / event.count:9.2f}  {event.key}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
