"""Name the machine and the software that figures were taken on."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform

import torch

PACKAGES = ("torch", "triton", "transformers", "qwen-tts", "qwen-tts-hf", "faster-qwen3-tts", "qwen3-tts-triton")


def describe() -> dict[str, str]:
    """Return GPU, driver-visible CUDA version, Python, package versions and the date."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {"gpu": gpu, "cuda": str(torch.version.cuda), "python": platform.python_version(), "date": datetime.date.today().isoformat(), **versions}
