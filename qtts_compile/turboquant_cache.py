"""A static key-value cache that holds most layers in 3, 4 or 8 bits a coordinate (TurboQuant, arXiv 2504.19874)."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from qtts_compile.arguments import check_whole_number
from qtts_compile.cache import StaticKVCache, View, add_buffer, within
from qtts_compile.kernels.turboquant.format import Format
from qtts_compile.kernels.turboquant.read import quantized_kv_read
from qtts_compile.kernels.turboquant.write import quantized_kv_write
from qtts_compile.options import KV_CACHES

BUFFERS = ("k_codes", "v_codes", "scales", "kept")


class Protect(NamedTuple):
    """What a quantised cache holds as it is.

    Layers: the ``first_layers`` and the ``last_layers`` of the stack; they have no codes at all. Tokens, in the other layers and beside their
    codes: the ``sinks`` first of a row, which come after its left padding, and the ``window`` newest, the one that is being read among them.
    """

    first_layers: int = 2
    last_layers: int = 0
    sinks: int = 4
    window: int = 64

    @classmethod
    def of(cls, protect: object) -> Protect:
        """Return what was given, and the defaults for None. Raises ``TypeError`` for anything else."""
        if protect is not None and not isinstance(protect, cls):
            raise TypeError(f"protect={protect!r}: give a qtts_compile.Protect(...), or None for its defaults")
        return cls() if protect is None else protect

    def check(self, slots: int) -> None:
        """Raise ``TypeError`` for what is no whole number, and ``ValueError`` for one that cannot be protected in a cache of ``slots``."""
        for name, value in self._asdict().items():
            least = int(name == "window")
            check_whole_number(f"protect: {name}", value, least, why=": a token attends to its own key and value as they are" if least else "")
        if self.sinks + self.window >= slots:
            raise ValueError(
                f"protect: sinks={self.sinks} and window={self.window} keep every token of {slots} slots as it is, so that none would be read "
                "quantised: lower the window, give more slots, or keep the cache in 'bf16'"
            )


class TurboQuantKVCache(StaticKVCache):
    """A :class:`StaticKVCache` whose layers in the middle are quantised.

    A prompt attends over its keys and values as they are. Later tokens attend over the dense keys and values that ``quantized_kv_read`` makes of
    codes for the time of one layer. Every token of a quantised layer is stored as codes; those that ``protect`` names are kept beside them.

    Buffers of a quantised layer i: ``k_codes_i``, ``v_codes_i`` uint8 ``[batch, kv_heads, slots, bytes]`` as
    :class:`qtts_compile.kernels.turboquant.format.Format` says, ``scales_i`` float16 ``[2, batch, kv_heads, slots]`` and ``kept_i``
    ``[2, batch, kv_heads, sinks + window, head_dim]`` of ``dtype``. Shared by all: ``start``.

    Args:
        config, batch, slots, dtype, device: as of :class:`StaticKVCache`.
        format: "int4", "int3", "k4v3" or "fp8".
        protect: what is not quantised.
        start: int64 ``[batch]``, the first slot of each row that is not left padding. The tensor itself is kept, and may be written later.

    Raises:
        ValueError: an unknown format, a head_dim that is no power of two from 32 on, or as :meth:`Protect.check`.
        TypeError: as :meth:`Protect.check`.
    """

    start: Tensor

    def __init__(
        self, config: Any, batch: int, slots: int, dtype: torch.dtype, device: torch.device, format: str, protect: Protect, start: Tensor
    ) -> None:
        layers, parsed = range(config.num_hidden_layers), Format.parse(format)
        protect.check(slots)
        quantized = layers[protect.first_layers : max(0, len(layers) - protect.last_layers)]
        super().__init__(config, batch, slots, dtype, device, dense=[layer for layer in layers if layer not in quantized])
        self.format, self.protect, self.quantized_layers = parsed, protect, tuple(quantized)
        _, heads, _, head_dim = self.shape
        for layer in quantized:
            add_buffer(self, f"k_codes_{layer}", (batch, heads, slots, parsed.key_bytes(head_dim)), torch.uint8, device)
            add_buffer(self, f"v_codes_{layer}", (batch, heads, slots, parsed.value_bytes(head_dim)), torch.uint8, device)
            add_buffer(self, f"scales_{layer}", (2, batch, heads, slots), torch.float16, device)
            add_buffer(self, f"kept_{layer}", (2, batch, heads, protect.sinks + protect.window, head_dim), dtype, device)
        self.register_buffer("start", start, persistent=False)

    def step(self, positions: Tensor, reach: int | None = None) -> View:
        """Return the view that writes one token to the slot ``positions`` ``[1]`` and attends over the first ``reach`` slots, by default over all.

        Raises ``ValueError`` for more tokens: each has a window of its own.
        """
        if len(positions) != 1:
            raise ValueError(f"{len(positions)} tokens after the prompt: a quantised cache takes them one by one")
        return super().step(positions, reach)

    def layer(self, index: int, view: View) -> Cache:
        """Return what one layer sees of a view."""
        if index not in self.quantized_layers:
            return super().layer(index, view)
        k_codes, v_codes, scales, kept = (self.get_buffer(f"{name}_{index}") for name in BUFFERS)
        buffers = within(k_codes, view.reach), within(v_codes, view.reach), within(scales, view.reach, dim=3), kept
        return QuantizedLayerView(buffers, view, self.start, self.protect.sinks, self.format.name)

    @property
    def bytes_per_token(self) -> int:
        """The bytes that one more slot of a row would take in all layers; what is kept as it is beside codes takes none."""
        _, heads, _, head_dim = self.shape
        dense = super().bytes_per_token // self.layers
        quantized = heads * self.format.bytes_per_token(head_dim)
        return dense * (self.layers - len(self.quantized_layers)) + quantized * len(self.quantized_layers)

    def quantized_tokens(self, tokens: int) -> int:
        """Return how many of the ``tokens`` of a row, its padding not counted, attention reads from codes in a quantised layer.

        These are all but the sinks and the window, which are stored as codes like the others.
        """
        return max(0, tokens - self.protect.sinks - self.protect.window) if self.quantized_layers else 0


class QuantizedLayerView(Cache):
    """One quantised layer: its ``buffers``, ``start``, ``sinks`` and ``format`` are those of :func:`quantized_kv_read`."""

    def __init__(self, buffers: tuple[Tensor, ...], view: View, start: Tensor, sinks: int, format: str) -> None:
        self.buffers, self.start, self.sinks, self.format = buffers, start, sinks, format
        self.positions, self.last, self.whole = view.positions, view.last, view.whole

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        k_codes, v_codes, scales, kept = self.buffers
        quantized_kv_write(key_states, value_states, k_codes, v_codes, scales, kept, self.positions, self.last, self.start, self.sinks, self.format)
        if not self.whole:
            return key_states, value_states
        return quantized_kv_read(k_codes, v_codes, scales, kept, self.last, self.start, self.sinks, self.format)


def make_cache(
    config: Any, batch: int, slots: int, dtype: torch.dtype, start: Tensor, kv_cache: str = "bf16", protect: Protect | None = None
) -> StaticKVCache:
    """Return the cache that ``kv_cache`` names, one of :data:`KV_CACHES`, on the device of ``start`` int64 ``[batch]``.

    "bf16" stands for a cache of ``dtype``. ``protect`` is for the others: None is ``Protect()``. Raises as :class:`TurboQuantKVCache`, and
    ``ValueError`` for an unknown name and for ``protect`` where nothing is quantised.
    """
    if kv_cache not in KV_CACHES:
        raise ValueError(f"kv_cache={kv_cache!r}: give one of {', '.join(KV_CACHES)}")
    wanted = Protect.of(protect)
    if kv_cache != "bf16":
        return TurboQuantKVCache(config, batch, slots, dtype, start.device, kv_cache, wanted, start)
    if protect is not None:
        raise ValueError(f"protect={protect} is for a quantised cache and kv_cache='bf16' quantises nothing: leave it out")
    return StaticKVCache(config, batch, slots, dtype, start.device)


def warn_of(cache: StaticKVCache, stacklevel: int) -> None:
    """Warn that a quantised cache is experimental, or that it quantises nothing because all of its layers are protected."""
    if not isinstance(cache, TurboQuantKVCache):
        return
    if cache.quantized_layers:
        over = "on the 1.7B model with random weights and over random keys" if 3 in (cache.format.k_bits, cache.format.v_bits) else "over random keys"
        message = f"is experimental: it fails this project's limits {over} (see README); the default is 'bf16'"
    else:
        message = f"quantises nothing: {cache.protect} keeps all {cache.layers} layers of this model as they are; lower first_layers and last_layers"
    warnings.warn(f"kv_cache={cache.format.name!r} {message}", stacklevel=stacklevel + 1)
