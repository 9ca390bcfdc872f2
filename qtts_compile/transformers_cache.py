"""A quantised cache for any transformers decoder: its ``forward`` and ``generate`` stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache

from qtts_compile.arguments import check_whole_number
from qtts_compile.cache import View
from qtts_compile.turboquant_cache import Protect, TurboQuantKVCache, warn_of


class TurboQuantCache(Cache):
    """A static cache of packed keys and values (TurboQuant, arXiv 2504.19874), for ``past_key_values=`` of a model or of its ``generate``.

    The first call of the model is the prompt, which attends over its own keys and values as they are; after it the model reads one token a call.
    It runs eagerly and under any backend; where no kernel reads codes, a layer's keys and values are decoded whenever it attends.

    Eager code attends over the tokens so far, so that a mask may be left out. Compiled code attends over all slots, as with a static cache, so that
    its shapes stay; the model's own masks, and 2-dimensional ones that it is given, are made for either. Codes of the newest tokens cannot go back
    to what they were, so that nothing that takes tokens back works: beam search, assisted generation.

    Args:
        config: of the decoder (of a talker: ``talker.config``).
        batch: rows.
        slots: tokens that a row has room for, left padding among them.
        kv_cache: "int4", "int3", "k4v3" or "fp8" (see :class:`qtts_compile.kernels.turboquant.format.Format`).
        protect: what stays as it is; by default ``Protect()``.
        dtype: of the model, bfloat16, float16 or float32; by default the config's, else torch's.
        device: of the model; by default torch's.
        start: of each row the first slot that is not left padding, int ``[batch]``; by default 0. It decides which tokens are kept as the first.

    Attributes:
        packed: the :class:`TurboQuantKVCache`, which has ``allocated_bytes``, ``bytes_per_token``, ``quantized_layers`` and ``quantized_tokens()``.

    Raises:
        ValueError: as :class:`TurboQuantKVCache`, and for a batch, slots or start out of range.
        TypeError: as :class:`TurboQuantKVCache`, for a config that is no decoder's, another dtype, a batch or slots that are no whole
            numbers, and a ``protect`` that is none.
    """

    def __init__(  # Cache's own constructor would make layers of its own
        self,
        config: Any,
        batch: int,
        slots: int,
        kv_cache: str = "int4",
        protect: Protect | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        start: Tensor | Sequence[int] | None = None,
    ) -> None:
        if not hasattr(config, "num_hidden_layers"):
            raise TypeError(f"config is a {type(config).__name__}, which has no layers: give the decoder's (of a talker: talker.config)")
        for name, value in {"batch": batch, "slots": slots}.items():
            check_whole_number(name, value)
        dtype = dtype or getattr(config, "dtype", None) or torch.get_default_dtype()
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise TypeError(f"dtype={dtype}: give the model's, which has to be bfloat16, float16 or float32")
        device = torch.get_default_device() if device is None else torch.device(device)
        zeros = torch.zeros(batch, dtype=torch.long, device=device)
        self.packed = TurboQuantKVCache(config, batch, slots, dtype, zeros.device, kv_cache, Protect.of(protect), zeros)
        warn_of(self.packed, stacklevel=2)
        self.reset()
        if start is not None:
            self.start = start

    def reset(self) -> None:
        """Forget all tokens; the buffers stay where they are, and ``start`` as it is."""
        self._length, self._layer = 0, 0
        self._view: View | None = None

    @property
    def start(self) -> Tensor:
        """Of each row the first slot that is not left padding, int64 ``[batch]``."""
        return self.packed.start

    @start.setter
    def start(self, start: Tensor | Sequence[int]) -> None:
        batch, _, slots, _ = self.packed.shape
        given = torch.as_tensor(start)
        if given.dtype.is_floating_point or given.dtype.is_complex or given.dtype == torch.bool:
            raise TypeError(f"start must be whole numbers, got {given.dtype}")
        if given.shape != (batch,):
            raise ValueError(f"start must have the shape ({batch},), one slot for each row, got {tuple(given.shape)}")
        if not ((given >= 0) & (given < slots)).all():
            raise ValueError(f"start={given.tolist()}: give slots from 0 to {slots - 1}")
        if self._length:
            raise ValueError("start says where a prompt begins and this cache has read one: set it before, or after reset()")
        self.packed.start.copy_(given)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values ``[batch, kv_heads, T, head_dim]`` and return those to attend over.

        Raises:
            ValueError: a model of another layout or on another device, more tokens than slots, or several tokens after the prompt.
            TypeError: another dtype.
        """
        self._check(key_states, layer_idx)
        if layer_idx == 0:
            self._view = self._advance(key_states.shape[2])
        self._layer = layer_idx
        if self._view is None:
            raise ValueError(f"layer {layer_idx} comes before layer 0, where a cache notes the new tokens")
        keys, values = self._view.update(key_states, value_states, layer_idx)
        if not self._view.whole or torch.compiler.is_compiling():
            return keys, values
        return keys[:, :, : self._length], values[:, :, : self._length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens of a row so far, its left padding among them."""
        return self._length

    def get_mask_sizes(self, query: Tensor | int, layer_idx: int = 0) -> tuple[int, int]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return how many slots the next tokens attend over, and the first: ``query`` is their number, or their positions (transformers 4)."""
        tokens = query.shape[0] if isinstance(query, Tensor) else query
        if self._length and torch.compiler.is_compiling():
            return self.packed.shape[2], 0
        return self._length + tokens, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return the slots."""
        return self.packed.shape[2]

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Return the slots: the name in transformers 4."""
        return self.get_max_length()

    @property
    def is_compileable(self) -> bool:
        # Else generate() would make masks of 4 dimensions, which a talker's forward() does not take.
        return False

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self)

    def __len__(self) -> int:
        return self.packed.layers

    def __repr__(self) -> str:
        batch, _, slots, _ = self.packed.shape
        return (
            f"TurboQuantCache({self.packed.format.name}, batch={batch}, {self._length} of {slots} slots, "
            f"{len(self.packed.quantized_layers)} of {self.packed.layers} layers quantised)"
        )

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise ``NotImplementedError``, as all that would take tokens back or move rows."""
        raise NotImplementedError(
            "a quantised cache keeps its newest tokens in a ring, which cannot go back, and its rows where they are: generate without beams, "
            "assistant or contrastive search, or with a DynamicCache; reset() begins anew"
        )

    reorder_cache = batch_repeat_interleave = batch_select_indices = crop

    def _advance(self, tokens: int) -> View:
        """Give the next ``tokens`` their slots."""
        slots, first = self.packed.shape[2], self._length
        if first and self._layer != self.packed.layers - 1:
            raise ValueError(
                f"this cache is of a stack of {self.packed.layers} layers and the model has {self._layer + 1}: give it the model's config"
            )
        if first + tokens > slots:
            raise ValueError(f"{first} tokens and {tokens} more do not fit into slots={slots}: make a cache of more slots, or reset() this one")
        positions = torch.arange(tokens, device=self.packed.start.device) + first
        view = self.packed.step(positions) if first else self.packed.prompt(positions)
        self._length = first + tokens
        return view

    def _check(self, key_states: Tensor, layer_idx: int) -> None:
        """Raise where a layer's keys are not those of the stack that this cache was made for."""
        batch, heads, _, head_dim = self.packed.shape
        if layer_idx >= self.packed.layers:
            raise ValueError(
                f"this cache is of a stack of {self.packed.layers} layers and the model has a layer {layer_idx}: give it the model's config"
            )
        names = ("batch", batch, key_states.shape[0]), ("KV heads", heads, key_states.shape[1]), ("head_dim", head_dim, key_states.shape[3])
        for name, ours, theirs in names:
            if ours != theirs:
                raise ValueError(f"this cache was made for {name}={ours} and the model has {name}={theirs}: make one that fits")
        if key_states.dtype != self.packed.dtype:
            raise TypeError(
                f"this cache was made for {self.packed.dtype} and the model has {key_states.dtype}: make it with dtype={key_states.dtype}"
            )
        if key_states.device != self.packed.start.device:
            raise ValueError(
                f"this cache is on {self.packed.start.device} and the model on {key_states.device}: make it with device={key_states.device}"
            )
