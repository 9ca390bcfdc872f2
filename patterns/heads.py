"""Read the heads of queries and keys, and the norm before them, in graphs of semantic operators."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from qtts_compile.patterns.graph import insert, is_call_of, operands, value


class Normed(NamedTuple):
    """The input of a per-head norm with its weight and eps, both None where the model has no such norm; ``transposed``: it is ``[B, T, H, D]``."""

    x: fx.Node
    weight: fx.Node | None
    eps: fx.Node | float | None
    transposed: bool


def normed(x: fx.Node) -> Normed:
    """Look through ``norm(x).transpose(1, 2)``; anything else is taken as it is."""
    if x.target is torch.ops.aten.permute.default and list(operands(x)[1]) == [0, 2, 1, 3]:
        norm = operands(x)[0]
        if is_call_of(norm, "rms_norm") and value(norm.args[0]).dtype == value(norm).dtype:
            return Normed(*norm.args, transposed=True)
    return Normed(x, None, None, False)


def heads_first(graph: fx.Graph, point: fx.Node, normed: Normed) -> fx.Node:
    """Return the heads as ``[B, H, T, D]``, permuted before ``point`` if they were normed as ``[B, T, H, D]``."""
    return insert(graph, point, torch.ops.aten.permute.default, normed.x, [0, 2, 1, 3]) if normed.transposed else normed.x
