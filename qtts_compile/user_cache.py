"""The folder for what this package computes once and keeps."""

import os
from pathlib import Path


def folder() -> Path:
    """Return ``$QTTS_COMPILE_CACHE``, else ``$XDG_CACHE_HOME/qtts_compile``, else ``~/.cache/qtts_compile``; it need not exist."""
    chosen = os.environ.get("QTTS_COMPILE_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qtts_compile"
