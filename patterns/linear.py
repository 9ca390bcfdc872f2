"""Read linear layers in ATen graphs: ``mm`` or ``addmm`` of rows with a transposed weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qtts_compile.kernels.checks import FLOAT_DTYPES
from qtts_compile.kernels.gemv import MAX_ROWS, most_rows
from qtts_compile.patterns.graph import is_call_of, operands, shape, value

aten = torch.ops.aten
# Measured on an H200: gate and up, 6144 x 2048 each, take 17 us of cuBLAS's 22 at 8 rows and 26 at 16. With less to read, and in bfloat16 (15 us),
# the kernels win. At 32 rows in bfloat16 gate and up take 16.7 us and cuBLAS's 23.4. When they still took 24.2 a frame took 3.94 ms where all linear
# layers were the kernels', which follow each other without waiting, and 5.64 where they were cuBLAS's.
MANY_ROWS, MANY_WEIGHTS = 9, 2 * 6144 * 2048


@dataclass(frozen=True)
class Linear:
    """``node`` computes ``rows @ weight.T + bias``: rows ``[M, K]``, weight ``[N, K]``, bias ``[N]`` or None."""

    node: fx.Node
    rows: fx.Node
    weight: fx.Node
    bias: fx.Node | None


def few_rows(node: Any) -> Linear | None:
    """Return the linear layer that a node is, if its rows are few enough, in a number known when compiling, to be bound by the weight's bytes."""
    if not isinstance(node, fx.Node) or node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
        return None
    bias, rows, transposed = (None, *operands(node)) if node.target is aten.mm.default else operands(node)
    if transposed.target is not aten.permute.default or list(operands(transposed)[1]) != [1, 0]:
        return None
    weight = operands(transposed)[0]
    if any(n is not None and n.op != "placeholder" for n in (weight, bias)):  # the kernels read parameters ahead of the kernel before them
        return None
    tensors = [value(n) for n in (rows, weight, bias) if n is not None]
    count, width = value(rows).shape
    most = most_rows(tensors[0].dtype, width, tensors[0].device) if isinstance(width, int) else MAX_ROWS
    if not isinstance(count, int) or not 0 < count <= most or len({(t.dtype, t.device) for t in tensors}) > 1 or tensors[0].dtype not in FLOAT_DTYPES:
        return None
    if value(weight).stride(1) != 1 or (bias is not None and (shape(bias) != shape(weight)[:1] or not value(bias).is_contiguous())):
        return None
    return Linear(node, rows, weight, bias)


def library_is_faster(linears: list[Linear]) -> str | None:
    """Return why linear layers of the same rows are better left to the library's matrix product, or None."""
    x, outputs = value(linears[0].rows), sum(shape(linear.weight)[0] for linear in linears)
    rows, width = x.shape
    if x.device.type == "cuda" and x.dtype != torch.bfloat16 and rows >= MANY_ROWS and outputs * width >= MANY_WEIGHTS:
        return f"the library is faster at {rows} rows and {outputs} outputs (measured on an H200)"
    return None


def without_views(node: Any) -> Any:
    """Return the node behind reshapes that keep the order of elements."""
    while isinstance(node, fx.Node) and _is_view(node):
        node = operands(node)[0]
    return node


def users_through_views(node: fx.Node) -> set[fx.Node]:
    """Return who reads a node, looking through such reshapes."""
    return {user for direct in node.users for user in (users_through_views(direct) if _is_view(direct) else {direct})}


def norm_before(rows: fx.Node, readers: set[fx.Node]) -> tuple[fx.Node, fx.Node | None, Any]:
    """Return source, weight and eps of the RMSNorm that gives ``rows`` and is read by ``readers`` alone, else ``rows``, None and 0."""
    norm = without_views(rows)
    if not is_call_of(norm, "rms_norm") or users_through_views(norm) != readers or shape(norm)[-1] != shape(rows)[-1]:
        return rows, None, 0.0
    source, weight, eps = operands(norm)
    alike = value(source).dtype == value(weight).dtype == value(rows).dtype
    return (source, weight, eps) if is_at_rest(weight) and alike else (rows, None, 0.0)


def is_at_rest(vector: fx.Node) -> bool:
    """Tell whether a kernel may read a vector ahead of the kernel before it: a contiguous parameter, not something that is computed."""
    return vector.op == "placeholder" and value(vector).is_contiguous()


def _is_view(node: fx.Node) -> bool:
    if node.target is aten.select.int:  # of the only entry
        source, dim, _ = operands(node)
        return shape(source)[dim] == 1
    return node.target in (aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim)
