"""Static key-value caches: fixed buffers, written in place, seen by the models as transformers caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache


def add_buffer(module: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Give ``module`` a buffer of zeros that is no weight."""
    module.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device), persistent=False)


class StaticKVCache(nn.Module):
    """Keys and values of every layer of a decoder stack, ``[batch, kv_heads, slots, head_dim]`` each.

    The buffers keep their addresses, so that CUDA graphs may write into them. The cache itself is handed to a model as one of two views:
    :meth:`prompt` for the tokens of a prompt and :meth:`step` for what follows.
    """

    def __init__(self, config: Any, batch: int, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = batch, config.num_key_value_heads, slots, head_dim
        self.layers = config.num_hidden_layers
        for layer in range(self.layers):
            for name in ("keys", "values"):
                add_buffer(self, f"{name}_{layer}", shape, dtype, device)

    def prompt(self, positions: Tensor) -> View:
        """Return the view that writes a prompt's keys and values to the slots ``positions`` ``[T]`` and attends over the prompt alone."""
        return View(self, positions, whole=False)

    def step(self, positions: Tensor) -> View:
        """Return the view that writes to the slots ``positions`` ``[T]`` and attends over all slots; the caller's mask says which count."""
        return View(self, positions, whole=True)


class View(Cache):
    """A cache at the slots ``positions`` ``[T]``, as a stack sees it; ``whole``: it attends over all slots, else over what it writes."""

    def __init__(self, cache: StaticKVCache, positions: Tensor, whole: bool) -> None:  # Cache's own constructor would make layers of its own
        self.cache, self.positions, self.whole = cache, positions, whole

    def layer(self, index: int) -> LayerView:
        """Return what one layer sees of it."""
        keys, values = (self.cache.get_buffer(f"{name}_{index}") for name in ("keys", "values"))
        return LayerView(keys, values, self.positions, self.whole)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.layer(layer_idx).update(key_states, value_states, layer_idx)


class LayerView(Cache):
    """One layer's keys and values ``[batch, kv_heads, slots, head_dim]``, written at the slots ``positions`` ``[T]``."""

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor, whole: bool) -> None:
        self.keys, self.values, self.positions, self.whole = keys, values, positions, whole

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.positions, key_states)
        self.values.index_copy_(2, self.positions, value_states)
        return (self.keys, self.values) if self.whole else (key_states, value_states)
