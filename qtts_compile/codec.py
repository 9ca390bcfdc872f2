"""The speech tokenizer's decoder as a user runs it: codes in, samples out, whole or as a stream, compiled for a few chunk sizes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qtts_compile.arguments import check_whole_numbers
from qtts_compile.launcher import Launcher, mark_varying
from qtts_compile.streaming_decoder import StreamingDecoder


class Codec:
    """Decode the codes of one utterance.

    Compiled, it holds two graphs: one of a single frame, and one of any number of frames, which modes with CUDA graphs record once for each
    size. Both read the model's own weights.

    Args:
        tokenizer: speech tokenizer (12 Hz), its model, or that model's decoder.
        launcher: compiles and runs; None runs uncompiled.
        sizes: numbers of frames that are decoded at once, 1 among them. The largest bounds the memory; uncompiled, only it counts.

    Attributes:
        samples_per_frame: samples that one frame of codes becomes.
        sample_rate: samples a second, or None for a bare decoder, which does not tell.

    Raises:
        TypeError: no decoder that can be streamed, or sizes that are no whole numbers.
        ValueError: a decoder with a layer that cannot be streamed; a wrong option; a size below 1, or sizes without 1.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        launcher: Launcher | None = None,
        sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    ) -> None:
        check_whole_numbers("sizes", sizes)
        if 1 not in sizes:
            raise ValueError(f"sizes={tuple(sizes)}: 1 is needed among them, so that any number of frames can be split into them")
        model = tokenizer if isinstance(tokenizer, nn.Module) else getattr(tokenizer, "model", None)
        decoder: Any = getattr(model, "decoder", None)
        if isinstance(decoder, nn.ModuleList):  # layers: the model itself is the decoder
            decoder = model
        if not isinstance(decoder, nn.Module):
            raise TypeError(f"{type(tokenizer).__name__} is no speech tokenizer and holds none; pass tts.model.speech_tokenizer")
        self._decoder = StreamingDecoder(decoder)
        self._device = next(decoder.parameters()).device
        launcher = launcher or Launcher(self._device)
        decode, self._any_size = launcher.compile(self._decoder), not launcher.compiles

        def run(codes: torch.Tensor) -> torch.Tensor:
            mark_varying((codes, 2))
            return decode(codes)

        self._run = launcher.wrap(run)
        self._sizes = sorted(sizes)
        config: Any = decoder.config
        self._codebooks: int = config.num_quantizers
        self.samples_per_frame = self._decoder.samples_per_frame
        self.sample_rate: int | None = getattr(model, "output_sample_rate", None)

    def reset(self) -> None:
        """Begin a new stream."""
        self._decoder.reset()

    def push(self, codes: torch.Tensor) -> torch.Tensor:
        """Decode the next frames of the stream; the samples of all pushes, joined, are those of one whole decode.

        Args:
            codes: int64 [F, Q] on the decoder's device, each below the codebook size: values are not checked, as that would wait for the GPU.

        Returns:
            float32 [F * samples_per_frame] in [-1, 1], on the same device, in memory of its own.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape or device.
        """
        self._check(codes)
        return self._decode(codes, self._split(len(codes), pad=False))

    def decode(self, codes: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """Decode a whole utterance. A stream under way ends.

        Args:
            codes: as for :meth:`push`.
            context: int64 [C, Q], the codes before them (the reference of an in-context voice clone), whose samples are not returned.

        Returns:
            As :meth:`push`.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape or device.
        """
        self._check(codes)
        skipped = 0
        if context is not None:
            self._check(context)
            skipped, codes = len(context), torch.cat([context, codes])
        self.reset()
        try:
            return self._decode(codes, self._split(len(codes), pad=True))[skipped * self.samples_per_frame :]
        finally:
            self.reset()

    def warmup(self) -> None:
        """Compile, and record CUDA graphs, for every size, so that no later call has to. A stream under way ends."""
        for size in reversed(self._sizes):  # the largest first: code for any number of frames is tuned for the one it is compiled with
            codes = torch.zeros(size, self._codebooks, dtype=torch.int64, device=self._device)
            for _ in range(2):  # the second call records
                self._decode(codes, [size])
        self.reset()

    def _check(self, codes: torch.Tensor) -> None:
        if codes.dtype != torch.int64:
            raise TypeError(f"codes of {codes.dtype}: torch.int64 is needed; convert them by codes.long()")
        if codes.dim() != 2 or codes.shape[1] != self._codebooks or codes.device != self._device:
            raise ValueError(f"codes {tuple(codes.shape)} on {codes.device}: (frames, {self._codebooks}) on {self._device} is needed")

    def _split(self, frames: int, pad: bool) -> list[int]:
        """Return the sizes to decode ``frames`` in, which add up to them, or with ``pad`` to no less."""
        largest = self._sizes[-1]
        sizes, rest = [largest] * (frames // largest), frames % largest
        if rest and self._any_size:
            return [*sizes, rest]
        if rest and pad:
            return [*sizes, min(size for size in self._sizes if size >= rest)]
        for size in reversed(self._sizes):
            sizes += [size] * (rest // size)
            rest %= size
        return sizes

    def _decode(self, codes: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """Decode chunks of ``sizes``, padding the last; the padding comes after the codes, so it does not change their samples."""
        with torch.inference_mode(False):  # whatever mode the caller is in
            waveform = torch.empty(len(codes), self.samples_per_frame, device=self._device)
            start = 0
            for size in sizes:
                part = codes[start : start + size]
                chunk = torch.zeros(1, self._codebooks, size, dtype=torch.int64, device=self._device)
                chunk[0, :, : len(part)] = part.T
                samples = self._run(chunk).unflatten(1, (size, self.samples_per_frame))
                waveform[start : start + size] = samples[0, : len(part)]
                start += size
            return waveform.flatten()
