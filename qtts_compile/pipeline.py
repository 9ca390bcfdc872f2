"""From a call to samples: prompt, engine and codec joined, for whole waveforms and for streams."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qtts_compile.arguments import check_whole_numbers
from qtts_compile.codec import Codec
from qtts_compile.engine import Engine, PromptInputs, Speech
from qtts_compile.launcher import Launcher
from qtts_compile.options import MODES
from qtts_compile.prompts import check_texts, read_call
from qtts_compile.stats import Clock, Stats
from qtts_compile.turboquant_cache import Protect

RECORDING_RUNS = 2  # a CUDA graph's first run allocates, the second is recorded
Chunks = Generator[tuple[np.ndarray, int], None, None]


class Pipeline:
    """What :class:`qtts_compile.tts.TTS` does behind its methods; its arguments are described there."""

    def __init__(
        self,
        model: Any,
        *,
        mode: str | None = "auto",
        max_seq_len: int = 2048,
        backend: str = "qtts",
        options: Mapping[str, Any] | None = None,
        chunk_frames: Sequence[int] = (1, 2, 4, 8),
        kv_cache: str = "bf16",
        protect: Protect | None = None,
    ) -> None:
        _check_model(model)
        check_whole_numbers("chunk_frames", chunk_frames)
        if not chunk_frames:
            raise ValueError(f"chunk_frames={chunk_frames!r}: give at least one number of frames")
        talker = model.model.talker
        self.model, self.chunk_frames = model, tuple(chunk_frames)
        self.device = next(talker.parameters()).device
        self.mode = _mode(mode, options, self.device)
        launcher = Launcher(self.device, self.mode, backend, options)
        self.engine = Engine(talker, max_seq_len=max_seq_len, launcher=launcher, kv_cache=kv_cache, protect=protect)
        self.codec = Codec(model.model.speech_tokenizer.model, launcher=launcher)
        self.sample_rate: int = model.model.speech_tokenizer.get_output_sample_rate()
        self.stats: Stats | None = None
        self._speaking = threading.Lock()

    def warmup(self, batch_sizes: Sequence[int] = (1,), prompt_lengths: Sequence[int] = (64,)) -> None:
        """Compile and record all that the first call would, for these numbers of texts and about these numbers of prompt tokens.

        Sizes in between are served by the next larger one; a prompt length that is not warmed only has its CUDA graph recorded in its first calls.
        A length that does not fit into ``max_seq_len`` stands for the longest that does.

        Raises:
            TypeError: sizes or lengths that are no ints, or no sequence of them.
            ValueError: sizes that are not 1 to ``engine.max_batch_size`` (32), lengths below 1.
            RuntimeError: this instance speaks already.
            torch.cuda.OutOfMemoryError: with advice what to lower.
        """
        check_whole_numbers("batch_sizes", batch_sizes, most=self.engine.max_batch_size)
        check_whole_numbers("prompt_lengths", prompt_lengths)
        with self._exclusively():
            call = read_call(self.model, *self._sample_call())
            settings = replace(call.settings, max_new_tokens=4, min_new_tokens=4)
            for rows, length in itertools.product(batch_sizes, {min(length, self.engine.max_seq_len - 1) for length in prompt_lengths}):
                inputs = PromptInputs(
                    call.inputs.embeds[:1, :1].repeat(rows, length, 1),
                    call.inputs.mask[:1, :1].repeat(rows, length),
                    call.inputs.text[:1, :1].repeat(rows, 1, 1),
                    call.inputs.pad,
                )
                for _ in range(RECORDING_RUNS):
                    speech = self.engine.start(inputs, settings, [0] * rows)
                    for _ in speech:
                        pass
                    speech.warm()
            self.codec.warmup()

    def _sample_call(self) -> tuple[str, dict[str, Any]]:
        """Return a method of the model and arguments that suit it."""
        text, kind = {"text": "Warm up."}, self.model.model.tts_model_type
        if kind == "custom_voice":
            return "generate_custom_voice", text | {"speaker": next(iter(self.model.get_supported_speakers() or []), None)}
        if kind == "voice_design":
            return "generate_voice_design", text | {"instruct": ""}
        voice = torch.zeros(self.model.model.talker.config.hidden_size)
        prompt = {"ref_code": [None], "ref_spk_embedding": [voice], "x_vector_only_mode": [True], "icl_mode": [False]}
        return "generate_voice_clone", text | {"voice_clone_prompt": prompt}

    def _generate(self, method: str, seed: int | Sequence[int] | None, /, **arguments: Any) -> tuple[list[np.ndarray], int]:
        with self._exclusively():
            clock = Clock()
            call = read_call(self.model, method, arguments)
            seeds = _seeds(seed, len(call.references))
            speeches, audio = [], []
            for first in range(0, len(seeds), self.engine.max_batch_size):
                rows = slice(first, first + self.engine.max_batch_size)
                inputs = replace(call.inputs, embeds=call.inputs.embeds[rows], mask=call.inputs.mask[rows], text=call.inputs.text[rows])
                speech = self.engine.start(inputs, call.settings, seeds[rows])
                for _ in speech:
                    pass
                codes = (codes[:length] for codes, length in zip(speech.codes, speech.lengths))
                audio += [_HostCopy(self.codec.decode(*pair)) for pair in zip(codes, call.references[rows])]
                speeches.append(speech)
            waveforms = [copy.numpy() for copy in audio]
            self._finish(clock, speeches, seeds)
        return waveforms, self.sample_rate

    def _stream(self, method: str, seed: int | None, /, **arguments: Any) -> Chunks:
        if (texts := check_texts(arguments["text"])) != 1:
            raise ValueError(f"{texts} texts: a stream speaks one; open one TTS for each stream, or call {method} to speak them together")
        seeds = _seeds(seed, 1)

        def chunks() -> Chunks:
            with self._exclusively():
                clock = Clock()
                call = read_call(self.model, method, arguments)
                speech = self.engine.start(call.inputs, call.settings, seeds)
                try:
                    for chunk in self._audio(speech, call.references[0]):
                        with clock.consumer():
                            yield chunk, self.sample_rate
                except GeneratorExit:
                    self._finish(clock, [speech], seeds)
                    raise
                self._finish(clock, [speech], seeds)

        return chunks()

    def _audio(self, speech: Speech, reference: Tensor | None) -> Iterator[np.ndarray]:
        """Yield a speech's audio in chunks.

        A chunk is decoded right behind its last frame, and the frame after it is launched before the host waits for the audio: the GPU does not
        stand still while the consumer has a chunk, and no chunk waits for more than its own frames.
        """
        self.codec.reset()
        if reference is not None:
            self.codec.push(reference)
        sizes = itertools.chain(self.chunk_frames, itertools.repeat(self.chunk_frames[-1]))
        sent, due, waiting = 0, next(sizes), None
        for frame in speech:
            decoded = None
            if frame + 1 == due:
                decoded = _HostCopy(self.codec.push(speech.codes[0, sent:due]))
                sent, due = due, due + next(sizes)
            if waiting is not None:
                yield waiting.numpy()
            waiting = decoded
        rest = _HostCopy(self.codec.push(speech.codes[0, sent : speech.lengths[0]])) if sent < speech.lengths[0] else None
        yield from (copy.numpy() for copy in (waiting, rest) if copy is not None)

    def _finish(self, clock: Clock, speeches: list[Speech], seeds: list[int]) -> None:
        """Note what the call took, and warn of speech that was cut off."""
        self.stats = stats = clock.stats(self.engine, speeches, seeds, self.codec.samples_per_frame / self.sample_rate, self.device)
        for limit, value in {"max_seq_len": self.engine.max_seq_len, "max_new_tokens": speeches[0].settings.max_new_tokens}.items():
            if cut := [str(text) for text, reason in enumerate(stats.end_reasons) if reason == limit]:
                which = f"of text {', '.join(cut)} was" if len(stats.end_reasons) > 1 else "was"
                warnings.warn(f"the speech {which} cut off by {limit}={value}: raise it, or split the text", stacklevel=4)

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Own this instance for a call."""
        if not self._speaking.acquire(blocking=False):
            raise RuntimeError(
                "this TTS is speaking already, in another thread or in a stream that has not ended: wait for it, close() the stream, or make "
                "another TTS of the same model, which shares its weights"
            )
        self.stats = None
        try:
            yield
        except torch.cuda.OutOfMemoryError as error:
            smaller = ", quantise the cache (kv_cache='int4')" if self.engine.kv_cache == "bf16" else ""
            advice = f"lower max_seq_len (now {self.engine.max_seq_len}){smaller}, speak fewer texts at once, or shorten the reference recording"
            raise torch.cuda.OutOfMemoryError(f"{error}\n{advice}") from error
        finally:
            self._speaking.release()


