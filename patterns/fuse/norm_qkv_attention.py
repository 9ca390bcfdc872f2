"""norm_linears of one row and the attention that alone reads its three results, over a cache -> one kernel per decode step and layer.

Before, with the caches written in place::

    q, k, v = norm_linears(x, ...)
    qk_norm_rope_attention(heads(q), heads(k), heads(v), ..., k_cache, v_cache, mask)

After::

    norm_qkv_attention(x, ..., k_cache, v_cache, mask)
"""

from __future__ import annotations

from torch import fx

from qtts_compile.patterns.norm_qkv import join_projections
from qtts_compile.patterns.scope import Scope

NAME = "norm_qkv_attention"


def fuse(graph: fx.Graph, scope: Scope) -> None:
    """Join every attention of one token with the projections before it."""
    join_projections(graph, scope, NAME, "qk_norm_rope_attention", "k_cache")
