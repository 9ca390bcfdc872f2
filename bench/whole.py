"""Rows from a text to a waveform: load a checkpoint, speak for the first time, check, and speak again, by the methods that a user calls."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import models
from bench.engines import begin, compile_seconds
from bench.hearing import CALL, WrongAudio, first_chunk
from bench.peers import SLOTS, Graphs, hand_in, patch_generate, patch_graphs, told_by
from bench.reads import cache_figures
from bench.run import Run
from bench.start import directory
from bench.task import CHECKED_FRAMES, FRAME_MS, PROMPT, Task, check, generate
from bench.timing import figure, forget_memory_peak, memory, synchronize
from qtts_compile.cache import StaticKVCache
from qtts_compile.environment import import_qwen_tts
from qtts_compile.pipeline import RECORDING_RUNS
from qtts_compile.tts import TTS


@dataclass(frozen=True)
class Speaker:
    """A loaded model and how it is spoken with.

    Attributes:
        talker: the model's.
        generate: like ``Qwen3TTSModel.generate_custom_voice``.
        codes: greedy codes ``[1, F, groups]`` of a task, and the talker's cache, where it is ours.
        stream: yields chunks, first what is heard first; None where nothing streams.
        changed: whether the model itself was patched, so that another must judge it.
        note: what else to know, once it has spoken.
    """

    talker: Any
    generate: Callable[..., tuple[list[np.ndarray], int]]
    codes: Callable[[Task], tuple[Tensor, StaticKVCache | None]]
    stream: Callable[..., Iterator[Any]] | None = None
    changed: bool = False
    note: Callable[[], str] = str


def ours(run: Run, size: models.Size = "1.7b", backend: str = "qtts", kv_cache: str = "bf16") -> None:
    """Speak with :class:`TTS`."""
    protect = models.protection("tiny" if run.tiny else size, kv_cache)
    cache: dict[str, Any] = {"kv_cache": kv_cache, "protect": protect}

    def load() -> Speaker:
        tts = TTS.from_pretrained(str(directory(run, size)), device=run.device, dtype=run.dtype, mode=run.mode, backend=backend, **cache)

        def codes(task: Task) -> tuple[Tensor, StaticKVCache]:
            speech = begin(tts.engine, task)
            list(speech)
            return speech.codes.clone(), speech.cache

        return Speaker(tts.engine.talker, tts.generate_custom_voice, codes, tts.stream_custom_voice)

    measure(run, load, size)


def generated(run: Run, size: models.Size = "1.7b", peer: str | None = None, kv_cache: str = "bf16") -> None:
    """Speak with ``Qwen3TTSModel``, as it is, with a quantised cache, or as a ``peer``'s mode leaves it."""

    def load() -> Speaker:
        tts = _pretrained(run, size)
        cache = None if peer is None else patch_generate(tts, peer)
        note = str if cache is None else lambda: told_by(cache)
        talker = tts.model.talker
        packed = hand_in(talker, 1, SLOTS, kv_cache, "tiny" if run.tiny else size)
        return Speaker(talker, tts.generate_custom_voice, lambda task: (generate(talker, task), packed), changed=peer is not None, note=note)

    measure(run, load, size)


def graphs(run: Run, size: models.Size = "1.7b", patched: bool = False, turboquant: bool = False) -> None:
    """Speak with ``FasterQwen3TTS``, around a model as it is or as qwen3-tts-triton's hybrid leaves it."""
    from faster_qwen3_tts import FasterQwen3TTS  # pyright: ignore[reportMissingImports]

    def load() -> Speaker:
        tts = _pretrained(run, size)
        cache = patch_graphs(tts, turboquant) if patched else None
        talker = tts.model.talker

        @functools.cache
        def recorded() -> tuple[Graphs, Any]:
            # By the first call, as its own wrapper does: recording is no part of loading.
            graphs = Graphs(talker, SLOTS)
            faster: Any = FasterQwen3TTS(tts, graphs.sampled, graphs.step, run.device, run.dtype, SLOTS)
            faster._warmed_up = True
            return graphs, faster

        def codes(task: Task) -> tuple[Tensor, None]:
            graphs, _ = recorded()
            return graphs.speak(task, graphs.greedy)[0][None], None

        return Speaker(
            talker,
            lambda **call: recorded()[1].generate_custom_voice(**call),
            codes,
            lambda **call: recorded()[1].generate_custom_voice_streaming(**call, chunk_size=1),
            patched,
            str if cache is None else lambda: told_by(cache),
        )

    measure(run, load, size)


