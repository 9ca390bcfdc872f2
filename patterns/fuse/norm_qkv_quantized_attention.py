"""norm_linears of one row and the attention over a quantised cache that alone reads its three results -> one kernel per decode step and layer.

Before, with the cache's buffers written in place::

    q, k, v = norm_linears(x, ...)
    qk_norm_rope_quantized_attention(heads(q), heads(k), heads(v), ..., *buffers, position, start, mask)

After::

    norm_qkv_quantized_attention(x, ..., *buffers, position, start, mask)
"""

from __future__ import annotations

from torch import fx

from qtts_compile.patterns.norm_qkv import join_projections
from qtts_compile.patterns.scope import Scope

NAME = "norm_qkv_quantized_attention"


def fuse(graph: fx.Graph, scope: Scope) -> None:
    """Join every attention of one token over a quantised cache with the projections before it."""
    join_projections(graph, scope, NAME, "qk_norm_rope_quantized_attention", "k_codes")
