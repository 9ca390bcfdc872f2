"""Read the heads of queries and keys, the norm before them and their rotation, in graphs of semantic operators."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from qtts_compile.patterns.graph import insert, is_call_of, operands, value

NO_EPS = 0.0


class Normed(NamedTuple):
    """The input of a per-head norm with its weight and eps, both None where the model has no such norm; ``transposed``: it is ``[B, T, H, D]``."""

    x: fx.Node
    weight: fx.Node | None
    eps: fx.Node | float | None
    transposed: bool


def _normed(x: fx.Node) -> Normed:
    """Look through ``norm(x).transpose(1, 2)``; anything else is taken as it is."""
    if x.target is torch.ops.aten.permute.default and list(operands(x)[1]) == [0, 2, 1, 3]:
        norm = operands(x)[0]
        if is_call_of(norm, "rms_norm") and value(norm.args[0]).dtype == value(norm).dtype:
            return Normed(*norm.args, transposed=True)
    return Normed(x, None, None, False)


def _heads_first(graph: fx.Graph, point: fx.Node, normed: Normed) -> fx.Node:
    """Return the heads as ``[B, H, T, D]``, permuted before ``point`` if they were normed as ``[B, T, H, D]``."""
    return insert(graph, point, torch.ops.aten.permute.default, normed.x, [0, 2, 1, 3]) if normed.transposed else normed.x


class RotatedHeads(NamedTuple):
    """The heads of queries and of keys that one ``angles``, the other arguments of their rotary embeddings, rotates; an ``eps`` of each norm."""

    q: Normed
    k: Normed
    q_eps: fx.Node | float
    k_eps: fx.Node | float
    angles: tuple[Any, ...]

    def arguments(self, graph: fx.Graph, point: fx.Node) -> dict[str, Any]:
        """Return what an operator that normalises and rotates them is given at ``point``."""
        cos, sin, sections, interleaved = self.angles
        return dict(
            q=_heads_first(graph, point, self.q),
            k=_heads_first(graph, point, self.k),
            q_weight=self.q.weight,
            k_weight=self.k.weight,
            q_eps=self.q_eps,
            k_eps=self.k_eps,
            cos=cos,
            sin=sin,
            sections=sections,
            interleaved=interleaved,
        )


def rotated_heads(q_rope: fx.Node, k_rope: fx.Node) -> RotatedHeads | str:
    """Return the heads behind the rotary embeddings of queries and of keys, or why one operator cannot make both."""
    if any(node.target is not torch.ops.qtts.rotary.default for node in (q_rope, k_rope)) or q_rope.args[1:] != k_rope.args[1:]:
        return "queries and keys are not rotated by the same tables"
    q, k = _normed(operands(q_rope)[0]), _normed(operands(k_rope)[0])
    eps = [n.eps for n in (q, k) if n.eps is not None] or [NO_EPS]
    if isinstance(eps[0], fx.Node) is not isinstance(eps[-1], fx.Node):
        return "one eps is a number, the other a graph input"
    return RotatedHeads(q, k, eps[0], eps[-1], operands(q_rope)[1:])
