"""q/k RMSNorm + rotary embedding + key and value cache writes -> one kernel per decode step and layer.

Before::

    attention(rotary(norm(q)), kv_write(k_cache, rotary(norm(k))), kv_write(v_cache, v), mask)

After, with both caches written in place::

    attention(qk_norm_rope_kv_write(q, k, v, ..., k_cache, v_cache), k_cache, v_cache, mask)

The anchor is the attention that reads both caches: keys and values of different layers have no other link than the position.
"""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from qtts_compile.patterns.graph import insert_mutating, keywords, operands, overload
from qtts_compile.patterns.heads import rotated_heads
from qtts_compile.patterns.scope import Scope

NAME = "qk_norm_rope_kv_write"


def fuse(graph: fx.Graph, scope: Scope) -> None:
    """Fuse what stands between the projections and the attention of every layer."""
    if "rotary" in scope.disabled:
        return
    for attention in [n for n in graph.nodes if n.target is torch.ops.qtts.decode_attention.default]:
        if scope.allows(NAME, attention):
            reason = _fuse_layer(graph, attention)
            if reason:
                scope.refuse(NAME, attention, reason)


def _fuse_layer(graph: fx.Graph, attention: fx.Node) -> str | None:
    q_rope, k_cache, v_cache = operands(attention)[:3]
    k_write, v_write = _write_of(k_cache), _write_of(v_cache)
    if k_write is None or v_write is None:
        return None  # a growing cache, or a cache that this graph only reads: nothing to fuse with
    k_args, v_args = keywords(k_write), keywords(v_write)
    k_rope = k_args["src"]
    heads = rotated_heads(q_rope, k_rope)
    if isinstance(heads, str):
        return heads
    if k_args["position"] is not v_args["position"]:
        return "keys and values are written at different positions"
    if len(k_rope.users) > 1:
        return "the rotated keys are read elsewhere"
    point = max(q_rope, k_write, v_write)
    if not all(point < user for node in (q_rope, k_cache, v_cache) for user in node.users):
        return "a result is read before both caches are written"
    arguments = heads.arguments(graph, point) | dict(v=v_args["src"], k_cache=k_args["cache"], v_cache=v_args["cache"], position=k_args["position"])
    for old, new in zip((q_rope, k_cache, v_cache), insert_mutating(graph, point, overload(NAME, heads.q_eps), arguments, attention)):
        old.replace_all_uses_with(new)
    for node in (k_cache, v_cache, k_write, v_write, q_rope, k_rope):
        graph.erase_node(node)
    return None


def _write_of(cache: fx.Node) -> fx.Node | None:
    if cache.target is not operator.getitem:
        return None
    call = operands(cache)[0]
    is_write = call.target is auto_functionalized and call.args[0] is torch.ops.qtts.kv_write.default
    return call if is_write else None
