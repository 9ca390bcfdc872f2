"""The command ``qtts``: speak a text, show what was rewritten, show what is installed, measure."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from qtts_compile.cli.bench import bench
from qtts_compile.cli.common import DEMO_TEXT, DTYPES, UsageError
from qtts_compile.cli.demo import demo, env, explain
from qtts_compile.cli.speak import clone, design, speak
from qtts_compile.options import KV_CACHES, MODES

Command = argparse.ArgumentParser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 done, 1 a check failed, 2 wrong usage."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["bench"]:  # whose command line is the checkout's
            return bench(argv[1:])
        arguments = _parser().parse_args(argv)
        return arguments.run(arguments)
    except UsageError as error:
        print(f"qtts: error: {error}", file=sys.stderr)
        return 2


def _parser() -> Command:
    parser = Command(prog="qtts", description="Qwen3-TTS through torch.compile(backend='qtts').")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], int]) -> Command:
        subparser = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        subparser.set_defaults(run=run, speaker=None, instruct=None, language="auto")
        return subparser

    speaking = command(speak)
    _add_speaking_options(speaking)
    _add_speaker_option(speaking)
    speaking.add_argument("--instruct", help="how to speak")

    cloning = command(clone)
    _add_speaking_options(cloning)
    cloning.add_argument("--ref-audio", type=Path, required=True, metavar="FILE", help="recording of the voice")
    cloning.add_argument("--ref-text", help="what the recording says: speech goes on from it")
    cloning.add_argument("--x-vector-only", action="store_true", help="take only the sound of the voice from the recording")

    designing = command(design)
    _add_speaking_options(designing)
    designing.add_argument("--instruct", required=True, help="description of the voice")

    explaining = command(explain)
    explaining.add_argument("--text", default=DEMO_TEXT, help="what to say meanwhile")
    explaining.add_argument("--json", action="store_true", help="print the report for machines")
    explaining.add_argument("--instruct", help="how to speak, or the voice itself for a voice-design model")
    _add_model_options(explaining)
    _add_speaker_option(explaining)
    _add_run_options(explaining, 4)

    command(env)
    commands.add_parser("bench", help=bench.__doc__)

    showing = command(demo)
    showing.add_argument("--text", default=DEMO_TEXT, help="what to say")
    _add_output_option(showing, "demo.wav")
    _add_run_options(showing, 33)
    return parser


def _add_speaking_options(parser: Command) -> None:
    parser.add_argument("text", help="what to say")
    _add_output_option(parser, "speech.wav")
    parser.add_argument("--stream", action="store_true", help="write the file as the audio comes")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    parser.add_argument("--greedy", action="store_true", help="choose the likeliest codes instead of sampling")
    parser.add_argument("--max-seq-len", type=int, default=2048, help="most tokens of prompt and speech together (default: %(default)s)")
    parser.add_argument(
        "--kv-cache",
        choices=KV_CACHES,
        default="bf16",
        help="format of the talker's keys and values; bf16 is the model's dtype (default: %(default)s)",
    )
    parser.add_argument(
        "--protect",
        metavar="NAME=N,...",
        help="what a quantised cache holds as it is (default: first_layers=2,last_layers=0,sinks=4,window=64)",
    )
    parser.add_argument("--no-compile", action="store_true", help="run the model as it is")
    _add_model_options(parser)
    _add_run_options(parser, None)


def _add_output_option(parser: Command, default: str) -> None:
    parser.add_argument("-o", "--output", type=Path, default=Path(default), help="sound file (default: %(default)s)")


def _add_model_options(parser: Command) -> None:
    parser.add_argument("--model", help="directory or hub id of a checkpoint (default: the embedded model)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: bfloat16 on a GPU, float32 on a CPU)")
    parser.add_argument("--language", default="auto", help="language of the text (default: auto)")


def _add_speaker_option(parser: Command) -> None:
    parser.add_argument("--speaker", help="a named voice of the model (default: vivian, or the model's first)")


def _add_run_options(parser: Command, max_new_tokens: int | None) -> None:
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU where there is one)")
    parser.add_argument("--mode", choices=MODES, help="as for torch.compile")
    limit = "the model's own" if max_new_tokens is None else max_new_tokens
    parser.add_argument("--max-new-tokens", type=_token_count, default=max_new_tokens, help=f"at most, one a frame plus one (default: {limit})")


def _token_count(text: str) -> int:
    if not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of 2 or more")
    return int(text)
