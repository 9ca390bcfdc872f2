"""How long a talker speaks when each cache goes its own way: many seeds in one batch, until each ends its speech by itself.

Random weights know no end of speech. Here the talker may choose among ``CHOICES`` first codes only, of which the end is one, so that speech ends
by chance, on average after about as many frames. That shows whether a cache makes ends rarer or more frequent, and runs that would never end. It
does not show whether speech ends where its text does, for which real weights are needed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bench.task import PROMPT, Task, staggered
from qtts_compile.engine import Engine

CHOICES = 64


def speak(engine: Engine, texts: int, cap: int, seed: int = 0) -> tuple[list[int], Tensor]:
    """Speak with ``texts`` seeds from ``seed`` on until all have ended or made ``cap`` frames; return their lengths and codes ``[B, F, groups]``."""
    config = engine.talker.config
    task = Task.of(engine.talker, staggered(PROMPT, texts), cap)
    suppressed = [token for token in range(CHOICES - 1, config.vocab_size) if token != config.codec_eos_token_id]
    task = Task(task.arguments | {"min_new_tokens": 1, "suppress_tokens": suppressed})
    speech = engine.start(task.inputs, task.settings, [seed + row for row in range(texts)])
    list(speech)
    return speech.lengths, speech.codes.clone()


def compare(exact: tuple[list[int], Tensor], seen: tuple[list[int], Tensor], cap: int) -> dict[str, Any]:
    """Compare the lengths of speeches with those over an unquantised cache, and say after how many frames they part."""
    lengths, others = seen[0], exact[0]
    parted = []
    for row, (ours, theirs) in enumerate(zip(lengths, others, strict=True)):
        both = min(ours, theirs)
        same = (seen[1][row, :both] == exact[1][row, :both]).all(1).tolist()
        parted.append((same + [False]).index(False))
    return {
        "lengths": lengths,
        "duration_ratio": sum(lengths) / sum(others),
        "at_cap": sum(length >= cap for length in lengths) / len(lengths),
        "frames_until_parted": sum(parted) / len(parted),
    }
