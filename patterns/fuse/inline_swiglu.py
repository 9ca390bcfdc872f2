"""SwiGLU where Inductor's own code is faster than our kernel -> plain PyTorch again."""

from __future__ import annotations

import math

import torch
from torch import fx

from qtts_compile.patterns.graph import inline, shape, value
from qtts_compile.patterns.lift.swiglu import PATTERN
from qtts_compile.patterns.scope import Scope

# bench/results/decode_step-1.7b-h200.json: without our kernel 0.291 ms instead of 0.294 (5 layers), and 2.397 instead of 2.311 at 6144 (28 layers).
FEW_ELEMENTS = 3072


def fuse(graph: fx.Graph, scope: Scope) -> None:
    """Give single rows of few elements back to Inductor; a prompt or a batch has several rows."""
    for node in list(graph.find_nodes(op="call_function", target=torch.ops.qtts.swiglu.default)):
        size = shape(node)
        if value(node).device.type == "cuda" and math.prod(size[:-1]) == 1 and size[-1] <= FEW_ELEMENTS:
            scope.decline(PATTERN.name, node, f"Inductor is faster at one row of {size[-1]} (measured up to {FEW_ELEMENTS} on an H200)")
            inline(graph, node, PATTERN.search)
