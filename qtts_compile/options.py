"""Options of ``torch.compile(..., backend="qtts", mode=..., options=...)``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
EXECUTORS = ("inductor", "eager")
KV_CACHES = ("bf16", "int4", "int3", "k4v3", "fp8")  # of the talker; "bf16" is the dtype of its model


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        mode: one of torch.compile's modes. Can stand in ``options``, because torch.compile takes mode or options, not both.
        layers: half-open range of decoder layers to rewrite, e.g. ``(0, 24)``; None for all. Negative bounds are refused.
        disable: names of rewrites to leave out.
        strict: raise when a building block is seen in the graph and not rewritten.
        executor: "inductor" generates code for what is not rewritten; "eager" runs the rewritten graph op by op (no compiler needed).
        kv_cache: "bf16", "int4", "int3", "k4v3" or "fp8", the cache that graphs must read ("bf16": one in the model's dtype), else compiling raises.
            The caller hands it to the model (:class:`qtts_compile.TurboQuantCache`); None is whatever they hand.
        inductor: options of Inductor's own, passed through.
    """

    mode: str = "default"
    layers: tuple[int, int] | None = None
    disable: frozenset[str] = frozenset()
    strict: bool = False
    executor: str = "inductor"
    kv_cache: str | None = None
    inductor: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, mode: str | None = None, options: Mapping[str, Any] | None = None) -> Options:
        """Check and read what torch.compile hands to the backend.

        Raises:
            ValueError: an unknown option or mode, a value out of range or of the wrong type, of which the message names the valid ones; options
                that contradict each other; ``triton.enable_pdl``.
        """
        given = dict(options or {})
        if mode is not None and given.setdefault("mode", mode) != mode:
            raise ValueError(f"mode={mode!r} and options['mode']={given['mode']!r} contradict each other; give one of them")
        known: dict[str, Any] = {name: read(given.pop(name)) for name, read in _READERS.items() if name in given}
        valid = set(torch._inductor.list_options())
        for name in given:
            if name.replace("-", "_") not in valid:
                raise ValueError(f"unknown option {name!r}; valid: {', '.join(_READERS)}, and Inductor's (torch._inductor.list_options())")
        parsed = cls(**known, inductor=given)
        if parsed.executor == "eager" and parsed.config_patches():
            raise ValueError(
                f"executor='eager' generates no code, so mode={parsed.mode!r} and {sorted(given)} have no effect; leave them or the executor out"
            )
        if parsed.config_patches().get("triton.enable_pdl"):
            raise ValueError(
                "triton.enable_pdl=True: Inductor's kernels would not wait for those of this package, which start early themselves; leave it out"
            )
        return parsed

    def config_patches(self) -> dict[str, Any]:
        """Return Inductor's settings for this mode, with the user's own on top."""
        mode = {} if self.mode == "default" else torch._inductor.list_mode_options(self.mode)
        return {**mode, **{name.replace("-", "_"): value for name, value in self.inductor.items()}}


def _mode(value: Any) -> str:
    return "default" if value is None else _one_of("mode", value, MODES)


def _executor(value: Any) -> str:
    return _one_of("executor", value, EXECUTORS)


def _kv_cache(value: Any) -> str | None:
    return None if value is None else _one_of("kv_cache", value, KV_CACHES)


def _strict(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"strict={value!r} is not a bool; valid: True, False")
    return value


def _one_of(name: str, value: Any, valid: tuple[str, ...]) -> str:
    if value not in valid:
        raise ValueError(f"{name}={value!r} is unknown; valid: {', '.join(valid)}")
    return value


def _layers(value: Any) -> tuple[int, int]:
    if not (isinstance(value, (tuple, list)) and len(value) == 2 and all(type(bound) is int for bound in value)):
        raise ValueError(f"layers={value!r} is not a half-open range (start, stop) of ints, e.g. (0, 24)")
    start, stop = value
    if not 0 <= start < stop:
        raise ValueError(f"layers={value!r} is an impossible range; 0 <= start < stop is needed")
    return start, stop


def _disable(value: Any) -> frozenset[str]:
    from qtts_compile.patterns.catalogue import OPS

    if isinstance(value, str) or not isinstance(value, Collection) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"disable={value!r} is not a collection of names of rewrites; valid: {', '.join(OPS)}")
    unknown = [name for name in value if name not in OPS]
    if unknown:
        raise ValueError(f"disable: no rewrite is called {unknown[0]!r}; valid: {', '.join(OPS)}")
    return frozenset(value)


_READERS: dict[str, Callable[[Any], Any]] = {
    "mode": _mode,
    "layers": _layers,
    "disable": _disable,
    "strict": _strict,
    "executor": _executor,
    "kv_cache": _kv_cache,
}
