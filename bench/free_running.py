"""How long a talker speaks when each cache goes its own way: many seeds, a batch at a time, until each ends its speech by itself.

Random weights know no end of speech. Here the talker may choose among ``CHOICES`` first codes only, of which the end is one, so that speech ends
by chance, on average after about as many frames. That shows whether a cache makes ends rarer or more frequent, and runs that would never end. It
does not show whether speech ends where its text does, for which real weights are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

from torch import Tensor

from bench.task import PROMPT, Task, staggered
from qtts_compile.engine import Engine

CHOICES = 64
TOGETHER = 20  # texts of a batch


def speak(engine: Engine, seeds: Sequence[int], cap: int) -> list[Tensor]:
    """Speak with each seed until it has ended or made ``cap`` frames; return its codes ``[frames, groups]``.

    A last batch of fewer than ``TOGETHER`` texts may need a CUDA graph of its own, which an engine records for a size of batch.
    """
    config = engine.talker.config
    suppressed = [token for token in range(CHOICES - 1, config.vocab_size) if token != config.codec_eos_token_id]
    codes: list[Tensor] = []
    for first in range(0, len(seeds), TOGETHER):
        batch = seeds[first : first + TOGETHER]
        task = Task.of(engine.talker, staggered(PROMPT, len(batch)), cap)
        task = Task(task.arguments | {"min_new_tokens": 1, "suppress_tokens": suppressed})
        speech = engine.start(task.inputs, task.settings, batch)
        list(speech)
        codes += [each[:length].clone() for each, length in zip(speech.codes, speech.lengths, strict=True)]
    return codes


def ratio_error(lengths: Sequence[int], others: Sequence[int]) -> float:
    """Return the standard error of ``sum(lengths) / sum(others)``, by the delta method.

    A ratio r of two means varies as the mean of ``length - r * other`` does, divided by the mean of the others. That counts what the two lengths of a
    pair have in common, so it holds for pairs of one seed, which speak alike until they part, and for pairs of two seeds, which are independent.
    """
    count, ratio = len(lengths), sum(lengths) / sum(others)
    squares = sum((length - ratio * other) ** 2 for length, other in zip(lengths, others, strict=True))
    return sqrt(squares / (count - 1) / count) / (sum(others) / count)


def compare(exact: Sequence[Tensor], seen: Sequence[Tensor], cap: int) -> dict[str, Any]:
    """Compare the lengths of speeches with those over an unquantised cache, and say after how many frames they part."""
    lengths, others = [len(codes) for codes in seen], [len(codes) for codes in exact]
    parted = []
    for ours, theirs in zip(seen, exact, strict=True):
        both = min(len(ours), len(theirs))
        same = (ours[:both] == theirs[:both]).all(1).tolist()
        parted.append((same + [False]).index(False))
    return {
        "lengths": lengths,
        "duration_ratio": sum(lengths) / sum(others),
        "ratio_error": ratio_error(lengths, others),
        "at_cap": sum(length >= cap for length in lengths) / len(lengths),
        "frames_until_parted": sum(parted) / len(parted),
    }
