"""RMSNorm: ``weight * (x / rms(x))``, normalised in float32 and rounded to the input dtype before the weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from qtts_compile.patterns.graph import dtypes_and_devices, insert, operands, overload, shape, value
from qtts_compile.patterns.matching import Example, Match, Pattern
from qtts_compile.patterns.tracing import TensorSpec


def _search(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    wide = x.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def _examples(graph: fx.Graph) -> Iterator[Example]:
    for dtype, device in dtypes_and_devices(graph):
        for weight_dtype in dict.fromkeys((dtype, torch.float32)):
            for size in ((1, 1, 24), (2, 3, 4, 24)):
                tensors = (TensorSpec.dense(size, dtype, device), TensorSpec.dense((24,), weight_dtype, device))
                yield Example(tensors, (("eps", 1.25e-5),))


def _replace(graph: fx.Graph, match: Match) -> fx.Node:
    x, weight = match.inputs
    return insert(graph, match.anchor, *norm_call("rms_norm", x, weight, match.scalars["eps"]))


def norm_call(op: str, *args: Any) -> tuple[Any, ...]:
    """Return the op and its arguments, by the overload that fits an eps that is a number or a graph input."""
    *tensors, eps = args
    eps = _widest(eps) if isinstance(eps, fx.Node) else float(eps)
    return overload(op, eps), *tensors, eps


def _widest(node: fx.Node) -> fx.Node:
    """Look through the cast of a 0-d graph input, so that eps keeps its float64 value."""
    if node.target is torch.ops.prims.convert_element_type.default and value(node).ndim == 0:
        return operands(node)[0]
    return node


def _check(match: Match) -> str | None:
    x, weight = map(shape, match.inputs)
    if weight != x[-1:]:
        return f"weight of shape {weight} for rows of {x[-1]}"
    eps = match.scalars["eps"]
    if isinstance(eps, fx.Node) and (shape(eps) or value(_widest(eps)).device.type != "cpu"):
        return f"eps is a tensor of shape {shape(eps)} on {value(eps).device}, not a number"
    return None


def _signature(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.rsqrt.default


PATTERN = Pattern("rms_norm", _search, _examples, _replace, _signature, _check)
