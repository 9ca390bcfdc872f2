"""Static key-value caches: fixed buffers, written in place, seen by the models as transformers caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache


def add_buffer(module: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Give ``module`` a buffer of zeros that is no weight."""
    module.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device), persistent=False)


def within(buffer: Tensor, reach: int | None, dim: int = 2) -> Tensor:
    """Return the first ``reach`` slots of a buffer, by default itself."""
    return buffer if reach is None else buffer.narrow(dim, 0, reach)


class StaticKVCache(nn.Module):
    """Keys and values of every layer of a decoder stack, ``[batch, kv_heads, slots, head_dim]`` each.

    The buffers keep their addresses, so that CUDA graphs may write into them. The cache itself is handed to a model as one of two views:
    :meth:`prompt` for the tokens of a prompt and :meth:`step` for what follows.

    Args:
        config: of the stack.
        batch: its rows.
        slots: tokens that a row has room for, left padding among them.
        dtype: of keys and values.
        device: of the buffers.
        dense: the layers that are held so; by default all.

    Attributes:
        layers: the stack's layers.
        quantized_layers: those that are not held so.

    Raises:
        ValueError: a config whose ``head_dim`` is no int from 1 on. Batch, slots and dtype are not checked.
    """

    quantized_layers: tuple[int, ...] = ()

    def __init__(self, config: Any, batch: int, slots: int, dtype: torch.dtype, device: torch.device, dense: Sequence[int] | None = None) -> None:
        super().__init__()
        head_dim = getattr(config, "head_dim", None)
        if head_dim is None:
            head_dim = config.hidden_size // config.num_attention_heads
        if type(head_dim) is not int or head_dim < 1:
            raise ValueError(f"head_dim={head_dim!r} of the config: a head has a whole number of coordinates, from 1 on")
        self.shape = batch, config.num_key_value_heads, slots, head_dim
        self.layers, self.dtype = config.num_hidden_layers, dtype
        for layer in range(self.layers) if dense is None else dense:
            for name in ("keys", "values"):
                add_buffer(self, f"{name}_{layer}", self.shape, dtype, device)

    def prompt(self, positions: Tensor, last: Tensor | None = None) -> View:
        """Return the view that writes a prompt's keys and values to the slots ``positions`` ``[T]`` and attends over the prompt alone.

        Slots after ``last`` ``[1]`` are padding at the prompt's right; by default there is none.
        """
        return View(self, positions, positions[-1:] if last is None else last, whole=False)

    def step(self, positions: Tensor, reach: int | None = None) -> View:
        """Return the view that writes to the slots ``positions`` ``[T]`` and attends over the first ``reach`` slots, by default over all.

        The caller's mask says which of them count; ``positions`` are among them.
        """
        return View(self, positions, positions, whole=True, reach=reach)

    def layer(self, index: int, view: View) -> Cache:
        """Return what one layer sees of a view."""
        keys, values = (within(self.get_buffer(f"{name}_{index}"), view.reach) for name in ("keys", "values"))
        return LayerView(keys, values, view.positions, view.whole)

    @property
    def allocated_bytes(self) -> int:
        """The bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def bytes_per_token(self) -> int:
        """The bytes that one more slot of a row would take in all layers."""
        _, heads, _, head_dim = self.shape
        return self.layers * heads * 2 * head_dim * self.dtype.itemsize

    def quantized_tokens(self, tokens: int) -> int:
        """Return how many of the ``tokens`` of a row, its padding not counted, attention reads from codes in a quantised layer."""
        return 0


class View(Cache):
    """A cache at the slots ``positions`` ``[T]``, as a stack sees it.

    Slots after ``last`` ``[1]`` do not count. ``whole``: it attends over all slots, or the first ``reach`` of them, else over what it writes.
    """

    # Cache's own constructor would make layers of its own.
    def __init__(self, cache: StaticKVCache, positions: Tensor, last: Tensor, whole: bool, reach: int | None = None) -> None:
        self.cache, self.positions, self.last, self.whole, self.reach = cache, positions, last, whole, reach

    def layer(self, index: int) -> Cache:
        """Return what one layer sees of it."""
        return self.cache.layer(index, self)

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
