"""One 80 ms frame of speech as one function, and the prompt before it, over the talker's own submodules.

The code predictor runs once per codebook after the first, their samplers choose, the codes' embeddings are summed, and the talker takes one step
and chooses the next frame's first code. All that passes from one frame to the next stands in the buffers of a :class:`SpeechState`, so that a CUDA
graph of a frame replays without arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qtts_compile.cache import StaticKVCache, add_buffer
from qtts_compile.kernels.sample import sample
from qtts_compile.sampling import Settings


class SpeechState(nn.Module):
    """The device memory of ``batch`` utterances spoken together.

    Buffers: ``text`` ``[B, 1, H]`` what the talker hears in the next frame; ``hidden`` ``[B, 1, H]`` its last hidden state; ``token`` ``[B, 1]``
    the code it chose last; ``codes`` ``[B, slots, groups]`` the frames so far; ``position`` ``[1]`` the next cache slot; ``frame`` ``[1]`` the
    next frame; ``start`` ``[B]`` the first slot of a row that is not padding; ``seen``, ``suppressed``, ``ending`` ``[B or 1, V]`` tokens chosen
    before, never chosen, and ending speech; ``min_new_tokens`` ``[1]``; ``seed`` ``[B]``; ``controls``, ``sub_controls`` ``[5]`` of the samplers.
    """

    text: Tensor
    hidden: Tensor
    token: Tensor
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

    def __init__(self, talker: Any, batch: int, slots: int) -> None:
        super().__init__()
        config, parameter = talker.config, next(talker.parameters())
        dtype, device = parameter.dtype, parameter.device
        self.batch, self.slots, self.groups, self.vocabulary = batch, slots, config.num_code_groups, config.vocab_size
        self.cache = StaticKVCache(config, batch, slots, dtype, device)
        self.sub_cache = StaticKVCache(config.code_predictor_config, batch, self.groups, dtype, device)
        for name in ("text", "hidden"):
            add_buffer(self, name, (batch, 1, config.hidden_size), dtype, device)
        for name, shape in {"token": (batch, 1), "codes": (batch, slots, self.groups), "start": (batch,), "seed": (batch,)}.items():
            add_buffer(self, name, shape, torch.long, device)
        for name in ("position", "frame", "min_new_tokens"):
            add_buffer(self, name, (1,), torch.long, device)
        for name, rows in {"seen": batch, "suppressed": 1, "ending": 1}.items():
            add_buffer(self, name, (rows, self.vocabulary), torch.bool, device)
        for name in ("controls", "sub_controls"):
            add_buffer(self, name, (5,), torch.float32, device)

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

    def choose(self, logits: Tensor, index: Tensor) -> None:
        """Choose the talker's token number ``index`` ``[1]`` from ``logits`` ``[B, V]`` and remember it."""
        blocked = self.suppressed | (self.ending & (index < self.min_new_tokens))
        blocked = blocked.expand(self.batch, -1)
        token = sample(logits, self.controls, self.seed, index * self.groups, self.seen, blocked)[:, None]
        self.seen.scatter_(1, token, True)
        self.token.copy_(token)


class Prompt(nn.Module):
    """Read a prompt, fill the cache and choose the first code."""

    def __init__(self, talker: Any, state: SpeechState) -> None:
        super().__init__()
        self.talker, self.state = talker, state

    def forward(self, embeds: Tensor, length: Tensor) -> None:
        """Read ``embeds`` ``[B, T, H]``, of which the first ``length`` ``[1]`` int64 slots count; rows are padded at their left up to ``start``.

        What lies beyond ``length`` pads the prompt to a size that is compiled already: no token sees it, and the frames overwrite it.
        """
        state = self.state
        slots = torch.arange(embeds.shape[1], device=embeds.device)
        start = state.start[:, None, None]
        # Padding sees itself, so that no row of the softmax is empty: a NaN would spread through its values.
        mask = (slots <= slots[:, None]) & (slots >= start) | (slots == slots[:, None])
        positions = (slots - state.start[:, None]).clamp(min=0)
        hidden = self.talker.model(
            inputs_embeds=embeds,
            attention_mask=mask[:, None],
            position_ids=positions.expand(3, -1, -1),
            past_key_values=state.cache.prompt(slots),
            cache_position=slots,
            use_cache=True,
        ).last_hidden_state.index_select(1, length - 1)
        state.hidden.copy_(hidden)
        state.position.copy_(length)
        state.choose(self.talker.codec_head(hidden[:, -1]), state.frame)


