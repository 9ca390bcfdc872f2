"""Run the real ``Qwen3TTSModel`` with its decoder stacks compiled: compare with eager, report what was rewritten."""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qtts_compile.cli.common import EMBEDDED, UsageError, check_output, check_text, load_model, voice
from qtts_compile.environment import collect_environment
from qtts_compile.parity import Choices, Parity, compare, record


@dataclass(frozen=True)
class Speech:
    """One utterance: float32 samples ``[T]`` at ``sample_rate`` Hz, and the wall time from text to samples."""

    waveform: np.ndarray
    sample_rate: int
    seconds: float


def demo(arguments: argparse.Namespace) -> int:
    """Speak with the embedded model, eagerly and compiled, and compare the two."""
    import qtts_compile

    check_output(arguments.output)
    tts = load_model(None, arguments.device, "float32")
    print(f"{EMBEDDED}\nDevice: {_device_name(tts)}, float32; torch {torch.__version__}\n")

    def greedy() -> Speech:
        return _generate(tts, arguments, do_sample=False, subtalker_dosample=False)

    expected = record(tts, greedy)
    eager = greedy()
    print(qtts_compile.compile(tts, mode=arguments.mode))
    with qtts_compile.collect() as report:
        compilation = _compile_seconds(greedy)
    warm = greedy()
    parity = compare(expected, record(tts, greedy))
    print(f"\n{report}\n")
    _print_parity(parity, expected)
    _print_times(eager, warm, compilation, expected.frames)
    _write(arguments.output, warm)
    return 0 if parity.first_difference is None else 1


def explain(arguments: argparse.Namespace) -> int:
    """Compile a checkpoint, speak a few frames and print what was rewritten."""
    import qtts_compile

    tts = load_model(arguments.model, arguments.device, arguments.dtype)
    stacks = qtts_compile.compile(tts, mode=arguments.mode)
    with qtts_compile.collect() as report:
        _generate(tts, arguments)
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else f"{stacks}\n\n{report}")
    return 0


def env(arguments: argparse.Namespace) -> int:
    """Print versions, devices and whether they fit together."""
    environment = collect_environment()
    print(environment)
    return 1 if environment.problems else 0


def _generate(tts: Any, arguments: argparse.Namespace, **sampling: Any) -> Speech:
    """Speak ``arguments.text`` by the method that fits the kind of model, after checking what it is asked for."""
    request = _request(tts, arguments)
    methods = {"custom_voice": tts.generate_custom_voice, "voice_design": tts.generate_voice_design}
    started = time.perf_counter()
    waveforms, sample_rate = methods[tts.model.tts_model_type](**request, **sampling)
    return Speech(waveforms[0], sample_rate, time.perf_counter() - started)


def _request(tts: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    kind = tts.model.tts_model_type
    check_text(tts, arguments.text, arguments.language)
    request = {"text": arguments.text, "language": arguments.language, "max_new_tokens": arguments.max_new_tokens}
    if kind == "custom_voice":
        return request | voice(tts, arguments.speaker, arguments.instruct)
    if kind == "voice_design":
        if arguments.speaker:
            raise UsageError(f"--speaker {arguments.speaker}: a voice-design model has no named speakers; describe the voice with --instruct")
        if not arguments.instruct:
            raise UsageError("a voice-design model needs --instruct, a description of the voice")
        return request | {"instruct": arguments.instruct}
    raise UsageError(f"a model of the kind {kind!r} clones a recorded voice, which this command does not; call qtts_compile.explain from Python")


def _print_parity(parity: Parity, expected: Choices) -> None:
    frame, codebook = divmod(parity.first_difference or 0, expected.groups)
    codes = "identical" if parity.first_difference is None else f"DIFFER from frame {frame}, codebook {codebook} on"
    print(f"Parity with eager, greedy decoding, {expected.frames} frames of {expected.groups} codes")
    print(f"  codes   {codes}")
    print(f"  logits  max abs difference {parity.talker:.1e} (talker), {parity.code_predictor:.1e} (code predictor)")
    print(f"          over {parity.steps} choices made from equal inputs; the largest abs logit is {parity.scale:.1f}\n")


def _print_times(eager: Speech, compiled: Speech, compilation: float, frames: int) -> None:
    print("Time, from text to samples, warm")
    for name, speech in {"eager": eager, "compiled": compiled}.items():
        print(f"  {name:<9}{speech.seconds:8.2f} s{1000 * speech.seconds / frames:9.1f} ms a frame")
    print(f"  {'compiling':<9}{compilation:8.2f} s once, not counted above\n")


def _compile_seconds(first_run: Callable[[], object]) -> float:
    """Return the seconds of ``first_run`` that torch.compile took to trace, rewrite and generate code, as torch counts them."""
    from torch._dynamo.utils import calculate_time_spent

    before = calculate_time_spent().get("total_wall_time", 0.0)
    first_run()
    return calculate_time_spent().get("total_wall_time", 0.0) - before


def _write(path: Path, speech: Speech) -> None:
    import soundfile

    soundfile.write(path, speech.waveform, speech.sample_rate)
    print(f"Wrote {path}: {len(speech.waveform) / speech.sample_rate:.2f} s at {speech.sample_rate} Hz")


def _device_name(tts: Any) -> str:
    return torch.cuda.get_device_name(tts.device) if tts.device.type == "cuda" else "CPU"
