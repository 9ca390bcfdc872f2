"""One 80 ms frame of speech as one function, and the prompt before it, over the talker's own submodules.

The code predictor runs once per codebook after the first, their samplers choose, the codes' embeddings are summed, and the talker takes one step
and chooses the next frame's first code. All that passes from one frame to the next stands in the buffers of a :class:`SpeechState`, so that a CUDA
graph of a frame replays without arguments.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtts_compile.cache import StaticKVCache, add_buffer, within
from qtts_compile.code_embeddings import CodeEmbeddings
from qtts_compile.kernels.copy_to_host import copy_to_host
from qtts_compile.kernels.sample import sample
from qtts_compile.launcher import mark_varying
from qtts_compile.regions import Angles, Compile, Stack
from qtts_compile.sampling import Settings
from qtts_compile.turboquant_cache import Protect, make_cache

STRETCH = 64  # frames whose text is on the device at once


class SpeechState(nn.Module):
    """The device memory of ``batch`` utterances spoken together, the talker's cache (:func:`make_cache`) among it.

    Buffers: ``text`` ``[B, STRETCH, H]`` what the talker hears, frame f at f modulo :data:`STRETCH`; ``hidden`` ``[B, 1, H]`` its last hidden
    state; ``chosen`` ``[2, B]`` the last two codes it chose, number n at n modulo 2; ``codes`` ``[B, slots, groups]`` the frames so far;
    ``position`` ``[1]`` the next cache slot; ``frame`` ``[1]`` the next frame; ``start`` ``[B]`` the first slot of a row that is not padding;
    ``seen``, ``suppressed``, ``ending`` ``[B or 1, V]`` tokens chosen before, never chosen, and ending speech; ``min_new_tokens`` ``[1]``;
    ``seed`` ``[B]``; ``controls``, ``sub_controls`` ``[5]`` of the samplers.

    Attributes:
        fetched: ``chosen`` in the host's memory, after :meth:`fetch`.
    """

    text: Tensor
    hidden: Tensor
    chosen: Tensor
    codes: Tensor
    position: Tensor
    frame: Tensor
    start: Tensor
    seen: Tensor
    suppressed: Tensor
    ending: Tensor
    min_new_tokens: Tensor
    seed: Tensor
    controls: Tensor
    sub_controls: Tensor

    def __init__(self, talker: Any, batch: int, slots: int, kv_cache: str = "bf16", protect: Protect | None = None) -> None:
        super().__init__()
        config, parameter = talker.config, next(talker.parameters())
        dtype, device = parameter.dtype, parameter.device
        self.batch, self.slots, self.groups, self.vocabulary = batch, slots, config.num_code_groups, config.vocab_size
        self.sub_cache = StaticKVCache(config.code_predictor_config, batch, self.groups, dtype, device)
        for name, length in {"text": STRETCH, "hidden": 1}.items():
            add_buffer(self, name, (batch, length, config.hidden_size), dtype, device)
        for name, shape in {"chosen": (2, batch), "codes": (batch, slots, self.groups), "start": (batch,), "seed": (batch,)}.items():
            add_buffer(self, name, shape, torch.long, device)
        self.cache = make_cache(config, batch, slots, dtype, self.start, kv_cache, protect)
        for name in ("position", "frame", "min_new_tokens"):
            add_buffer(self, name, (1,), torch.long, device)
        for name, rows in {"seen": batch, "suppressed": 1, "ending": 1}.items():
            add_buffer(self, name, (rows, self.vocabulary), torch.bool, device)
        for name in ("controls", "sub_controls"):
            add_buffer(self, name, (5,), torch.float32, device)
        self.fetched = torch.zeros(2, batch, dtype=torch.long, pin_memory=device.type == "cuda")

    @property
    def token(self) -> Tensor:
        """The code ``[B, 1]`` that the talker chose for the next frame."""
        return self.chosen.index_select(0, self.frame % 2).T

    def fetch(self) -> None:
        """Start to copy the codes that the talker chose to the host. What is there of the last but one does not change meanwhile."""
        copy_to_host(self.chosen, self.fetched)

    def reset(self, settings: Settings, start: Tensor, seeds: Tensor) -> None:
        """Begin utterances whose prompts have their first token at slot ``start`` ``[B]`` int64, drawn with ``seeds`` ``[B]`` int64."""
        self.frame.zero_()
        self.seen.zero_()
        self.suppressed.zero_()
        self.suppressed[0, list(settings.suppress_tokens)] = True
        self.ending.zero_()
        self.ending[0, settings.eos_token_id] = True
        self.min_new_tokens.fill_(settings.min_new_tokens)
        self.start.copy_(start)
        self.seed.copy_(seeds)
        self.controls.copy_(settings.talker.controls())
        self.sub_controls.copy_(settings.subtalker.controls())

    def choose(self, logits: Tensor, index: Tensor, draw: Tensor) -> None:
        """Choose the talker's token number ``index`` ``[1]`` from ``logits`` ``[B, V]`` by ``draw`` ``[1]``, at rest, and remember it."""
        blocked = self.suppressed | (self.ending & (index < self.min_new_tokens))
        blocked = blocked.expand(self.batch, -1)
        token = sample(logits, self.controls, self.seed, draw, self.seen, blocked)
        # One kernel, where a scatter would be a copy and a scatter.
        self.seen |= torch.arange(self.vocabulary, device=token.device) == token[:, None]
        self.chosen.index_copy_(0, index % 2, token[None])


