"""A draw from logits and the look-up of what was drawn in an embedding table -> one kernel launch."""

from __future__ import annotations

import torch
from torch import fx

from qtts_compile.kernels.checks import FLOAT_DTYPES
from qtts_compile.kernels.sample_embedding import MAX_WIDTH
from qtts_compile.patterns.graph import getitem, insert, operands, shape, value
from qtts_compile.patterns.linear import without_views
from qtts_compile.patterns.scope import Scope

aten = torch.ops.aten
NAME = "sample_embedding"


def fuse(graph: fx.Graph, scope: Scope) -> None:
    """Let every draw look up its tokens itself, in the first table in which all of them are looked up."""
    for node in list(graph.find_nodes(op="call_function", target=aten.embedding.default)):
        table, tokens = operands(node)[:2]
        draw = without_views(tokens)
        if draw.target is not torch.ops.qtts.sample.default or not node.users or not scope.allows(NAME, node):
            continue
        logits = operands(draw)[0]
        # The table must be there before the draw, where the new node stands.
        if table.op != "placeholder" or value(table).dtype not in FLOAT_DTYPES or value(table).device != value(logits).device:
            continue
        if shape(table)[0] < shape(logits)[1] or not 0 < shape(table)[1] <= MAX_WIDTH or value(table).stride(-1) != 1:
            continue
        arguments = [*operands(draw), *[None] * (6 - len(draw.args))]
        result = insert(graph, draw, torch.ops.qtts.sample_embedding.default, *arguments, table, like=node)
        drawn, rows = (getitem(graph, draw, result, index) for index in (0, 1))
        node.replace_all_uses_with(insert(graph, node, aten.reshape.default, rows, list(shape(node)), like=node))
        graph.erase_node(node)
        draw.replace_all_uses_with(drawn)
        graph.erase_node(draw)
