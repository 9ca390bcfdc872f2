"""How codes are chosen from logits, and when speech ends: the settings of one call, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """One sampler, with the semantics and defaults of transformers' logits processors.

    Attributes:
        do_sample: draw from the distribution; False takes the largest logit (greedy).
        temperature: logits are divided by it; above 0.
        top_k: keep the k largest logits (and ties with the last of them); 0 keeps all.
        top_p: keep the fewest tokens whose probabilities sum to it; 1 keeps all; in (0, 1].
        repetition_penalty: logits of tokens chosen before are divided (positive) or multiplied (negative) by it; 1 changes nothing.
    """

    do_sample: bool = True
    temperature: float = 0.9
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        _check("do_sample", self.do_sample, bool, lambda _: True, "True or False")
        _check("temperature", self.temperature, float, lambda x: 0 < x < float("inf"), "a number above 0, or do_sample=False for greedy")
        _check("top_k", self.top_k, int, lambda x: x >= 0, "a whole number, 0 to keep every token")
        _check("top_p", self.top_p, float, lambda x: 0 < x <= 1, "a number above 0 and at most 1, which keeps every token")
        _check("repetition_penalty", self.repetition_penalty, float, lambda x: 0 < x < float("inf"), "a number above 0, 1 for none")

    def controls(self) -> Tensor:
        """Return the float32 ``[5]`` that :func:`qtts_compile.kernels.sample.sample` reads."""
        return torch.tensor([self.do_sample, self.temperature, self.top_k, self.top_p, self.repetition_penalty], dtype=torch.float32)


@dataclass(frozen=True)
class Settings:
    """Everything that decides the codes of one call, besides the prompt and the seed.

    Attributes:
        talker: sampler of each frame's first code; the only one that has a repetition penalty.
        subtalker: sampler of the other codes of a frame.
        max_new_tokens: tokens the talker may choose. A frame needs the token after it, so at most ``max_new_tokens - 1`` frames are made,
            as with transformers' ``generate``.
        min_new_tokens: end of speech is not chosen among the first so many tokens.
        eos_token_id: the talker's token that ends speech.
        suppress_tokens: tokens the talker never chooses.
    """

    talker: Sampling
    subtalker: Sampling
    max_new_tokens: int
    min_new_tokens: int
    eos_token_id: int
    suppress_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check("max_new_tokens", self.max_new_tokens, int, lambda x: x >= 2, "a whole number of 2 or more: one a frame, and one")
        _check("min_new_tokens", self.min_new_tokens, int, lambda x: x >= 0, "a whole number of 0 or more")

    @staticmethod
    def of(arguments: Mapping[str, Any]) -> Settings:
        """Read the keyword arguments that ``Qwen3TTSForConditionalGeneration.generate`` hands to its talker's ``generate``.

        Raises ValueError for a value out of range and TypeError for an argument this engine does not know.
        """
        rest = dict(arguments)
        talker = Sampling(*(rest.pop(name) for name in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")))
        subtalker = Sampling(*(rest.pop(f"subtalker_{name}") for name in ("dosample", "temperature", "top_k", "top_p")))
        settings = Settings(
            talker,
            subtalker,
            max_new_tokens=rest.pop("max_new_tokens"),
            min_new_tokens=rest.pop("min_new_tokens"),
            eos_token_id=rest.pop("eos_token_id"),
            suppress_tokens=tuple(rest.pop("suppress_tokens", ())),
        )
        unknown = rest.keys() - {"output_hidden_states", "return_dict_in_generate", "pad_token_id"}  # shape what generate returns, not the codes
        if unknown:
            raise TypeError(f"unknown generation arguments: {', '.join(sorted(unknown))}")
        return settings


def _check(name: str, value: Any, kind: type, valid: Any, wanted: str) -> None:
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool) if kind is float else isinstance(value, kind)
    if not numeric or (kind is int and isinstance(value, bool)) or not valid(value):
        raise ValueError(f"{name}={value!r}: give {wanted}")
