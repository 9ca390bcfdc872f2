"""The command ``qtts``: speak a text, show what was rewritten, show what is installed."""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qtts_compile.demo_model import cached_checkpoint
from qtts_compile.environment import collect_environment, import_qwen_tts
from qtts_compile.options import MODES
from qtts_compile.parity import Choices, Parity, compare, record

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEMO_TEXT = "Hello! This sentence was spoken through torch.compile."
EMBEDDED = "Model: the embedded tiny one. Its weights are random, so the audio is noise, not speech."


class UsageError(Exception):
    """What the user asked for cannot be done; the message is one line and says what can."""


@dataclass(frozen=True)
class Speech:
    """One utterance: float32 samples ``[T]`` at ``sample_rate`` Hz, and the wall time from text to samples."""

    waveform: np.ndarray
    sample_rate: int
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 done, 1 a check failed, 2 wrong usage."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except UsageError as error:
        print(f"qtts: error: {error}", file=sys.stderr)
        return 2


def demo(arguments: argparse.Namespace) -> int:
    """Speak with the embedded model, eagerly and compiled, and compare the two."""
    import qtts_compile

    _check_output(arguments.output)
    tts = _load(None, arguments.device, "float32")
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


def speak(arguments: argparse.Namespace) -> int:
    """Speak a text with a checkpoint and write the sound file."""
    _check_output(arguments.output)
    if arguments.no_compile and arguments.mode:
        raise UsageError("--mode says how to compile and --no-compile not to: leave one out")
    tts = _load(arguments.model, arguments.device, arguments.dtype)
    if arguments.model is None:
        print(EMBEDDED)
    if not arguments.no_compile:
        import qtts_compile

        print(qtts_compile.compile(tts, mode=arguments.mode))
    torch.manual_seed(arguments.seed)
    speech = _generate(tts, arguments)
    print(f"Generated in {speech.seconds:.1f} s" + ("" if arguments.no_compile else ", compilation included"))
    _write(arguments.output, speech)
    return 0


def explain(arguments: argparse.Namespace) -> int:
    """Compile a checkpoint, speak a few frames and print what was rewritten."""
    import qtts_compile

    tts = _load(arguments.model, arguments.device, arguments.dtype)
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


