"""All that can be measured, in one place: modes (ways to run the model), cases (what they are given) and jobs (a mode with a case, in a process).

A new mode, case or row of ``bench.speech`` is one entry here. Importing this module imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

INSTALLS = {"qwen_tts": "'qtts-compile[tts]'", "faster_qwen3_tts": "faster-qwen3-tts==0.3.2", "qwen3_tts_triton": "qwen3-tts-triton==0.3.0"}
SIZES = ("0.6b", "1.7b")
POSITIONS = (64, 512, 2048, 8000)  # where `qtts bench frame` times frames
BATCHES = (1, 8)
QUANTIZED = ("int4", "int3", "k4v3", "fp8")  # formats of keys and values
METRICS = {
    "ms/frame": "milliseconds that 80 ms of audio take, all texts of a batch together; median, least and greatest of the repeats",
    "x real time": "seconds of audio made in a second, all texts together",
    "call to first audio": "milliseconds from the call to the first samples in the host's memory, when nothing is left to compile",
    "VRAM": "peak of PyTorch's allocator (allocated, reserved) and what the device has in use",
    "cache": "MiB of the talker's static cache as allocated, KiB of a token of it in all layers, and how many layers hold codes",
    "load": "seconds from a checkpoint in the page cache to a model on the GPU",
    "compile": "seconds in torch.compile by Dynamo's clock, and those that the first call takes besides",
    "floor": "milliseconds in which the weights and the cached keys and values of a frame can be read once at the bandwidth of a copy",
}


@dataclass(frozen=True)
class Mode:
    """A way to run the model that has a name.

    Attributes:
        what: what it is, in a line.
        frames: ``module:name`` of what times its frames.
        whole: ``module:name`` of what goes from a checkpoint and a text to a waveform.
        arguments: of both.
        modules: Python modules that it needs.
        torch_mode: ``torch.compile``'s mode; None where nothing is compiled.
        largest_batch: the most texts that it speaks together.
        needs_gpu: whether ``--tiny`` must leave it out.
    """

    what: str
    frames: str
    whole: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = ("qwen_tts",)
    torch_mode: str | None = None
    largest_batch: int = 32
    needs_gpu: bool = False

    @property
    def absent(self) -> str:
        """Why it cannot run here, or nothing."""
        lacking = [module for module in self.modules if find_spec(module) is None]
        return f"{' and '.join(lacking)} not installed: pip install {' '.join(map(INSTALLS.__getitem__, lacking))}" if lacking else ""


@dataclass(frozen=True)
class Case:
    """What a mode is given.

    Attributes:
        size: of the model.
        batch: texts spoken together.
        slots: of the static caches; 0 for as many as the positions need.
        positions: tokens before the first frame that is timed, for each row; () for the runner's own.
        kv_cache: format of the talker's keys and values, in place of the mode's own; "" for that.
    """

    size: str = "1.7b"
    batch: int = 1
    slots: int = 2048
    positions: tuple[int, ...] = ()
    kv_cache: str = ""


@dataclass(frozen=True)
class Job:
    """One process and the rows it makes; what shares compiled code shares a job.

    Attributes:
        function: ``module:name`` of what takes a :class:`bench.worker.Run` and ``arguments``.
        labels: what every row says of itself besides.
        torch_mode: ``torch.compile``'s mode; None where nothing is compiled.
        compiles: whether its compilation can be done ahead, beside that of others.
        needs_gpu: whether ``--tiny`` must leave it out.
        after: jobs whose files it needs.
        cache: the compile cache that all jobs share, or one of the cold starts' own, emptied first or as the last one left it.
        skip: why it cannot run here.
    """

    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)
    torch_mode: str | None = None
    compiles: bool = False
    needs_gpu: bool = False
    after: tuple[str, ...] = ()
    cache: Literal["shared", "emptied", "kept"] = "shared"
    skip: str = ""

    def run(self, run: Any) -> None:
        """Run the job in this process."""
        module, _, name = self.function.partition(":")
        getattr(import_module(module), name)(run, **self.arguments)


def _ours(what: str, backend: str, torch_mode: str, **cache: str) -> Mode:
    return Mode(what, "bench.engines:engine", "bench.whole:ours", {"backend": backend, **cache}, torch_mode=torch_mode)


def _eager(what: str, **cache: str) -> Mode:
    return Mode(what, "bench.peers:generated", "bench.whole:generated", cache)


def _peer(what: str, kind: str, arguments: Mapping[str, Any]) -> Mode:
    patched = ("qwen_tts", "qwen3_tts_triton")
    if kind == "generated":
        return Mode(what, "bench.peers:generated", "bench.whole:generated", arguments, patched)
    modules = ("qwen_tts", "faster_qwen3_tts", *(patched[1:] if arguments else ()))
    return Mode(what, "bench.peers:graphs", "bench.whole:graphs", arguments, modules, largest_batch=1, needs_gpu=True)


# The seven names that users of qwen3-tts-triton know stand for what this package has in their place; its own modes bear its name.
MODES = {
    "base": _eager("qwen-tts as it is: eager, transformers' generate loop"),
    "base+tq": _eager("qwen-tts, eager, whose generate() is handed a TurboQuantCache: int4 keys and values", kv_cache="int4"),
    "triton": _ours('TTS(mode="default"): the rewrites and their kernels, launched one by one without CUDA graphs', "qtts", "default"),
    "triton+tq": _ours('TTS(mode="default", kv_cache="int4"): attention reads the packed cache', "qtts", "default", kv_cache="int4"),
    "faster": _ours('TTS(backend="inductor"): a frame as one CUDA graph, without the rewrites', "inductor", "reduce-overhead"),
    "hybrid": _ours("TTS as it comes: the rewrites and their kernels, a frame as one CUDA graph", "qtts", "reduce-overhead"),
    "hybrid+tq": _ours('TTS(kv_cache="int4"): the same in one CUDA graph', "qtts", "reduce-overhead", kv_cache="int4"),
    "faster-qwen3-tts": _peer("faster-qwen3-tts: two CUDA graphs a frame", "graphs", {}),
    "qwen3-tts-triton:triton": _peer("qwen3-tts-triton's kernels patched into qwen-tts", "generated", {"peer": "triton"}),
    "qwen3-tts-triton:hybrid": _peer("qwen3-tts-triton's kernels in faster-qwen3-tts's graphs", "graphs", {"patched": True}),
    "qwen3-tts-triton:base+tq": _peer("qwen-tts with qwen3-tts-triton's TurboQuant cache", "generated", {"peer": "base+tq"}),
    "qwen3-tts-triton:triton+tq": _peer("its kernels and its TurboQuant cache", "generated", {"peer": "triton+tq"}),
    "qwen3-tts-triton:hybrid+tq": _peer(
        "its hybrid with TurboQuant asked for, which never runs there: it stands in a method that is not called",
        "graphs",
        {"patched": True, "turboquant": True},
    ),
}
GROUPS = {
    "ours": [name for name in MODES if "qwen3" not in name],
    "peers": [name for name in MODES if "qwen3" in name],
    "all": list(MODES),
}


def frame_job(name: str, case: Case, frames: int = 100, **arguments: Any) -> Job:
    """Return the job that times the frames of a mode."""
    mode = MODES[name]
    slots = case.slots or -(-(max(case.positions) + frames + 1) // 1024) * 1024
    given = {"size": case.size, "batch": case.batch, "slots": slots, "positions": list(case.positions)}
    cache = {"kv_cache": case.kv_cache} if case.kv_cache else {}
    return Job(
        mode.frames,
        {**given, **mode.arguments, **cache, **arguments},
        {"mode": name, "size": case.size, "batch": case.batch, "slots": slots, **cache},
        mode.torch_mode,
        compiles=mode.torch_mode is not None,
        needs_gpu=mode.needs_gpu,
        skip=mode.absent or (f"speaks {mode.largest_batch} text at a time" if case.batch > mode.largest_batch else ""),
    )


def whole_job(name: str, size: str) -> Job:
    """Return the job that goes with a mode from a checkpoint and a text to a waveform, with an empty compile cache."""
    mode = MODES[name]
    labels = {"mode": name, "size": size, "batch": 1}
    return Job(
        mode.whole,
        {"size": size, **mode.arguments},
        labels,
        mode.torch_mode,
        needs_gpu=mode.needs_gpu,
        after=(f"checkpoint-{size}",),
        cache="emptied",
        skip=mode.absent,
    )


def checkpoint_job(size: str = "1.7b") -> Job:
    """Return the job that writes a checkpoint."""
    return Job("bench.start:checkpoint", {"size": size})


# The rows of `python -m bench.speech`, by importance, under the names they have in bench/results.
ROWS = {
    "qtts": frame_job("hybrid", Case(), audio=True),
    "eager": frame_job("base", Case()),
    "hybrid": frame_job("qwen3-tts-triton:hybrid", Case()),
    "faster": frame_job("faster-qwen3-tts", Case()),
    "inductor": frame_job("faster", Case()),
    "decoder": Job("bench.decoder:decoder", torch_mode="reduce-overhead", compiles=True),
    **{f"batch-{batch}": frame_job("hybrid", Case(batch=batch)) for batch in (2, 4, 8, 16, 32)},
    "0.6b": frame_job("hybrid", Case(size="0.6b")),
    "8192-slots": frame_job("hybrid", Case(slots=8192, positions=POSITIONS)),
    **{name: frame_job("hybrid+tq", Case(slots=8192, positions=POSITIONS, kv_cache=name)) for name in QUANTIZED},
    **{f"batch-{batch}-8192": frame_job("hybrid", Case(batch=batch, slots=8192, positions=POSITIONS[1:])) for batch in (8, 32)},
    **{
        f"batch-{batch}-8192-{name}": frame_job("hybrid+tq", Case(batch=batch, slots=8192, positions=POSITIONS[1:], kv_cache=name))
        for batch in (8, 32)
        for name in QUANTIZED
    },
    "checkpoint": checkpoint_job(),
    "cold-start": Job("bench.start:start", torch_mode="reduce-overhead", after=("checkpoint",), cache="emptied"),
    "warm-start": Job("bench.start:start", torch_mode="reduce-overhead", after=("cold-start",), cache="kept"),
}


def chosen(names: Sequence[str], jobs: Mapping[str, Job] = ROWS) -> dict[str, Job]:
    """Return the jobs of these names, in the order of ``jobs``, with those they need.

    Raises ValueError for an unknown name.
    """
    for name in names:
        if name not in jobs:
            raise ValueError(f"no rows are called {name!r}; there are {', '.join(jobs)}")
    wanted = set(names)
    while more := {needed for name in wanted for needed in jobs[name].after} - wanted:
        wanted |= more
    return {name: job for name, job in jobs.items() if name in wanted}


def modes_named(names: Sequence[str]) -> list[str]:
    """Return the modes that these names and names of groups stand for, in the order of the names: what a budget is too small for comes last.

    Raises ValueError for an unknown name.
    """
    for name in names:
        if name not in MODES and name not in GROUPS:
            raise ValueError(f"no mode is called {name!r}; there are {', '.join(MODES)}, and the groups {', '.join(GROUPS)}")
    return list(dict.fromkeys(mode for name in names for mode in GROUPS.get(name, [name])))
