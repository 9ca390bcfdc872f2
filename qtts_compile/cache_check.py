"""The option ``kv_cache``: which cache the compiled graphs must read.

The caller hands the cache to the model, so that a backend cannot choose it; it can refuse a graph that would run over another one unnoticed.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from qtts_compile.patterns.catalogue import LIFT
from qtts_compile.patterns.graph import called, keywords, operands
from qtts_compile.patterns.lift.attention import is_attention

# What shows keys in a graph. A model may spell attention out (attn_implementation="eager"), and then it still rotates them.
SIGNATURES = (is_attention, *(pattern.signature for pattern in LIFT if pattern.name in ("kv_write", "rotary")))


def check_kv_cache(gm: fx.GraphModule, kv_cache: str | None) -> None:
    """Raise ``ValueError`` unless the keys and values of a graph, if it has any, are held in ``kv_cache``; None allows whatever they are held in.

    Of a quantised cache some layers may be in the model's dtype (:class:`qtts_compile.Protect`), but not all that are in the graph.
    """
    if kv_cache is None:
        return
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    nodes = [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
    formats = {format for node in nodes if (format := _format(node))}
    if formats == (set() if kv_cache == "bf16" else {kv_cache}):
        return
    if not formats and not any(is_seen(node) for node in nodes for is_seen in SIGNATURES):
        return
    held = " and ".join(map(repr, sorted(formats))) or "the model's dtype"
    packed = f"past_key_values=TurboQuantCache(model.config, batch, slots, {kv_cache!r}, dtype=model.dtype, device=model.device)"
    cache = "a cache of its own dtype" if kv_cache == "bf16" else packed
    raise ValueError(f"kv_cache={kv_cache!r}: this graph holds its keys and values in {held}; hand the model {cache}, or leave kv_cache out")


def _format(node: fx.Node) -> Any:
    """Return the format of the quantised cache that a node writes or reads, or None."""
    op = called(node)
    if op is None or op.namespace != "qtts":
        return None
    names = (argument.name for argument in op._schema.arguments)
    return (dict(zip(names, operands(node))) | keywords(node)).get("format")  # in functional form, all of op's own are keywords