def _load(model: str | None, device: str | None, dtype: str | None) -> Any:
    """Return a ``Qwen3TTSModel`` on ``device``: by default the first GPU in bfloat16, else the CPU in float32."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: torch sees no GPU here; `qtts env` says more")
    if model is not None and not Path(model).is_dir() and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        raise UsageError(f"--model {model}: no such directory, nor a model id like Qwen/Qwen3-TTS-12Hz-1.7B-CustomVoice")
    try:
        qwen_tts = import_qwen_tts()
    except ImportError as error:
        raise UsageError(f"{_first_line(error)}; `qtts env` says more") from error
    weights = DTYPES[dtype or ("bfloat16" if device.startswith("cuda") else "float32")]
    if model is None:
        model = str(_embedded_model())
    try:
        return qwen_tts.Qwen3TTSModel.from_pretrained(model, device_map=device, dtype=weights)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model {model}: cannot be loaded: {_first_line(error)}") from error


def _embedded_model() -> Path:
    try:
        return cached_checkpoint()
    except OSError as error:
        raise UsageError(f"the embedded model cannot be written: {error}; set QTTS_COMPILE_CACHE to a writable directory") from error


def _generate(tts: Any, arguments: argparse.Namespace, **sampling: Any) -> Speech:
    """Speak ``arguments.text`` by the method that fits the kind of model, after checking what it is asked for."""
    request = _request(tts, arguments)
    methods = {"custom_voice": tts.generate_custom_voice, "voice_design": tts.generate_voice_design}
    started = time.perf_counter()
    waveforms, sample_rate = methods[tts.model.tts_model_type](**request, **sampling)
    return Speech(waveforms[0], sample_rate, time.perf_counter() - started)


def _request(tts: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    kind, speaker, instruct = tts.model.tts_model_type, arguments.speaker, arguments.instruct
    request = {"text": arguments.text, "language": arguments.language, "max_new_tokens": arguments.max_new_tokens}
    _check_choice("language", arguments.language, tts.get_supported_languages())
    if not arguments.text.strip():
        raise UsageError("the text is empty: nothing to speak")
    if kind == "custom_voice":
        _check_choice("speaker", speaker or "vivian", tts.get_supported_speakers())
        if instruct and tts.model.tts_model_size == "0b6":
            raise UsageError("--instruct: the 0.6B model takes no instruction; use a 1.7B one or leave it out")
        return request | {"speaker": speaker or "vivian", "instruct": instruct}
    if kind == "voice_design":
        if speaker:
            raise UsageError(f"--speaker {speaker}: a voice-design model has no named speakers; describe the voice with --instruct")
        if not instruct:
            raise UsageError("a voice-design model needs --instruct, a description of the voice")
        return request | {"instruct": instruct}
    raise UsageError(f"a model of the kind {kind!r} clones a recorded voice: call Qwen3TTSModel.generate_voice_clone from Python")


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


def _check_choice(name: str, value: str, valid: Sequence[str] | None) -> None:
    if valid is not None and value.lower() not in valid:
        raise UsageError(f"--{name} {value}: not one of this model's: {', '.join(sorted(valid))}")


def _check_output(path: Path) -> None:
    import soundfile

    formats = [name.lower() for name in soundfile.available_formats()]
    if path.suffix[1:].lower() not in formats:
        raise UsageError(f"-o {path}: the ending must name a sound format: {', '.join(formats)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"-o {path}: the directory {path.absolute().parent} does not exist")


def _write(path: Path, speech: Speech) -> None:
    import soundfile

    soundfile.write(path, speech.waveform, speech.sample_rate)
    print(f"Wrote {path}: {len(speech.waveform) / speech.sample_rate:.2f} s at {speech.sample_rate} Hz")


def _device_name(tts: Any) -> str:
    return torch.cuda.get_device_name(tts.device) if tts.device.type == "cuda" else "CPU"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _token_count(text: str) -> int:
    if not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of 2 or more")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qtts", description="Qwen3-TTS through torch.compile(backend='qtts').")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        subparser = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        subparser.set_defaults(run=run, speaker=None, instruct=None, language="auto")
        return subparser

    def add_model_options(subparser: argparse.ArgumentParser) -> None:
        subparser.add_argument("--model", help="directory or hub id of a checkpoint (default: the embedded model)")
        subparser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: bfloat16 on a GPU, float32 on a CPU)")
        subparser.add_argument("--speaker", help="a named voice of the model (default: vivian)")
        subparser.add_argument("--language", default="auto", help="language of the text (default: auto)")
        subparser.add_argument("--instruct", help="how to speak, or the voice itself for a voice-design model")

    def add_run_options(subparser: argparse.ArgumentParser, max_new_tokens: int | None) -> None:
        subparser.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU where there is one)")
        subparser.add_argument("--mode", choices=MODES, help="as for torch.compile")
        limit = "the model's own" if max_new_tokens is None else max_new_tokens
        subparser.add_argument(
            "--max-new-tokens", type=_token_count, default=max_new_tokens, help=f"at most, one a frame plus one (default: {limit})"
        )

    speaking = command(speak)
    speaking.add_argument("text", help="what to say")
    speaking.add_argument("-o", "--output", type=Path, default=Path("speech.wav"), help="sound file (default: %(default)s)")
    speaking.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    speaking.add_argument("--no-compile", action="store_true", help="run the model as it is")
    add_model_options(speaking)
    add_run_options(speaking, None)

    explaining = command(explain)
    explaining.add_argument("--text", default=DEMO_TEXT, help="what to say meanwhile")
    explaining.add_argument("--json", action="store_true", help="print the report for machines")
    add_model_options(explaining)
    add_run_options(explaining, 4)

    command(env)

    showing = command(demo)
    showing.add_argument("--text", default=DEMO_TEXT, help="what to say")
    showing.add_argument("-o", "--output", type=Path, default=Path("demo.wav"), help="sound file (default: %(default)s)")
    add_run_options(showing, 33)
    return parser


if __name__ == "__main__":
    sys.exit(main())
