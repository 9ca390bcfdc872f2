"""What quantisation does to a talker that hears the same frames whatever it would choose itself: a trajectory of the unquantised model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from bench.forced import ForcedCache, forced_hidden
from bench.run import FailedParity
from bench.task import Task, generate, heard
from qtts_compile.transformers_cache import TurboQuantCache
from qtts_compile.turboquant_cache import TurboQuantKVCache

STEPPED = 16  # steps that a real cache takes beside the forced one
MAX_APART = 0.001  # KL divergence of the two: little beside what quantisation may cost


class WrongForcing(FailedParity):
    """Logits that the real cache does not give."""


@dataclass(frozen=True)
class Trajectory:
    """``embeds`` ``[B, T, H]`` that the talker heard, the first ``prompt`` of them a prompt."""

    talker: Any
    embeds: Tensor
    prompt: int

    @staticmethod
    def of(talker: Any, batch: int, prompt: int, frames: int) -> Trajectory:
        """Let the eager model speak, sampling, after prompts of random embeddings."""
        torch.manual_seed(0)
        task = Task.of(talker, [prompt] * batch, frames)
        spoken = heard(talker, generate(talker, task), task.inputs.text, task.inputs.pad)
        return Trajectory(talker, torch.cat((task.inputs.embeds, spoken), 1), prompt)


@dataclass(frozen=True)
class Observed:
    """What the talker made of the steps after a prompt: ``log_probs`` ``[B, F, V]`` and each layer's attention ``[B, F, heads, D]``."""

    log_probs: Tensor
    attention: list[Tensor]


@torch.inference_mode()
def observe(trajectory: Trajectory, like: TurboQuantKVCache) -> Observed:
    """Return what the talker makes of a trajectory over a cache ``like`` this one."""
    talker, embeds, attention = trajectory.talker, trajectory.embeds, []

    def keep(module: Any, arguments: tuple[Tensor, ...]) -> None:
        attention.append(arguments[0][:, trajectory.prompt :].unflatten(-1, (-1, like.shape[3])).clone())

    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(keep) for layer in talker.model.layers]
    try:
        hidden = forced_hidden(talker, embeds, ForcedCache(like, trajectory.prompt, embeds.shape[1], embeds.device))
    finally:
        for hook in hooks:
            hook.remove()
    return Observed(_log_probs(talker, hidden[:, trajectory.prompt :]), attention)


def compare(talker: Any, exact: Observed, seen: Observed) -> dict[str, Any]:
    """Compare what was seen over a quantised cache with what was seen over one that is not.

    Raises ValueError where either is not finite.
    """
    if not (exact.log_probs.isfinite().all() and seen.log_probs.isfinite().all()):
        raise ValueError("the talker's logits are not finite")
    divergence = _divergence(exact.log_probs, seen.log_probs)
    cosines = [cosine_similarity(ours.float(), theirs.float(), dim=-1).mean().item() for ours, theirs in zip(seen.attention, exact.attention)]
    drift = (seen.log_probs - exact.log_probs)[..., talker.config.codec_eos_token_id]
    return {
        "cosine": sum(cosines) / len(cosines),
        "worst_cosine": min(cosines),
        "cosines": cosines,
        "kl": divergence.mean().item(),
        "kl_p99": divergence.flatten().quantile(0.99).item(),
        "top1": (exact.log_probs.argmax(-1) == seen.log_probs.argmax(-1)).float().mean().item(),
        "eos_drift": drift.mean().item(),
        "eos_drift_abs": drift.abs().mean().item(),
    }


@torch.inference_mode()
def check(trajectory: Trajectory, like: TurboQuantKVCache, seen: Observed) -> float:
    """Check what was seen in one call against a real cache, packed and read token after token, and return how far they are apart (KL divergence).

    Raises :class:`WrongForcing`.
    """
    talker, embeds, prompt = trajectory.talker, trajectory.embeds, trajectory.prompt
    batch, end = len(embeds), min(prompt + STEPPED, embeds.shape[1])
    kinds: dict[str, Any] = {"dtype": embeds.dtype, "device": embeds.device}
    cache = TurboQuantCache(talker.config, batch, like.shape[2], like.format.name, like.protect, **kinds)
    hidden = []
    for first, last in [(0, prompt), *((place, place + 1) for place in range(prompt, end))]:
        places = torch.arange(first, last, device=embeds.device).expand(3, batch, -1)
        given: dict[str, Any] = dict(position_ids=places, cache_position=places[0, 0], past_key_values=cache, use_cache=True)
        hidden.append(talker.model(inputs_embeds=embeds[:, first:last], **given).last_hidden_state)
    stepped = _log_probs(talker, torch.cat(hidden[1:], 1))
    apart = _divergence(stepped, seen.log_probs[:, : end - prompt]).mean().item()
    if not apart <= MAX_APART:  # NaN fails too
        raise WrongForcing(f"{like.format.name}, {like.protect}: a real cache gives logits {apart:.2g} away; allowed are {MAX_APART}")
    return apart


def _log_probs(talker: Any, hidden: Tensor) -> Tensor:
    return talker.codec_head(hidden).double().log_softmax(-1)


def _divergence(exact: Tensor, seen: Tensor) -> Tensor:
    return (exact.exp() * (exact - seen)).sum(-1)
