"""SwiGLU: ``silu(gate) * up``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import fx

from qtts_compile.patterns.graph import dtypes_and_devices, insert, shape
from qtts_compile.patterns.matching import Example, Match, Pattern
from qtts_compile.patterns.tracing import TensorSpec


def _search(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def _examples(graph: fx.Graph) -> Iterator[Example]:
    for dtype, device in dtypes_and_devices(graph):
        spec = TensorSpec.dense((2, 3, 24), dtype, device)
        yield Example((spec, spec))


def _replace(graph: fx.Graph, match: Match) -> fx.Node:
    return insert(graph, match.anchor, torch.ops.qtts.swiglu.default, *match.inputs)


def _check(match: Match) -> str | None:
    gate, up = map(shape, match.inputs)
    if gate != up:
        return f"gate {gate} and up {up} differ in shape"
    return None


def _signature(node: fx.Node) -> bool:
    """A sigmoid or exp(-x) whose input is multiplied by it again is a SiLU; an activation other than that leaves no trace here."""
    if node.target is not torch.ops.aten.exp.default or not isinstance(node.args[0], fx.Node):
        return False
    return node.args[0].target is torch.ops.aten.neg.default


PATTERN = Pattern("swiglu", _search, _examples, _replace, _signature, _check)
