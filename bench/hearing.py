"""The time from a call to the first chunk of its stream."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from bench import models
from bench.run import FailedParity, Run
from bench.timing import figure, repeated, synchronize
from qtts_compile.prompts import read_call
from qtts_compile.tts import TTS

PROMPT_TOKENS = 60
CALL: dict[str, Any] = dict(text=("etaoinshrdlu" * 5)[:49], speaker=models.SPEAKER, language=models.LANGUAGE)  # one token a letter
# Under random weights bfloat16 moves a waveform by 0.1 of its norm; that of another speech is 1.4 away.
STREAM_TOLERANCE = 0.3


class WrongAudio(FailedParity):
    """A waveform that the model would not have made."""


def time_first_audio(run: Run, tts: TTS) -> None:
    """Time a stream's first chunk, and its parts each by itself."""
    with run.row(f"first audio after a prompt of {PROMPT_TOKENS} tokens") as row:
        call = read_call(tts.model, "generate_custom_voice", CALL)
        if call.inputs.embeds.shape[1] != PROMPT_TOKENS:
            raise ValueError(f"the prompt has {call.inputs.embeds.shape[1]} tokens instead of {PROMPT_TOKENS}")
        row["check"] = check_stream(tts)
        row["figures"] = {"call to first chunk": first_chunks(tts)}
        codes = torch.zeros(1, 16, dtype=torch.long, device=run.device)
        waveform = tts.codec.push(codes)
        speech = iter(tts.engine.start(call.inputs, call.settings, [0]))
        row["figures"] |= {
            "building the prompt": repeated(lambda: read_call(tts.model, "generate_custom_voice", CALL), 10),
            "a frame": repeated(lambda: next(speech), 10),
            "the prompt": repeated(lambda: tts.engine.start(call.inputs, call.settings, [0]), 10),
            "decoding a frame": repeated(lambda: tts.codec.push(codes), 10),
            "copying it": repeated(lambda: waveform.float().cpu(), 10),
        }
        row["note"] = "the parts overlap in a stream; here each is timed by itself, from an idle GPU to an idle GPU"


def first_chunks(tts: TTS, repeats: int = 10) -> dict[str, Any]:
    """Return the figure of the time from a call to its first chunk in the host's memory."""
    times = [first_chunk(partial(tts.stream_custom_voice, **CALL, seed=0)) for _ in range(1 + repeats)]
    return figure(times[1:], "ms")


def first_chunk(stream: Callable[[], Any]) -> float:
    """Return the milliseconds from a call to the first chunk that what it returns yields."""
    torch.manual_seed(0)  # of a peer, which takes no seed
    synchronize()
    started = time.perf_counter()
    chunks = stream()
    next(chunks)
    taken = 1000 * (time.perf_counter() - started)
    chunks.close()
    return taken


def check_stream(tts: TTS) -> str:
    """Check that a stream's chunks make up the waveform that is not streamed, and say how near they come.

    Raises :class:`WrongAudio`.
    """
    limits: dict[str, Any] = dict(seed=0, max_new_tokens=17)
    streamed = torch.from_numpy(np.concatenate([chunk for chunk, _ in tts.stream_custom_voice(**CALL, **limits)]))
    whole = torch.from_numpy(tts.generate_custom_voice(**CALL, **limits)[0][0])
    if len(streamed) != len(whole) or not whole.any():
        raise WrongAudio(f"{len(streamed)} samples are streamed, {len(whole)} are not, their norm is {whole.norm():.3g}")
    error = relative_error(streamed, whole)
    if not error <= STREAM_TOLERANCE:  # NaN fails too
        raise WrongAudio(f"the stream differs from the whole waveform by {error:.2e} of its norm")
    return f"{len(whole)} samples streamed, different from the whole waveform by {error:.2e} of its norm"


def relative_error(waveform: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of ``reference``."""
    return ((waveform.double() - reference.double()).norm() / reference.double().norm()).item()
