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

    def prompt(self, positions: Tensor) -> Cache:
        """Return the view that writes a prompt's keys and values to the slots ``positions`` ``[T]`` and attends over the prompt alone."""
        return _PromptView(self, positions)

    def step(self, positions: Tensor) -> Cache:
        """Return the view that writes to the slots ``positions`` ``[T]`` and attends over all slots; the caller's mask says which count."""
        return _StepView(self, positions)

    def write(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``[batch, kv_heads, T, head_dim]`` to the slots ``positions`` ``[T]`` of a layer and return the layer's whole buffers."""
        buffers = self.get_buffer(f"keys_{layer}"), self.get_buffer(f"values_{layer}")
        for buffer, new in zip(buffers, (keys, values)):
            buffer.index_copy_(2, positions, new)
        return buffers


class _StepView(Cache):
    def __init__(self, cache: StaticKVCache, positions: Tensor) -> None:  # Cache's own constructor would make layers of its own
        self.cache, self.positions = cache, positions

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.cache.write(layer_idx, self.positions, key_states, value_states)


class _PromptView(_StepView):
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        super().update(key_states, value_states, layer_idx)
        return key_states, value_states
