"""A torch.compile backend for Qwen3-TTS and the models built on it."""

import importlib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from qtts_compile.explain import explain
from qtts_compile.options import Options
from qtts_compile.report import Report, collect
from qtts_compile.rewriter import NotRewritten
from qtts_compile.stacks import compile, find_stacks

if TYPE_CHECKING:
    from qtts_compile.transformers_cache import TurboQuantCache
    from qtts_compile.tts import TTS
    from qtts_compile.turboquant_cache import Protect

__all__ = ["TTS", "NotRewritten", "Options", "Protect", "Report", "TurboQuantCache", "collect", "compile", "explain", "find_stacks"]
__version__ = "0.1.0"
_LATE = {
    "TTS": "qtts_compile.tts",
    "Protect": "qtts_compile.turboquant_cache",
    "TurboQuantCache": "qtts_compile.transformers_cache",
}


def __getattr__(name: str) -> Any:
    """Import what needs transformers when it is first used: the backend needs neither."""
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _register_in_bare_checkout() -> None:
    """Make ``backend="qtts"`` known where the package is imported from a checkout that is not installed (an installed one has an entry point)."""
    if not any(point.name == "qtts" for point in entry_points(group="torch_dynamo_backends")):
        from torch._dynamo import list_backends, register_backend

        from qtts_compile.backend import qtts

        if "qtts" not in list_backends(exclude_tags=()):
            register_backend(qtts, name="qtts")


_register_in_bare_checkout()
