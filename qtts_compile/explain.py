"""Tell what backend="qtts" does to a module, by compiling and running it once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qtts_compile.report import Report, collect


def explain(module: nn.Module, *args: Any, mode: str | None = None, options: dict[str, Any] | None = None, **kwargs: Any) -> Report:
    """Compile ``module`` afresh with backend="qtts", call it once with the arguments, and return the report.

    The call is real: it runs under ``torch.inference_mode()`` and a cache passed in is written. The module itself is left uncompiled.

    Args:
        module: what to compile.
        mode, options: as for torch.compile with this backend.
        args, kwargs: the call's arguments.

    Raises:
        torch._dynamo.exc.BackendCompilerFailed: around the ValueError of a wrong option, and under ``strict`` around :class:`NotRewritten`.
    """
    torch._dynamo.reset()
    with collect() as report, torch.inference_mode():
        torch.compile(module, backend="qtts", options={**(options or {}), **({"mode": mode} if mode else {})})(*args, **kwargs)
    hidden = sorted({type(part).__name__ for part in module.modules() if _runs_a_hub_kernel(part)})
    if hidden and report.graphs:
        report.graphs[0].notes.append(f"{', '.join(hidden)} run a kernel from the hub, which hides their computation from the matcher")
    return report


def _runs_a_hub_kernel(module: nn.Module) -> bool:
    """Tell whether a class that offers itself to the hub's kernels (transformers' ``use_kernel_forward_from_hub``) had its forward replaced."""
    return hasattr(type(module), "kernel_layer_name") and "forward" in vars(module)
