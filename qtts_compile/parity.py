"""Record what a model chooses as it speaks, and compare two runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Choices:
    """The codes of one utterance and the logits they were chosen from, in the order of choice.

    A frame is ``groups`` choices: the talker's code, then the code predictor's. The last logits are those of the talker's code that
    ended the utterance and made no frame.

    Attributes:
        groups: codes in a frame (16).
        codes: int64 ``[frames * groups]``.
        logits: float32, ``frames * groups + 1`` tensors of the vocabulary's size.
    """

    groups: int
    codes: Tensor
    logits: list[Tensor]

    @property
    def frames(self) -> int:
        return len(self.codes) // self.groups


@dataclass(frozen=True)
class Parity:
    """How two greedy runs on the same text agree.

    Attributes:
        first_difference: index of the first code that differs, or None. Up to it both runs saw equal inputs; after it they did not.
        talker, code_predictor: max abs(difference) of their logits up to there.
        steps: number of choices compared.
        scale: the largest abs(logit) of the reference.
    """

    first_difference: int | None
    talker: float
    code_predictor: float
    steps: int
    scale: float


def record(tts: Any, speak: Callable[[], object]) -> Choices:
    """Call ``speak``, which makes ``tts`` (a ``Qwen3TTSModel``) generate one utterance, and return what the model chose.

    Forward hooks read the outputs of the talker and its code predictor; the models run as they are.
    """
    frames: list[Tensor] = []
    logits: list[Tensor] = []

    def on_forward(module: nn.Module, inputs: Any, output: Any) -> None:
        logits.append(output.logits[0, -1].float().cpu())
        if module is talker and output.hidden_states[1] is not None:  # the prompt makes no frame
            frames.append(output.hidden_states[1][0].cpu())

    talker = tts.model.talker
    hooks = [module.register_forward_hook(on_forward) for module in (talker, talker.code_predictor)]
    try:
        speak()
    finally:
        for hook in hooks:
            hook.remove()
    return Choices(talker.config.num_code_groups, torch.cat(frames), logits)


def compare(reference: Choices, other: Choices) -> Parity:
    """Compare ``other`` with ``reference`` over every choice that both made from equal inputs."""
    length = min(len(reference.codes), len(other.codes))
    differing = (reference.codes[:length] != other.codes[:length]).nonzero().flatten().tolist()
    first = differing[0] if differing else None if len(reference.codes) == len(other.codes) else length
    steps = min(len(reference.logits), len(other.logits)) if first is None else first + 1
    differences = [(reference.logits[step] - other.logits[step]).abs().max().item() for step in range(steps)]
    return Parity(
        first_difference=first,
        talker=max(differences[:: reference.groups]),
        code_predictor=max((difference for step, difference in enumerate(differences) if step % reference.groups), default=0.0),
        steps=steps,
        scale=max(step.abs().max().item() for step in reference.logits),
    )
