"""Time decoder layers one after the other, as they stand in a frame, at the published shapes, for one text or several together.

Run: ``python -m bench.layers [--stacks talker predictor] [--texts TEXTS ...] [--kv-cache bf16 int4 ...] [--slots SLOTS ...] [--positions TOKENS ...]
[--search] [--parts] [--table FILE] [--json FILE]``. A kernel overlaps with its neighbours, so that what is fastest alone (bench.linears,
bench.quantized_attention) need not be fastest here: ``--search`` tries each linear kernel's launches in their place, over all caches and positions
asked for, and ``--table`` writes this GPU's table for kernels/launches with what it found. ``--parts`` tries attention of several texts by
kernels of clusters with each number of parts. The layers' weights together exceed the L2 cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import triton

from bench.attention import Case as AttentionCase
from bench.linears import CASES, Case, chosen_launch, compile_launch, shape_of, tried_launches
from bench.machine import describe
from bench.quantized_attention import build_arguments, kernel_of, parts, write_prompt
from bench.reads import copy_bandwidth
from bench.result_files import command_of
from qtts_compile.kernels.gemv_launch import BYTES_IN_FLIGHT, tiles_in_flight
from qtts_compile.kernels.launch_search import microseconds
from qtts_compile.kernels.launch_table import SHIPPED, Launch, file_name, remember
from qtts_compile.kernels.linear_add import linear_add_triton
from qtts_compile.kernels.norm_linears import norm_linears
from qtts_compile.kernels.norm_qkv import MAX_SLOTS
from qtts_compile.kernels.norm_qkv_attention import norm_qkv_attention
from qtts_compile.kernels.norm_qkv_quantized_attention import norm_qkv_quantized_attention
from qtts_compile.kernels.norm_swiglu import norm_swiglu_triton
from qtts_compile.kernels.skinny.launch import MAX_ROWS, is_skinny
from qtts_compile.options import KV_CACHES

EPS, HEADS, WIDTH = 1e-6, 16, 128
PARTS = ("down", "o", "qkv", "gate/up")  # those beside attention first, to which they leave room or not
ROUNDS = 15
SEARCH_ROUNDS = 5  # of a launch that may turn out slow
NOISE_US = 0.03  # of a layer
GIVE_UP_US = 0.2  # of a layer: by so much a launch may be slower over some caches and win over others
TRIED_BYTES = (128, 192, 256, 384, 512)  # of each thread, of weights in flight
NO_LAUNCH: Mapping[str, Any] = {}
Layers = Sequence[Callable[[torch.Tensor], torch.Tensor]]


class Stack(NamedTuple):
    """Layers of a hidden size over a cache of ``slots`` rows, of which those up to ``position`` are attended to, for so many ``texts``."""

    hidden: int
    inner: int
    layers: int
    slots: int
    position: int
    sections: tuple[int, ...] = ()
    texts: int = 1


STACKS = {
    "predictor": Stack(1024, 3072, 5, 16, 8),
    "talker": Stack(2048, 6144, 8, 2048, 100, (24, 20, 20)),
}


def build_attention(stack: Stack, kv_cache: str, device: str = "cuda", launch: Mapping[str, Any] = NO_LAUNCH) -> Callable[..., torch.Tensor]:
    """Return attention over a cache with a random prompt: ``[texts, heads, 1, WIDTH]`` of x ``[texts, hidden]``, its norm's weight, the projections,
    and two weights to prefetch where one operator computes all this. That of several texts is launched with what ``launch`` holds at each call."""
    case = AttentionCase("", stack.slots, stack.position, stack.sections)
    sets = build_arguments(kv_cache, case, stack.texts, device, copies=1)
    write_prompt(kv_cache, case, sets)
    attend, rest = kernel_of(kv_cache, device), sets[0][3:]
    if stack.slots <= MAX_SLOTS and stack.texts == 1:  # one operator computes projections and attention, as in a frame
        joined = norm_qkv_attention if kv_cache == "bf16" else norm_qkv_quantized_attention
        return lambda x, norm, projections, prefetch=None: joined(x, norm, projections, EPS, *rest, prefetch=prefetch)

    def projected(x: torch.Tensor, norm: torch.Tensor, projections: list[torch.Tensor], prefetch: object = None) -> torch.Tensor:
        states = norm_linears(x, norm, projections, [None] * 3, EPS)
        return attend(*(state.view(stack.texts, 1, -1, WIDTH).transpose(1, 2) for state in states), *rest, **launch)

    return projected


def build_layer(stack: Stack, kv_cache: str = "bf16", launch: Mapping[str, Any] = NO_LAUNCH) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a layer with random weights, a function of ``[texts, hidden]``; ``launch`` is that of :func:`build_attention`."""
    new = partial(torch.randn, dtype=torch.bfloat16, device="cuda")

    def weight(outputs: int, width: int) -> torch.Tensor:
        return new(outputs, width) * width**-0.5

    projections = [weight(heads * WIDTH, stack.hidden) for heads in (HEADS, HEADS // 2, HEADS // 2)]
    out, gate, up = weight(stack.hidden, HEADS * WIDTH), weight(stack.inner, stack.hidden), weight(stack.inner, stack.hidden)
    down, norms, attend = weight(stack.hidden, stack.inner), (new(stack.hidden), new(stack.hidden)), build_attention(stack, kv_cache, launch=launch)

    def layer(x: torch.Tensor) -> torch.Tensor:
        x = linear_add_triton(attend(x, norms[0], projections, [gate, up]).transpose(1, 2).reshape(len(x), -1), out, None, x)
        return linear_add_triton(norm_swiglu_triton(x, norms[1], gate, up, EPS), down, None, x)

    return layer


def case_of(stack: str, part: str) -> Case:
    """Return the linear kernel that is a part of a stack's layers."""
    return next(case for case in CASES if case.name == f"{stack} {part}")


def launches_of(case: Case, texts: int = 1) -> list[Launch]:
    """Return what is tried for a linear kernel, what it is launched with now first; what the rule has in flight is not named again."""
    launches = [chosen_launch(case, texts), *tried_launches(case, texts)]
    for launch in [launch for launch in launches if not is_skinny(launch)]:
        by_rule, *counts = (tiles_in_flight(launch, tried, case.width, case.matrices, 2) for tried in (BYTES_IN_FLIGHT, *TRIED_BYTES))
        launches += [launch._replace(in_flight=count) for count in counts if count != by_rule]
    return list(dict.fromkeys(launches))


def measure(layers: Layers, x: torch.Tensor, rounds: int = ROUNDS) -> float:
    """Return the microseconds of a layer, of all in turn."""

    def run(inputs: tuple[torch.Tensor]) -> torch.Tensor:
        y = inputs[0]
        for layer in layers:
            y = layer(y)
        return y

    return median(microseconds(run, [(x,)], rounds)) / len(layers)


def try_parts(layers: Layers, x: torch.Tensor, launch: dict[str, Any], tried: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return the microseconds of a layer by the parts that attention is shared into, of layers that were built with ``launch``."""
    us = {}
    for each in tried:
        launch |= each
        us[str(each["parts"])] = min(measure(layers, x) for _ in range(2))
    launch.clear()
    return us


def search(name: str, parts: Sequence[str], variants: Sequence[Layers], x: torch.Tensor, compiled: set[tuple[Case, Launch]]) -> dict[str, Launch]:
    """Try each linear kernel's launches in its place, twice over, in layers over several caches; return those that are used from now on."""
    device, found = x.device, {}
    best = [min(measure(layers, x) for _ in range(5)) for layers in variants]
    for part in (*parts, *parts):
        case = case_of(name, part)
        shape = shape_of(case, len(x))
        chosen = before = chosen_launch(case, len(x))
        for launch in launches_of(case, len(x)):
            if (case, launch) in compiled and launch != before:
                remember(shape, device, launch)
                if (us := try_launch(variants, x, best)) and sum(us) < sum(best) - NOISE_US * len(best):
                    best, chosen = us, launch
        remember(shape, device, chosen)
        found[str(shape)] = chosen
        print(f"  {case.name:18} {tuple(before)} -> {tuple(chosen)}: {', '.join(f'{us:.2f}' for us in best)} us a layer", flush=True)
    return found


def try_launch(variants: Sequence[Layers], x: torch.Tensor, best: Sequence[float]) -> list[float] | None:
    """Return the microseconds of a layer over each cache, or None as soon as it is clear that together they are more than the best so far."""
    us = []
    for i, layers in enumerate(variants):
        us.append(measure(layers, x, SEARCH_ROUNDS))
        if sum(us) > sum(best[: i + 1]) + GIVE_UP_US * (len(variants) - 1 - i):
            return None
    return [min(measure(layers, x) for _ in range(2)) for layers in variants]


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; ``variants`` are the stacks that are timed, by name and number of texts, each with a kind of cache."""
    parser = argparse.ArgumentParser(prog="python -m bench.layers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stacks", nargs="+", choices=STACKS, default=list(STACKS), metavar="NAME")
    parser.add_argument("--texts", nargs="+", type=int, choices=range(1, MAX_ROWS + 1), default=[1], metavar="TEXTS", help="together")
    parser.add_argument("--kv-cache", nargs="+", choices=KV_CACHES, default=["bf16"], metavar="FORMAT", help="of the talker's keys and values")
    parser.add_argument("--positions", nargs="+", type=int, default=[STACKS["talker"].position], metavar="TOKENS", help="of the talker")
    parser.add_argument("--slots", nargs="+", type=int, default=[STACKS["talker"].slots], help="of the talker's cache (default: %(default)s)")
    parser.add_argument("--search", action="store_true", help="try other launches of the linear kernels first")
    parser.add_argument("--parts", action="store_true", help="try attention of several texts by kernels of clusters with each number of parts")
    parser.add_argument("--table", type=Path, help="where to write the launches found, with all others that are shipped for this GPU")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    if wrong := [position for position in arguments.positions if not 0 < position < max(arguments.slots)]:
        parser.error(f"--positions {wrong[0]}: give 1 to {max(arguments.slots) - 1}, or --slots for more")
    talkers = [
        (STACKS["talker"]._replace(slots=slots, position=position), kv_cache)
        for slots, kv_cache, position in itertools.product(arguments.slots, arguments.kv_cache, arguments.positions)
        if position < slots
    ]
    each = {"talker": talkers, "predictor": [(STACKS["predictor"], "bf16")]}
    arguments.variants = {
        (name, texts): [(stack._replace(texts=texts), kv_cache) for stack, kv_cache in each[name]]
        for name in arguments.stacks
        for texts in arguments.texts
    }
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    arguments = arguments_of(argv)
    with multiprocessing.get_context("fork").Pool(max(1, (os.cpu_count() or 1) - 1)) as pool:  # before CUDA starts
        if not torch.cuda.is_available():
            raise SystemExit("bench.layers needs a CUDA GPU")
        capability = torch.cuda.get_device_capability()
        cases = [(case_of(name, part), texts) for name, texts in arguments.variants for part in PARTS] if arguments.search else []
        jobs = [(capability, case, texts, launch) for case, texts in cases for launch in launches_of(case, texts)]
        compiled = {(job[1], job[3]) for job, done in zip(jobs, pool.map(compile_launch, jobs, chunksize=2), strict=True) if done}
    shipped = SHIPPED / file_name(torch.cuda.get_device_name())
    table: dict[str, Any] = json.loads(shipped.read_text()) if shipped.is_file() else {}
    result: dict[str, Any] = {"machine": describe(), "triton": triton.__version__, "rows": []}
    result["command"] = command_of("layers", argv)
    for (name, texts), variants in arguments.variants.items():
        launch: dict[str, Any] = {}
        built = [[build_layer(stack, kv_cache, launch) for _ in range(stack.layers)] for stack, kv_cache in variants]
        x = torch.randn(texts, STACKS[name].hidden, dtype=torch.bfloat16, device="cuda")
        times = [[min(measure(layers, x) for _ in range(5))] for layers in built]
        if arguments.search:
            has_qkv = texts > 1 or any(stack.slots > MAX_SLOTS for stack, _ in variants)
            table |= search(name, [part for part in PARTS if part != "qkv" or has_qkv], built, x, compiled)
            for us, layers in zip(times, built, strict=True):
                us.append(min(measure(layers, x) for _ in range(5)))
        floor = sum(case_of(name, part).weight_bytes for part in PARTS) / copy_bandwidth() / 1e6
        launches = {part: chosen_launch(case_of(name, part), texts) for part in PARTS}
        for (stack, kv_cache), layers, us in zip(variants, built, times, strict=True):
            place = dict(stack=name, texts=texts, layers=stack.layers, slots=stack.slots, position=stack.position, kv_cache=kv_cache)
            result["rows"].append(place | dict(us=us, floor_us=floor, launches=launches))
            timed = " -> ".join(f"{value:.2f}" for value in us)
            where = f"{name:10} x {texts:2} {kv_cache:5} {stack.slots:5} {stack.position:5}"
            print(f"{where} {timed} us a layer; its weights can be read in {floor:.2f}", flush=True)
            if arguments.parts and (by_parts := try_parts(layers, x, launch, parts(kv_cache, stack.slots, texts))):
                result["rows"][-1]["parts_us"] = by_parts
                print(f"{'':10} by parts: {', '.join(f'{n} {value:.2f}' for n, value in by_parts.items())}", flush=True)
        del built
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    if arguments.table:
        launches = {shape: Launch(*launch) for shape, launch in sorted(table.items())}
        lines = [f"{json.dumps(shape)}: {json.dumps(launch if launch.in_flight else launch[:4])}" for shape, launch in launches.items()]
        arguments.table.write_text("{\n " + ",\n ".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
