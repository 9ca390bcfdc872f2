"""Find launch parameters by measuring: in a CUDA graph whose launches find none of their weights in the L2 cache."""

import contextlib
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import torch
import triton

from qtts_compile.kernels.launch_table import Launch, Shape, keep, lookup, remember
from qtts_compile.kernels.recording import graph_lock

log = logging.getLogger(__name__)

COLD_BYTES = 200e6  # four times the L2 cache of an H200
LAUNCHES = 40  # of a graph, at least
ROUNDS = 7
SECONDS = 20  # after which a search compiles nothing more


def can_search(device: torch.device) -> bool:
    """Tell whether a launch on ``device`` may be preceded by a search now: on a GPU that records no CUDA graph, unless the user forbids it."""
    allowed = os.environ.get("QTTS_COMPILE_SEARCH", "1").lower() not in ("", "0", "false", "no", "off")
    return allowed and device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def search(
    shape: Shape, launches: Sequence[Launch], weights: Sequence[torch.Tensor], run: Callable[[Sequence[torch.Tensor], Launch], object]
) -> Launch:
    """Return the fastest of ``launches`` and keep it for a shape; where nothing can be measured, return the first, for this process.

    ``run`` launches the kernel with weights like ``weights``, whose copies take about 200 MB meanwhile, and launch parameters. What fails
    on this GPU, compiled or timed, is passed over. No CUDA graph is recorded elsewhere meanwhile.
    """
    device = weights[0].device
    with graph_lock:
        if found := lookup(shape, device):  # by a thread that was waited for
            return found
        _tell()
        started, times = time.perf_counter(), {}
        try:
            copies = _copies(weights)
        except torch.cuda.OutOfMemoryError:
            log.warning("no memory is free to measure the launches of %s: in this process %s is used, chosen by rule", shape, launches[0])
        else:
            times = _measure(shape, _compiled(shape, launches, weights, run, started + SECONDS), copies, run)
        if not times:
            remember(shape, device, launches[0])
            return launches[0]
        best = min(times, key=times.__getitem__)
        log.info("%s: %s takes %.2f us, found among %d in %.1f s", shape, best, times[best], len(times), time.perf_counter() - started)
        keep(shape, device, best)
        return best


@functools.cache
def _tell() -> None:
    """Say once in a process why its first launches take long."""
    log.warning(
        "measuring how to launch the linear kernels on this GPU, once for each shape, some seconds each; QTTS_COMPILE_SEARCH=0 leaves it to a rule"
    )


def _copies(weights: Sequence[torch.Tensor]) -> list[Sequence[torch.Tensor]]:
    """Return the weights and so many copies of them that no cache holds them all."""
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    with _aside(weights[0].device):
        return [weights, *([weight.clone() for weight in weights] for _ in range(math.ceil(COLD_BYTES / size) - 1))]


@contextlib.contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """Allocate on a stream of its own: what is allocated on the current one may belong to a CUDA graph, which would hold it for good."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield
    torch.cuda.synchronize(device)


def _compiled(
    shape: Shape,
    launches: Sequence[Launch],
    weights: Sequence[torch.Tensor],
    run: Callable[[Sequence[torch.Tensor], Launch], object],
    deadline: float,
) -> list[Launch]:
    """Return those of ``launches`` that work, which ran once: the first, and as many as are compiled, side by side, until ``deadline``."""
    device = weights[0].device
    work: set[Launch] = set()
    late: list[Launch] = []

    def attempt(launch: Launch) -> None:
        if launch != launches[0] and time.perf_counter() > deadline:
            late.append(launch)
            return
        with _passing_over(shape, launch), torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            run(weights, launch)
            work.add(launch)

    with ThreadPoolExecutor(min(len(launches), os.cpu_count() or 1)) as pool:  # Triton compiles without Python's lock
        list(pool.map(attempt, launches))
    if late:
        log.info("%s: the search ran out of its %d s, %d of %d launches were not tried", shape, SECONDS, len(late), len(launches))
    return [launch for launch in launches if launch in work]


def _measure(
    shape: Shape,
    launches: Sequence[Launch],
    copies: Sequence[Sequence[torch.Tensor]],
    run: Callable[[Sequence[torch.Tensor], Launch], object],
) -> dict[Launch, float]:
    """Return the microseconds of each of ``launches`` that can be timed."""
    times = {}
    for launch in launches:
        with _passing_over(shape, launch):
            times[launch] = median(microseconds(lambda copy, launch=launch: run(copy, launch), copies))
    return times


@contextlib.contextmanager
def _passing_over(shape: Shape, launch: Launch) -> Iterator[None]:
    """Let a launch that fails be left out."""
    try:
        yield
    except (triton.TritonError, RuntimeError) as error:
        log.debug("%s: %s is left out: %s", shape, launch, error)


def microseconds(call: Callable[[Any], object], copies: Sequence[Sequence[Any]], rounds: int = ROUNDS) -> list[float]:
    """Return for each round the time of one ``call``, when a CUDA graph of calls with all ``copies``, whose first is a tensor, in turn replays."""
    inputs = [*copies] * math.ceil(LAUNCHES / len(copies))
    device = copies[0][0].device
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream.wait_stream(torch.cuda.current_stream(device))
    times = []
    with torch.cuda.stream(stream):
        call(inputs[0])
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for copy in inputs:
                call(copy)
        graph.replay()
        for _ in range(rounds):
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(1000 * start.elapsed_time(end) / len(inputs))
    return times
