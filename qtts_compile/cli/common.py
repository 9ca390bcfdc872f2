"""What the commands share: loading a model, and checking what was asked for."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qtts_compile.demo_config import Kind
from qtts_compile.demo_model import cached_checkpoint
from qtts_compile.environment import import_qwen_tts

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEMO_TEXT = "Hello! This sentence was spoken through torch.compile."
EMBEDDED = "Model: the embedded tiny one. Its weights are random, so the audio is noise, not speech."


class UsageError(Exception):
    """What the user asked for cannot be done; the message is one line and says what can."""


def load_model(model: str | None, device: str | None, dtype: str | None, kind: Kind = "custom_voice") -> Any:
    """Return a ``Qwen3TTSModel`` on ``device``: by default the first GPU in bfloat16, else the CPU in float32.

    Where no model is named it is the embedded one of this kind.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: torch sees no GPU here; `qtts env` says more")
    if model is not None and not Path(model).is_dir() and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        raise UsageError(f"--model {model}: no such directory, nor a model id like Qwen/Qwen3-TTS-12Hz-1.7B-CustomVoice")
    try:
        qwen_tts = import_qwen_tts()
    except ImportError as error:
        raise UsageError(f"{first_line(error)}; `qtts env` says more") from error
    weights = DTYPES[dtype or ("bfloat16" if device.startswith("cuda") else "float32")]
    if model is None:
        model = str(_embedded_model(kind))
    try:
        return qwen_tts.Qwen3TTSModel.from_pretrained(model, device_map=device, dtype=weights)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model {model}: cannot be loaded: {first_line(error)}") from error


def _embedded_model(kind: Kind) -> Path:
    try:
        return cached_checkpoint(kind)
    except OSError as error:
        raise UsageError(f"the embedded model cannot be written: {error}; set QTTS_COMPILE_CACHE to a writable directory") from error


def check_text(tts: Any, text: str, language: str) -> None:
    """Refuse what ``tts`` cannot say."""
    check_choice("language", language, tts.get_supported_languages())
    if not text.strip():
        raise UsageError("the text is empty: nothing to speak")


def voice(tts: Any, speaker: str | None, instruct: str | None) -> dict[str, Any]:
    """Return the arguments of ``generate_custom_voice`` that choose the voice, after checking them."""
    speakers = tts.get_supported_speakers()
    chosen = speaker or ("vivian" if not speakers or "vivian" in speakers else speakers[0])
    check_choice("speaker", chosen, speakers)
    if instruct and tts.model.tts_model_size == "0b6":
        raise UsageError("--instruct: the 0.6B model takes no instruction; use a 1.7B one or leave it out")
    return {"speaker": chosen, "instruct": instruct}


def check_choice(name: str, value: str, valid: Sequence[str] | None) -> None:
    """Refuse a value that is not one of the model's."""
    if valid is not None and value.lower() not in valid:
        raise UsageError(f"--{name} {value}: not one of this model's: {', '.join(sorted(valid))}")


def check_output(path: Path) -> None:
    """Refuse a file that could not be written once there is something to write."""
    import soundfile

    formats = [name.lower() for name in soundfile.available_formats() if soundfile.default_subtype(name)]
    if path.suffix[1:].lower() not in formats:
        raise UsageError(f"-o {path}: the ending must name a sound format: {', '.join(formats)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"-o {path}: the directory {path.absolute().parent} does not exist")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().splitlines()[0]
