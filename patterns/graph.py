"""Small helpers to read and edit ATen graphs."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch.fx.node import map_arg

from qtts_compile.kernels.checks import FLOAT_DTYPES
from qtts_compile.patterns.tracing import TensorSpec, trace


def value(node: Any) -> torch.Tensor:
    """Return the fake tensor that stands for a node's result."""
    return node.meta["val"]


def shape(node: Any) -> tuple[int, ...]:
    """Return the size of a node's result; symbolic sizes by their hints, so that reading them adds no guard."""
    return TensorSpec.of(node.meta["val"]).shape


def operands(node: Any) -> tuple[Any, ...]:
    """Return a node's arguments, typed for reading (fx types each as a union of twenty)."""
    return node.args


def keywords(node: Any) -> dict[str, Any]:
    """Return a node's keyword arguments, typed for reading."""
    return node.kwargs


def overload(op: str, eps: Any) -> Any:
    """Return the overload of ``qtts::op`` that fits an eps that is a number or a graph input."""
    packet = getattr(torch.ops.qtts, op)
    return packet.tensor_eps if isinstance(eps, fx.Node) else packet.default


def is_call_of(node: Any, op: str) -> bool:
    """Tell whether a node calls ``qtts::op``, by the overload for an eps that is a number or for one that is a graph input."""
    packet = getattr(torch.ops.qtts, op)
    return isinstance(node, fx.Node) and node.target in (packet.default, packet.tensor_eps)


def called(node: fx.Node) -> torch._ops.OpOverload | None:
    """Return the operator that a node calls, as it is or in functional form."""
    target = node.args[0] if node.args and isinstance(node.args[0], torch._ops.OpOverload) else node.target
    return target if isinstance(target, torch._ops.OpOverload) else None


def dtypes_and_devices(graph: fx.Graph) -> list[tuple[torch.dtype, torch.device]]:
    """Return the floating dtypes that occur in a graph, with their devices, in order of appearance."""
    seen: dict[tuple[torch.dtype, torch.device], None] = {}
    for node in graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor) and val.dtype in FLOAT_DTYPES and val.ndim > 0:
            seen[val.dtype, val.device] = None
    return list(seen)


def insert(graph: fx.Graph, before: fx.Node, target: Any, *args: Any, like: fx.Node | None = None) -> fx.Node:
    """Insert ``target(*args)`` before a node, with its fake result, and the provenance of ``like`` (default: ``before``)."""
    with graph.inserting_before(before):
        node = graph.call_function(target, args)
    return _annotate(node, target(*_fakes(args)), like or before)


def insert_mutating(graph: fx.Graph, before: fx.Node, op: torch._ops.OpOverload, kwargs: dict[str, Any], like: fx.Node) -> list[fx.Node]:
    """Insert an op that writes into its arguments, in functional form.

    Returns the op's own results, then one node per mutated argument, in schema order. Inductor turns it into one in-place call without copies.
    """
    mutated = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    returns = len(op._schema.returns)
    with graph.inserting_before(before):
        call = graph.call_function(auto_functionalized, (op,), kwargs)
    fakes = {name: _fakes(arg) for name, arg in kwargs.items()}
    result = op(**fakes)
    results = () if returns == 0 else (result,) if returns == 1 else tuple(result)
    # The written arguments as new values: with the storage of the old ones, Inductor would see a use of the cache after its write, and copy it.
    values = (*(results or (None,)), *(fakes[name].clone() for name in mutated))
    _annotate(call, values, like)
    first = 0 if returns else 1
    return [_annotate(_getitem(graph, before, call, i), values[i], like) for i in range(first, len(values))]


def inline(graph: fx.Graph, node: fx.Node, function: Callable[..., Any]) -> None:
    """Replace ``node``, an op on tensors, by the operators that ``function`` of the same tensors is made of."""
    traced = trace(function, tuple(TensorSpec.of(value(arg)) for arg in node.args), ())
    placeholders = [n for n in traced.nodes if n.op == "placeholder"]
    copies: dict[fx.Node, Any] = dict(zip(placeholders, node.args))
    for inner in traced.nodes:
        if inner.op == "call_function":
            copies[inner] = insert(graph, node, inner.target, *map_arg(inner.args, copies.__getitem__), like=node)
    node.replace_all_uses_with(copies[operands(traced.output_node())[0]])
    graph.erase_node(node)


def getitem(graph: fx.Graph, before: fx.Node, call: fx.Node, index: int) -> fx.Node:
    """Insert the selection of one of several results."""
    return _annotate(_getitem(graph, before, call, index), call.meta["val"][index], call)


def module_path(node: fx.Node) -> str:
    """Return the dotted path of the module that a node was traced in, relative to the compiled module ('' at its top)."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    return re.sub(r"^L\['(self|fn|layer|model|head)'\]", "", path).lstrip(".") if isinstance(path, str) else ""


def _getitem(graph: fx.Graph, before: fx.Node, call: fx.Node, index: int) -> fx.Node:
    with graph.inserting_before(before):
        return graph.call_function(operator.getitem, (call, index))


def _fakes(args: Any) -> Any:
    return map_arg(args, lambda n: n.meta["val"])


def _annotate(node: fx.Node, val: Any, like: fx.Node) -> fx.Node:
    node.meta.update({k: v for k, v in like.meta.items() if k in ("nn_module_stack", "stack_trace", "source_fn_stack", "mutation_region_id")})
    node.meta["val"] = val
    return node
