"""Measure what a quantised KV cache costs in quality, without a corpus of speech.

Run: ``python -m bench.quality [--formats int4 k4v3 int3 fp8] [--parts synthetic model protect free] [--size 1.7b] [--frames 200] [--seeds 200]
[--json FILE]``. Each format is measured with the default protection, with nothing protected but the token that is being read, and, but in free
speech, with each protection alone:

- synthetic: attention over random keys, some with a common mean or outlier channels, by queries with the same or without (on any machine);
- model: random weights at the published shape hear a trajectory of the unquantised model;
- protect: so do they, with each protection alone in several sizes, from which the defaults are chosen;
- free: every cache goes its own way, with ``--seeds`` seeds, and speech ends by chance; its duration beside the unquantised cache's is told with the
  ratio's standard error (see ``bench/free_running.py``).

``--tiny`` tries the benchmark itself on a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import free_running, models, synthetic, teacher
from bench.machine import describe
from bench.result_files import command_of
from bench.task import PROMPT
from qtts_compile.engine import Engine
from qtts_compile.options import KV_CACHES, MODES
from qtts_compile.tts import TTS
from qtts_compile.turboquant_cache import Protect, TurboQuantKVCache

PARTS = ("synthetic", "model", "protect", "free")
LIMITS = {"kl": 0.02, "top1": 0.95}  # the most KL divergence and the least share of equal first choices that pass
SLOTS = 2048  # of the cache whose bytes are told
BATCH, LONG_PROMPT = 4, 512  # so that most of what a step attends to is read from codes
SEEDS, TINY_SEEDS = 200, 4
BARE = Protect(first_layers=0, last_layers=0, sinks=0, window=1)
SIZES = {"first_layers": (1, 2, 3, 4), "last_layers": (1, 2, 3, 4), "sinks": (1, 4, 16), "window": (8, 16, 64, 256)}


def protections(default: Protect) -> dict[str, Protect]:
    """Return what is protected, by name."""
    return {
        "default": default,
        "nothing": BARE,
        "layers": BARE._replace(first_layers=default.first_layers, last_layers=default.last_layers),
        "sinks": BARE._replace(sinks=default.sinks),
        "window": BARE._replace(window=default.window),
    }


def variations() -> dict[str, Protect]:
    """Return each protection alone in several sizes, by name, after none at all."""
    return {"nothing": BARE} | {f"{name}={size}": BARE._replace(**{name: size}) for name, sizes in SIZES.items() for size in sizes}


def verdict(row: dict[str, Any]) -> str:
    """Say which limits a row keeps."""
    failed = [name for name, fails in {"KL": row["kl"] > LIMITS["kl"], "top-1": row["top1"] < LIMITS["top1"]}.items() if fails]
    return f"FAILS {' and '.join(failed)}" if failed else "passes"


def rows_of(part: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of a part."""
    default = models.TINY_PROTECT if arguments.tiny else Protect()
    if part == "synthetic":
        yield from synthetic_rows(arguments, default)
        return
    device, dtype = ("cpu", torch.float32) if arguments.tiny else ("cuda", torch.bfloat16)
    model = models.build("tiny" if arguments.tiny else arguments.size, device, dtype)
    if part == "free":
        yield from free_rows(model, arguments, default)
    else:
        yield from model_rows(model.model.talker, arguments, part, protections(default) if part == "model" else variations())


def synthetic_rows(arguments: argparse.Namespace, default: Protect) -> Iterator[dict[str, Any]]:
    """Yield the rows of attention over random keys, to which layers mean nothing."""
    heads, tokens = (2, 256) if arguments.tiny else (synthetic.HEADS, synthetic.TOKENS)
    device = "cuda" if torch.cuda.is_available() and not arguments.tiny else "cpu"
    for keys in synthetic.KINDS:
        states = synthetic.draw(keys, heads, tokens, device)
        for name in arguments.formats:
            for protected, protect in protections(default).items():
                if protected != "layers":
                    row = dict(part="synthetic", keys=keys, format=name, protected=protected, **synthetic.measure(states, name, protect))
                    yield row | {"verdict": verdict(row)}


