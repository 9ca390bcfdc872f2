"""Time one decode step of the talker and of the code predictor: eager, Inductor, this backend, and this backend without each rewrite.

Run: ``python -m bench.decode_step [--size 1.7b] [--parts talker predictor] [--without] [--json FILE] [--profile DIR]``. Random weights at the
published shapes, batch 1, static cache, bfloat16. Every row checks its output against eager before it is
timed, and the rows are timed in turns, so that a change of clocks or temperature meets them all.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import StaticCache

from bench.machine import describe
from bench.result_files import command_of
from qtts_compile import collect
from qtts_compile.patterns.catalogue import OPS
from tests.models.cases import ModelCase, published

POSITION = {"talker": 100, "predictor": 8}
SLOTS = {"talker": 1024, "predictor": 16}
COSINE_FLOOR = 0.999


class Step(nn.Module):
    """One token through a decoder stack with a static cache: x ``[B, 1, H]``, position ``[1]`` int64 -> hidden states ``[B, 1, H]``."""

    def __init__(self, model: nn.Module, case: ModelCase, slots: int, batch: int = 1) -> None:
        super().__init__()
        parameter = next(model.parameters())
        self.model, self.axes = model, case.rope_axes
        self.cache: Any = StaticCache(config=model.config, max_cache_len=slots)  # pyright: ignore[reportArgumentType]
        self.cache.early_initialization(batch, case.kv_heads, case.head_dim, parameter.dtype, parameter.device)
        self.slots: torch.Tensor
        self.register_buffer("slots", torch.arange(slots, device=parameter.device))

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        mask = (self.slots[None, :] <= position[:, None])[None, None]
        ids = position.view(1, -1) if self.axes == 1 else position.view(1, 1, -1).expand(self.axes, 1, -1)
        return self.model(
            inputs_embeds=x, attention_mask=mask, position_ids=ids, past_key_values=self.cache, cache_position=position, use_cache=True
        ).last_hidden_state


def variants(without: bool) -> dict[str, dict[str, Any] | None]:
    """Return row name -> arguments of torch.compile (None for eager)."""
    graphs = {"triton.cudagraph_or_error": True}
    rows: dict[str, dict[str, Any] | None] = {
        "eager": None,
        "inductor reduce-overhead": dict(backend="inductor", options={**torch._inductor.list_mode_options("reduce-overhead"), **graphs}),
        "qtts default": dict(backend="qtts"),
        "qtts reduce-overhead": dict(backend="qtts", options={"mode": "reduce-overhead", **graphs}),
    }
    if without:
        for name in OPS:
            rows[f"qtts reduce-overhead, without {name}"] = dict(backend="qtts", options={"mode": "reduce-overhead", "disable": [name], **graphs})
    return rows


def time_calls(call: Any, calls: int = 40) -> tuple[float, float]:
    """Return GPU milliseconds per call, and the milliseconds the host takes to issue one (no less than the first: the host is what limits)."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    torch.cuda.synchronize()
    issued = time.perf_counter()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    issued = time.perf_counter() - issued
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls, 1000 * issued / calls


def measure(part: str, size: str, names: dict[str, dict[str, Any] | None], rounds: int, profile: Path | None) -> list[dict[str, Any]]:
    """Measure every variant of one part on one set of weights: compile and check them all, then time them in turns, ``rounds`` times."""
    case = published(size, part)  # pyright: ignore[reportArgumentType]
    step = Step(case.build(torch.bfloat16, "cuda"), case, SLOTS[part])
    x = torch.randn(1, 1, case.hidden, device="cuda", dtype=torch.bfloat16)
    position = torch.tensor([POSITION[part]], device="cuda")
    for layer in step.cache.layers:  # the positions before this step hold something
        layer.keys.normal_()
        layer.values.normal_()
    torch.compiler.reset()
    rows, calls, reference = [], {}, None
    for name, arguments in names.items():
        call = step if arguments is None else torch.compile(step, fullgraph=True, **arguments)
        started = time.perf_counter()
        with collect() as report:
            out = call(x, position).clone()
            torch.cuda.synchronize()
            compile_s = time.perf_counter() - started
            for _ in range(3):
                call(x, position)
        reference = out if reference is None else reference
        cosine = torch.cosine_similarity(out.double().flatten(), reference.double().flatten(), dim=0).item()
        row: dict[str, Any] = dict(part=part, size=size, variant=name, cosine_with_eager=cosine, compile_s=compile_s)
        row |= dict(cudagraph_skips=report.cudagraph_skips, kernels=dict(report.kernels), rewrite_s=sum(graph.seconds for graph in report.graphs))
        row["refusals"] = sorted({f"{r.rewrite}: {r.reason}" for r in report.refusals})
        rows.append(row)
        if cosine >= COSINE_FLOOR:  # no speed for a result that is not right
            calls[name] = partial(call, x, position)
        print(f"{part} {name}: compiled in {compile_s:.1f} s, cosine {cosine:.6f}", file=sys.stderr, flush=True)
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            figures[name].append(time_calls(call))
    for row in rows:
        taken = figures.get(row["variant"])
        row["ms"] = None
        if taken:
            gpu, host = zip(*taken)
            row |= dict(ms=median(gpu), ms_min=min(gpu), ms_max=max(gpu), host_ms=median(host))
            if profile and names[row["variant"]] and "without" not in row["variant"]:
                write_profile(profile / f"{part}-{row['variant'].replace(' ', '-')}.txt", calls[row["variant"]])
    return rows


def write_profile(path: Path, call: Any, calls: int = 5) -> None:
    """Write the GPU kernels of a step, longest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as run:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(run.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=90))


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.7b", choices=("0.6b", "1.7b"))
    parser.add_argument("--parts", nargs="+", default=["talker", "predictor"], choices=("talker", "predictor"))
    parser.add_argument("--without", action="store_true", help="also measure with each rewrite switched off")
    parser.add_argument("--rounds", type=int, default=9, help="each round times every variant once")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", type=Path)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("bench.decode_step needs a CUDA GPU")
    result: dict[str, Any] = {"machine": describe(), "command": command_of("decode_step", argv), "rows": []}
    for part in arguments.parts:
        with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=64):
            result["rows"] += measure(part, arguments.size, variants(arguments.without), arguments.rounds, arguments.profile)
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1))
    print(f"{'part':10} {'variant':52} {'ms/step':>8} {'min':>8} {'max':>8} {'host':>8} {'cosine':>9} {'compile s':>9} {'rewrite s':>9}")
    for row in result["rows"]:
        timing = " ".join(f"{row[k]:8.3f}" for k in ("ms", "ms_min", "ms_max", "host_ms")) if row["ms"] else f"{'not equal to eager':>35}"
        print(f"{row['part']:10} {row['variant']:52} {timing} {row['cosine_with_eager']:9.6f} {row['compile_s']:9.1f} {row['rewrite_s']:9.2f}")


if __name__ == "__main__":
    main()
