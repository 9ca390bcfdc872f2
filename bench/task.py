"""The speech that every runner of the talker is given, and the check that its codes are the model's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.forced import ForcedCache, forced_hidden
from bench.run import FailedParity
from bench.timing import figure
from qtts_compile.cache import StaticKVCache
from qtts_compile.engine import PromptInputs
from qtts_compile.sampling import Settings
from qtts_compile.turboquant_cache import TurboQuantKVCache
from tests.models.generation import generation_inputs

PROMPT = 64  # tokens
FRAME_MS = 80.0
CHECKED_FRAMES = 16
SAMPLED = dict(do_sample=True, temperature=0.9, top_k=50, top_p=1.0, repetition_penalty=1.05)
SAMPLED |= dict(subtalker_dosample=True, subtalker_temperature=0.9, subtalker_top_k=50, subtalker_top_p=1.0)  # the published defaults
GREEDY = SAMPLED | dict(do_sample=False, subtalker_dosample=False, repetition_penalty=1.0)
MAX_REGRET, MAX_MEAN_REGRET = 0.25, 0.01  # in standard deviations of the logits; a wrong choice costs about 3
# Of choices made over codes, judged by logits that were not: quantisation moves logits, so that more than rounding decides near ties.
MAX_REGRET_OF_CODES, MAX_MEAN_REGRET_OF_CODES = 1.0, 0.05


class WrongCodes(FailedParity):
    """Codes that the model would not have chosen."""


@dataclass(frozen=True)
class Task:
    """Exactly ``frames`` frames after prompts of random embeddings, as arguments of ``talker.generate``."""

    arguments: dict[str, Any]

    @staticmethod
    def of(talker: Any, lengths: list[int], frames: int, greedy: bool = False) -> Task:
        """Return the task for prompts of these ``lengths``, padded at their left."""
        config = talker.config
        specials = range(config.vocab_size - 1024, config.vocab_size)
        suppressed = [token for token in specials if token != config.codec_eos_token_id]
        return Task(generation_inputs(talker, frames, lengths) | (GREEDY if greedy else SAMPLED) | {"suppress_tokens": suppressed})

    @property
    def frames(self) -> int:
        """Frames to make."""
        return self.arguments["max_new_tokens"] - 1

    @property
    def inputs(self) -> PromptInputs:
        """What the engine's ``start`` takes."""
        return PromptInputs(*(self.arguments[name] for name in ("inputs_embeds", "attention_mask", "trailing_text_hidden", "tts_pad_embed")))

    @property
    def settings(self) -> Settings:
        """What the engine's ``start`` takes besides."""
        tensors = ("inputs_embeds", "attention_mask", "trailing_text_hidden", "tts_pad_embed")
        return Settings.of({name: value for name, value in self.arguments.items() if name not in tensors})


def staggered(length: int, batch: int) -> list[int]:
    """Return the lengths of a batch's prompts, of which the longest has ``length`` tokens."""
    return [length - 3 * (row % 8) for row in range(batch)]


@torch.inference_mode()
def generate(talker: Any, task: Task) -> Tensor:
    """Return the codes ``[B, frames, groups]`` of the model's own loop."""
    result = talker.generate(**task.arguments)
    return torch.stack([hidden[-1] for hidden in result.hidden_states if hidden[-1] is not None], dim=1)


@torch.inference_mode()
def check(talker: Any, task: Task, codes: Tensor, cache: StaticKVCache | None = None) -> str:
    """Check greedy ``codes`` ``[B, F, groups]`` against the eager model's logits given the same codes, and say what was found.

    A choice's regret is how far its logit lies below the largest, in standard deviations of the logits: 0 for the eager model's own choice,
    small for a near tie that rounding decides, about 3 for a wrong one. Judging each choice by itself lets no early tie spoil what follows.

    Codes that were chosen over a quantised ``cache`` are judged twice: within the same limits by eager logits over the same keys and values,
    quantised by the codec's formula, and within wider ones by eager logits over keys and values as they are.

    Raises :class:`WrongCodes`, also where a cache that should be quantised is not.
    """
    if not isinstance(cache, TurboQuantKVCache):
        return _judge(talker, task, codes, "eager logits given the same codes", (MAX_REGRET, MAX_MEAN_REGRET))
    heard_tokens = task.inputs.embeds.shape[1] + codes.shape[1] - 1
    tokens = cache.quantized_tokens(heard_tokens)
    if not tokens:
        raise WrongCodes(f"none of {heard_tokens} tokens was read from {cache.format.name} codes: {cache.protect} keeps all; measure later positions")
    over = f"{cache.format.name} keys and values of up to {tokens} tokens in {len(cache.quantized_layers)} layers"
    same = _judge(talker, task, codes, f"eager logits given the same codes, over {over}", (MAX_REGRET, MAX_MEAN_REGRET), cache)
    limits = MAX_REGRET_OF_CODES, MAX_MEAN_REGRET_OF_CODES
    others = _judge(talker, task, codes, f"eager logits over {str(cache.dtype).removeprefix('torch.')} ones", limits)
    return f"{same}; {others} (allowed are {limits[0]} and {limits[1]} on average: quantisation moves logits, which decides near ties)"


