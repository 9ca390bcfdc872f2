"""What a call took, and why it ended."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from qtts_compile.engine import EndReason, Engine, Speech


@dataclass(frozen=True)
class Stats:
    """What one call took.

    Attributes:
        frames: frames of each text, 80 ms each.
        audio_seconds: length of all audio together.
        seconds: wall time from the call to its end; of a stream without what its consumer took between chunks.
        ms_per_frame: ``seconds`` in milliseconds over the frames of the longest text of each batch; everything is included.
        real_time_factor: seconds of audio made in a second.
        time_to_first_audio: seconds from the call to the first samples in the host's memory; ``seconds`` if nothing was streamed.
        peak_vram_bytes: what PyTorch holds of the GPU's memory at the end, CUDA graphs included; a call gives none back, so it is the most
            that was held. None on a CPU.
        end_reasons: why each text ended.
        seeds: what each text was drawn with.
        kv_cache: format of the talker's cache; "bf16" stands for the model's dtype.
        cache_bytes: of the talker's caches, one for each size of batch that this instance has spoken.
        cache_bytes_per_token: what one more slot of ``max_seq_len`` would take for one text, in all layers.
        quantized_layers: the layers of the talker that hold codes, counted from 0.
        quantized_tokens: tokens of each text, prompt and frames, that attention read from codes in these layers in the text's last frame. The
            newest and the first ones, which ``protect`` keeps beside their codes, are not counted.
    """

    frames: list[int]
    audio_seconds: float
    seconds: float
    ms_per_frame: float
    real_time_factor: float
    time_to_first_audio: float
    peak_vram_bytes: int | None
    end_reasons: list[EndReason]
    seeds: list[int]
    kv_cache: str
    cache_bytes: int
    cache_bytes_per_token: int
    quantized_layers: list[int]
    quantized_tokens: list[int]

    def __str__(self) -> str:
        texts = f"{len(self.frames)} texts, " if len(self.frames) > 1 else ""
        vram = "" if self.peak_vram_bytes is None else f", {self.peak_vram_bytes / 2**30:.2f} GiB of VRAM"
        counts = Counter(self.end_reasons)
        reasons = ", ".join(reason if len(counts) == 1 else f"{reason} ({count})" for reason, count in counts.items())
        seeds = f"seed {self.seeds[0]}" if len(set(self.seeds)) == 1 else f"seeds {', '.join(map(str, self.seeds))}"
        cache = (
            ""
            if self.kv_cache == "bf16"
            else (
                f"; {self.kv_cache} cache of {self.cache_bytes / 2**20:.1f} MiB, {self.cache_bytes_per_token / 1024:.1f} KiB a token, "
                f"{sum(self.quantized_tokens)} tokens quantised in {_span(self.quantized_layers)}"
            )
        )
        return (
            f"{texts}{sum(self.frames)} frames, {self.audio_seconds:.2f} s of audio in {self.seconds:.2f} s: {self.ms_per_frame:.1f} ms a frame, "
            f"{self.real_time_factor:.1f} x real time, first audio after {1000 * self.time_to_first_audio:.1f} ms{vram}; ended by {reasons}; "
            f"{seeds}{cache}"
        )


def _span(layers: Sequence[int]) -> str:
    """Name layers that follow each other."""
    if len(layers) < 2:
        return f"layer {layers[0]}" if layers else "no layer"
    return f"layers {layers[0]} to {layers[-1]}"


class Clock:
    """Times a call, from here on, without what the consumer of a stream does meanwhile."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._first_audio: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._started

    @contextmanager
    def consumer(self) -> Iterator[None]:
        """The consumer has audio now; what it does with it is not counted."""
        handed_over = self.seconds
        if self._first_audio is None:
            self._first_audio = handed_over
        try:
            yield
        finally:
            self._started += self.seconds - handed_over

    def stats(self, engine: Engine, speeches: Sequence[Speech], seeds: list[int], frame_seconds: float, device: torch.device) -> Stats:
        """Return what the call took that spoke these batches."""
        seconds, cache = self.seconds, speeches[0].cache
        frames = [length for speech in speeches for length in speech.lengths]
        audio_seconds = sum(frames) * frame_seconds
        return Stats(
            frames=frames,
            audio_seconds=audio_seconds,
            seconds=seconds,
            ms_per_frame=1000 * seconds / max(1, sum(max(speech.lengths) for speech in speeches)),
            real_time_factor=audio_seconds / seconds,
            time_to_first_audio=seconds if self._first_audio is None else self._first_audio,
            peak_vram_bytes=torch.cuda.memory_reserved(device) if device.type == "cuda" else None,
            end_reasons=[reason for speech in speeches for reason in speech.end_reasons],
            seeds=seeds,
            kv_cache=engine.kv_cache,
            cache_bytes=engine.cache_bytes,
            cache_bytes_per_token=cache.bytes_per_token,
            quantized_layers=list(cache.quantized_layers),
            quantized_tokens=[tokens for speech in speeches for tokens in speech.quantized_tokens],
        )
