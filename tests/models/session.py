"""One model and one cache, stepped as a caller of the decoder stack would."""

import inspect
from typing import Any, Literal

import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from qtts_compile import Protect, TurboQuantCache
from qtts_compile.options import KV_CACHES

from .cases import ModelCase

CacheKind = Literal["static", "dynamic", "int4", "int3", "k4v3", "fp8"]
MaskKind = Literal["4d", "4d-additive", "2d", "none"]
Axes = Literal["distinct", "shared"]


class Session:
    """Make the keyword arguments of each call of the decoder stack ``model``, on one key-value cache.

    Every call of ``prefill_inputs`` or ``decode_inputs`` moves the position on, so run the model (eager or compiled) exactly once on what
    it returns. The tokens of a row are a fixed function of ``seed``: ``clone`` replays them on a cache of its own, ``row`` replays one row
    without its padding, and prefill of n+1 tokens sees the same input as prefill of n and one decode step.

    cache: "static" allocates all ``max_len`` slots here, outside any compiled region; "dynamic" grows; the others are as the first, quantised.
    protect: what a quantised one keeps as it is.
    mask: "4d" is bool ``[B, 1, T, S]`` over all S slots, "4d-additive" the same as 0 and the dtype's minimum, "2d" the long mask of the
        tokens seen so far, which the model expands itself (``[B, max_len]`` with zeros ahead for a static cache, else ``[B, seen]``),
        "none" leaves the mask to the model. Default: "4d" for a static cache and "2d", as ``generate`` calls it, for others.
    padding: masked slots at the left of each row.
    axes: the position ids ``[3, B, T]`` of a model with three rotary axes differ by axis ("distinct", so that a mix-up of sections
        shows) or are one expanded tensor ("shared", as for speech).
    """

    def __init__(
        self,
        model: nn.Module,
        case: ModelCase,
        *,
        cache: CacheKind = "static",
        protect: Protect | None = None,
        mask: MaskKind | None = None,
        batch: int = 1,
        max_len: int = 64,
        padding: list[int] | None = None,
        axes: Axes = "distinct",
        seed: int = 0,
    ) -> None:
        if cache not in ("static", "dynamic", *KV_CACHES[1:]):
            raise ValueError(f"cache {cache!r}: choose static, dynamic or {' or '.join(KV_CACHES[1:])}")
        if axes not in ("distinct", "shared"):
            raise ValueError(f"axes {axes!r}: choose distinct or shared")
        if padding is not None and len(padding) != batch:
            raise ValueError(f"padding {padding} names {len(padding)} rows, batch has {batch}")
        self.model, self.case, self.batch, self.max_len, self.seed = model, case, batch, max_len, seed
        self.cache_kind: CacheKind = cache
        self.protect = protect
        self.axes: Axes = axes
        self.mask_kind: MaskKind = mask or ("4d" if cache == "static" else "2d")
        if self.mask_kind not in ("4d", "4d-additive", "2d", "none"):
            raise ValueError(f"mask {mask!r}: choose 4d, 4d-additive, 2d or none")
        self.padding = padding or [0] * batch
        if self.mask_kind == "none" and any(self.padding):
            raise ValueError(f"padding {padding} needs a mask; mask is 'none'")
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.tokens = torch.randn(batch, max_len, case.hidden, generator=torch.Generator().manual_seed(seed))
        self._takes_cache_position = "cache_position" in inspect.signature(model.forward).parameters
        self.position = 0
        self.cache = self._new_cache()

    def prefill_inputs(self, length: int) -> dict[str, Any]:
        """Return the call for the first ``length`` slots, padding included."""
        if self.position:
            raise ValueError(f"prefill at position {self.position}: reset() or clone() first")
        if length <= max(self.padding):
            raise ValueError(f"prefill of {length} slots leaves no token after padding {self.padding}")
        return self._inputs(length)

    def decode_inputs(self) -> dict[str, Any]:
        """Return the call for the next single token."""
        if not self.position:
            raise ValueError("decode before prefill_inputs(length)")
        return self._inputs(1)

    def clone(self) -> "Session":
        """Return a session at position 0 with the same model, options and tokens, and a cache of its own."""
        return self._copy(self.batch, self.padding, self.tokens)

    def row(self, index: int) -> "Session":
        """Return a session at position 0 over row ``index`` alone, without its padding."""
        return self._copy(1, None, self.tokens[index : index + 1])

    def reset(self) -> None:
        """Go back to position 0; a static cache keeps its buffers."""
        self.position = 0
        if self.cache_kind == "dynamic":
            self.cache = self._new_cache()
        else:
            self.cache.reset()

    @property
    def valid(self) -> torch.Tensor:
        """Bool ``[B, position]``: the slots handed out so far that are not padding."""
        return self._slots(self.position) >= self._starts()

    def _copy(self, batch: int, padding: list[int] | None, tokens: torch.Tensor) -> "Session":
        copy = Session(
            self.model,
            self.case,
            cache=self.cache_kind,
            protect=self.protect,
            mask=self.mask_kind,
            batch=batch,
            max_len=self.max_len,
            padding=padding,
            axes=self.axes,
            seed=self.seed,
        )
        copy.tokens = tokens
        return copy

    def _new_cache(self) -> Any:
        config: Any = self.model.config
        if self.cache_kind == "dynamic":
            return DynamicCache(config=config)
        if self.cache_kind != "static":
            given: dict[str, Any] = dict(dtype=self.dtype, device=self.device, start=self.padding)
            return TurboQuantCache(config, self.batch, self.max_len, self.cache_kind, self.protect, **given)
        cache = StaticCache(config=config, max_cache_len=self.max_len)
        # Allocates the buffers and marks their addresses static, in both transformers lines.
        cache.early_initialization(self.batch, self.case.kv_heads, self.case.head_dim, self.dtype, self.device)
        return cache

    def _slots(self, end: int, start: int = 0) -> torch.Tensor:
        return torch.arange(start, end, device=self.device)

    def _starts(self) -> torch.Tensor:
        return torch.tensor(self.padding, device=self.device)[:, None]

    def _inputs(self, length: int) -> dict[str, Any]:
        start, end = self.position, self.position + length
        if end > self.max_len:
            raise ValueError(f"slot {end} is beyond max_len={self.max_len}")
        index = self._slots(end, start) - self._starts()  # [B, T], negative in the padding
        tokens = self.tokens.to(self.device)[torch.arange(self.batch, device=self.device)[:, None], index.clamp(min=0)]
        inputs = dict(
            inputs_embeds=torch.where(index[..., None] >= 0, tokens, 0.0).to(self.dtype),
            attention_mask=self._mask(start, end),
            position_ids=self._position_ids(index),
            past_key_values=self.cache,
            use_cache=True,
        )
        if self._takes_cache_position:
            inputs["cache_position"] = self._slots(end, start)
        self.position = end
        return inputs

    def _position_ids(self, index: torch.Tensor) -> torch.Tensor:
        positions = index.masked_fill(index < 0, 1)
        if self.case.rope_axes == 1:
            return positions
        if self.axes == "shared":
            return positions.expand(self.case.rope_axes, -1, -1)
        return torch.stack([positions * (axis + 1) for axis in range(self.case.rope_axes)])

    def _mask(self, start: int, end: int) -> torch.Tensor | None:
        if self.mask_kind == "none":
            return None
        slots = self._slots(end if self.cache_kind == "dynamic" else self.max_len)
        present = slots >= self._starts()  # [B, S]
        if self.mask_kind == "2d":
            return (present & (slots < end)).long()
        mask = present[:, None, None, :] & (slots <= self._slots(end, start)[:, None])
        if self.mask_kind == "4d":
            return mask
        return torch.zeros(mask.shape, dtype=self.dtype, device=self.device).masked_fill(~mask, torch.finfo(self.dtype).min)