class Frame(nn.Module):
    """Complete one frame of 16 codes and choose the first code of the next.

    Args:
        talker: the model.
        state: the utterances.
        compile: compiles a part of the frame. The code predictor's pass is one such part, called for each code with that code's own layers, so
            that 14 equal passes are traced and compiled once.
    """

    slots: Tensor
    passes: Tensor

    def __init__(self, talker: Any, state: SpeechState, compile: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda part: part) -> None:
        super().__init__()
        self.talker, self.state = talker, state
        slots = torch.arange(max(state.slots, state.groups), device=state.token.device)
        self.register_buffer("slots", slots, persistent=False)
        # Each pass's slot lies at an address that is a multiple of 16 bytes, as compiled code wants it, instead of every other.
        self.register_buffer("passes", slots[: state.groups, None].repeat(1, 2), persistent=False)
        self._open, self._choose, self._step = compile(self.open), compile(self.choose), compile(self.step)

    def forward(self) -> None:
        """Speak one frame while the talker hears ``state.text``."""
        predictor = self.talker.code_predictor
        heads, embeddings = predictor.lm_head, predictor.get_input_embeddings()
        first, code, embed = self._open(heads[0], embeddings[0])
        codes, embeds = [code], [first, embed]
        for group in range(2, self.state.groups):
            code, embed = self._choose(embed, self.passes[group, :1], heads[group - 1], embeddings[group - 1])
            codes.append(code)
            embeds.append(embed)
        self._step(codes, embeds)

    def open(self, head: nn.Module, embedding: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Return the embedding of the code chosen last, the code after it and that one's embedding."""
        first = self.talker.get_input_embeddings()(self.state.token)
        return first, *self.choose(torch.cat((self.state.hidden, first), 1), self.slots[:2], head, embedding)

    def choose(self, inputs: Tensor, positions: Tensor, head: nn.Module, embedding: nn.Module) -> tuple[Tensor, Tensor]:
        """Choose a code ``[B, 1]``, and return it and its embedding ``[B, 1, H]``.

        ``inputs`` ``[B, T, H]`` go to the slots ``positions`` ``[T]`` of the predictor's cache, of which the last is the code's number.
        """
        predictor, state = self.talker.code_predictor, self.state
        hidden = predictor.model(
            inputs_embeds=predictor.small_to_mtp_projection(inputs),
            attention_mask=(self.slots[: state.groups] <= positions[:, None])[None, None],
            position_ids=positions[None],
            past_key_values=state.sub_cache.step(positions),
            cache_position=positions,
            use_cache=True,
        ).last_hidden_state
        draw = state.frame * state.groups + positions[-1:]
        code = sample(head(hidden[:, -1]), state.sub_controls, state.seed, draw)[:, None]
        return code, embedding(code)

    def step(self, codes: list[Tensor], embeds: list[Tensor]) -> None:
        """Store the frame's ``codes``, of which the talker chose the first, and let the talker hear the sum of all their embeddings."""
        talker, state = self.talker, self.state
        state.codes.index_copy_(1, state.frame, torch.cat([state.token, *codes], 1)[:, None])
        position, slots = state.position, self.slots[: state.slots]
        mask = (slots <= position) & (slots >= state.start[:, None])
        hidden = talker.model(
            inputs_embeds=torch.cat(embeds, 1).sum(1, keepdim=True) + state.text,
            attention_mask=mask[:, None, None],
            position_ids=(position - state.start)[:, None].expand(3, -1, -1),
            past_key_values=state.cache.step(position),
            cache_position=position,
            use_cache=True,
        ).last_hidden_state
        logits = talker.codec_head(hidden[:, -1])
        state.frame.add_(1)
        state.position.add_(1)
        state.hidden.copy_(hidden)
        state.choose(logits, state.frame)
