"""A linear layer and the residual it is added to -> one kernel launch, for few rows."""

from __future__ import annotations

import torch
from torch import fx

from qtts_compile.patterns.graph import insert, operands, shape, value
from qtts_compile.patterns.linear import few_rows, users_through_views, without_views
from qtts_compile.patterns.scope import Scope

aten = torch.ops.aten
NAME = "linear_add"


def fuse(graph: fx.Graph, scope: Scope) -> None:
    """Fold every addition that alone reads a linear layer's result."""
    for node in list(graph.find_nodes(op="call_function", target=aten.add.Tensor)):
        if node.kwargs or not scope.allows(NAME, node):
            continue
        for product, residual in (operands(node), operands(node)[::-1]):
            linear = few_rows(without_views(product))
            if linear is None or users_through_views(linear.node) != {node} or not isinstance(residual, fx.Node):
                continue
            if not shape(product) == shape(residual) == shape(node) or value(residual).dtype != value(node).dtype:
                continue
            rows = insert(graph, node, aten.reshape.default, linear.rows, [*shape(node)[:-1], shape(linear.rows)[-1]])
            op = torch.ops.qtts.linear_add.default
            node.replace_all_uses_with(insert(graph, node, op, rows, linear.weight, linear.bias, residual))
            graph.erase_node(node)
            break
