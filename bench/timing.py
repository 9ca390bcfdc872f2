"""Take times and memory, and tell what the GPU ran."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import Any

import torch

GIB = 1024**3
COMPILE, SKIPS = "compile and capture", "launches without a CUDA graph"  # figures
PROMPTED = "with its prompt"  # a peak of memory


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


def kernel_table(shares: Mapping[str, float], launches: Mapping[str, float], classes: Mapping[str, str], rows: int = 40) -> str:
    """Return the kernels of a frame as text, longest first, given each one's microseconds, launches and class."""
    total = sum(shares.values())
    lines = [f"GPU time per frame: {total / 1000:.3f} ms in {sum(launches.values()):.0f} kernels", ""]
    lines.append(f"{'us a frame':>12} {'%':>6} {'launches':>9}  {'class':10} kernel")
    for name, us in sorted(shares.items(), key=lambda item: -item[1])[:rows]:
        lines.append(f"{us:12.1f} {100 * us / total:6.2f} {launches[name]:9.1f}  {classes[name]:10} {name}")
    return "\n".join(lines) + "\n"
