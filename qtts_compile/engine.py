"""Speak prompts frame by frame: compile and record what runs, launch it, and notice the end of speech without waiting for the GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qtts_compile.arguments import check_whole_number
from qtts_compile.cache import StaticKVCache
from qtts_compile.code_embeddings import CodeEmbeddings
from qtts_compile.frame import STRETCH, Frame, Prompt, SpeechState
from qtts_compile.launcher import Launcher
from qtts_compile.regions import Stack
from qtts_compile.sampling import Settings
from qtts_compile.stacks import check_layers, find_stacks
from qtts_compile.turboquant_cache import Protect, make_cache, warn_of

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
NEAR, NEAR_BATCH = 256, 4  # slots that frames of so many rows are recorded for apart: attention over fewer takes fewer programs
EndReason = Literal["end of speech", "max_new_tokens", "max_seq_len", "closed"]


@dataclass(frozen=True)
class PromptInputs:
    """What the talker hears.

    Attributes:
        embeds: ``[B, T, H]``, rows padded at their left.
        mask: ``[B, T]``, 0 where a row is padded.
        text: ``[B, L, H]``, the text that frames 0 to L - 1 hear.
        pad: ``[1, 1, H]``, what the frames after that hear.
    """

    embeds: Tensor
    mask: Tensor
    text: Tensor
    pad: Tensor

    def write_text(self, frame: int, text: Tensor) -> None:
        """Write what frames hear from ``frame`` on into ``text`` ``[B, frames, H]``."""
        known = self.text[:, frame : frame + text.shape[1]]
        text[:, : known.shape[1]] = known
        text[:, known.shape[1] :] = self.pad

    def padded_to(self, batch: int, length: int) -> PromptInputs:
        """Repeat the first row up to ``batch`` rows and add slots at the right up to ``length``."""
        rows = [*range(len(self.embeds)), *[0] * (batch - len(self.embeds))]
        spare = length - self.embeds.shape[1]
        embeds, mask, text = (x if len(rows) == len(x) else x[rows] for x in (self.embeds, self.mask, self.text))
        return PromptInputs(F.pad(embeds, (0, 0, 0, spare)), mask, text, self.pad)


class Engine:
    """Runs a talker and its code predictor.

    Args:
        talker: a ``Qwen3TTSTalkerForConditionalGeneration``, or what is built like it.
        max_seq_len: slots of the static cache: prompt and frames together.
        launcher: compiles and runs; None runs without compiling.
        kv_cache, protect: what the talker's cache holds (:func:`qtts_compile.turboquant_cache.make_cache`).

    Raises:
        TypeError: a ``max_seq_len`` that is no int, a ``protect`` that is no :class:`qtts_compile.Protect` of ints.
        ValueError: a ``max_seq_len`` below 32 or beyond the model's positions; an unknown ``kv_cache``, or a ``protect`` or a model that does not
            suit it; a launcher whose option ``layers`` reaches beyond a stack.
    """

    def __init__(
        self,
        talker: Any,
        *,
        max_seq_len: int = 2048,
        launcher: Launcher | None = None,
        kv_cache: str = "bf16",
        protect: Protect | None = None,
    ) -> None:
        longest = talker.config.max_position_embeddings
        check_whole_number("max_seq_len", max_seq_len, 32, longest, ", the positions this model knows")
        nowhere, dtype = torch.zeros(1, dtype=torch.long, device="meta"), next(talker.parameters()).dtype
        warn_of(make_cache(talker.config, 1, max_seq_len, dtype, nowhere, kv_cache, protect), stacklevel=3)
        self.talker, self.max_seq_len, self.kv_cache, self.protect = talker, max_seq_len, kv_cache, protect
        self.launcher = launcher or Launcher(next(talker.parameters()).device)
        if self.launcher.backend == "qtts" and (layers := self.launcher.options.get("layers")):
            check_layers(find_stacks(talker), layers)
        self._runners: dict[int, Runner] = {}
        self._shared: Shared | None = None

    @property
    def max_batch_size(self) -> int:
        """The most utterances that are spoken together."""
        return BATCH_SIZES[-1]

    @property
    def cache_bytes(self) -> int:
        """The bytes of the talker's caches: one for each size of batch that was spoken."""
        return sum(runner.state.cache.allocated_bytes for runner in self._runners.values())

    @torch.inference_mode()
    def start(self, inputs: PromptInputs, settings: Settings, seeds: Sequence[int]) -> Speech:
        """Read a prompt and choose the first codes. Starting another speech ends this one.

        Raises ValueError for more rows than :attr:`max_batch_size` and for a prompt that leaves no slot for a frame.
        """
        rows, length = inputs.embeds.shape[:2]
        if rows > self.max_batch_size:
            raise ValueError(f"{rows} utterances at once: give at most {self.max_batch_size}, in several calls if there are more")
        if len(seeds) != rows:
            raise ValueError(f"{len(seeds)} seeds for {rows} utterances: give one each")
        if length >= self.max_seq_len:
            fits = f"max_seq_len={self.max_seq_len} fits {self.max_seq_len - 1} and a frame"
            raise ValueError(f"the prompt has {length} tokens, and {fits}: shorten it or raise max_seq_len")
        batch = next(size for size in BATCH_SIZES if size >= rows)
        if batch not in self._runners:
            with torch.inference_mode(False):
                state = SpeechState(self.talker, batch, self.max_seq_len, self.kv_cache, self.protect)
                self._runners[batch] = Runner(self.talker, state, self._share(), self.launcher)
        runner = self._runners[batch]
        inputs = inputs.padded_to(batch, min(padded_length(length), self.max_seq_len))
        runner.state.reset(settings, inputs.mask.argmax(1), torch.tensor([*seeds, *[0] * (batch - rows)]))
        self._share().embeddings.refresh()
        runner.read(inputs.embeds, torch.tensor([length], device=inputs.embeds.device))
        return Speech(runner, inputs, settings, rows, length)

    def _share(self) -> Shared:
        """Return what all batch sizes share, made when it is first asked for."""
        if self._shared is None:
            launcher, predictor = self.launcher, self.talker.code_predictor
            compile = launcher.compile if launcher.compiles else None
            split = "layers" not in launcher.options  # that option tells layers apart
            self._shared = Shared(
                Stack(self.talker.model, 3, self.max_seq_len, compile, split),
                Stack(predictor.model, 1, self.talker.config.num_code_groups, compile, split),
                CodeEmbeddings(predictor),
            )
        return self._shared


