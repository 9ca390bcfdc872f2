"""RMSNorm, gate and up projections and SwiGLU -> one kernel launch, for few rows."""

from __future__ import annotations

import torch
from torch import fx

from qtts_compile.patterns.graph import insert, operands, overload, shape
from qtts_compile.patterns.linear import few_rows, library_is_faster, norm_before, users_through_views, without_views
from qtts_compile.patterns.scope import Scope

NAME = "norm_swiglu"


def fuse(graph: fx.Graph, scope: Scope) -> None:
    """Fold both projections into the SwiGLU that alone reads them, and the norm that alone they read."""
    for node in list(graph.find_nodes(op="call_function", target=torch.ops.qtts.swiglu.default)):
        gate, up = (few_rows(without_views(operand)) for operand in operands(node))
        if gate is None or up is None or gate.rows is not up.rows or gate.bias or up.bias or not scope.allows(NAME, node):
            continue
        if any(users_through_views(linear.node) != {node} for linear in (gate, up)) or shape(gate.weight) != shape(up.weight):
            continue
        if reason := library_is_faster([gate, up]):
            scope.decline(NAME, node, reason)
            continue
        source, norm_weight, eps = norm_before(gate.rows, {gate.node, up.node})
        call = insert(graph, node, overload(NAME, eps), source, norm_weight, gate.weight, up.weight, eps)
        node.replace_all_uses_with(insert(graph, node, torch.ops.aten.reshape.default, call, list(shape(node))))
        graph.erase_node(node)
