"""Speak a text with :class:`qtts_compile.TTS` and write the sound file."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from qtts_compile.cli.common import EMBEDDED, UsageError, check_output, check_text, first_line, load_model, voice
from qtts_compile.demo_config import Kind

if TYPE_CHECKING:
    from qtts_compile.tts import Chunks
    from qtts_compile.turboquant_cache import Protect

COMMANDS: dict[Kind, str] = {"custom_voice": "speak", "base": "clone", "voice_design": "design"}


def speak(arguments: argparse.Namespace) -> int:
    """Speak with a named voice."""
    return _run(arguments, "custom_voice", lambda model: voice(model, arguments.speaker, arguments.instruct))


def clone(arguments: argparse.Namespace) -> int:
    """Speak with the voice of a recording."""
    return _run(arguments, "base", lambda _: _recording(arguments))


def design(arguments: argparse.Namespace) -> int:
    """Speak with a voice that you describe."""
    return _run(arguments, "voice_design", lambda _: {"instruct": arguments.instruct})


def _run(arguments: argparse.Namespace, kind: Kind, voice_of: Callable[[Any], dict[str, Any]]) -> int:
    check_output(arguments.output)
    if arguments.no_compile and arguments.mode:
        raise UsageError("--mode says how to compile and --no-compile not to: leave one out")
    protect = _protect(arguments.protect)
    model = load_model(arguments.model, arguments.device, arguments.dtype, kind)
    if model.model.tts_model_type != kind:
        raise UsageError(f"a model of the kind {model.model.tts_model_type!r} speaks by `qtts {COMMANDS[model.model.tts_model_type]}`")
    check_text(model, arguments.text, arguments.language)
    request = {"text": arguments.text, "language": arguments.language, "seed": arguments.seed, **voice_of(model)}
    request |= {"max_new_tokens": arguments.max_new_tokens, "do_sample": False if arguments.greedy else None}
    if arguments.model is None:
        print(EMBEDDED)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"qtts: warning: {message}", file=sys.stderr)
        try:
            _speak(model, arguments, kind, request, protect)
        except (ValueError, torch.cuda.OutOfMemoryError) as error:
            raise UsageError(" ".join(str(error).split())) from error
    return 0


def _speak(model: Any, arguments: argparse.Namespace, kind: Kind, request: dict[str, Any], protect: Protect | None) -> None:
    from qtts_compile.tts import TTS  # imports transformers, which `qtts env` is to say something about even where it does not fit

    mode = None if arguments.no_compile else arguments.mode or "auto"
    tts = TTS(model, mode=mode, max_seq_len=arguments.max_seq_len, kv_cache=arguments.kv_cache, protect=protect)
    if tts.mode:
        started = time.perf_counter()
        tts.warmup()
        print(f"Compiled in {time.perf_counter() - started:.1f} s")
    streams = {"custom_voice": tts.stream_custom_voice, "base": tts.stream_voice_clone, "voice_design": tts.stream_voice_design}
    chunks = _with_progress(streams[kind](**request), tts.codec.samples_per_frame)
    if arguments.stream:
        _write_as_they_come(arguments.output, chunks)
    else:
        samples, rates = zip(*chunks)
        soundfile.write(arguments.output, np.concatenate(samples), rates[0])
    print(f"Wrote {arguments.output} at {tts.sample_rate} Hz: {tts.stats}")


def _with_progress(chunks: Chunks, samples_per_frame: int) -> Chunks:
    """Pass chunks on, with a progress bar where a terminal shows one."""
    with tqdm(desc="Speaking", unit=" frames", disable=None) as bar:
        for samples, sample_rate in chunks:
            bar.update(len(samples) // samples_per_frame)
            yield samples, sample_rate


def _write_as_they_come(path: Path, chunks: Chunks) -> None:
    first, sample_rate = next(chunks)
    with soundfile.SoundFile(path, "w", sample_rate, channels=1) as file:
        for samples, _ in itertools.chain([(first, sample_rate)], chunks):
            file.write(samples)
            file.flush()


def _protect(text: str | None) -> Protect | None:
    """Read ``--protect``: numbers of some of the fields of Protect, by name."""
    if text is None:
        return None
    from qtts_compile.turboquant_cache import Protect  # imports transformers, as above

    given: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name not in Protect._fields or name in given or not re.fullmatch("-?[0-9]+", number):
            raise UsageError(
                f"--protect {text}: {part!r} is not NAME=N, N a whole number and NAME one of {', '.join(Protect._fields)}, each at most once"
            )
        given[name] = int(number)
    return Protect(**given)


def _recording(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of ``generate_voice_clone`` that choose the voice, after checking them."""
    if arguments.x_vector_only == bool(arguments.ref_text):
        raise UsageError("--ref-text says what the recording says, and --x-vector-only goes without it: give one of them")
    try:
        samples, sample_rate = soundfile.read(arguments.ref_audio, dtype="float32", always_2d=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise UsageError(f"--ref-audio {arguments.ref_audio}: cannot be read: {first_line(error)}") from error
    if not len(samples):
        raise UsageError(f"--ref-audio {arguments.ref_audio}: the recording is empty")
    return {"ref_audio": (samples.mean(1), sample_rate), "ref_text": arguments.ref_text, "x_vector_only_mode": arguments.x_vector_only}
