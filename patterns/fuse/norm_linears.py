"""RMSNorm and the linear layers that read it (queries, keys and values; a head) -> one kernel launch, for few rows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from qtts_compile.patterns.graph import getitem, insert, overload, shape
from qtts_compile.patterns.linear import Linear, few_rows, library_is_faster, norm_before
from qtts_compile.patterns.scope import Scope

NAME = "norm_linears"
MAX_WEIGHTS = 3


def fuse(graph: fx.Graph, scope: Scope) -> None:
    """Join linear layers of the same rows, and fold the norm before them where nothing else reads it."""
    for group in _groups(filter(None, map(few_rows, graph.nodes))):
        first = group[0]
        if len(group) > MAX_WEIGHTS or not scope.allows(NAME, first.node) or library_is_faster(group):
            continue
        source, norm_weight, eps = norm_before(first.rows, {linear.node for linear in group})
        weights, biases = [linear.weight for linear in group], [linear.bias for linear in group]
        call = insert(graph, first.node, overload(NAME, eps), source, norm_weight, weights, biases, eps)
        for index, linear in enumerate(group):
            result = getitem(graph, first.node, call, index)
            linear.node.replace_all_uses_with(
                insert(graph, first.node, torch.ops.aten.reshape.default, result, list(shape(linear.node)), like=linear.node)
            )
        for linear in group:
            graph.erase_node(linear.node)


def _groups(linears: Iterable[Linear]) -> list[list[Linear]]:
    by_rows: dict[fx.Node, list[Linear]] = {}
    for linear in linears:
        by_rows.setdefault(linear.rows, []).append(linear)
    return list(by_rows.values())
