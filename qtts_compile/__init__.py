"""A torch.compile backend for Qwen3-TTS and the models built on it."""

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from qtts_compile.explain import explain
from qtts_compile.options import Options
from qtts_compile.report import Report, collect
from qtts_compile.rewriter import NotRewritten
from qtts_compile.stacks import compile, find_stacks

if TYPE_CHECKING:
    from qtts_compile.tts import TTS

__all__ = ["TTS", "NotRewritten", "Options", "Report", "collect", "compile", "explain", "find_stacks"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import :class:`TTS` when it is first used: the backend needs neither it nor transformers."""
    if name == "TTS":
        from qtts_compile.tts import TTS

        return TTS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _register_in_bare_checkout() -> None:
    """Make ``backend="qtts"`` known where the package is imported from a checkout that is not installed (an installed one has an entry point)."""
    if not any(point.name == "qtts" for point in entry_points(group="torch_dynamo_backends")):
        from torch._dynamo import list_backends, register_backend

        from qtts_compile.backend import qtts

        if "qtts" not in list_backends(exclude_tags=()):
            register_backend(qtts, name="qtts")


_register_in_bare_checkout()
