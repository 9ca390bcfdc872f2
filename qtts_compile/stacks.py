"""Find the decoder stacks inside a model by their structure, and compile them in place."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qtts_compile.options import Options

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class CompiledStack:
    """A decoder stack that now runs through backend="qtts"."""

    name: str
    module: nn.Module
    layers: int

    def __str__(self) -> str:
        return f"{self.name} ({type(self.module).__name__}, {self.layers} layers)"


class CompiledStacks(list[CompiledStack]):
    """What :func:`compile` compiled."""

    def __str__(self) -> str:
        return "compiled with backend='qtts': " + ", ".join(map(str, self))


def compile(obj: Any, *, mode: str | None = None, options: Mapping[str, Any] | None = None, dynamic: bool | None = None) -> CompiledStacks:  # noqa: A001
    """Compile every decoder stack inside ``obj`` in place, with torch's own ``nn.Module.compile(backend="qtts")``.

    Args:
        obj: a Qwen3TTSModel, a FasterQwen3TTS, a talker, any transformers decoder, or an object that holds one.
        mode: torch.compile's mode. Modes with CUDA graphs suit stacks that you step yourself with a static cache: a replay overwrites the
            outputs of the one before, which ``generate`` keeps.
        options: see :class:`qtts_compile.options.Options`.
        dynamic: torch.compile's ``dynamic``.

    Raises:
        ValueError: a wrong option, a ``layers`` range beyond a stack's layers, or a quantised ``kv_cache`` for several stacks.
        TypeError: no decoder stack was found in ``obj``.
    """
    parsed = Options.parse(mode, options)
    stacks = list(find_stacks(obj))
    if not stacks:
        raise TypeError(
            f"no decoder stack found in {type(obj).__name__}: a stack is a module with a list of layers that hold {', '.join(PROJECTIONS)} "
            "and a forward() that takes past_key_values; pass the model, or compile your own module with torch.compile(m, backend='qtts')"
        )
    if parsed.layers is not None:
        check_layers(stacks, parsed.layers)
    if parsed.kv_cache not in (None, "bf16") and len(stacks) > 1:
        names = ", ".join(stack.name for stack in stacks)
        raise ValueError(
            f"kv_cache={parsed.kv_cache!r} is for one decoder stack and {len(stacks)} were found ({names}), "
            "of which only the talker's reads a quantised cache; compile it itself: "
            f"talker.model.compile(backend='qtts', options={{'kv_cache': {parsed.kv_cache!r}}})"
        )
    merged = {**(options or {}), **({"mode": parsed.mode} if parsed.mode != "default" else {})}
    for stack in stacks:
        stack.module.compile(backend="qtts", options=merged or None, dynamic=dynamic)
    return CompiledStacks(stacks)


def check_layers(stacks: Iterable[CompiledStack], layers: Sequence[int]) -> None:
    """Raise ``ValueError`` where the range ``layers`` reaches beyond one of the stacks."""
    for stack in stacks:
        if layers[1] > stack.layers:
            raise ValueError(
                f"layers={tuple(layers)} reaches beyond the {stack.layers} layers of {stack.name}; end it there, or "
                "compile the stacks one by one to give each its own range: qtts_compile.compile(stack, options=...)"
            )


def find_stacks(obj: Any) -> Iterator[CompiledStack]:
    """Yield the decoder stacks inside ``obj``, outermost first, each once."""
    seen: set[int] = set()
    for prefix, root in _modules_of(obj):
        for name, module in root.named_modules():
            layers = _layers(module)
            if layers and id(module) not in seen:
                seen.add(id(module))
                yield CompiledStack(".".join(filter(None, (prefix, name))) or type(module).__name__, module, layers)


def _modules_of(obj: Any, depth: int = 2) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that an object is, or holds in its attributes (a wrapper class around a model, or around such a wrapper)."""
    if isinstance(obj, nn.Module):
        yield "", obj
    elif depth and hasattr(obj, "__dict__"):
        for name, value in vars(obj).items():
            for prefix, module in _modules_of(value, depth - 1):
                yield ".".join(filter(None, (name, prefix))), module


def _layers(module: nn.Module) -> int:
    """Return the number of layers if ``module`` runs a list of attention layers over a key-value cache, else 0."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) and all(_has_projections(layer) for layer in child):
            return len(child) if "past_key_values" in inspect.signature(module.forward).parameters else 0
    return 0


def _has_projections(layer: nn.Module) -> bool:
    return any(all(hasattr(part, name) for name in PROJECTIONS) for part in layer.modules())