class Prompt(nn.Module):
    """Read a prompt, fill the cache and choose the first code.

    Args:
        talker: the model.
        state: the utterances.
        stack: the talker's layers.
        compile: compiles a part of it.
    """

    def __init__(self, talker: Any, state: SpeechState, stack: Stack, compile: Compile = lambda part: part) -> None:
        super().__init__()
        self.talker, self.state, self.stack = talker, state, stack
        self._place, self._choose = compile(self.place), compile(self.choose)

    def forward(self, embeds: Tensor, length: Tensor) -> None:
        """Read ``embeds`` ``[B, T, H]``, of which the first ``length`` ``[1]`` int64 slots count; rows are padded at their left up to ``start``.

        What lies beyond ``length`` pads the prompt to a size that is compiled already: no token sees it, the frames overwrite it, and a
        quantised cache does not take it for the newest tokens.
        """
        mark_varying((embeds, 1))
        slots, mask, positions, angles = self._place(embeds)
        hidden = self.stack(embeds, mask, positions, angles, self.state.cache.prompt(slots, length - 1), varying=True)
        mark_varying((hidden, 1))
        self._choose(hidden, length)

    def place(self, embeds: Tensor) -> tuple[Tensor, Tensor, Tensor, Angles | None]:
        """Return slots ``[T]``, mask ``[B, 1, T, T]``, positions ``[B, T]`` and their angles for a prompt ``[B, T, H]``."""
        slots = torch.arange(embeds.shape[1], device=embeds.device)
        start = self.state.start[:, None]
        # Padding sees itself, so that no row of the softmax is empty: a NaN would spread through its values.
        mask = (slots <= slots[:, None]) & (slots >= start[:, None]) | (slots == slots[:, None])
        positions = (slots - start).clamp(min=0)
        return slots, mask[:, None], positions, self.stack.angles(positions)

    def choose(self, hidden: Tensor, length: Tensor) -> None:
        """Choose the first code after the hidden states ``[B, T, H]`` of the first ``length`` ``[1]`` tokens."""
        state, hidden = self.state, self.stack.norm(hidden.index_select(1, length - 1))
        state.hidden.copy_(hidden)
        state.position.copy_(length)
        state.choose(self.talker.codec_head(hidden[:, -1]), state.frame, state.frame)  # the first draw is number 0


