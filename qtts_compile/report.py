"""What was rewritten, where, and what was refused and why."""

from __future__ import annotations

import contextlib
import contextvars
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from qtts_compile.patterns.scope import Refusal


@dataclass
class GraphReport:
    """One compiled graph.

    Attributes:
        lifted: blocks recognised, by rewrite, before any fusion.
        kernels: rewrite -> module paths of the ops that stand in the final graph, one entry per op.
        refusals: places that show a block which was not rewritten.
        declined: blocks recognised and left to Inductor, because that is faster at their shape.
        layers: decoder layers seen.
        nodes: operators in the graph before and after.
        seconds: time taken by matching and rewriting.
        notes: what else the user should know (a fall-back, a graph left alone).
    """

    lifted: Counter[str] = field(default_factory=Counter)
    kernels: dict[str, list[str]] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)
    declined: list[Refusal] = field(default_factory=list)
    layers: int = 0
    nodes: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


@dataclass
class Report:
    """All graphs compiled by backend="qtts" while the report was collected."""

    graphs: list[GraphReport] = field(default_factory=list)
    graph_breaks: list[str] = field(default_factory=list)
    cudagraph_skips: int = 0

    @property
    def lifted(self) -> Counter[str]:
        """Blocks recognised, by rewrite, over all graphs."""
        return sum((graph.lifted for graph in self.graphs), Counter())

    @property
    def kernels(self) -> Counter[str]:
        """Ops left in the final graphs, by rewrite."""
        return sum((Counter({name: len(paths) for name, paths in graph.kernels.items()}) for graph in self.graphs), Counter())

    @property
    def refusals(self) -> list[Refusal]:
        """Refusals of all graphs."""
        return [refusal for graph in self.graphs for refusal in graph.refusals]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for machines."""
        return {
            "kernels": dict(self.kernels),
            "lifted": dict(self.lifted),
            "graphs": [{**asdict(graph), "lifted": dict(graph.lifted)} for graph in self.graphs],
            "graph_breaks": list(self.graph_breaks),
            "cudagraph_skips": self.cudagraph_skips,
        }

    def __str__(self) -> str:
        if not self.graphs:
            return "qtts: no graph was compiled (was the code compiled before, or never run?)"
        rows = [("rewrite", "recognised", "kernels", "where")]
        paths = {name: [p for graph in self.graphs for p in graph.kernels.get(name, ())] for name in self.kernels}
        for name in sorted({*self.lifted, *self.kernels}):
            rows.append((name, str(self.lifted[name] or "-"), str(self.kernels[name] or "-"), _summary(paths.get(name, []))))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        declined = [refusal for graph in self.graphs for refusal in graph.declined]
        lines += [*_grouped("left to Inductor", declined), *_grouped("refused", self.refusals)]
        if not self.refusals:
            lines.append("refused: nothing")
        lines += [f"note: {note}" for note in dict.fromkeys(note for graph in self.graphs for note in graph.notes)]
        lines += [f"graph break: {reason}" for reason in self.graph_breaks]
        seconds = sum(graph.seconds for graph in self.graphs)
        lines.append(
            f"graphs: {len(self.graphs)}, graph breaks: {len(self.graph_breaks)}, CUDA-graph skips: {self.cudagraph_skips}, "
            f"matching and rewriting: {seconds:.2f} s"
        )
        return "\n".join(lines)


_collectors: contextvars.ContextVar[tuple[Report, ...]] = contextvars.ContextVar("qtts_compile_collectors", default=())


@contextlib.contextmanager
def collect() -> Iterator[Report]:
    """Collect what backend="qtts" compiles inside the ``with`` block.

    Code that was compiled before the block is not compiled again and so not reported: call ``torch.compiler.reset()`` first.
    """
    from torch._dynamo.utils import counters

    report = Report()
    breaks, skips = Counter(counters["graph_break"]), counters["inductor"]["cudagraph_skips"]
    token = _collectors.set((*_collectors.get(), report))
    try:
        yield report
    finally:
        _collectors.reset(token)
        report.graph_breaks = [str(reason).splitlines()[0] for reason in (Counter(counters["graph_break"]) - breaks).elements()]
        report.cudagraph_skips = counters["inductor"]["cudagraph_skips"] - skips


def publish(graph: GraphReport) -> None:
    """Hand a compiled graph's report to everyone who collects."""
    for report in _collectors.get():
        report.graphs.append(graph)


def _grouped(title: str, refusals: list[Refusal]) -> Iterator[str]:
    for (rewrite, where, reason), count in Counter((r.rewrite, _summary([r.module]), r.reason) for r in refusals).items():
        yield f"{title}: {rewrite} x{count} at {where}: {reason}"


def _summary(paths: list[str]) -> str:
    """Fold the layer numbers of module paths: layers.0.mlp, layers.1.mlp -> layers.*.mlp."""
    folded = Counter(".".join("*" if part.isdigit() else part for part in path.split(".")) or "(top)" for path in paths)
    return ", ".join(f"{path} x{count}" if count > 1 else path for path, count in folded.items())