def measure(run: Run, load: Callable[[], Speaker], size: models.Size) -> None:
    """Make the row of a speaker: nothing is entered before its codes are checked."""
    forget_memory_peak()
    frames = run.frames
    with run.row(f"text to waveform, {frames} frames") as row, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cut off by max_new_tokens")
        loading, speaker = _timed(load)
        compiled = compile_seconds()
        first, _ = _timed(lambda: _speak(speaker, 2))
        compiled = compile_seconds() - compiled
        settling, _ = _timed(lambda: [_speak(speaker, frames) for _ in range(RECORDING_RUNS)])
        held = memory("text to waveform")
        row["check"], cache = _check(run, speaker, size)
        times, seconds = zip(*(_timed(lambda: _speak(speaker, frames)) for _ in range(run.repeats)))
        if min(seconds) < frames * FRAME_MS / 2000:
            raise WrongAudio(f"{min(seconds):.2f} s of audio were made of {frames * FRAME_MS / 1000:.2f} asked for")
        parts = {"load": loading, "first call": first, "of it torch.compile": compiled, "next two calls": settling}
        row["figures"] = {name: figure(taken, "s") for name, taken in parts.items()}
        row["figures"]["x real time"] = figure([made / taken for made, taken in zip(seconds, times)], "s a second")
        row["figures"]["call to first audio"] = figure(_first_audio(speaker, run.repeats), "ms")
        row["figures"] |= held | (cache_figures(cache) if cache else {})
        notes = [speaker.note(), "" if speaker.stream else f"nothing streams: first audio is a waveform of {CHECKED_FRAMES} frames"]
        row["note"] = "; ".join(["the checkpoint is in the page cache", *filter(None, notes)])


def _pretrained(run: Run, size: models.Size) -> Any:
    return import_qwen_tts().Qwen3TTSModel.from_pretrained(str(directory(run, size)), device_map=run.device, dtype=run.dtype)


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a call takes to an idle GPU, and its result."""
    synchronize()
    started = time.perf_counter()
    result = call()
    synchronize()
    return time.perf_counter() - started, result


def _speak(speaker: Speaker, frames: int) -> float:
    """Speak at most ``frames`` frames and return the seconds of audio."""
    torch.manual_seed(0)
    waveforms, rate = speaker.generate(**CALL, max_new_tokens=frames + 1)
    if not np.isfinite(waveforms[0]).all() or not np.any(waveforms[0]):
        raise WrongAudio(f"the waveform of {len(waveforms[0])} samples is silent or not finite")
    return len(waveforms[0]) / rate


def _check(run: Run, speaker: Speaker, size: models.Size) -> tuple[str, StaticKVCache | None]:
    """Check the codes of the loaded model, and return what was found with the talker's cache.

    Raises :class:`bench.task.WrongCodes`.
    """
    task = Task.of(speaker.talker, [PROMPT], CHECKED_FRAMES, greedy=True)
    codes, cache = speaker.codes(task)
    judge = _pretrained(run, size).model.talker if speaker.changed else speaker.talker
    return check(judge, task, codes, cache), cache


def _first_audio(speaker: Speaker, repeats: int) -> list[float]:
    """Return the milliseconds from a call to its first samples in the host's memory, of calls that find nothing left to compile or record."""
    if speaker.stream is None:
        return [1000 * _timed(lambda: _speak(speaker, CHECKED_FRAMES))[0] for _ in range(repeats)]
    stream = functools.partial(speaker.stream, **CALL)
    return [first_chunk(stream) for _ in range(RECORDING_RUNS + repeats)][RECORDING_RUNS:]