class Frame(nn.Module):
    """Complete one frame of 16 codes and choose the first code of the next.

    What repeats is compiled once: a layer of the code predictor, which runs 15 times a frame, what stands between its passes, and a layer of the
    talker. Without ``compile``, and with stacks made without, the frame is one function that ``torch.compile`` traces as a whole.

    Args:
        talker: the model.
        state: the utterances.
        stack: the talker's layers.
        predictor: the code predictor's layers.
        embeddings: what the code predictor reads of its own codes.
        compile: compiles a part of the frame.
    """

    slots: Tensor

    def __init__(
        self,
        talker: Any,
        state: SpeechState,
        stack: Stack,
        predictor: Stack,
        embeddings: CodeEmbeddings,
        compile: Compile = lambda part: part,
    ) -> None:
        super().__init__()
        self.talker, self.state, self.stack, self.predictor, self.embeddings = talker, state, stack, predictor, embeddings
        self.register_buffer("slots", torch.arange(state.slots, device=state.chosen.device), persistent=False)
        self._passes = [self._pass(group) for group in range(1, state.groups)]
        self._open, self._choose = compile(self.open), compile(self.choose)
        self._hear, self._close = compile(self.hear), compile(self.close)

    def _pass(self, group: int) -> tuple[Tensor, Tensor, Tensor, Angles | None]:
        """Return slots ``[T]``, mask ``[1, 1, T, groups]``, positions ``[1, T]`` and their angles in the predictor's pass for a code.

        Each lies in memory of its own, at an address that compiled code likes.
        """
        slots = torch.tensor([0, 1] if group == 1 else [group], device=self.slots.device)
        mask = torch.arange(self.state.groups, device=slots.device) <= slots[:, None]
        return slots, mask[None, None], slots[None], self.predictor.angles(slots[None])

    def forward(self, reach: int | None = None) -> None:
        """Speak one frame while the talker hears ``state.text`` of it, at a position within the first ``reach`` slots, by default anywhere."""
        state, heads = self.state, self.talker.code_predictor.lm_head
        inputs, draws = self._open()
        codes = []
        for draw, (slots, mask, positions, angles), head, table in zip(draws, self._passes, heads, self.embeddings.tables):
            hidden = self.predictor(inputs, mask, positions, angles, state.sub_cache.step(slots))
            code, inputs = self._choose(hidden, draw[:1], head, table)
            codes.append(code)
        heard, mask, positions, angles = self._hear(codes, within(self.slots, reach, dim=0))
        self._close(self.stack(heard, mask, positions, angles, state.cache.step(state.position, reach)), draws[-1, :1])

    def open(self) -> tuple[Tensor, Tensor]:
        """Return what the predictor reads first ``[B, 2, H']``, and in column 0 the numbers of the frame's draws ``[groups, 2]``, the talker's last.

        Each number lies at an address that is a multiple of 16 bytes, as compiled code wants it.
        """
        state, groups = self.state, self.state.groups
        embed = self.talker.get_input_embeddings()(state.token)
        draws = state.frame * groups + torch.arange(1, groups + 1, device=embed.device)
        return self.talker.code_predictor.small_to_mtp_projection(torch.cat((state.hidden, embed), 1)), draws[:, None].repeat(1, 2)

    def choose(self, hidden: Tensor, draw: Tensor, head: nn.Module, table: Tensor) -> tuple[Tensor, Tensor]:
        """Choose a code ``[B, 1]`` by ``draw`` ``[1]`` after the predictor's ``hidden`` states ``[B, T, H']``, and return it.

        With it comes what the predictor reads next ``[B, 1, H']``, from ``table`` ``[V, H']``.
        """
        logits = head(self.predictor.norm(hidden[:, -1]))
        code = sample(logits, self.state.sub_controls, self.state.seed, draw)[:, None]
        return code, F.embedding(code, table)

    def hear(self, codes: list[Tensor], slots: Tensor) -> tuple[Tensor, Tensor, Tensor, Angles | None]:
        """Store the frame's ``codes``, of which the talker chose the first, and return what the talker hears: the sum of all their embeddings.

        After it come the mask ``[B, 1, 1, S]`` of ``slots`` ``[S]``, the position ``[B, 1]`` and its angles.
        """
        state, position = self.state, self.state.position
        codes = [state.token, *codes]
        # By comparisons, which become one kernel with the write. With torch.cat there are three.
        places, row = torch.arange(state.groups, device=position.device), codes[0]
        for group, code in enumerate(codes[1:], 1):
            row = torch.where(places == group, code, row)
        state.codes.index_copy_(1, state.frame, row[:, None])
        embeddings = self.talker.get_input_embeddings(), *self.talker.code_predictor.get_input_embeddings()
        # Added up in float32 and rounded once, as a sum over the codes is, but in a form that becomes one kernel with all the look-ups.
        text = state.text.index_select(1, state.frame % STRETCH)
        total = torch.zeros_like(text, dtype=torch.float32)
        for embedding, code in zip(embeddings, codes):
            total = total + embedding(code)
        heard = total.to(text.dtype) + text
        mask = (slots <= position) & (slots >= state.start[:, None])
        positions = (position - state.start)[:, None]
        return heard, mask[:, None, None], positions, self.stack.angles(positions)

    def close(self, hidden: Tensor, draw: Tensor) -> None:
        """Choose the next frame's first code by ``draw`` ``[1]`` after the talker's ``hidden`` states ``[B, 1, H]``."""
        state, hidden = self.state, self.stack.norm(hidden)
        state.frame.add_(1)
        state.position.add_(1)
        state.hidden.copy_(hidden)
        state.choose(self.talker.codec_head(hidden[:, -1]), state.frame, draw)
