"""Where rewrites may apply, and the record of where they did not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx

from qtts_compile.patterns.graph import module_path


@dataclass(frozen=True)
class Refusal:
    """A place where a rewrite could stand and does not."""

    rewrite: str
    module: str
    reason: str


@dataclass
class Scope:
    """The user's limits on a graph: rewrites switched off, and the half-open range of decoder layers to rewrite."""

    disabled: frozenset[str] = frozenset()
    layers: tuple[int, int] | None = None
    refusals: list[Refusal] = field(default_factory=list)
    declined: list[Refusal] = field(default_factory=list)

    def allows(self, rewrite: str, node: fx.Node) -> bool:
        """Tell whether a rewrite may touch a node. What lies outside every layer (the final norm) is not limited by ``layers``."""
        if rewrite in self.disabled:
            return False
        index = layer_index(node)
        return self.layers is None or index is None or self.layers[0] <= index < self.layers[1]

    def refuse(self, rewrite: str, node: fx.Node, reason: str) -> None:
        """Record that a rewrite was refused at a node."""
        self.refusals.append(Refusal(rewrite, module_path(node), reason))

    def decline(self, rewrite: str, node: fx.Node, reason: str) -> None:
        """Record that a block was recognised and left to Inductor, because that is faster."""
        self.declined.append(Refusal(rewrite, module_path(node), reason))


def layer_index(node: fx.Node) -> int | None:
    """Return the index of the decoder layer that a node was traced in: the first number in its module path."""
    return next((int(part) for part in module_path(node).split(".") if part.isdigit()), None)


def layer_count(nodes: Iterable[fx.Node]) -> int:
    """Return how many decoder layers a graph shows."""
    return max((index + 1 for index in map(layer_index, nodes) if index is not None), default=0)
