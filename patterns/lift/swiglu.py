"""SwiGLU: ``silu(gate) * up``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import fx

from qtts_compile.patterns.graph import dtypes_and_devices, insert, operands, shape
from qtts_compile.patterns.matching import Example, Match, Pattern
from qtts_compile.patterns.tracing import TensorSpec

aten = torch.ops.aten


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
    """Tell whether a node is a SiLU, ``x / (1 + exp(-x))``, that is multiplied by something. A SiLU without a gate is not our block."""
    if node.target is not aten.div.Tensor:
        return False
    x, denominator = operands(node)
    if not isinstance(denominator, fx.Node) or denominator.target is not aten.add.Tensor:
        return False
    exponential = operands(denominator)[0]
    if not isinstance(exponential, fx.Node) or exponential.target is not aten.exp.default:
        return False
    negated = operands(exponential)[0]
    users = {user for n in (node, *node.users) if n is node or n.target is torch.ops.prims.convert_element_type.default for user in n.users}
    return negated.target is aten.neg.default and negated.args[0] is x and any(user.target is aten.mul.Tensor for user in users)


PATTERN = Pattern("swiglu", _search, _examples, _replace, _signature, _check)
