"""Find in a graph the computation that a plain PyTorch function writes.

A match is accepted in two steps. *Structure*: the function, traced at example shapes, has the same operators in the same places; numbers are
wildcards and the scalars of interest (an eps, a section size) are read off. *Proof*: the function, traced again with the very shapes, strides,
dtypes and scalars of the candidate, gives the candidate's graph to the last literal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from qtts_compile.patterns.graph import shape
from qtts_compile.patterns.tracing import TensorSpec, hint, trace

aten = torch.ops.aten
COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor}
# The sizes these take are compared through the shape they give: a model may write -1 where a pattern writes the number.
SHAPE_OPS = {aten.view.default, aten.reshape.default, aten.expand.default}


@dataclass(frozen=True)
class Example:
    """Inputs that a pattern is traced with: tensors by position, scalars by keyword, each scalar a value nothing else in the trace has."""

    tensors: tuple[TensorSpec | None, ...]
    scalars: tuple[tuple[str, Any], ...] = ()


@dataclass
class Match:
    """A place in a graph: ``inputs`` in the pattern's argument order (None where the example had none), ``scalars`` by name."""

    anchor: fx.Node
    inputs: tuple[Any, ...]
    scalars: dict[str, Any]


@dataclass(frozen=True)
class Pattern:
    """A spelling of one building block and the semantic op that replaces it.

    ``search`` is plain PyTorch. ``examples(graph)`` yields inputs to trace it with. ``replace(graph, match)`` inserts the op before the anchor
    and returns its node. ``signature(node)`` tells whether a node shows that this block is present, so that one left over is reported.
    ``check(match)`` returns why a match must be refused, or None.
    """

    name: str
    search: Callable[..., Any]
    examples: Callable[[fx.Graph], Iterable[Example]]
    replace: Callable[[fx.Graph, Match], fx.Node]
    signature: Callable[[fx.Node], bool]
    check: Callable[[Match], str | None] = field(default=lambda match: None)


class Matcher:
    """One traced pattern graph, matched backwards from its output."""

    def __init__(self, graph: fx.Graph, scalars: dict[str, Any], exact: bool) -> None:
        self.names = {value: name for name, value in scalars.items()}
        self.exact = exact
        self.placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        self.output: Any = graph.output_node().args[0]
        self.failure = (-1, "")

    @property
    def target(self) -> Any:
        """The operator that computes the pattern's output."""
        return self.output.target

    def match(self, node: fx.Node) -> dict[Any, Any] | None:
        """Return pattern node -> graph node and scalar name -> value, or None (``failure`` then says how far it came and why)."""
        self.failure = (-1, "")
        return self._match([(self.output, node)], {})

    def _fail(self, depth: int, reason: str) -> None:
        if depth > self.failure[0]:
            self.failure = (depth, reason)

    def _match(self, todo: list[tuple[Any, Any]], bound: dict[Any, Any]) -> dict[Any, Any] | None:
        while todo:
            (p, n), todo = todo[-1], todo[:-1]
            if not isinstance(p, fx.Node):
                if not self._literal(p, n, bound, todo):
                    return self._fail(len(bound), f"the number {n} where {p} was expected")
                continue
            if p in bound:
                if bound[p] is not n:
                    return self._fail(len(bound), f"{n} is not {bound[p]}")
                continue
            if not isinstance(n, fx.Node):
                return self._fail(len(bound), f"the literal {n} where {p.target} was expected")
            bound = {**bound, p: n}
            if p.op == "placeholder":
                continue
            if n.op != p.op or n.target != p.target:
                return self._fail(len(bound), f"{_name(n)} where {_name(p)} was expected")
            if p.target in SHAPE_OPS:
                if self.exact and shape(p) != shape(n):
                    return self._fail(len(bound), f"{_name(n)} to {shape(n)} where {shape(p)} was expected")
                todo = [*todo, (p.args[0], n.args[0])]
                continue
            if len(p.args) != len(n.args) or p.kwargs.keys() != n.kwargs.keys():
                return self._fail(len(bound), f"{_name(n)} called with other arguments")
            todo = [*todo, *((p.kwargs[k], n.kwargs[k]) for k in p.kwargs), *zip(p.args, n.args)]
            if p.target in COMMUTATIVE:
                swapped = [*todo[:-2], (p.args[0], n.args[1]), (p.args[1], n.args[0])]
                return self._match(todo, bound) or self._match(swapped, bound)
        return bound

    def _literal(self, p: Any, n: Any, bound: dict[Any, Any], todo: list[tuple[Any, Any]]) -> bool:
        if isinstance(p, (list, tuple)):
            if not isinstance(n, (list, tuple)) or len(p) != len(n):
                return False
            todo.extend(zip(p, n))
            return True
        if isinstance(p, (int, float)) and not isinstance(p, bool):
            if p in self.names:
                return bound.setdefault(self.names[p], n) == n and isinstance(n, (int, float, fx.Node))
            value = hint(n.meta.get("val")) if isinstance(n, fx.Node) else n
            return isinstance(value, (int, float)) and (value == p or not self.exact)
        return p == n


