"""KV-cache write: new keys or values copied into a static cache at given positions, in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from qtts_compile.patterns.graph import dtypes_and_devices, insert_mutating, value
from qtts_compile.patterns.matching import Example, Match, Pattern
from qtts_compile.patterns.tracing import TensorSpec


def _search(cache: torch.Tensor, source: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    return cache.index_copy(2, position, source)


def _examples(graph: fx.Graph) -> Iterator[Example]:
    for dtype, device in dtypes_and_devices(graph):
        for tokens in (1, 3):
            yield Example(
                (
                    TensorSpec.dense((2, 4, 16, 24), dtype, device),
                    TensorSpec.dense((2, 4, tokens, 24), dtype, device),
                    TensorSpec.dense((tokens,), torch.int64, device),
                )
            )


def _replace(graph: fx.Graph, match: Match) -> fx.Node:
    arguments: dict[str, Any] = dict(zip(("cache", "src", "position"), match.inputs))
    return insert_mutating(graph, match.anchor, torch.ops.qtts.kv_write.default, arguments, match.anchor)[0]


def _check(match: Match) -> str | None:
    cache, source, position = (value(n) for n in match.inputs if n is not None)
    if cache.ndim != 4 or position.ndim != 1 or position.dtype != torch.int64:
        return f"cache {tuple(cache.shape)} written at {position.dtype} positions of shape {tuple(position.shape)}"
    if cache.dtype != source.dtype:
        return f"{source.dtype} written into a {cache.dtype} cache"
    return None


def _signature(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.index_put.default and value(node).ndim == 4 and value(node).is_floating_point()


PATTERN = Pattern("kv_write", _search, _examples, _replace, _signature, _check)
