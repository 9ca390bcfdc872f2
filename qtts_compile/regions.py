"""Run a decoder stack layer by layer, through code that is compiled once and serves all its layers.

The stack's own forward() runs as Python over a copy of its module tree, in which each layer leads to one compiled function. Two parts of the stack
stand elsewhere: the final norm is left to the caller, who compiles it with what reads it, and the angles of the rotary embedding are looked up in a
table. A stack is taken apart only if that gives, bit for bit, what its forward() gives; this is tried when it is made.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qtts_compile.cache import StaticKVCache, View
from qtts_compile.launcher import mark_varying

log = logging.getLogger(__name__)

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
Angles = tuple[Tensor, Tensor]


class Stack:
    """A decoder stack: its layers, and the norm after them, which the caller applies.

    Args:
        model: a transformers decoder, whose children ``layers``, ``norm`` and ``rotary_emb`` are what these names say.
        axes: of its positions: 3 for M-RoPE, else 1.
        slots: positions that it will see.
        compile: compiles a function; None leaves everything as it is, to be traced with what surrounds it.
        split: whether the layers may be compiled as one.

    Attributes:
        norm: what the caller has to apply to the result.
    """

    norm: nn.Module

    def __init__(self, model: Any, axes: int, slots: int, compile: Compile | None = None, split: bool = True) -> None:
        self._model, self._axes, self._slots = model, axes, slots
        self._varying, self._angles, self._body, self.norm = False, None, None, nn.Identity()
        self._whole = call_whole
        reason = self._take_apart() if compile is not None and split else None
        if reason is not None:
            log.warning("%s is compiled as a whole, which takes longer: %s", type(model).__name__, reason)
        if compile is not None and self._body is None:
            self._whole = compile(call_whole)
        elif compile is not None:
            self._body = self._with_layers(compile(call_layer))

    def angles(self, positions: Tensor) -> Angles | None:
        """Return the cosines and sines of ``positions`` ``[B, T]``, ``[B, T, D]`` or ``[axes, B, T, D]``, if the stack is to be given them."""
        if self._body is None or self._angles is None:
            return None
        cos, sin = self._angles.index_select(-2, positions.flatten()).unflatten(-2, positions.shape)  # in one kernel
        return cos, sin

    def __call__(self, embeds: Tensor, mask: Tensor, positions: Tensor, angles: Angles | None, cache: View, varying: bool = False) -> Tensor:
        """Return the hidden states ``[B, T, H]`` after the layers.

        Args:
            embeds: ``[B, T, H]``.
            mask: bool ``[B or 1, 1, T, S]``, True where a token sees a slot.
            positions: int64 ``[B or 1, T]``.
            angles: of these positions, by :meth:`angles`.
            cache: view of the cache, of as many layers.
            varying: whether T will vary, so that the code is compiled for any T above 1.
        """
        positions = positions.expand(len(embeds), -1)
        if self._axes > 1:
            positions = positions.expand(self._axes, -1, -1)
        arguments = dict(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=cache, cache_position=cache.positions, use_cache=True
        )
        if varying:
            mark_varying((embeds, 1), (mask, 2), (positions, -1), (cache.positions, 0), *((table, -2) for table in angles or ()))
            mark_varying((mask, 3))
        if self._body is None:
            return self._whole(self._model, arguments)
        self._varying, self._body.rotary_emb.given = varying, angles
        hidden = self._body(**arguments).last_hidden_state
        self._body.rotary_emb.given = None
        return hidden

    @torch.inference_mode()
    def _take_apart(self) -> str | None:
        """Take the norm and the angles out of the stack, or say why that cannot be done."""
        model = self._model
        missing = [name for name in ("layers", "norm", "rotary_emb") if not isinstance(getattr(model, name, None), nn.Module)]
        if missing:
            return f"it has no {', '.join(missing)}"
        parameter = next(model.parameters())
        generator = torch.Generator().manual_seed(0)
        embeds = torch.randn(1, 3, model.config.hidden_size, generator=generator).to(parameter)
        slots = torch.arange(3, device=parameter.device)
        mask = (slots <= slots[:, None])[None, None]
        # Near and far: angles may depend on how far the positions go.
        places = [torch.tensor([[0, 1, last]], device=parameter.device) for last in (2, self._slots - 1)]

        def results() -> Tensor:
            caches = [StaticKVCache(model.config, 1, 3, parameter.dtype, parameter.device) for _ in places]
            calls = [self(embeds, mask, place, self.angles(place), cache.step(slots)) for place, cache in zip(places, caches)]
            return self.norm(torch.cat(calls))

        expected = results()
        every = torch.arange(self._slots, device=parameter.device)[None]
        cos, sin = model.rotary_emb(embeds, every if self._axes == 1 else every.expand(self._axes, -1, -1))
        self._angles = torch.stack((cos.select(-3, 0), sin.select(-3, 0)))
        self._body, self.norm = self._with_layers(call_layer), model.norm
        try:
            reason = None if torch.equal(results(), expected) else "its layers, one by one, do not give what its forward() gives"
        except Exception as error:  # whatever a model's own code makes of layers that are not its own
            reason = f"its layers cannot be run one by one: {type(error).__name__}: {error}"
        if reason is not None:
            self._body, self._angles, self.norm = None, None, nn.Identity()
        return reason

    def _with_layers(self, run: Callable[..., Any]) -> Any:
        """Return a copy of the model whose layers lead to ``run``, whose angles are given, and which has no norm. It shares all weights."""
        body = copy.copy(self._model)
        layers = nn.ModuleList(self._region(layer, index, run) for index, layer in enumerate(self._model.layers))
        body._modules = {**self._model._modules, "layers": layers, "norm": nn.Identity(), "rotary_emb": GivenAngles()}
        return body

    def _region(self, layer: nn.Module, index: int, run: Callable[..., Any]) -> nn.Module:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._varying:
                mark_varying((args[0] if args else kwargs["hidden_states"], 1))
            # With a cache of its own, no layer's code names the layer.
            return run(layer, *args, **{name: value.layer(index) if isinstance(value, View) else value for name, value in kwargs.items()})

        region = copy.copy(layer)  # with what the stack reads of a layer
        region.forward = forward
        region._forward_hooks, region._forward_pre_hooks = OrderedDict(), OrderedDict()  # the layer's own run when it is called
        return region


class GivenAngles(nn.Module):
    """Stands where a stack computes the angles of its rotary embedding, and returns those that it is ``given``."""

    given: Angles | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Angles | None:
        return self.given


def call_layer(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run one layer: what is compiled for a stack."""
    return layer(*args, **kwargs)


def call_whole(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """Run all layers and the norm: what is compiled for a stack that is not taken apart."""
    return model(**arguments).last_hidden_state
