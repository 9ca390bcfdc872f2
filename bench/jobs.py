"""What ``bench.speech`` can run, by importance. A job is a process; what shares compiled code shares a job."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal


@dataclass(frozen=True)
class Job:
    """One process and the rows it makes.

    Attributes:
        function: ``module:name`` of what takes a :class:`bench.worker.Run` and ``arguments``.
        compiles: whether its compilation can be done ahead, beside that of others.
        needs_gpu: whether ``--tiny`` must leave it out.
        after: jobs whose files it needs.
        cache: the compile cache that all jobs share, or one of the cold starts' own, emptied first or as the last one left it.
    """

    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    compiles: bool = False
    needs_gpu: bool = False
    after: tuple[str, ...] = ()
    cache: Literal["shared", "emptied", "kept"] = "shared"

    def run(self, run: Any) -> None:
        """Run the job in this process."""
        module, _, name = self.function.partition(":")
        getattr(import_module(module), name)(run, **self.arguments)


def _engine(**arguments: Any) -> Job:
    return Job("bench.engines:engine", arguments, compiles=True)


JOBS = {
    "qtts": _engine(audio=True),
    "eager": Job("bench.peers:eager"),
    "hybrid": Job("bench.peers:graphs", {"patched": True}, needs_gpu=True),
    "faster": Job("bench.peers:graphs", {"patched": False}, needs_gpu=True),
    "inductor": _engine(backend="inductor"),
    "decoder": Job("bench.decoder:decoder", compiles=True),
    "batch-8": _engine(batch=8),
    "batch-32": _engine(batch=32),
    "0.6b": _engine(size="0.6b"),
    "8192-slots": _engine(slots=8192),
    "checkpoint": Job("bench.start:checkpoint"),
    "cold-start": Job("bench.start:start", after=("checkpoint",), cache="emptied"),
    "warm-start": Job("bench.start:start", after=("cold-start",), cache="kept"),
}


def chosen(names: list[str]) -> list[str]:
    """Return the jobs to run for these names, in order, with those they need.

    Raises ValueError for an unknown name.
    """
    for name in names:
        if name not in JOBS:
            raise ValueError(f"no rows are called {name!r}; there are {', '.join(JOBS)}")
    wanted = set(names)
    while more := {needed for name in wanted for needed in JOBS[name].after} - wanted:
        wanted |= more
    return [name for name in JOBS if name in wanted]
