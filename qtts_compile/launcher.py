"""Compile modules once and launch them often, from any thread."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

RECOMPILE_LIMIT = 256  # every instance of a module compiles the same code for its own buffers


class Launcher:
    """Wraps modules so that they run compiled, one launch at a time.

    torch keeps the recordings of CUDA graphs apart for each thread, and fails or records again in a thread that is new to it. A launcher brings
    its own set to whichever thread launches, so that a server's worker threads share them, and other compiled code in the process is left alone.

    Args:
        mode: ``torch.compile``'s mode, or None to run modules as they are.
        backend: ``torch.compile``'s backend.
        options: ``torch.compile``'s options, beside what the mode stands for.
    """

    def __init__(self, mode: str | None, backend: str = "qtts", options: Mapping[str, Any] | None = None) -> None:
        if mode is None and options:
            raise ValueError(f"options={dict(options)} are for torch.compile and mode=None does not compile: name a mode")
        self.mode, self.backend = mode, backend
        # torch.compile takes a mode or options, not both.
        self.options = {} if mode is None else {**torch._inductor.list_mode_options(mode), **(options or {})}
        self._lock = threading.RLock()
        self._prepared = threading.local()
        self._graphs = {"tree_manager_containers": {}, "tree_manager_locks": defaultdict(threading.Lock)}

    def wrap(self, module: nn.Module) -> Callable[..., Any]:
        """Return a callable that runs ``module`` compiled as one graph, in inference mode. The first call with new shapes compiles."""
        if self.mode is None:
            return torch.inference_mode()(module.__call__)
        compiled = torch.compile(module, backend=self.backend, fullgraph=True, options=self.options)
        resident = next(itertools.chain(module.buffers(), module.parameters()))

        @functools.wraps(module.forward)
        def launch(*args: Any) -> Any:
            with self._own_graphs(), torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
                with torch.inference_mode(), torch.cuda.device_of(resident):
                    self._prepare_thread(resident.device)
                    return compiled(*args)

        return launch

    def _prepare_thread(self, device: torch.device) -> None:
        """Make cuBLAS and cuDNN set up what they keep for each thread, which they cannot while a CUDA graph is recorded."""
        if device.type == "cuda" and str(device) not in vars(self._prepared):
            torch.cuda.current_blas_handle()
            torch.conv1d(torch.zeros(1, 1, 1, device=device), torch.zeros(1, 1, 1, device=device))
            vars(self._prepared)[str(device)] = True

    @contextlib.contextmanager
    def _own_graphs(self) -> Iterator[None]:
        from torch._inductor import cudagraph_trees

        local = cudagraph_trees.local
        with self._lock:
            before = {name: getattr(local, name, None) for name in self._graphs}
            vars(local).update(self._graphs)
            try:
                yield
            finally:
                for name, value in before.items():
                    setattr(local, name, value) if value is not None else delattr(local, name)