def find(pattern: Pattern, graph: fx.Graph, refuse: Callable[[fx.Node, str], None]) -> list[Match]:
    """Return the matches of ``pattern`` in ``graph``, in graph order; call ``refuse(anchor, reason)`` for near misses."""
    matches: dict[fx.Node, Match] = {}
    tried: set[str] = set()
    shown = sum(node.op == "call_function" and pattern.signature(node) for node in graph.nodes)
    for example in pattern.examples(graph):
        if len(matches) >= shown:
            break
        traced = trace(pattern.search, example.tensors, example.scalars)
        key = f"{[t is None for t in example.tensors]} {traced}"
        if key in tried:
            continue
        tried.add(key)
        matcher = Matcher(traced, dict(example.scalars), exact=False)
        for node in graph.find_nodes(op="call_function", target=matcher.target):
            if node in matches:
                continue
            bound = matcher.match(node)
            if bound is None:
                continue
            match = _bind(matcher, example, node, bound)
            reason = _prove(pattern, example, match) or pattern.check(match)
            if reason:
                refuse(node, reason)
            else:
                matches[node] = match
    return [matches[node] for node in graph.nodes if node in matches]


def nearest_failure(pattern: Pattern, graph: fx.Graph, signature: fx.Node) -> str:
    """Say why the block that ``signature`` belongs to was not recognised: the mismatch of the attempt that came furthest."""
    best = (-1, "no candidate")
    downstream, frontier = {signature}, [signature]
    while frontier and len(downstream) < 64:
        frontier = [u for n in frontier for u in n.users if u not in downstream]
        downstream.update(frontier)
    for example in pattern.examples(graph):
        matcher = Matcher(trace(pattern.search, example.tensors, example.scalars), dict(example.scalars), exact=False)
        for node in downstream:
            if node.op == "call_function" and node.target == matcher.target and matcher.match(node) is None:
                best = max(best, matcher.failure)
    return best[1]


def _bind(matcher: Matcher, example: Example, anchor: fx.Node, bound: dict[Any, Any]) -> Match:
    present = iter(matcher.placeholders)
    inputs = tuple(None if t is None else bound.get(next(present)) for t in example.tensors)
    return Match(anchor, inputs, {name: bound.get(name) for name, _ in example.scalars})


def _prove(pattern: Pattern, example: Example, match: Match) -> str | None:
    if any(n is None for n, t in zip(match.inputs, example.tensors) if t is not None):
        return "an input of the pattern is not used"
    if any(not isinstance(n.meta.get("val"), torch.Tensor) for n in match.inputs if n is not None):
        return "an input is not a tensor"
    tensors = tuple(None if n is None else TensorSpec.of(n.meta["val"]) for n in match.inputs)
    # A scalar that is a graph input (dynamic shapes turn module floats into inputs) has no value to trace with: it stays a wildcard.
    wild = {name: value for name, value in example.scalars if isinstance(match.scalars[name], fx.Node)}
    known = {name: wild.get(name, match.scalars[name]) for name, _ in example.scalars}
    try:
        traced = trace(pattern.search, tensors, tuple(known.items()))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return f"does not run at these shapes: {str(error).splitlines()[0]}"
    matcher = Matcher(traced, wild, exact=True)
    bound = matcher.match(match.anchor)
    if bound is None:
        return matcher.failure[1]
    if _bind(matcher, Example(tensors, example.scalars), match.anchor, bound).inputs != match.inputs:
        return "the inputs stand in other places"
    return None


def _name(node: fx.Node) -> str:
    return str(node.target)