class Shared(NamedTuple):
    """The layers of a talker, those of its code predictor, and what that reads of its own codes."""

    stack: Stack
    predictor: Stack
    embeddings: CodeEmbeddings


class Runner:
    """The memory of one batch size, and what runs in it."""

    def __init__(self, talker: Any, state: SpeechState, shared: Shared, launcher: Launcher) -> None:
        self.state = state
        prompt, frame = Prompt(talker, state, shared.stack, launcher.compile), Frame(talker, state, *shared, launcher.compile)

        def read(embeds: Tensor, length: Tensor) -> None:
            prompt(embeds, length)
            state.fetch()

        def speak(reach: int | None) -> None:
            frame(reach)
            state.fetch()

        self.read = launcher.wrap(read)
        self.kinds = {reach: launcher.wrap(partial(speak, None if reach == state.slots else reach)) for reach in reaches_of(state)}

    def speak(self, position: int) -> None:
        """Speak one frame, in which the talker's step is at the slot ``position``."""
        next(speak for reach, speak in self.kinds.items() if position < reach)()


class Speech:
    """Utterances being spoken together.

    Iterating launches frames and yields their numbers. A frame that is yielded has been launched, not finished: work on :attr:`codes` that is
    launched after it sees it. The iteration ends when every row has ended; one that was left goes on where it was.
    """

    def __init__(self, runner: Runner, inputs: PromptInputs, settings: Settings, rows: int, length: int) -> None:
        state = runner.state
        self.settings = settings
        self._state, self._runner, self._inputs, self._length = state, runner, inputs, length
        self._limit = min(settings.max_new_tokens - 1, state.slots - length)
        self._limited_by: EndReason = "max_new_tokens" if self._limit == settings.max_new_tokens - 1 else "max_seq_len"
        self._ends: list[int | None] = [None] * rows
        self.frames = 0
        self._fetched = [torch.cuda.Event() for _ in range(2)] if state.chosen.is_cuda else []

    @property
    def codes(self) -> Tensor:
        """The frames launched so far, int64 ``[rows, frames, groups]`` on the device, valid until the engine starts another speech."""
        return self._state.codes[: len(self._ends), : self.frames]

    @property
    def lengths(self) -> list[int]:
        """Frames of each row, without what was launched after its end."""
        return [self.frames if end is None else end for end in self._ends]

    @property
    def end_reasons(self) -> list[EndReason]:
        """Why each row ended: "closed" if the iteration was left before."""
        otherwise: EndReason = self._limited_by if self.frames == self._limit else "closed"
        return [otherwise if end is None else "end of speech" for end in self._ends]

    def warm(self) -> None:
        """Launch a frame of each kind that a longer speech would come to, so that none is left to compile. It ends this speech."""
        for reach, speak in self._runner.kinds.items():
            if int(self._state.position) < reach:
                speak()

    @property
    def cache(self) -> StaticKVCache:
        """The talker's cache."""
        return self._state.cache

    @property
    def quantized_tokens(self) -> list[int]:
        """Of each row, how many tokens of prompt and speech attention read from codes in its last frame (:meth:`StaticKVCache.quantized_tokens`)."""
        prompts = self._inputs.mask.sum(1).tolist()
        return [self.cache.quantized_tokens(prompt + frames) for prompt, frames in zip(prompts, self.lengths)]

    def __iter__(self) -> Iterator[int]:
        if None not in self._ends:
            return
        self._launched(self.frames)
        for frame in range(self.frames, self._limit):
            self._give_text(frame)
            self._runner.speak(self._length + frame)
            self._launched(frame + 1)
            if self._ended(frame):
                return
            self.frames = frame + 1
            yield frame
        self._ended(self._limit)

    @torch.inference_mode()
    def _give_text(self, frame: int) -> None:
        """Have the text of a frame on the device, and with it that of the frames after it."""
        if frame % STRETCH == 0:
            self._inputs.write_text(frame, self._state.text)

    def _launched(self, index: int) -> None:
        """Note that all is launched that brings token number ``index`` of every row to the host."""
        if self._fetched:
            self._fetched[index % 2].record(torch.cuda.current_stream(self._state.chosen.device))

    def _ended(self, index: int) -> bool:
        """Note the rows whose token number ``index`` ends speech, and tell whether all rows have ended.

        The token was chosen a frame ago, and the GPU has that frame to do while the host waits for it.
        """
        if self._fetched:
            self._fetched[index % 2].synchronize()
        for row, token in enumerate(self._state.fetched[index % 2, : len(self._ends)].tolist()):
            if self._ends[row] is None and token == self.settings.eos_token_id:
                self._ends[row] = index
        return None not in self._ends


def reaches_of(state: SpeechState) -> tuple[int, ...]:
    """Return within how many slots each kind of frame has its position, the smallest first."""
    return (NEAR, state.slots) if state.batch <= NEAR_BATCH and state.slots > NEAR else (state.slots,)


def padded_length(length: int) -> int:
    """Return the prompt size that is compiled and recorded for ``length`` tokens: at most a quarter more, from 16 on."""
    step = max(16, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step
