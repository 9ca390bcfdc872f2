"""What a frame has to read from the GPU's memory, and the least time that takes."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from statistics import mean, median
from typing import Any

import torch
from torch import nn

from bench.timing import figure
from qtts_compile.cache import StaticKVCache

COPY_BYTES = 1 << 30


def weight_bytes(talker: Any) -> int:
    """Return the bytes of weights that a frame reads: the talker's once, the predictor's once for each code after the first.

    Of an embedding a frame reads a row, which does not count.
    """
    predictor = talker.code_predictor
    once = [talker.model.layers, talker.model.norm, talker.codec_head, predictor.lm_head, predictor.small_to_mtp_projection]
    each = [predictor.model.layers, predictor.model.norm]
    return _bytes(once) + len(predictor.lm_head) * _bytes(each)


def cache_bytes(talker: Any, positions: int, batch: int = 1, cache: StaticKVCache | None = None) -> int:
    """Return the bytes of keys and values that a frame reads after so many ``positions``, from the talker's ``cache`` or one of the model's dtype."""
    groups, tokens = talker.config.num_code_groups, positions + 1
    token, pass_of_predictor = (_bytes_of_token(stack) for stack in (talker, talker.code_predictor))
    packed, packed_token = (cache.quantized_tokens(tokens), cache.bytes_per_token) if cache else (0, 0)
    read = packed * packed_token + (tokens - packed) * token
    return batch * (read + sum(range(2, groups + 1)) * pass_of_predictor)


def _bytes_of_token(stack: Any) -> int:
    config = stack.config
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * next(stack.parameters()).element_size()


def cache_figures(cache: StaticKVCache) -> dict[str, Any]:
    """Return what the talker's cache takes."""
    return {
        "cache": figure(cache.allocated_bytes / 2**20, "MiB"),
        "cache, a token": figure(cache.bytes_per_token / 2**10, "KiB"),
        "quantised layers": figure(len(cache.quantized_layers), ""),
    }


def read_figures(talker: Any, position: int, frames: int, batch: int, cache: StaticKVCache | None = None) -> dict[str, Any]:
    """Return what an average frame reads that is one of ``frames`` from ``position`` on, and on a GPU the floor under its time."""
    weights, cached = weight_bytes(talker), mean(cache_bytes(talker, place, batch, cache) for place in range(position, position + frames))
    figures = {"weights read": figure(weights / 1e9, "GB"), "keys and values read": figure(cached / 1e6, "MB")}
    if next(talker.parameters()).is_cuda:
        figures["floor"] = figure((weights + cached) / copy_bandwidth() / 1e9, "ms")
    return figures


@functools.cache
def copy_bandwidth() -> float:
    """Return the TB/s at which this GPU copies: what is read and what is written, together."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(20):
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * COPY_BYTES / median(times[5:]) / 1e9


def _bytes(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())
