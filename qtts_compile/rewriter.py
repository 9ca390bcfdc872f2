"""Rewrite one ATen graph: lift spellings to semantic ops, then fuse those into kernels."""

from __future__ import annotations

import logging
import time

from torch import fx

from qtts_compile.options import Options
from qtts_compile.patterns.catalogue import FUSE, LIFT, OPS
from qtts_compile.patterns.graph import called, module_path
from qtts_compile.patterns.matching import Pattern, find, nearest_failure
from qtts_compile.patterns.scope import Refusal, Scope, layer_count
from qtts_compile.patterns.tracing import canonicalize
from qtts_compile.report import GraphReport

log = logging.getLogger(__name__)


class NotRewritten(RuntimeError):
    """Raised under ``strict`` when a building block was seen and not rewritten."""


def rewrite(gm: fx.GraphModule, options: Options) -> GraphReport:
    """Rewrite a functional inference graph in place and report what was done.

    Raises:
        ValueError: ``layers`` reaches beyond the decoder layers of this graph.
        NotRewritten: under ``strict``, when a block is left over.
    """
    started = time.perf_counter()
    report, scope = GraphReport(), Scope(options.disable, options.layers)
    before = _size(gm.graph)
    canonicalize(gm)
    graph = gm.graph
    report.layers = layer_count(n for p in LIFT for n in graph.nodes if n.op == "call_function" and p.signature(n))
    if options.layers is not None and report.layers and options.layers[1] > report.layers:
        raise ValueError(f"layers={options.layers} reaches beyond the {report.layers} decoder layers of this graph; valid: 0 to {report.layers}")
    refused: list[tuple[fx.Node, Refusal]] = []
    for pattern in LIFT:
        report.lifted[pattern.name] += _lift(pattern, graph, scope, refused)
    report.lifted = +report.lifted
    scope.refusals += _left_over(graph, scope, [refusal for node, refusal in refused if not node._erased])
    for fusion in FUSE:
        fusion.fuse(graph, scope)
        graph.eliminate_dead_code()
    graph.lint()
    gm.recompile()
    report.kernels = _kernels(graph)
    report.refusals, report.declined = scope.refusals, scope.declined
    report.nodes = before, _size(graph)
    report.seconds = time.perf_counter() - started
    log.info("%d nodes -> %d in %.2f s: %s", *report.nodes, report.seconds, {name: len(paths) for name, paths in report.kernels.items()})
    for refusal in report.refusals:
        log.debug("refused %s at %s: %s", refusal.rewrite, refusal.module or "(top)", refusal.reason)
    if options.strict and report.refusals:
        lines = "\n".join(f"  {r.rewrite} at {r.module or '(top)'}: {r.reason}" for r in report.refusals)
        raise NotRewritten(f"strict: {len(report.refusals)} expected rewrites did not match\n{lines}")
    return report


def _lift(pattern: Pattern, graph: fx.Graph, scope: Scope, refused: list[tuple[fx.Node, Refusal]]) -> int:
    def refuse(node: fx.Node, reason: str) -> None:
        refused.append((node, Refusal(pattern.name, module_path(node), reason)))

    if pattern.name in scope.disabled:
        return 0
    replaced: dict[fx.Node | None, fx.Node] = {}
    for match in find(pattern, graph, refuse):
        if not scope.allows(pattern.name, match.anchor):
            continue
        match.inputs = tuple(replaced.get(n, n) for n in match.inputs)  # one match may read another's result
        try:
            new = pattern.replace(graph, match)
        except (TypeError, ValueError) as error:  # the op's own check of its arguments
            refuse(match.anchor, str(error))
            continue
        match.anchor.replace_all_uses_with(new)
        replaced[match.anchor] = new
        log.debug("%s at %s", pattern.name, module_path(match.anchor) or "(top)")
    graph.eliminate_dead_code()
    return len(replaced)


def _left_over(graph: fx.Graph, scope: Scope, refused: list[Refusal]) -> list[Refusal]:
    """Say why each block that still shows in the graph was not recognised."""
    reasons = {(refusal.rewrite, refusal.module): refusal for refusal in refused}
    found: dict[tuple[str, fx.Node], Refusal] = {}
    for pattern in LIFT:
        for node in graph.nodes:
            if node.op != "call_function" or not pattern.signature(node) or not scope.allows(pattern.name, node):
                continue
            key = pattern.name, module_path(node)
            if (pattern.name, node) not in found:
                found[pattern.name, node] = reasons.get(key) or Refusal(*key, nearest_failure(pattern, graph, node))
    return list(found.values())


def _kernels(graph: fx.Graph) -> dict[str, list[str]]:
    names = {f"qtts::{op}": name for name, op in OPS.items()}
    kernels: dict[str, list[str]] = {}
    for node in graph.nodes:
        op = called(node)
        if op is not None and op._schema.name in names:
            kernels.setdefault(names[op._schema.name], []).append(module_path(node))
    return kernels


def _size(graph: fx.Graph) -> int:
    return sum(node.op == "call_function" for node in graph.nodes)
