"""Where a frame's time goes: what the GPU runs, in classes, from the profiler's trace.

A kernel may start before the one ahead of it ends (programmatic dependent launch) and waits for it, so that adding up durations counts an
instant twice. Here an instant belongs to the running kernel that ends first, which is what the others wait for; the classes then add up to the
time in which the GPU ran anything. Frames are traced in two runs of different lengths, and the difference is taken, so that prompts cancel out.
A traced GPU is slower than an untraced one: where the classes add up to more than the frame takes untraced, they are scaled down to it, and
where they add up to less, the rest is "idle". "weights floor" is the time in which the weights can be read once at the bandwidth of a copy, and
"GEMV overhead" what the matrix products take beyond it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from bench.reads import copy_bandwidth, weight_bytes
from bench.run import Run
from bench.timing import kernel_table, milliseconds

# The first that is found in a kernel's name decides. Inductor names a kernel after the operators that it joins. norm_qkv is mostly a
# matrix product: it reads two thirds of the weights before a layer's second norm.
CLASSES = {
    "attention": r"combine_kernel|qk_norm_rope|kv_(write|read)|rotary|rope|flash|fmha|^(?!norm_qkv).*attention|attn|triton.*(softmax|bmm|index_copy)",
    "gemv": r"norm_linears|norm_qkv|norm_swiglu|linear_add|embedding_linear|skinny|gemv|gemm|cutlass|nvjet|splitK|xmma|(^|_)(add)?mm(_|$)",
    "sampling": r"_sample_(embedding_)?kernel|topk|sort|radix|argmax|arg_max|multinomial|cumsum|DeviceScan|softmax|exponential|distribution",
}
PARTS = ("weights floor", "GEMV overhead", "attention", "sampling", "rest", "idle")
SHORT, LONG = 4, 12  # frames that are traced


class Kernel(NamedTuple):
    """A kernel, copy or fill that the GPU ran, in microseconds."""

    name: str
    start: float
    end: float


def classify(name: str) -> str:
    """Return the class of a kernel: "gemv", "attention", "sampling" or "rest"."""
    return next((kind for kind, pattern in CLASSES.items() if re.search(pattern, name, re.IGNORECASE)), "rest")


def attribute(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Return the microseconds of each name; an instant belongs to the running kernel that ends first."""
    shares: defaultdict[str, float] = defaultdict(float)
    covered: list[tuple[float, float]] = []  # disjoint, in order: what kernels that ended before have
    for kernel in sorted(kernels, key=lambda kernel: (kernel.end, kernel.start)):
        start, taken = kernel.start, 0.0
        while covered and covered[-1][1] >= start:
            first, last = covered.pop()
            taken += max(0.0, last - max(first, kernel.start))
            start = min(start, first)
        covered.append((start, kernel.end))
        shares[kernel.name] += kernel.end - kernel.start - taken
    return shares


def parts(shares: Mapping[str, float], frame_us: float, floor_us: float) -> dict[str, float]:
    """Return the microseconds of a frame's :data:`PARTS`, which add up to ``frame_us``, from those of each kernel."""
    classes = dict.fromkeys([*CLASSES, "rest"], 0.0)
    for name, us in shares.items():
        classes[classify(name)] += us
    busy = sum(classes.values())
    scale = min(1.0, frame_us / busy) if busy else 1.0
    gemv = scale * classes["gemv"]
    floor = min(floor_us, gemv)
    split = {"weights floor": floor, "GEMV overhead": gemv - floor}
    split |= {name: scale * classes[name] for name in ("attention", "sampling", "rest")}
    return split | {"idle": frame_us - scale * busy}


def traced(call: Callable[[], Any]) -> list[Kernel]:
    """Return what the GPU runs in a call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as run:
        call()
        torch.cuda.synchronize()
    events = (event for event in run.events() or () if event.device_type.name == "CUDA")
    return [Kernel(event.name, event.time_range.start, event.time_range.end) for event in events]


def trace(run: Run, speak: Callable[[int], Any], talker: Any, position: int, batch: int = 1) -> None:
    """Make the row that says where the time of a frame goes which ``speak(frames)`` makes, and write its kernels, longest first."""
    with run.row(f"where a frame's time goes, from position {position} on") as row:
        for frames in (SHORT, LONG):
            speak(frames)
        count = LONG - SHORT

        def frame_us() -> float:
            # What a prompt, and the host before the first frame, take is taken off.
            return 1000 * (milliseconds(lambda: speak(SHORT + run.frames)) - milliseconds(lambda: speak(SHORT))) / run.frames

        untraced_us = median(frame_us() for _ in range(run.repeats))  # first: a process that was traced stays slower
        short, long = (traced(lambda frames=frames: speak(frames)) for frames in (SHORT, LONG))
        once, more = attribute(short), attribute(long)
        launches = Counter(kernel.name for kernel in long)
        launches.subtract(Counter(kernel.name for kernel in short))
        shares = {name: gained / count for name, us in more.items() if (gained := us - once.get(name, 0.0)) > 0}
        row["breakdown"] = parts(shares, untraced_us, weight_bytes(talker) / copy_bandwidth() / 1e6)
        row["traced"] = {"us": sum(shares.values()), "kernels": launches.total() / count, "batch": batch}
        path = Path(run.profile or ".") / (re.sub(r"[^\w.-]+", "-", run.job) + ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(kernel_table(shares, {name: launches[name] / count for name in shares}, {name: classify(name) for name in shares}))
        row["note"] = f"{path}: {path.read_text().splitlines()[0]}"
