"""README's tables by name, each made of one file of bench/results."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bench import cache_tables, kernel_tables, speech_tables
from bench.result_files import Results

TABLES: dict[str, Callable[[Results], str]] = {
    "speech": speech_tables.speech,
    "batches": speech_tables.batches,
    "starts": speech_tables.starts,
    "decoder": speech_tables.decoder,
    "frame": speech_tables.frame,
    "e2e": speech_tables.e2e,
    "decode-step": kernel_tables.decode_step,
    "linears": kernel_tables.linears,
    "boundaries": kernel_tables.boundaries,
    "kernels": kernel_tables.kernels,
    "caches": cache_tables.caches,
    "caches-of-batches": partial(cache_tables.caches, least_texts=2),
    "quantized-attention": cache_tables.quantized_attention,
    "attention-parts": cache_tables.attention_parts,
    "layers": cache_tables.layers,
    "quality": cache_tables.quality,
    "random-keys": cache_tables.random_keys,
    "protection": cache_tables.protection,
    "free-running": cache_tables.free_running,
}
