"""Rows of the speech tokenizer's decoder, whole and in chunks, beside the original one."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from bench import models
from bench.engines import enter_launches, timed_compile
from bench.hearing import WrongAudio, relative_error
from bench.run import Run
from bench.timing import repeated
from qtts_compile.codec import Codec
from qtts_compile.launcher import Launcher

CHUNKS = (1, 2, 4, 8)
WHOLE = 62  # frames: 5 s
CONTEXT = 25  # frames of the past that other streams decode again with every chunk


@torch.inference_mode()
def decoder(run: Run) -> None:
    """Compile, check and time the decoder."""
    tokenizer = models.build("tiny" if run.tiny else "1.7b", run.device, run.dtype).model.speech_tokenizer.model
    codes = torch.randint(0, 2048, (WHOLE, 16), generator=torch.Generator().manual_seed(0)).to(run.device)
    launcher = Launcher(codes.device, run.mode)
    codec = Codec(tokenizer, launcher=launcher)

    def first_calls() -> None:
        for _ in range(3):  # CUDA graphs: one call to warm up, one to record, one to replay
            codec.decode(codes)
            for chunk in CHUNKS:
                codec.push(codes[:chunk])

    with run.row("compile") as row:
        row["figures"] = timed_compile(first_calls)
    if run.compile_only:
        return
    original, unrecorded = tokenizer.decoder, launcher.runs
    with run.row(f"whole decode of {WHOLE} frames") as row:
        row["check"] = check_audio(original, codes, codec.decode(codes))
        row["figures"] = {"Codec.decode": repeated(lambda: codec.decode(codes), 20)}
        row["figures"]["original decoder"] = repeated(lambda: original(codes.T[None]), 10)
    with run.row("chunks of a stream") as row:
        codec.reset()
        row["check"] = check_audio(original, codes[: sum(CHUNKS)], torch.cat([codec.push(chunk) for chunk in codes[: sum(CHUNKS)].split(CHUNKS)]))
        row["figures"] = {f"frames: {chunk}": repeated(lambda chunk=chunk: codec.push(codes[:chunk]), 20) for chunk in CHUNKS}
        enter_launches(row, launcher, unrecorded)
        row["figures"][f"original decoder, 1 and {CONTEXT} before"] = repeated(lambda: original(codes[: CONTEXT + 1].T[None]), 10)


def check_audio(original: torch.nn.Module, codes: Tensor, waveform: Tensor) -> str:
    """Check that ``waveform`` is about as near the one in float64 as the original decoder's is, and say how near.

    Raises :class:`WrongAudio`.
    """
    exact = copy.deepcopy(original).double()(codes.T[None]).flatten()
    error, eager_error = (relative_error(samples, exact) for samples in (waveform, original(codes.T[None]).flatten()))
    found = f"relative error against float64 {error:.2e}, the original decoder's is {eager_error:.2e}"
    if not error <= 1.5 * eager_error + 1e-5:  # NaN fails too
        raise WrongAudio(found)
    return found
