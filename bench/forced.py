"""A known sequence over a quantised cache in one call of the eager model: what a run that reads token after token would have computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from qtts_compile.kernels.turboquant.codec import dequantize, quantize
from qtts_compile.turboquant_cache import Protect, TurboQuantKVCache


class ForcedCache(Cache):
    """The keys and values of ``tokens`` known tokens, the first ``prompt`` of them a prompt, as a cache ``like`` this one would have shown them.

    A layer gets each key and value twice, as it is and decoded from its codes, and the ``mask`` ``[1, 1, tokens, 2 * tokens]`` says which of the
    two a token sees. Codes come from the codec in plain PyTorch: no kernel, no packed buffer and no ring of recent tokens judges itself.
    """

    # Cache's own constructor would make layers of its own.
    def __init__(self, like: TurboQuantKVCache, prompt: int, tokens: int, device: torch.device) -> None:
        self.format, self.layers_with_codes = like.format, like.quantized_layers
        slots = torch.arange(tokens, device=device)
        reader = slots[:, None]
        seen, exact = slots <= reader, (reader < prompt) | is_kept(slots, reader, like.protect)
        self.mask = torch.cat((seen & exact, seen & ~exact), 1)[None, None]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = key_states, value_states
        if layer_idx in self.layers_with_codes:
            keys, values = decoded(keys, self.format.k_bits, unbiased=True), decoded(values, self.format.v_bits, unbiased=False)
        return torch.cat((key_states, keys), 2), torch.cat((value_states, values), 2)


def is_kept(slots: Tensor, reader: Tensor | int, protect: Protect) -> Tensor:
    """Tell which ``slots`` of a row without padding the token at slot ``reader`` sees as they are."""
    return (slots < protect.sinks) | (slots > reader - protect.window)


def decoded(x: Tensor, bits: int, unbiased: bool) -> Tensor:
    """Return what is left of vectors once they have been codes."""
    return dequantize(*quantize(x, bits, unbiased), bits).to(x.dtype)


def forced_hidden(talker: Any, embeds: Tensor, cache: ForcedCache | None = None) -> Tensor:
    """Return the talker's last hidden states ``[B, T, H]`` for ``embeds`` ``[B, T, H]``, without a cache if none is given."""
    places = torch.arange(embeds.shape[1], device=embeds.device)
    arguments: dict[str, Any] = dict(inputs_embeds=embeds, position_ids=places.expand(3, len(embeds), -1), use_cache=cache is not None)
    if cache is not None:
        arguments |= dict(attention_mask=cache.mask, past_key_values=cache, cache_position=places)
    return talker.model(**arguments).last_hidden_state
