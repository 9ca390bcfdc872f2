"""Rows of the cold start: from a checkpoint directory to the first chunk."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench import models
from bench.engines import compile_seconds
from bench.hearing import CALL, WrongAudio, first_chunks
from bench.run import Run
from bench.timing import figure, synchronize
from qtts_compile import user_cache
from qtts_compile.tts import TTS


def checkpoint(run: Run, size: models.Size = "1.7b") -> None:
    """Write the checkpoint."""
    with run.row("written") as row:
        written = models.write_checkpoint(directory(run, size), "tiny" if run.tiny else size, run.device)
        row["figures"] = {"weights": figure(sum(path.stat().st_size for path in written.rglob("*.safetensors")) / 1e9, "GB")}


def directory(run: Run, size: models.Size = "1.7b") -> Path:
    """Return where the checkpoint of a model of this size stands."""
    return Path(run.folder) / f"checkpoint-{'tiny' if run.tiny else size}"


def launches_found() -> int:
    """Return for how many shapes launches are kept that were measured on this machine."""
    return sum(len(json.loads(table.read_text())) for table in (user_cache.folder() / "launches").rglob("*.json"))


def start(run: Run) -> None:
    """Go from a new process to the first chunk, and on until nothing is left to compile."""
    imported, found = time.time() - run.started, launches_found()
    began = time.perf_counter()
    tts = TTS.from_pretrained(str(directory(run)), device=run.device, dtype=run.dtype, mode=run.mode)
    synchronize()
    loaded = time.perf_counter() - began
    with run.row("load to first audio") as row:
        compiled, began = compile_seconds(), time.perf_counter()
        stream: Any = tts.stream_custom_voice(**CALL, seed=0)
        chunk, _ = next(stream)
        stream.close()
        taken, compiled = time.perf_counter() - began, compile_seconds() - compiled
        if not (chunk.size and np.isfinite(chunk).all() and chunk.any()):
            raise WrongAudio(f"the first chunk has {chunk.size} samples, or they are silent or not finite")
        row["check"] = f"the chunk has {chunk.size} finite samples"
        parts = {"sum": loaded + taken, "load": loaded, "compile": compiled, "capture and run": taken - compiled, "imports, before": imported}
        row["figures"] = {name: figure(seconds, "s") for name, seconds in parts.items()}
        row["note"] = "the checkpoint is in the page cache"
    with run.row("first audio to warm") as row:
        compiled, began = compile_seconds(), time.perf_counter()
        tts.warmup()
        synchronize()
        taken, compiled = time.perf_counter() - began, compile_seconds() - compiled
        parts = {"sum": taken, "compile": compiled, "capture and run": taken - compiled}
        row["figures"] = {name: figure(seconds, "s") for name, seconds in parts.items()} | {"call to first chunk": first_chunks(tts)}
        row["figures"]["shapes whose launches were measured"] = figure(launches_found() - found, "")
