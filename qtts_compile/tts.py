"""Text to speech: the methods of ``qwen_tts.Qwen3TTSModel``, compiled, seeded and streamed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from qtts_compile.environment import import_qwen_tts
from qtts_compile.pipeline import Chunks, Pipeline


class TTS(Pipeline):
    """Speaks with a loaded ``Qwen3TTSModel``, which it does not change.

    Its ``generate_...`` methods take and return what those of ``Qwen3TTSModel`` do, and ``seed``: an int with which each text draws as if it were
    alone, or one int for each text; by default torch's generator, which ``torch.manual_seed`` sets, gives each text its own. With a seed the same
    GPU speaks the same call the same, and a stream as its text alone. In float32 a text is also spoken in a batch as alone; in bfloat16 and float16
    kernels of one text and of several round differently, and what a seed draws may differ with it. Lists of texts are spoken together, at most
    ``engine.max_batch_size`` (32) at once and the rest after them. Its ``stream_...`` methods take one text and yield the same audio in chunks,
    float32 samples and their rate, as it comes; they begin when the first chunk is asked for. Arguments and their defaults are qwen_tts's; any that
    it would ignore is a TypeError. ``do_sample=False`` alone is greedy for all codebooks. Sampling arguments: do_sample, temperature, top_k, top_p,
    repetition_penalty, max_new_tokens, subtalker_dosample, subtalker_temperature, subtalker_top_k, subtalker_top_p.

    One call at a time: another, from any thread, is a RuntimeError. After an exception or a stream that was closed early the next call works.

    Args:
        model: a ``Qwen3TTSModel`` with the 12 Hz speech tokenizer.
        mode: ``torch.compile``'s mode, None to run uncompiled, or "auto": "reduce-overhead" (CUDA graphs) on a GPU and None elsewhere.
        max_seq_len: the most tokens of a prompt and frames of its speech together.
        backend: ``torch.compile``'s backend.
        options: ``torch.compile``'s options, beside the mode and ``kv_cache``; of backend "qtts" those of :class:`qtts_compile.Options`.
        chunk_frames: frames of a stream's first chunk, its second and so on; the last repeats. A frame is 80 ms.
        kv_cache: how the talker's keys and values are held: "bf16", in the model's dtype, whatever that is; or packed, TurboQuant (arXiv
            2504.19874) with 4 bits a coordinate ("int4"), 3 ("int3") or 4 for keys and 3 for values ("k4v3"); or e4m3 ("fp8").
        protect: what of a packed cache stays in the model's dtype (:class:`qtts_compile.Protect`): by default the first two layers, and in the
            others the first 4 tokens and the newest 64.

    Attributes:
        sample_rate: samples a second.
        stats: what the last call took (:class:`qtts_compile.stats.Stats`); None before its end, and if it failed.

    Raises:
        TypeError: a ``model`` that is none, or whose audio cannot be streamed; a ``max_seq_len`` or ``chunk_frames`` that are no ints; a
            ``protect`` that is no ``Protect`` of ints.
        ValueError: a model with another speech tokenizer or another ``attn_implementation`` than "sdpa"; an unknown mode, or one of CUDA graphs on
            a CPU; unknown or impossible options, options without a mode, ``mode`` or ``kv_cache`` among them, ``layers`` that a stack does not
            have; a number out of range; an unknown ``kv_cache``, or a ``protect`` that does not suit it.
        RuntimeError: options that another backend than "qtts" does not take.
    """

    @classmethod
    def from_pretrained(cls, id_or_dir: str, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None, **arguments: Any) -> TTS:
        """Load a checkpoint from the hub or a directory, to a GPU in bfloat16 where there is one and else to the CPU in float32.

        ``arguments`` are those of :class:`TTS`. Raises as :class:`TTS` and as qwen_tts's own method, and ImportError where that is not installed.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        return cls(import_qwen_tts().Qwen3TTSModel.from_pretrained(str(id_or_dir), device_map=device, dtype=dtype), **arguments)

    def generate_custom_voice(
        self,
        text: str | list[str],
        speaker: str | list[str],
        language: str | list[str] | None = None,
        instruct: str | list[str] | None = None,
        non_streaming_mode: bool = True,
        *,
        seed: int | Sequence[int] | None = None,
        **sampling: Any,
    ) -> tuple[list[np.ndarray], int]:
        """Speak with a named voice of a CustomVoice model.

        Returns:
            For each text a waveform, float32 ``[samples]`` in [-1, 1], 80 ms a frame; and the samples a second.

        Raises:
            TypeError: a text that is no string, a seed that is no whole number, an argument that qwen_tts does not use.
            ValueError: a model of another kind; an unknown speaker or language; nothing to speak, a prompt that ``max_seq_len`` has no room for;
                lists of different lengths, or not one seed for each text; a seed or a sampling argument out of range.
            RuntimeError: this instance speaks already.
            torch.cuda.OutOfMemoryError: with what to lower.
        """
        arguments = dict(text=text, speaker=speaker, language=language, instruct=instruct, non_streaming_mode=non_streaming_mode)
        return self._generate("generate_custom_voice", seed, **arguments, **sampling)

    def stream_custom_voice(
        self,
        text: str,
        speaker: str,
        language: str | None = None,
        instruct: str | None = None,
        non_streaming_mode: bool = True,
        *,
        seed: int | None = None,
        **sampling: Any,
    ) -> Chunks:
        """Speak as :meth:`generate_custom_voice` does, chunk by chunk.

        Returns:
            A generator of chunks, float32 ``[samples]`` in [-1, 1] of ``chunk_frames`` frames, each with the samples a second.

        Raises:
            TypeError, ValueError: as :meth:`generate_custom_voice`, and for several texts: of text and seed at once, of the rest when the first
                chunk is asked for.
            RuntimeError, torch.cuda.OutOfMemoryError: as :meth:`generate_custom_voice`, when a chunk is asked for.
        """
        arguments = dict(text=text, speaker=speaker, language=language, instruct=instruct, non_streaming_mode=non_streaming_mode)
        return self._stream("generate_custom_voice", seed, **arguments, **sampling)

    def generate_voice_clone(
        self,
        text: str | list[str],
        language: str | list[str] | None = None,
        ref_audio: Any = None,
        ref_text: str | list[str | None] | None = None,
        x_vector_only_mode: bool | list[bool] = False,
        voice_clone_prompt: Any = None,
        non_streaming_mode: bool = False,
        *,
        seed: int | Sequence[int] | None = None,
        **sampling: Any,
    ) -> tuple[list[np.ndarray], int]:
        """Speak with the voice of a recording, or of what :meth:`create_voice_clone_prompt` made of it, by a Base model.

        Returns and raises as :meth:`generate_custom_voice`, besides what reading ``ref_audio`` raises, and ValueError where there is neither that nor
        a prompt, or no ``ref_text`` and ``x_vector_only_mode`` is False.
        """
        return self._generate(
            "generate_voice_clone",
            seed,
            text=text,
            language=language,
            ref_audio=ref_audio,
            ref_text=ref_text,
            x_vector_only_mode=x_vector_only_mode,
            voice_clone_prompt=voice_clone_prompt,
            non_streaming_mode=non_streaming_mode,
            **sampling,
        )

    def stream_voice_clone(
        self,
        text: str,
        language: str | None = None,
        ref_audio: Any = None,
        ref_text: str | None = None,
        x_vector_only_mode: bool = False,
        voice_clone_prompt: Any = None,
        non_streaming_mode: bool = False,
        *,
        seed: int | None = None,
        **sampling: Any,
    ) -> Chunks:
        """Speak as :meth:`generate_voice_clone` does, chunk by chunk: returns and raises as :meth:`stream_custom_voice`."""
        return self._stream(
            "generate_voice_clone",
            seed,
            text=text,
            language=language,
            ref_audio=ref_audio,
            ref_text=ref_text,
            x_vector_only_mode=x_vector_only_mode,
            voice_clone_prompt=voice_clone_prompt,
            non_streaming_mode=non_streaming_mode,
            **sampling,
        )

    def generate_voice_design(
        self,
        text: str | list[str],
        instruct: str | list[str],
        language: str | list[str] | None = None,
        non_streaming_mode: bool = True,
        *,
        seed: int | Sequence[int] | None = None,
        **sampling: Any,
    ) -> tuple[list[np.ndarray], int]:
        """Speak with a voice that ``instruct`` describes, by a VoiceDesign model. Returns and raises as :meth:`generate_custom_voice`."""
        arguments = dict(text=text, instruct=instruct, language=language, non_streaming_mode=non_streaming_mode)
        return self._generate("generate_voice_design", seed, **arguments, **sampling)

    def stream_voice_design(
        self,
        text: str,
        instruct: str,
        language: str | None = None,
        non_streaming_mode: bool = True,
        *,
        seed: int | None = None,
        **sampling: Any,
    ) -> Chunks:
        """Speak as :meth:`generate_voice_design` does, chunk by chunk: returns and raises as :meth:`stream_custom_voice`."""
        arguments = dict(text=text, instruct=instruct, language=language, non_streaming_mode=non_streaming_mode)
        return self._stream("generate_voice_design", seed, **arguments, **sampling)

    def create_voice_clone_prompt(
        self, ref_audio: Any, ref_text: str | list[str | None] | None = None, x_vector_only_mode: bool | list[bool] = False
    ) -> list[Any]:
        """Prepare recordings for :meth:`generate_voice_clone`, once for many calls: qwen_tts's own method, and its errors."""
        return self.model.create_voice_clone_prompt(ref_audio, ref_text, x_vector_only_mode)

    def get_supported_speakers(self) -> list[str] | None:
        """Return the named voices; None where the model does not say."""
        return self.model.get_supported_speakers()

    def get_supported_languages(self) -> list[str] | None:
        """Return the languages; None where the model does not say."""
        return self.model.get_supported_languages()
