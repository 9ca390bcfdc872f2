"""Compile functions once, record what they launch as CUDA graphs, and replay it often, from any thread."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtts_compile.kernels.recording import graph_lock
from qtts_compile.options import Options

RECOMPILE_LIMIT = 256  # every size of batch and state compiles the same code anew


class Launcher:
    """Runs what is made of compiled functions, one launch at a time.

    A mode of ``torch.compile`` that records CUDA graphs is taken to mean one graph for all that a launch does, however many compiled functions
    it calls and how often: what repeats is compiled once. The functions are compiled without graphs of their own. All graphs share their memory.

    Args:
        device: where everything runs.
        mode: ``torch.compile``'s mode, or None to run functions as they are.
        backend: ``torch.compile``'s backend.
        options: ``torch.compile``'s options, beside what the mode stands for; but not ``mode``, nor ``kv_cache``, which is TTS's and the engine's.

    Attributes:
        records: whether it records CUDA graphs.
        recordings: CUDA graphs recorded so far.
        runs: launches so far that no CUDA graph made.

    Raises:
        ValueError: ``mode`` or ``kv_cache`` among the options, options without a mode, and, of backend "qtts", as :meth:`Options.parse`.
        RuntimeError: a mode that torch does not know.
    """

    def __init__(self, device: torch.device, mode: str | None = None, backend: str = "qtts", options: Mapping[str, Any] | None = None) -> None:
        # CUDA graphs are recorded here and not by the backend, and what is compiled has caches of several kinds.
        for name in ("mode", "kv_cache"):
            if options and name in options:
                raise ValueError(f"options={{{name!r}: {options[name]!r}}}: give it to TTS itself, {name}={options[name]!r}")
        if mode is None and options:
            raise ValueError(f"options={dict(options)} are for torch.compile and mode=None does not compile: name a mode")
        self.mode, self.backend = mode, backend
        # torch.compile takes a mode or options, not both.
        self.options = {} if mode is None else {**torch._inductor.list_mode_options(mode), **(options or {})}
        self.records = bool(self.options.pop("triton.cudagraphs", False))
        if backend == "qtts":
            Options.parse(None, self.options)
        self.recordings = self.runs = 0
        self._device = device
        self._lock = threading.RLock()
        self._pool = torch.cuda.graph_pool_handle() if self.records else None
        self._stream = torch.cuda.Stream(device) if self.records else None

    @property
    def compiles(self) -> bool:
        """Whether :meth:`compile` does."""
        return self.mode is not None

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` compiled as one graph, to be called in what :meth:`wrap` is given."""
        if not self.compiles:
            return function
        return torch.compile(function, backend=self.backend, fullgraph=True, dynamic=False, options=self.options)

    def wrap(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return a callable that does ``run`` in inference mode.

        Where CUDA graphs are recorded, the first call with new shapes runs and compiles, the second records and replays, and the later ones replay;
        the result lies in memory that the next launch may overwrite. ``run`` takes tensors.
        """
        known: dict[tuple[torch.Size, ...], _Recording] = {}

        @functools.wraps(run)
        def launch(*args: Tensor) -> Any:
            with self._lock, torch.inference_mode(), self._on_device():
                if not self.records:
                    return self._run(run, args)
                shapes = tuple(arg.shape for arg in args)
                if shapes in known:
                    return self._replay(known[shapes], run, args)
                recording = _Recording(tuple(arg.clone() for arg in args))
                result = self._run(run, recording.inputs)
                known[shapes] = recording
                return result

        return launch

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()

    def _run(self, run: Callable[..., Any], args: tuple[Tensor, ...]) -> Any:
        self.runs += 1
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            return run(*args)

    def _replay(self, recording: _Recording, run: Callable[..., Any], args: tuple[Tensor, ...]) -> Any:
        for kept, given in zip(recording.inputs, args):
            kept.copy_(given)
        if recording.graph is None:
            _prepare_thread(self._device)
            graph = torch.cuda.CUDAGraph()
            with graph_lock, torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                recording.result = run(*recording.inputs)
            recording.graph = graph
            self.recordings += 1
        recording.graph.replay()
        return recording.result


def mark_varying(*dimensions: tuple[Tensor, int]) -> None:
    """Have what is compiled for these tensors serve any size above 1 of these dimensions of theirs, if theirs is."""
    for tensor, dim in dimensions:
        if tensor.shape[dim] > 1:
            torch._dynamo.mark_dynamic(tensor, dim % tensor.ndim)


@dataclass
class _Recording:
    """A CUDA graph, once it is recorded, and the memory that it reads its arguments from and leaves its result in."""

    inputs: tuple[Tensor, ...]
    graph: torch.cuda.CUDAGraph | None = None
    result: Any = None


def _prepare_thread(device: torch.device) -> None:
    """Make cuBLAS and cuDNN set up what they keep for each thread, which they cannot while a CUDA graph is recorded."""
    torch.cuda.current_blas_handle()
    torch.conv1d(torch.zeros(1, 1, 1, device=device), torch.zeros(1, 1, 1, device=device))
