"""q/k RMSNorm + rotary embedding + cache writes, and the attention that alone reads the queries -> one kernel per decode step and layer.

Before, with both caches written in place::

    attention(qk_norm_rope_kv_write(q, k, v, ..., k_cache, v_cache), k_cache, v_cache, mask)

After::

    qk_norm_rope_attention(q, k, v, ..., k_cache, v_cache, mask)
"""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from qtts_compile.kernels.qk_norm_rope_attention import MAX_TOKENS
from qtts_compile.patterns.graph import insert_mutating, keywords, operands, overload, shape
from qtts_compile.patterns.linear import is_at_rest
from qtts_compile.patterns.scope import Scope

NAME = "qk_norm_rope_attention"


def fuse(graph: fx.Graph, scope: Scope) -> None:
    """Join every attention with the kernel that writes its caches."""
    for attention in [n for n in graph.nodes if n.target is torch.ops.qtts.decode_attention.default]:
        if scope.allows(NAME, attention):
            reason = _fuse_layer(graph, attention)
            if reason:
                scope.refuse(NAME, attention, reason)


def _fuse_layer(graph: fx.Graph, attention: fx.Node) -> str | None:
    results = operands(attention)[:3]
    call = _write_of(results)
    if call is None or shape(attention)[2] > MAX_TOKENS:
        return None  # caches that something else writes, or that this graph only reads
    q, k_cache, v_cache = results
    mask, scale = operands(attention)[3:]
    arguments = keywords(call)
    if len(q.users) > 1:
        return "the rotated queries are read elsewhere"
    if not all(is_at_rest(weight) for weight in (arguments["q_weight"], arguments["k_weight"]) if weight is not None):
        return "the weight of a norm is computed in the graph"
    if not all(attention < user for cache in (k_cache, v_cache) for user in cache.users if user is not attention):
        return "a cache is read between its write and the attention"
    op = overload(NAME, arguments["q_eps"])
    new = insert_mutating(graph, attention, op, arguments | dict(mask=mask, scale=scale), attention)
    for old, result in zip((attention, k_cache, v_cache), new):
        old.replace_all_uses_with(result)
    for node in (attention, q, k_cache, v_cache, call):
        graph.erase_node(node)
    return None


def _write_of(results: tuple[fx.Node, ...]) -> fx.Node | None:
    """Return the qk_norm_rope_kv_write whose three results these are, in order."""
    if any(node.target is not operator.getitem for node in results):
        return None
    calls, indices = zip(*(operands(node) for node in results))
    packet = torch.ops.qtts.qk_norm_rope_kv_write
    is_write = calls[0].target is auto_functionalized and calls[0].args[0] in (packet.default, packet.tensor_eps)
    return calls[0] if is_write and set(calls) == {calls[0]} and indices == (0, 1, 2) else None
