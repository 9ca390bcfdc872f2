"""Rows of the engine: frames of one size, batch, cache length and backend, what they cost in memory, and where their time goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch._dynamo.utils import calculate_time_spent, counters

from bench import models
from bench.breakdown import trace
from bench.hearing import time_first_audio
from bench.reads import cache_figures, read_figures
from bench.run import Run
from bench.task import CHECKED_FRAMES, PROMPT, Task, agreement, check, enter_speed, generate, staggered
from bench.timing import COMPILE, PROMPTED, SKIPS, figure, forget_memory_peak, memory, milliseconds, repeated, synchronize
from qtts_compile.engine import Engine
from qtts_compile.launcher import Launcher
from qtts_compile.tts import TTS


def engine(
    run: Run,
    size: models.Size = "1.7b",
    backend: str = "qtts",
    batch: int = 1,
    slots: int = 2048,
    positions: Sequence[int] = (),
    audio: bool = False,
    kv_cache: str = "bf16",
) -> None:
    """Compile, check and time the frames of one engine, and with ``audio`` all that a user hears of it.

    ``positions`` are the lengths of the prompts; by default that of ``PROMPT``, and for one text the longest that fits.
    """
    size = "tiny" if run.tiny else size
    model = models.build(size, run.device, run.dtype)
    forget_memory_peak()
    tts = TTS(model, mode=run.mode, backend=backend, max_seq_len=slots, kv_cache=kv_cache, protect=models.protection(size, kv_cache))
    if not positions:
        positions = (PROMPT, slots - PROMPT - run.frames) if batch == 1 else (PROMPT,)
    compile_frames(run, tts.engine, staggered(positions[0], batch))
    used = memory("frames")  # before the checks, in which the eager model runs
    if audio:
        with run.row("warmup") as row:
            row["figures"] = timed_compile(tts.warmup)
    if run.compile_only:
        return
    enter_memory(run, tts, used, audio)
    for position in positions:
        time_frames(run, tts.engine, staggered(position, batch))
    if audio:
        time_first_audio(run, tts)
    if run.profile and not run.tiny:

        def speak(frames: int) -> None:
            list(begin(tts.engine, Task.of(tts.engine.talker, staggered(positions[0], batch), frames)))

        trace(run, speak, model.model.talker, positions[0], batch)


def compile_frames(run: Run, engine: Engine, lengths: list[int]) -> None:
    """Make the first frames, for which everything is compiled and recorded, and report what that took."""
    with run.row("compile") as row:
        task = Task.of(engine.talker, lengths, 3)

        def first_frames() -> None:
            for _ in range(3):  # CUDA graphs: one call to warm up, one to record, one to replay
                list(begin(engine, task))

        row["figures"] = timed_compile(first_frames)


def timed_compile(call: Any) -> dict[str, Any]:
    """Return the figures of a call that compiles and records CUDA graphs."""
    names = {"autograd_cache_hit": "graphs from the cache", "autograd_cache_miss": "graphs not from it"}
    before = [counters["aot_autograd"][name] for name in names]
    compiled, started = compile_seconds(), time.perf_counter()
    call()
    synchronize()
    times = {COMPILE: figure(time.perf_counter() - started, "s"), "of it torch.compile": figure(compile_seconds() - compiled, "s")}
    return times | {label: figure(counters["aot_autograd"][name] - count, "") for (name, label), count in zip(names.items(), before)}


def compile_seconds() -> float:
    """Return the seconds this process has spent in ``torch.compile``, by Dynamo's own clock."""
    return calculate_time_spent().get("entire_frame_compile", 0.0)


def time_frames(run: Run, engine: Engine, lengths: list[int]) -> None:
    """Check the engine's greedy codes after prompts of these lengths, then time its sampled frames."""
    talker, batch, position = engine.talker, len(lengths), max(lengths)
    with run.row(f"frames at positions {position} to {position + run.frames}") as row:
        greedy = Task.of(talker, lengths, CHECKED_FRAMES, greedy=True)
        speech = begin(engine, greedy)
        list(speech)
        codes = speech.codes.clone()
        row["check"] = check(talker, greedy, codes, speech.cache)
        if position == PROMPT:
            alone = generate(talker, Task.of(talker, lengths[:1], CHECKED_FRAMES, greedy=True))
            row["check"] += f"; {agreement(codes[0], alone[0])}"
        task = Task.of(talker, lengths, run.frames)
        forget_memory_peak()  # that of the eager model
        list(begin(engine, task))
        times, unrecorded = [], engine.launcher.runs
        for _ in range(run.repeats):
            speech = begin(engine, task)
            times.append(milliseconds(partial(list, speech)) / run.frames)
            if speech.frames != run.frames:
                raise RuntimeError(f"{speech.frames} frames were made instead of {run.frames}")
        enter_speed(row, times, batch)
        enter_launches(row, engine.launcher, unrecorded)
        row["figures"] |= memory(PROMPTED)  # before the bandwidth is measured, which takes memory of its own
        row["figures"] |= read_figures(talker, position, run.frames, batch, speech.cache) | cache_figures(speech.cache)
        row["figures"]["prompt"] = repeated(lambda: begin(engine, task), run.repeats, warmup=0)


def enter_launches(row: dict[str, Any], launcher: Launcher, before: int) -> None:
    """Enter how many launches no CUDA graph made since their number was ``before``, where CUDA graphs are recorded."""
    if launcher.records:
        row["figures"][SKIPS] = figure(launcher.runs - before, "")


def enter_memory(run: Run, tts: TTS, used: dict[str, Any], audio: bool) -> None:
    """Report the peak of memory that frames ``used``, and with ``audio`` the one after as many frames as the cache holds are decoded."""
    with run.row("memory") as row:
        row["figures"] = used
        if audio:
            frames = tts.engine.max_seq_len - PROMPT
            tts.codec.decode(torch.zeros(frames, 16, dtype=torch.long, device=run.device))
            row["figures"] |= memory(f"with {frames} frames of audio")
        row["note"] = f"{tts.engine.max_seq_len} slots"


def begin(engine: Engine, task: Task) -> Any:
    """Start a task's speech."""
    return engine.start(task.inputs, task.settings, list(range(len(task.inputs.embeds))))
