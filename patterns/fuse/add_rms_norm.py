"""add + RMSNorm -> add_rms_norm, which gives both the sum (the residual stream) and its norm."""

from __future__ import annotations

import torch
from torch import fx

from qtts_compile.patterns.graph import getitem, insert, is_call_of, operands, shape, value
from qtts_compile.patterns.lift.rms_norm import norm_call
from qtts_compile.patterns.scope import Scope

NAME = "add_rms_norm"


def fuse(graph: fx.Graph, scope: Scope) -> None:
    """Fuse every residual addition with the norm that reads it."""
    for norm in [n for n in graph.nodes if is_call_of(n, "rms_norm")]:
        total, weight, eps = operands(norm)
        if total.target is not torch.ops.aten.add.Tensor or total.kwargs or not scope.allows(NAME, norm):
            continue
        if not all(isinstance(a, fx.Node) and shape(a) == shape(total) and value(a).dtype == value(total).dtype for a in total.args):
            scope.refuse(NAME, norm, "the addition broadcasts or promotes")
            continue
        point = total.next
        if any(isinstance(a, fx.Node) and not a < point for a in (weight, eps)):
            scope.refuse(NAME, norm, "the weight is computed after the addition")
            continue
        residual, x = total.args
        call = insert(graph, point, *norm_call(NAME, x, residual, weight, eps), like=norm)
        normed, summed = getitem(graph, point, call, 0), getitem(graph, point, call, 1)
        total.replace_all_uses_with(summed)
        norm.replace_all_uses_with(normed)
        graph.erase_node(norm)
        graph.erase_node(total)
