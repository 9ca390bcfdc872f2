"""Two rotary embeddings with the same tables (a layer's queries and keys) -> one kernel launch."""

from __future__ import annotations

import torch
from torch import fx

from qtts_compile.patterns.graph import getitem, insert, shape, value
from qtts_compile.patterns.scope import Scope

NAME = "rotary_qk"


def fuse(graph: fx.Graph, scope: Scope) -> None:
    """Pair neighbouring rotations. What the first one feeds must come after the second, so the keys of a layer never pair with the next layer."""
    rotations = [n for n in graph.nodes if n.target is torch.ops.qtts.rotary.default and scope.allows(NAME, n)]
    while len(rotations) > 1:
        q = rotations.pop(0)
        k = rotations[0]
        if q.args[1:] != k.args[1:] or not _same_tokens(q, k) or not all(k < user for user in q.users):
            continue
        rotations.pop(0)
        point = k.next
        call = insert(graph, point, torch.ops.qtts.rotary_qk.default, q.args[0], k.args[0], *k.args[1:], like=k)
        for index, node in enumerate((q, k)):
            node.replace_all_uses_with(getitem(graph, point, call, index))
            graph.erase_node(node)


def _same_tokens(q: fx.Node, k: fx.Node) -> bool:
    (batch, _, *tokens), (k_batch, _, *k_tokens) = shape(q), shape(k)
    return (batch, tokens, value(q).dtype) == (k_batch, k_tokens, value(k).dtype)