def _judge(talker: Any, task: Task, codes: Tensor, by: str, limits: tuple[float, float], cache: TurboQuantKVCache | None = None) -> str:
    """Say what the regrets of ``codes`` are. Raises :class:`WrongCodes` where the largest or their mean is beyond its limit."""
    inputs = task.inputs
    rows = [
        _regrets(talker, task, inputs.embeds[row : row + 1, mask.bool()], inputs.text[row : row + 1], codes[row : row + 1], cache)
        for row, mask in enumerate(inputs.mask)
    ]
    regrets = torch.cat(rows)
    equal, largest, mean = (regrets == 0).double().mean().item(), regrets.max().item(), regrets.mean().item()
    found = (
        f"{regrets.numel()} greedy choices in {codes.shape[1]} frames against {by}: {100 * equal:.1f}% equal, "
        f"the others behind by {largest:.3f} sigma at most"
    )
    if not (largest <= limits[0] and mean <= limits[1]):  # NaN fails too
        raise WrongCodes(f"{found}, {mean:.4f} on average; allowed are {limits[0]} and {limits[1]}")
    return found


def heard(talker: Any, codes: Tensor, text: Tensor, pad: Tensor) -> Tensor:
    """Return the embeddings ``[B, F, H]`` that the talker reads after a prompt: of ``codes`` ``[B, F, groups]`` and of the text beside them."""
    tables = [talker.get_input_embeddings(), *talker.code_predictor.get_input_embeddings()]
    summed = torch.stack([table(codes[:, :, group]) for group, table in enumerate(tables)]).sum(0)
    batch, frames, _ = summed.shape
    return summed + torch.cat((text, pad.expand(batch, max(0, frames - text.shape[1]), -1)), 1)[:, :frames]


def _regrets(talker: Any, task: Task, embeds: Tensor, text: Tensor, codes: Tensor, cache: TurboQuantKVCache | None) -> Tensor:
    """Return the regret of each of the choices ``codes`` ``[1, F, groups]`` of one row, float32 ``[F, groups]``."""
    prompt, frames = embeds.shape[1], codes.shape[1]
    embeds = torch.cat((embeds, heard(talker, codes, text, task.inputs.pad)), 1)[:, :-1]  # the last frame's codes are heard after the last choice
    forced = None if cache is None else ForcedCache(cache, prompt, embeds.shape[1], embeds.device)
    hidden, codes = forced_hidden(talker, embeds, forced)[0, -frames:], codes[0]
    first = talker.codec_head(hidden).float()
    blocked = [*task.arguments["suppress_tokens"], task.arguments["eos_token_id"]]
    rest = talker.forward_sub_talker_finetune(codes, hidden)[0].float()
    regrets = []
    for logits, chosen in [(first, codes[:, :1]), *((rest[:, group], codes[:, group + 1, None]) for group in range(rest.shape[1]))]:
        allowed = logits.index_fill(1, torch.tensor(blocked, device=logits.device), float("-inf")) if logits is first else logits
        regrets.append((allowed.amax(1) - allowed.gather(1, chosen)[:, 0]) / logits.std(1))
    return torch.stack(regrets, 1)


def agreement(ours: Tensor, theirs: Tensor) -> str:
    """Say how many frames from the first on ``ours`` and ``theirs`` ``[F, groups]`` have in common when each goes its own way."""
    same = (ours[: len(theirs)] == theirs[: len(ours)]).all(1).tolist()
    return f"{(same + [False]).index(False)} of {len(same)} frames equal generate's in a run of its own"


def enter_speed(row: dict[str, Any], ms_per_frame: list[float], batch: int = 1) -> None:
    """Enter the milliseconds that a frame of ``batch`` utterances took in each run into a row that holds what its check found."""
    if "check" not in row:
        raise FailedParity("nothing was checked")
    row["ms_per_frame"] = figure(ms_per_frame, "ms")
    row["figures"] = {"frame": row["ms_per_frame"], "audio": figure([batch * FRAME_MS / ms for ms in ms_per_frame], "s a second")}
