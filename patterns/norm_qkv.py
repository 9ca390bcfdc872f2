"""Join the projections of one token with the attention that alone reads them, over whatever cache."""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from qtts_compile.kernels.norm_qkv import MAX_SLOTS
from qtts_compile.patterns.graph import insert_mutating, is_call_of, keywords, operands, overload, shape, value
from qtts_compile.patterns.heads import NO_EPS
from qtts_compile.patterns.linear import without_views
from qtts_compile.patterns.scope import Scope


def join_projections(graph: fx.Graph, scope: Scope, name: str, attention: str, cache: str) -> None:
    """Replace each ``qtts::attention`` of one token, and the norm_linears before it, by ``qtts::name``.

    ``cache`` is an argument ``[1, Hk, S, ...]`` of the attention.
    """
    packet = getattr(torch.ops.qtts, attention)
    for call in [n for n in graph.nodes if n.target is auto_functionalized and n.args[0] in (packet.default, packet.tensor_eps)]:
        if scope.allows(name, call) and shape(keywords(call)[cache])[2] <= MAX_SLOTS:
            reason = _join_layer(graph, name, call)
            if reason:
                scope.refuse(name, call, reason)


def _join_layer(graph: fx.Graph, name: str, call: fx.Node) -> str | None:
    arguments = dict(keywords(call))
    heads = [arguments.pop(key) for key in ("q", "k", "v")]
    results = [_projection_of(head) for head in heads]
    linears = _linears_of(results)
    if linears is None:
        return None
    x, norm_weight, weights, biases, eps = operands(linears)
    if any(bias is not None for bias in biases):
        return None
    if any(not _is_read_once(head, result) for head, result in zip(heads, results)) or len(linears.users) != len(results):
        return "a projection is read elsewhere"
    arguments |= dict(x=x, norm_weight=norm_weight, weights=[weights[operands(result)[1]] for result in results], eps=eps)
    norms = {"eps": "norm_weight", "q_eps": "q_weight", "k_eps": "k_weight"}
    used = [arguments[each] for each, weight in norms.items() if arguments[weight] is not None] or [NO_EPS]
    if len({isinstance(each, fx.Node) for each in used}) > 1:
        return "one eps is a number, the other a graph input"
    arguments |= {each: used[0] for each, weight in norms.items() if arguments[weight] is None}  # of no matter, but of one kind
    if prefetch := _weights_behind(call):
        arguments["prefetch"] = prefetch
    new = insert_mutating(graph, call, overload(name, used[0]), arguments, call)
    for user in list(call.users):
        user.replace_all_uses_with(new[operands(user)[1]])
        graph.erase_node(user)
    graph.erase_node(call)
    for node in heads:
        while not node.users:
            node, unused = operands(node)[0], node
            graph.erase_node(unused)
    return None


def _weights_behind(call: fx.Node) -> list[fx.Node]:
    """Return the weights, inputs of the graph, of the first norm_swiglu behind an attention and before the next, if they have no gaps."""
    node = call.next
    while node.op == "call_function" and node.target is not auto_functionalized:
        if is_call_of(node, "norm_swiglu"):
            weights = operands(node)[2:4]
            return [*weights] if all(value(weight).is_contiguous() for weight in weights) else []
        node = node.next
    return []


def _projection_of(heads: fx.Node) -> fx.Node:
    """Return the node behind the heads ``[1, H, 1, D]`` of one token, whose axes of one entry may have been swapped."""
    node = without_views(heads)
    while isinstance(node, fx.Node) and node.target is torch.ops.aten.permute.default and value(node).is_contiguous():
        node = without_views(operands(node)[0])
    return node


def _linears_of(results: list[fx.Node]) -> fx.Node | None:
    """Return the norm_linears of one row whose three results these are, in any order."""
    if any(node.target is not operator.getitem for node in results):
        return None
    calls, indices = zip(*(operands(node) for node in results))
    is_of_one_row = set(calls) == {calls[0]} and is_call_of(calls[0], "norm_linears") and value(operands(calls[0])[0]).shape[:-1].numel() == 1
    return calls[0] if is_of_one_row and sorted(indices) == [0, 1, 2] and len(operands(calls[0])[2]) == 3 else None


def _is_read_once(node: fx.Node, source: fx.Node) -> bool:
    """Tell whether nothing but what leads to ``node`` reads ``source``, and ``node`` has one user."""
    while len(node.users) == 1:
        if node is source:
            return True
        node = operands(node)[0]
    return False
