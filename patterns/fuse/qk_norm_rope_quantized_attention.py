"""q/k RMSNorm + rotary embedding + write into a quantised cache + attention over what is read of it -> one kernel per decode step and layer.

Before, with the cache's buffers written in place::

    quantized_kv_write(rotary(norm(k)), v, *buffers, position, position, start)
    attention(rotary(norm(q)), *quantized_kv_read(*buffers, position, start), mask)

After::

    qk_norm_rope_quantized_attention(q, k, v, ..., *buffers, position, start, mask)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2

from qtts_compile.patterns.graph import insert_mutating, keywords, operands, overload, shape
from qtts_compile.patterns.heads import rotated_heads
from qtts_compile.patterns.linear import is_at_rest
from qtts_compile.patterns.scope import Scope

NAME = "qk_norm_rope_quantized_attention"
BUFFERS = ("k_codes", "v_codes", "scales", "kept")


def fuse(graph: fx.Graph, scope: Scope) -> None:
    """Join every attention over a quantised cache with the write before it."""
    if "rotary" in scope.disabled:
        return
    for attention in [n for n in graph.nodes if n.target is torch.ops.qtts.decode_attention.default]:
        read = _read_of(*operands(attention)[1:3])
        if read is not None and scope.allows(NAME, attention):
            reason = _fuse_layer(graph, attention, read)
            if reason:
                scope.refuse(NAME, attention, reason)


def _fuse_layer(graph: fx.Graph, attention: fx.Node, read: fx.Node) -> str | None:
    q_rope, k, v, mask, scale = operands(attention)
    *buffers, last, start, sinks, format = operands(read)
    write = _write_of(buffers)
    if write is None:
        return "the cache is not written, as a whole, right before it is read"
    written = keywords(write)
    if shape(q_rope)[2] != 1 or any(operand is not last for operand in (written["position"], written["last"])):
        return "more than one token, or a token that is not the newest, is written"
    if (written["start"], written["sinks"], written["format"]) != (start, sinks, format):
        return "the cache is read with other arguments than it is written with"
    k_rope = written["k"]
    heads = rotated_heads(q_rope, k_rope)
    if isinstance(heads, str):
        return heads
    if not all(is_at_rest(weight) for weight in (heads.q.weight, heads.k.weight) if weight is not None):
        return "the weight of a norm is computed in the graph"
    read_elsewhere = len(q_rope.users) > 1 or len(k_rope.users) > 1 or set(read.users) != {k, v} or any(len(n.users) > 1 for n in (k, v))
    if read_elsewhere or not all(attention < user for buffer in buffers for user in buffer.users if user is not read):
        return "what this computes is read elsewhere too"
    bases = written["_all_bases"]
    arguments = heads.arguments(graph, attention) | dict(
        v=written["v"],
        **{name: bases[written[f"_{name}_base_index"]] for name in BUFFERS},
        position=last,
        start=start,
        sinks=sinks,
        format=format,
        mask=mask,
        scale=scale,
    )
    new = insert_mutating(graph, attention, overload(NAME, heads.q_eps), arguments, attention)
    for old, result in zip((attention, *buffers), new, strict=True):
        old.replace_all_uses_with(result)
    for node in (attention, k, v, read, *buffers, write, q_rope, k_rope):
        graph.erase_node(node)
    return None


def _read_of(k: fx.Node, v: fx.Node) -> fx.Node | None:
    """Return the quantized_kv_read whose two results these are, in order."""
    if any(node.target is not operator.getitem for node in (k, v)):
        return None
    (call, first), (other, second) = operands(k), operands(v)
    is_read = call is other and call.target is torch.ops.qtts.quantized_kv_read.default
    return call if is_read and (first, second) == (0, 1) else None


def _write_of(buffers: list[Any]) -> fx.Node | None:
    """Return the quantized_kv_write that gives these four buffers, in order and whole."""
    if any(node.target is not operator.getitem for node in buffers):
        return None
    calls, indices = zip(*(operands(node) for node in buffers))
    is_write = calls[0].target is auto_functionalized_v2 and calls[0].args[0] is torch.ops.qtts.quantized_kv_write.default
    if not is_write or set(calls) != {calls[0]}:
        return None
    given = keywords(calls[0])
    # A buffer that is a view of its base has more keywords than the index of the base.
    is_whole = all(sum(key.startswith(f"_{name}_") for key in given) == 1 for name in BUFFERS)
    return calls[0] if is_whole and indices == tuple(1 + given[f"_{name}_base_index"] for name in BUFFERS) else None
