"""Rotary position embedding in the rotate-half convention, with one position axis or three (M-RoPE, interleaved or concatenated sections).

The three-axis patterns take cos and sin as the rotary module gives them, one table per axis; the op selects the axis per frequency, so that no
merged table is built per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import fx

from qtts_compile.patterns.graph import dtypes_and_devices, insert, shape
from qtts_compile.patterns.matching import Example, Match, Pattern
from qtts_compile.patterns.tracing import TensorSpec

# Sizes that occur nowhere else in the traces, so that the sections of a model can be told from other numbers.
SECTIONS = (11, 8, 7)
HEAD_DIM = 2 * sum(SECTIONS)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def _search_single(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return _rotate(x, cos.unsqueeze(1), sin.unsqueeze(1))


def _search_interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, end1: int, end2: int) -> torch.Tensor:
    def merge(table: torch.Tensor) -> torch.Tensor:
        table = table[..., : table.shape[-1] // 2]
        merged = table[0].clone()
        for axis, end in ((1, end1), (2, end2)):
            merged[..., axis:end:3] = table[axis, ..., axis:end:3]
        return torch.cat([merged, merged], dim=-1).unsqueeze(1)

    return _rotate(x, merge(cos), merge(sin))


def _search_concatenated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, s0: int, s1: int, s2: int) -> torch.Tensor:
    def merge(table: torch.Tensor) -> torch.Tensor:
        pieces = table.split([s0, s1, s2] * 2, dim=-1)
        return torch.cat([piece[i % 3] for i, piece in enumerate(pieces)], dim=-1).unsqueeze(1)

    return _rotate(x, merge(cos), merge(sin))


def _examples(axes: tuple[int, ...], **scalars: int) -> Callable[[fx.Graph], Iterator[Example]]:
    def examples(graph: fx.Graph) -> Iterator[Example]:
        for dtype, device in dtypes_and_devices(graph):
            for batch, tokens in ((2, 3), (1, 1)):
                rows = TensorSpec.dense((batch, tokens, 4, HEAD_DIM), dtype, device)
                b, t, h, d = rows.stride
                x = TensorSpec((batch, 4, tokens, HEAD_DIM), (b, h, t, d), dtype, device)
                table = TensorSpec.dense((*axes, batch, tokens, HEAD_DIM), dtype, device)
                yield Example((x, table, table), tuple(scalars.items()))

    return examples


def _replace(sections: Callable[[Match], tuple[list[int], bool]]) -> Callable[[fx.Graph, Match], fx.Node]:
    def replace(graph: fx.Graph, match: Match) -> fx.Node:
        return insert(graph, match.anchor, torch.ops.qtts.rotary.default, *match.inputs, *sections(match))

    return replace


def _interleaved_sections(match: Match) -> tuple[list[int], bool]:
    s1, s2 = match.scalars["end1"] // 3, match.scalars["end2"] // 3
    return [shape(match.inputs[0])[-1] // 2 - s1 - s2, s1, s2], True


def _concatenated_sections(match: Match) -> tuple[list[int], bool]:
    return [match.scalars[name] for name in ("s0", "s1", "s2")], False


def _check(match: Match) -> str | None:
    x, cos, sin = map(shape, match.inputs)
    if len(x) != 4 or cos != sin or cos[-1] != x[-1]:
        return f"x {x} with cos {cos} and sin {sin}"
    if any(isinstance(s, fx.Node) or (name.startswith("end") and s % 3) for name, s in match.scalars.items()):
        return f"sections {match.scalars}"
    return None


def _signature(node: fx.Node) -> bool:
    if node.target is not torch.ops.aten.cat.default:
        return False
    pieces = node.args[0]
    return isinstance(pieces, (list, tuple)) and isinstance(pieces[0], fx.Node) and pieces[0].target is torch.ops.aten.neg.default


INTERLEAVED = Pattern(
    "rotary",
    _search_interleaved,
    _examples((3,), end1=3 * SECTIONS[1], end2=3 * SECTIONS[2]),
    _replace(_interleaved_sections),
    _signature,
    _check,
)
CONCATENATED = Pattern(
    "rotary",
    _search_concatenated,
    _examples((3,), **{f"s{i}": size for i, size in enumerate(SECTIONS)}),
    _replace(_concatenated_sections),
    _signature,
    _check,
)
SINGLE = Pattern("rotary", _search_single, _examples(()), _replace(lambda match: ([], False)), _signature, _check)
