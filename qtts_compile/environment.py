"""What is installed here, and whether it fits together."""

import contextlib
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from types import ModuleType

from packaging.requirements import Requirement

PACKAGES = ("qtts-compile", "torch", "triton", "torchaudio", "transformers", "qwen-tts", "qwen-tts-hf", "faster-qwen3-tts")
REQUIRED = ("torch>=2.11,<2.15", "torchaudio>=2.11")
FLASH_ATTENTION_NOTICE = re.compile(r"\n\*+\nWarning: flash-attn is not installed\..*?\n\*+\n ?\n", re.DOTALL)


@dataclass(frozen=True)
class Stack:
    """A set of packages that run Qwen3-TTS together, the extra that installs it, and the versions it needs of what may be there."""

    name: str
    extra: str
    requirements: tuple[str, ...]


STACKS = {
    "qwen-tts": Stack("A", "tts", ("transformers==4.57.3", "faster-qwen3-tts==0.3.2")),
    # From transformers 5.17 on, qwen-tts-hf's rotary initialiser replaces the codec's own, and the codec cannot be built.
    "qwen-tts-hf": Stack("B", "tts-hf", ("transformers>=5.15.1,<5.17", "faster-qwen3-tts>=0.4")),
}


@dataclass(frozen=True)
class Environment:
    """Versions and devices found, and for each thing that does not fit a sentence with the way out."""

    rows: dict[str, str]
    problems: list[str]

    def __str__(self) -> str:
        width = max(map(len, self.rows))
        lines = [f"{name:<{width}}  {value}" for name, value in self.rows.items()]
        verdict = "yes" if not self.problems else "no\n" + "\n".join(f"  - {problem}" for problem in self.problems)
        return "\n".join([*lines, f"{'fits together':<{width}}  {verdict}"])


def collect_environment() -> Environment:
    """Look at the installed packages, the GPU and the compiler; import torch and torchaudio, nothing else."""
    versions = {name: _version(name) for name in PACKAGES}
    rows = {"python": f"{platform.python_version()} ({sys.executable})"}
    rows |= {name: version or "not installed" for name, version in versions.items()}
    stacks = [stack for name, stack in STACKS.items() if versions[name]]
    rows["stack"] = " and ".join(f"{stack.name} (extra {stack.extra})" for stack in stacks) or "none"
    rows["GPU"] = _gpu()
    rows["C++ compiler"] = _cpp_compiler()
    return Environment(rows, [*stack_problems(versions), *_torchaudio_problems(versions)])


def stack_problems(versions: Mapping[str, str | None]) -> list[str]:
    """Say what does not fit together, given the installed version of each package, or None where it is not installed."""
    installed = [name for name in STACKS if versions.get(name)]
    if not installed:
        return ["no Qwen3-TTS package is installed: pip install 'qtts-compile[tts]' (or [tts-hf] for transformers 5)"]
    if len(installed) > 1:
        return [
            f"{' and '.join(installed)} both install the module qwen_tts and overwrite each other: "
            "pip uninstall both, then pip install 'qtts-compile[tts]' or 'qtts-compile[tts-hf]'"
        ]
    stack = STACKS[installed[0]]
    problems = []
    for requirement in map(Requirement, REQUIRED + stack.requirements):
        version = versions.get(requirement.name)
        if version and not requirement.specifier.contains(version, prereleases=True):
            problems.append(
                f"{requirement.name} {version} does not fit stack {stack.name}, which needs {requirement}: "
                f"pip install 'qtts-compile[{stack.extra}]' (or pip install '{requirement}')"
            )
    return problems


def import_qwen_tts() -> ModuleType:
    """Import ``qwen_tts`` without its two notices: that SoX is missing, which it never uses, and that flash-attn is.

    Whatever else the import prints comes through. Raises ImportError with the way out where it is not installed.
    """
    if "qwen_tts" in sys.modules:
        return sys.modules["qwen_tts"]
    if _version("qwen-tts") is None and _version("qwen-tts-hf") is None:
        raise ImportError(stack_problems({})[0])
    if shutil.which("sox") is None:
        with _stderr_discarded():
            import_module("sox")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            return import_module("qwen_tts")
    finally:
        print(FLASH_ATTENTION_NOTICE.sub("", printed.getvalue()), end="")


@contextlib.contextmanager
def _stderr_discarded() -> Iterator[None]:
    # The shell that looks for sox writes to the file descriptor, not to sys.stderr.
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as sink, contextlib.redirect_stderr(io.StringIO()):
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _torchaudio_problems(versions: Mapping[str, str | None]) -> list[str]:
    if versions["torchaudio"] is None:
        return []
    try:
        import_module("torchaudio")
    except (ImportError, OSError) as error:
        reason = str(error).splitlines()[0]
        return [
            f"torchaudio {versions['torchaudio']} does not load beside torch {versions['torch']} ({reason}): "
            "install torch>=2.11,<2.15 from PyPI (the CUDA 13.0 build, which also runs without a GPU)"
        ]
    return []


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"no GPU (torch is built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'the CPU only'})"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    major, minor = torch.cuda.get_device_capability()
    return f"{', '.join(names)}; capability {major}.{minor}; driver {_driver_version()}; CUDA {torch.version.cuda}"


def _driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown (nvidia-smi does not answer)"


def _cpp_compiler() -> str:
    from torch._inductor.cpp_builder import get_cpp_compiler

    from qtts_compile.backend import missing_compiler

    missing = missing_compiler()
    return f"{missing}: graphs on the CPU run op by op; install g++ and python3-dev, or set CXX" if missing else get_cpp_compiler()
