"""Embedded checkpoints of every kind, cut to a few layers, and what the installed qwen_tts and TTS speak with them."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch

from qtts_compile import TTS, demo_config
from qtts_compile.demo_config import Kind
from qtts_compile.demo_model import build_checkpoint
from qtts_compile.environment import import_qwen_tts
from qtts_compile.stats import Stats

# On these every greedy choice of test_tts.py wins by 1e-5 or more, in both transformers lines.
TEXTS = ["How are you?", "The train to the coast leaves at nine from platform four.", "No!"]
GREEDY: dict[str, Any] = {"do_sample": False, "subtalker_dosample": False}
SAMPLES = 1920  # of a frame
SPEAKER = {"speaker": "vivian"}
TONE = (np.sin(np.arange(24000) * 0.05).astype(np.float32) / 2, 24000)


@cache
def checkpoint(kind: Kind, size: Literal["0b6", "1b7"]) -> Path:
    """Return a checkpoint with the structure of a published size, written once: the 0.6B has one width for talker and code predictor."""
    directory = Path(_root().name) / f"{kind}-{size}"
    width = demo_config.model_config(kind)["talker_config"]["code_predictor_config"]["hidden_size"] if size == "0b6" else demo_config.TALKER_HIDDEN
    with patch.object(demo_config, "TALKER_HIDDEN", width):
        build_checkpoint(directory, kind=kind)
    config = json.loads((directory / "config.json").read_text()) | {"tts_model_size": size}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@cache
def _root() -> TemporaryDirectory[str]:
    return TemporaryDirectory()


def load(kind: Kind, size: Literal["0b6", "1b7"] = "1b7", ending: float = 0.0, device: str = "cpu") -> Any:
    """Return a ``Qwen3TTSModel`` in float32, with 2 talker layers and 1 of the code predictor.

    The logit of end of speech is ``ending`` times what it is by chance: at 0 no speech ends, from 2 on greedy speech ends after some frames.
    """
    tts = import_qwen_tts().Qwen3TTSModel.from_pretrained(str(checkpoint(kind, size)), device_map=device)
    talker = tts.model.talker
    for stack, layers in {talker: 2, talker.code_predictor: 1}.items():
        stack.model.layers = stack.model.layers[:layers]
        stack.config.num_hidden_layers = layers
    with torch.no_grad():
        talker.codec_head.weight[talker.config.codec_eos_token_id] *= ending
    return tts


@dataclass(frozen=True)
class Spoken:
    """Codes ``[frames, groups]`` and waveform of each text."""

    codes: list[torch.Tensor]
    waveforms: list[np.ndarray]


def speak_with_qwen_tts(tts: Any, method: str, **arguments: Any) -> Spoken:
    """Call a method of a ``Qwen3TTSModel`` and return what it spoke, the codes being what its model's ``generate`` returned."""
    view, view.model = (copied := copy.copy(tts)), copy.copy(tts.model)
    generate: Callable[..., Any] = copied.model.generate
    codes: list[torch.Tensor] = []

    def recorded(**kwargs: Any) -> Any:
        result = generate(**kwargs)
        codes.extend(result[0])
        return result

    copied.model.generate = recorded
    waveforms, _ = getattr(copied, method)(**arguments)
    return Spoken(codes, waveforms)


@cache
def voice(kind: Kind = "custom_voice", size: Literal["0b6", "1b7"] = "1b7", ending: float = 0.0) -> TTS:
    """Return the one TTS of this process around such a model; see :func:`load`."""
    return TTS(load(kind, size, ending), max_seq_len=256)


class Tape:
    """Stands before a codec and keeps the codes that it decodes, those of a reference apart."""

    def __init__(self, codec: Any) -> None:
        self.codec, self.decoded, self.pushed = codec, [], []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.codec, name)

    def decode(self, codes, context=None):
        self.decoded.append(codes.clone())
        return self.codec.decode(codes, context)

    def push(self, codes):
        self.pushed.append(codes.clone())
        return self.codec.push(codes)


def generate(tts: TTS, method: str, **arguments: Any) -> Spoken:
    tape: Any = Tape(tts.codec)
    tts.codec = tape
    try:
        waveforms, sample_rate = getattr(tts, f"generate_{method}")(**arguments)
    finally:
        tts.codec = tape.codec
    assert sample_rate == 24000 and {waveform.dtype for waveform in waveforms} == {np.dtype(np.float32)}
    return Spoken(tape.decoded, waveforms)


def stream(tts: TTS, method: str, **arguments: Any) -> tuple[torch.Tensor, list[np.ndarray]]:
    """Return the codes of all that was decoded, a reference among them, and the chunks."""
    tape: Any = Tape(tts.codec)
    tts.codec = tape
    try:
        chunks = list(getattr(tts, f"stream_{method}")(**arguments))
    finally:
        tts.codec = tape.codec
    assert {(samples.dtype, sample_rate) for samples, sample_rate in chunks} == {(np.dtype(np.float32), 24000)}
    return torch.cat(tape.pushed), [samples for samples, _ in chunks]


def stats_of(tts: TTS) -> Stats:
    assert tts.stats is not None
    return tts.stats


def assert_equal(ours: Spoken, theirs: Spoken) -> None:
    assert len(ours.codes) == len(theirs.codes) == len(ours.waveforms) == len(theirs.waveforms)
    for codes, expected in zip(ours.codes, theirs.codes):
        assert torch.equal(codes, expected)
    for codes, waveform, expected in zip(ours.codes, ours.waveforms, theirs.waveforms):
        assert len(waveform) == SAMPLES * len(codes)
        assert 0 <= len(expected) - len(waveform) <= 1  # qwen_tts cuts the reference off by a quotient that it rounds down
        np.testing.assert_allclose(waveform, expected[len(expected) - len(waveform) :], rtol=0, atol=1e-4)
