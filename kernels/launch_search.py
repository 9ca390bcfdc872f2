"""Find launch parameters by measuring: in a CUDA graph whose launches find none of their weights in the L2 cache."""

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

import torch
import triton

from qtts_compile.kernels.launch_table import Launch, Shape, keep

log = logging.getLogger(__name__)

COLD_BYTES = 200e6  # four times the L2 cache of an H200
LAUNCHES = 40  # of a graph, at least
ROUNDS = 7
_searching = threading.Lock()


def can_search(device: torch.device) -> bool:
    """Tell whether a launch on ``device`` may be preceded by a search now: on a GPU that records no CUDA graph, unless the user forbids it."""
    allowed = os.environ.get("QTTS_COMPILE_SEARCH", "1") != "0"
    return allowed and device.type == "cuda" and not torch.cuda.is_current_stream_capturing() and not _searching.locked()


def search(
    shape: Shape, launches: Iterable[Launch], weights: Sequence[torch.Tensor], run: Callable[[Sequence[torch.Tensor], Launch], object]
) -> Launch | None:
    """Return the fastest of ``launches`` and keep it for a shape; None if no memory is free for the search.

    ``run`` launches the kernel with weights like ``weights``, whose copies take about 200 MB meanwhile, and launch parameters. What does not
    compile on this GPU is passed over.
    """
    started, times = time.perf_counter(), {}
    with _searching:
        try:
            size = sum(weight.numel() * weight.element_size() for weight in weights)
            copies = [weights, *([weight.clone() for weight in weights] for _ in range(math.ceil(COLD_BYTES / size) - 1))]
        except torch.cuda.OutOfMemoryError:
            log.warning("no memory is free to measure the launches of %s: those chosen by rule are used in this process", shape)
            return None
        for launch in launches:
            try:
                times[launch] = median(microseconds(lambda copy, launch=launch: run(copy, launch), copies))
            except (triton.TritonError, RuntimeError) as error:
                log.debug("%s: %s is left out: %s", shape, launch, error)
    if not times:
        return None
    best = min(times, key=times.__getitem__)
    log.info("%s: %s takes %.2f us, found among %d in %.1f s", shape, best, times[best], len(times), time.perf_counter() - started)
    keep(shape, weights[0].device, best)
    return best


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
