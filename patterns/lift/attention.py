"""Grouped-query attention of a few tokens: repeat_kv and scaled_dot_product_attention become one kernel that reads each key once.

PyTorch turns scaled_dot_product_attention into another operator per device, dtype and mask, so the pattern is traced at the shapes of each
attention found in the graph. Prompts, whose tokens share what is read of the keys, keep PyTorch's attention.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import fx

from qtts_compile.patterns.graph import insert, shape, value
from qtts_compile.patterns.matching import Example, Match, Pattern
from qtts_compile.patterns.tracing import TensorSpec

SCALE = 0.3125
MAX_TOKENS = 2


def _search(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, *, scale: float) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]

    def repeat(x: torch.Tensor) -> torch.Tensor:
        batch, heads, slots, dim = x.shape
        return x if groups == 1 else x[:, :, None].expand(batch, heads, groups, slots, dim).reshape(batch, heads * groups, slots, dim)

    return F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=mask, scale=scale)


def _search_enable_gqa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, *, scale: float) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


def is_attention(node: fx.Node) -> bool:
    """Tell whether a node is one of the operators that scaled_dot_product_attention dispatches to."""
    return node.op == "call_function" and "scaled_dot_product" in str(node.target) and "backward" not in str(node.target)


def _signature(node: fx.Node) -> bool:
    return is_attention(node) and _is_few(shape(node.args[0])[2])


def _is_few(tokens: int | torch.SymInt) -> bool:
    return isinstance(tokens, int) and tokens <= MAX_TOKENS


def _examples(graph: fx.Graph) -> Iterator[Example]:
    seen: set[tuple] = set()
    for node in graph.nodes:
        if not _signature(node):
            continue
        query, key = TensorSpec.of(value(node.args[0])), TensorSpec.of(value(node.args[1]))
        if (query, key) in seen:
            continue
        seen.add((query, key))
        (batch, heads, tokens, _), slots = query.shape, key.shape[2]
        masks: list[TensorSpec | None] = [None]
        for dtype in (torch.bool, query.dtype):
            masks += [TensorSpec.dense((b, h, tokens, slots), dtype, query.device) for b in {batch, 1} for h in {1, heads}]
        for kv_heads in (n for n in range(1, heads + 1) if heads % n == 0):  # fewest first: repeat_kv is part of the longest spelling
            cache = TensorSpec.dense((batch, kv_heads, slots, query.shape[3]), query.dtype, query.device)
            for mask in masks:
                yield Example((query, cache, cache, mask), (("scale", SCALE),))


def _replace(graph: fx.Graph, match: Match) -> fx.Node:
    return insert(graph, match.anchor, torch.ops.qtts.decode_attention.default, *match.inputs, match.scalars["scale"])


def _check(match: Match) -> str | None:
    q, k, v = (shape(n) for n in match.inputs[:3])
    if not _is_few(q[2]):
        return f"{q[2]} query tokens, more than {MAX_TOKENS}"
    if k != v:
        return f"keys {k} and values {v} differ in shape"
    return None


PATTERN = Pattern("attention", _search, _examples, _replace, _signature, _check)
ENABLE_GQA = Pattern("attention", _search_enable_gqa, _examples, _replace, _signature, _check)