def model_rows(talker: Any, arguments: argparse.Namespace, part: str, protects: dict[str, Protect]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a talker that hears what the unquantised one has said, with each protection."""
    trajectory = teacher.Trajectory.of(talker, BATCH, PROMPT if arguments.tiny else LONG_PROMPT, arguments.frames)
    dense = _packed(talker, "int4", Protect(first_layers=talker.config.num_hidden_layers))
    exact = teacher.observe(trajectory, dense)
    for name in arguments.formats:
        bare = _packed(talker, name, BARE).allocated_bytes
        for protected, protect in protects.items():
            like = _packed(talker, name, protect)
            seen = teacher.observe(trajectory, like)
            row = dict(part=part, format=name, protected=protected, quantized_layers=len(like.quantized_layers))
            row |= dict(bytes=like.allocated_bytes, bytes_more=like.allocated_bytes - bare, of_dense=like.allocated_bytes / dense.allocated_bytes)
            if protected == "default":
                row["apart"] = teacher.check(trajectory, like, seen)
            row |= teacher.compare(talker, exact, seen)
            yield row | {"verdict": verdict(row)}


def free_rows(model: Any, arguments: argparse.Namespace, default: Protect) -> Iterator[dict[str, Any]]:
    """Yield the rows of speeches that go their own way; those of other seeds tell how much is chance."""
    cap, mode = arguments.frames, None if arguments.tiny else arguments.mode
    slots, seeds = -(-(PROMPT + cap + 1) // 256) * 256, range(arguments.seeds)

    def engine(kv_cache: str, protect: Protect | None = None) -> Engine:
        return TTS(model, mode=mode, max_seq_len=slots, kv_cache=kv_cache, protect=protect).engine

    unquantized = engine("bf16")
    exact = free_running.speak(unquantized, seeds, cap)
    others = free_running.speak(unquantized, [arguments.seeds + seed for seed in seeds], cap)
    yield dict(part="free", format="bf16", protected="", **free_running.compare(exact, exact, cap))
    yield dict(part="free", format="bf16", protected="other seeds", **free_running.compare(exact, others, cap))
    for name in arguments.formats:
        for protected, protect in {"default": default, "nothing": BARE}.items():
            seen = free_running.speak(engine(name, protect), seeds, cap)
            yield dict(part="free", format=name, protected=protected, **free_running.compare(exact, seen, cap))


def _packed(talker: Any, name: str, protect: Protect) -> TurboQuantKVCache:
    """Return a cache of the talker's that takes no memory."""
    nowhere = torch.zeros(1, dtype=torch.long, device="meta")
    return TurboQuantKVCache(talker.config, 1, SLOTS, next(talker.parameters()).dtype, nowhere.device, name, protect, nowhere)


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return for each format, as it comes, where it keeps the limits and where not."""
    told: dict[str, list[str]] = {}
    for row in rows:
        if row["part"] in ("model", "synthetic") and row["protected"] == "default":
            what = "the model" if row["part"] == "model" else f"keys {row['keys']}"
            told.setdefault(row["format"], []).append(f"{what} {row['verdict']}")
    return [f"{name}, limits KL {LIMITS['kl']} and top-1 {LIMITS['top1']:.0%}: {'; '.join(each)}" for name, each in told.items()]


def describe_row(row: dict[str, Any]) -> str:
    """Return a row as one line."""
    head = f"{row['part']:9} {row['format']:5} {row['protected']:12}"
    if row["part"] == "free":
        return (
            f"{head} {sum(row['lengths']) / len(row['lengths']):6.1f} frames, {row['duration_ratio']:.3f} ± {row['ratio_error']:.3f} of bf16's, "
            f"{row['at_cap']:.0%} at the cap, parted after {row['frames_until_parted']:.1f}"
        )
    figures = f"cosine {row['cosine']:.4f}, KL {row['kl']:.5f}, p99 {row['kl_p99']:.5f}, top-1 {row['top1']:6.1%}"
    if row["part"] == "synthetic":
        told = f"{figures} ({row['top1_clear']:.1%} where it is clear), keys {row['keys']}"
    else:
        told = f"{figures}, end of speech {row['eos_drift']:+.4f}, {row['bytes'] / 2**20:.1f} MiB, {row['bytes_more'] / 2**20:+.1f} for it"
        told += f", {row['apart']:.1g} from a real cache" if "apart" in row else ""
    return f"{head} {told}: {row['verdict']}"


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; return how many parts ended in an error."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    quantised = [name for name in KV_CACHES if name != "bf16"]
    parser.add_argument("--formats", nargs="+", choices=quantised, default=["int4", "k4v3", "int3", "fp8"], metavar="FORMAT")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--size", choices=("0.6b", "1.7b"), default="1.7b")
    parser.add_argument("--frames", type=int, default=200, help="of a trajectory, and the most that free speech makes (default: %(default)s)")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"speeches that go their own way (default: {SEEDS}, {TINY_SEEDS} with --tiny)")
    parser.add_argument("--mode", choices=MODES, default="reduce-overhead", help="torch.compile's, for free speech (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="the embedded model on the CPU, which tries the benchmark and measures nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as they come")
    arguments = parser.parse_args(argv)
    if arguments.seeds is None:
        arguments.seeds = TINY_SEEDS if arguments.tiny else SEEDS
    if arguments.seeds < 2:
        parser.error(f"--seeds {arguments.seeds}: give at least 2, from which a standard error can be told")
    if not arguments.tiny and arguments.parts != ["synthetic"] and not torch.cuda.is_available():
        raise SystemExit("bench.quality needs a CUDA GPU, but for --parts synthetic; --tiny tries it on a CPU")
    started, failed = time.perf_counter(), 0
    command = command_of("quality", argv)
    result: dict[str, Any] = {"machine": describe(), "command": command, "rows": []}
    for part in arguments.parts:
        try:
            for row in rows_of(part, arguments):
                print(f"[{time.perf_counter() - started:5.0f} s] {describe_row(row)}", flush=True)
                result["rows"].append(row)
                if arguments.json:
                    arguments.json.write_text(json.dumps(result, indent=1))
        except Exception as error:  # a part that fails must not end the others
            traceback.print_exc()
            print(f"{part}: FAILED {type(error).__name__}: {error}", flush=True)
            failed += 1
    print("\n".join(verdicts(result["rows"])))
    return failed


if __name__ == "__main__":
    sys.exit(min(1, main()))
