"""A linear layer of rows looked up in an embedding table -> one kernel launch, for few rows."""

from __future__ import annotations

import torch
from torch import fx

from qtts_compile.patterns.graph import insert, operands, shape, value
from qtts_compile.patterns.linear import few_rows, without_views
from qtts_compile.patterns.scope import Scope

aten = torch.ops.aten
NAME = "embedding_linear"


def fuse(graph: fx.Graph, scope: Scope) -> None:
    """Let every linear layer of embedded tokens read the table itself; what else reads the embedding keeps it."""
    for node in list(graph.nodes):
        linear = few_rows(node)
        if linear is None or not scope.allows(NAME, node):
            continue
        embedding = without_views(linear.rows)
        if embedding.target is not aten.embedding.default or shape(embedding)[-1] != shape(linear.rows)[-1]:
            continue
        table, tokens = operands(embedding)[:2]
        if value(table).dtype != value(node).dtype or value(table).stride(-1) != 1 or value(tokens).dtype != torch.int64:
            continue
        result = insert(graph, node, torch.ops.qtts.embedding_linear.default, tokens, table, linear.weight, linear.bias)
        node.replace_all_uses_with(insert(graph, node, aten.reshape.default, result, list(shape(node)), like=node))
        graph.erase_node(node)
