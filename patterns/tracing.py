"""Trace plain PyTorch functions to the ATen graphs that a backend is handed by AOTAutograd and Inductor's joint passes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._functorch.compile_utils import fx_graph_cse
from torch._guards import tracing
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import make_fx


class TensorSpec(NamedTuple):
    """What a trace depends on: size, stride (elements), dtype and device of one tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def dense(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> TensorSpec:
        """Describe a contiguous tensor."""
        return TensorSpec(shape, torch.empty(shape, device="meta").stride(), dtype, device)

    @staticmethod
    def of(value: torch.Tensor) -> TensorSpec:
        """Describe a (fake) tensor, symbolic sizes by their hints."""
        return TensorSpec(tuple(map(hint, value.shape)), tuple(map(hint, value.stride())), value.dtype, value.device)


def hint(value: Any) -> Any:
    """Return the concrete value behind a symbolic size, and anything else unchanged."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.hint
    return value


def canonicalize(gm: fx.GraphModule) -> None:
    """Drop dead nodes and merge equal ones, in place.

    Functionalization leaves dead slices behind, and inference graphs repeat per layer what depends on positions only (cos and sin).
    """
    gm.graph.eliminate_dead_code()
    gm.graph = fx_graph_cse(gm.graph)
    gm.graph.eliminate_dead_code()


@functools.lru_cache(maxsize=1024)
def trace(function: Callable, tensors: tuple[TensorSpec | None, ...], scalars: tuple[tuple[str, Any], ...]) -> fx.Graph:
    """Trace ``function(*tensors, **scalars)`` as AOTAutograd would for inference, then apply Inductor's joint-graph passes.

    Placeholders stand in the order of the tensors that are not None. Scalars are baked in as literals.
    """
    with unset_fake_temporarily(), tracing(None), FakeTensorMode() as mode, V.set_fake_mode(mode), torch.no_grad():
        fakes = [None if t is None else torch.empty_strided(t.shape, t.stride, dtype=t.dtype, device=t.device) for t in tensors]

        def call(*present: torch.Tensor) -> Any:
            remaining = iter(present)
            return function(*(None if t is None else next(remaining) for t in fakes), **dict(scalars))

        functional = torch.func.functionalize(call, remove="mutations")
        gm = make_fx(functional, decomposition_table=select_decomp_table())(*(t for t in fakes if t is not None))
        joint_graph_passes(gm)
        canonicalize(gm)
    return gm.graph