class _HostCopy:
    """Samples on their way to the host's memory."""

    def __init__(self, samples: Tensor) -> None:
        self._samples, self._arrived = samples, None
        if samples.is_cuda:
            self._samples = torch.empty(samples.shape, dtype=samples.dtype, pin_memory=True).copy_(samples, non_blocking=True)
            self._arrived = torch.cuda.current_stream(samples.device).record_event()

    def numpy(self) -> np.ndarray:
        """Wait for the samples and return them, in memory that is not pinned."""
        if self._arrived is None:
            return self._samples.numpy()
        self._arrived.synchronize()
        return self._samples.numpy().copy()


def _check_model(tts: Any) -> None:
    """Raise where this is no model that can be spoken with."""
    if not all(hasattr(getattr(tts, "model", None), name) for name in ("talker", "speech_tokenizer")):
        raise TypeError(
            f"{type(tts).__name__} is no Qwen3TTSModel: load one with qwen_tts.Qwen3TTSModel.from_pretrained(), or use TTS.from_pretrained()"
        )
    kind = tts.model.speech_tokenizer.get_model_type()
    if kind != "qwen3_tts_tokenizer_12hz":
        raise ValueError(f"speech tokenizer {kind!r}: only the 12 Hz one (qwen3_tts_tokenizer_12hz) decodes from codes alone, frame by frame")
    for config in (tts.model.talker.config, tts.model.talker.code_predictor.config):
        if config._attn_implementation != "sdpa":
            raise ValueError(f"attn_implementation={config._attn_implementation!r} takes no boolean mask: load the model with 'sdpa', its default")


def _mode(mode: str | None, options: Mapping[str, Any] | None, device: torch.device) -> str | None:
    if mode == "auto":
        return "reduce-overhead" if device.type == "cuda" else None
    if mode is not None and mode not in MODES:
        raise ValueError(f"mode={mode!r}: give 'auto', None or one of {', '.join(MODES)}")
    asked = {} if mode is None else torch._inductor.list_mode_options(mode) | dict(options or {})
    if device.type != "cuda" and asked.get("triton.cudagraphs"):
        raise ValueError(
            f"mode={mode!r} records CUDA graphs and the model is on the {device.type}: give 'default', None or 'auto', or move the model"
        )
    return mode


def _seeds(seed: int | Sequence[int] | None, texts: int) -> list[int]:
    if seed is None:
        return torch.randint(2**32, (texts,)).tolist()
    seeds = list(seed) if isinstance(seed, Iterable) and not isinstance(seed, str) else [seed] * texts
    if len(seeds) != texts:
        raise ValueError(f"{len(seeds)} seeds for {texts} texts: give one for all, or one each")
    for value in seeds:
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"seed={value!r}: give a whole number")
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"seed={value}: give one of 64 bits, from {-(2**63)} to {2**63 - 1}")
    return list(map(int, seeds))
