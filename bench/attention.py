"""Time the attention of a decode step at the published shapes, from projections to its result, in a CUDA graph of many launches.

Run: ``python -m bench.attention [--batches 1 8 32] [--cases NAME ...] [--search] [--json FILE]``. ``qk_norm_rope_attention`` stands beside the two
operators that it replaces, with and without programmatic dependent launch (PDL). The talker's launches find none of their keys in the L2 cache, the
predictor's, as in a frame, all of them. A result is checked before it is timed. ``--search`` tries other launch parameters too.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton

from bench.machine import describe
from bench.reads import copy_bandwidth
from bench.result_files import command_of
from bench.timing import milliseconds
from qtts_compile.kernels import pdl
from qtts_compile.kernels.decode_attention import decode_attention_triton
from qtts_compile.kernels.flash_decoding_launch import expand_mask, plan_launch
from qtts_compile.kernels.launch_search import COLD_BYTES, microseconds
from qtts_compile.kernels.qk_norm_rope_attention import qk_norm_rope_attention_reference, qk_norm_rope_attention_triton
from qtts_compile.kernels.qk_norm_rope_kv_write import qk_norm_rope_kv_write_triton

EPS = 1e-6
Q_HEADS, K_HEADS, WIDTH = 16, 8, 128
ROW_BYTES = 2 * 2 * K_HEADS * WIDTH  # of keys and values in bfloat16
MEMORY_LIMIT = 20e9
LAYERS_OF_PREDICTOR = 5
COMPILE_LIMIT_S = 60


class Case(NamedTuple):
    """A cache of ``slots`` rows, of which those up to ``position`` are attended to."""

    name: str
    slots: int
    position: int
    sections: tuple[int, ...] = ()


CASES = [
    Case("predictor", 16, 8),
    *(Case(f"talker at {position}", 2048, position, (24, 20, 20)) for position in (64, 512, 2000)),
]


def cold_copies(read_bytes: float, held_bytes: float) -> int:
    """Return how many caches, of ``held_bytes`` each, it takes that none is found in the L2 cache when its turn comes, as far as there is memory."""
    return max(1, min(math.ceil(COLD_BYTES / read_bytes), int(MEMORY_LIMIT / held_bytes)))


def build_arguments(case: Case, batch: int, device: str) -> list[tuple[Any, ...]]:
    """Return random arguments of the operator: as many caches as are read between two uses of one, with the same tokens."""
    copies = LAYERS_OF_PREDICTOR
    if case.slots > 16:
        copies = cold_copies(batch * case.position * ROW_BYTES, batch * case.slots * ROW_BYTES)
    caches = torch.randn(copies, 2, batch, K_HEADS, case.slots, WIDTH, dtype=torch.bfloat16, device=device)
    given, position, mask = step_arguments(case, batch, device)
    return [(*given, k_cache, v_cache, position, mask, WIDTH**-0.5) for k_cache, v_cache in caches]


def step_arguments(case: Case, batch: int, device: str) -> tuple[tuple[Any, ...], torch.Tensor, torch.Tensor]:
    """Return what attention is given before its cache, and the position and the mask after it."""
    new = partial(torch.randn, dtype=torch.bfloat16, device=device)
    q, k, v = (new(batch, 1, heads, WIDTH).transpose(1, 2) for heads in (Q_HEADS, K_HEADS, K_HEADS))
    theta = torch.randn(*((3,) if case.sections else ()), batch, 1, WIDTH, device=device)
    angles = theta.cos().bfloat16(), theta.sin().bfloat16(), list(case.sections), bool(case.sections)
    position = torch.tensor([case.position], device=device)
    mask = (torch.arange(case.slots, device=device) <= position).expand(batch, 1, 1, case.slots).contiguous()
    return (q, k, v, new(WIDTH), new(WIDTH), EPS, EPS, *angles), position, mask


def two_operators(*arguments: Any) -> torch.Tensor:
    """Compute the same by the two operators that stand in the graph without the fusion."""
    q = qk_norm_rope_kv_write_triton(*arguments[:14])
    return decode_attention_triton(q, *arguments[11:13], *arguments[14:])


@contextlib.contextmanager
def without_pdl() -> Iterator[None]:
    """Launch the kernels of attention one after the other."""
    with mock.patch.object(pdl, "has_pdl", lambda device: False):
        yield


def is_accurate(function: Callable[..., torch.Tensor], arguments: tuple[Any, ...]) -> bool:
    """Tell whether a function's result and what it writes are about as near to float32 as those of eager PyTorch."""
    caches = [x.clone() for x in arguments[11:13]]
    results = []
    for call, widen in ((function, False), (qk_norm_rope_attention_reference, False), (qk_norm_rope_attention_reference, True)):
        inputs = [*arguments[:11], *(cache.clone() for cache in caches), *arguments[13:]]
        if widen:
            inputs = [x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
        results.append([call(*inputs).float(), *(cache.float() for cache in inputs[11:13])])
    budgets = [
        2 * ((reference - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max())
        for reference, exact in zip(results[1], results[2], strict=True)
    ]
    return all(bool((found - exact).abs().max() <= budget) for found, exact, budget in zip(results[0], results[2], budgets, strict=True))


def candidates(case: Case, chosen: int) -> Iterator[dict[str, int]]:
    """Yield the launch parameters that a search tries around the ``chosen`` number of splits."""
    splits = (1,) if case.slots <= 32 else sorted({max(1, chosen // 4), max(1, chosen // 2), chosen, 2 * chosen})
    for n_splits, block_m in itertools.product(splits, (1, 2)):
        for block_n in (16,) if case.slots <= 16 else (16, 32, 64):
            for num_warps in (1, 2, 4):
                if 512 <= block_n * WIDTH // num_warps <= 2048:  # more spill registers
                    yield dict(n_splits=n_splits, block_n=block_n, num_warps=num_warps, block_m=block_m)


def timed(
    name: str,
    function: Callable[..., torch.Tensor],
    sets: list[tuple[Any, ...]],
    rounds: int,
    is_right: Callable[[Callable[..., torch.Tensor], tuple[Any, ...]], bool] = is_accurate,
) -> float | None:
    """Check and time a function in microseconds; return None, and say so, if it fails to compile in time or is wrong."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(COMPILE_LIMIT_S)
    try:
        right = is_right(function, sets[0])
        signal.alarm(0)
        if right and not sets[0][0].is_cuda:
            return 1000 * milliseconds(partial(function, *sets[0]), rounds)
        if right:
            return median(microseconds(lambda arguments: function(*arguments), sets, rounds))
        print(f"{name}: WRONG RESULT", file=sys.stderr, flush=True)
    except (Exception, KeyboardInterrupt) as error:  # a variant that does not work must not end the others
        print(f"{name}: {type(error).__name__} {str(error)[:200]!r}", file=sys.stderr, flush=True)
    finally:
        signal.alarm(0)
    return None


def measure(case: Case, batch: int, search: bool, rounds: int = 9) -> dict[str, Any]:
    """Time a case with the launch parameters that are chosen for it, and those of a search."""
    sets = build_arguments(case, batch, "cuda")
    grid, options = plan_launch(sets[0][0], sets[0][11], expand_mask(sets[0][14], sets[0][0], case.slots), None, None, None, None)
    chosen = dict(n_splits=grid[1], block_n=options["BLOCK_N"], num_warps=options["num_warps"], block_m=options["BLOCK_M"])
    label = f"{case.name}, batch {batch}"
    with without_pdl():
        today = timed(f"{label}, two operators without PDL", two_operators, sets, rounds)
    two = timed(f"{label}, two operators", two_operators, sets, rounds)
    one = timed(f"{label}, one operator", qk_norm_rope_attention_triton, sets, rounds)
    found = []
    for parameters in candidates(case, grid[1]) if search else ():
        us = timed(f"{label}, {parameters}", partial(qk_norm_rope_attention_triton, **parameters), sets, rounds)
        found += [dict(us=us, **parameters)] if us is not None else []
    floor = batch * (case.position + 1) * ROW_BYTES / copy_bandwidth() / 1e6
    times = dict(two_without_pdl_us=today, two_us=two, one_us=one, floor_us=floor)
    return dict(case=case.name, batch=batch, copies=len(sets), chosen=chosen, **times, search=sorted(found, key=lambda entry: entry["us"]))


def report(row: dict[str, Any], shown: int = 3) -> str:
    """Return a line on a case, and one on each of the best launch parameters of a search."""
    cells = [f"{row[name]:10.2f}" if row[name] is not None else f"{'failed':>10}" for name in ("two_without_pdl_us", "two_us", "one_us", "floor_us")]
    lines = [f"{row['case']:16} {row['batch']:5} {' '.join(cells)}   {tuple(row['chosen'].values())}"]
    lines += [f"{'':44} {entry['us']:10.2f} {'':10}   {tuple(entry.values())[1:]}" for entry in row["search"][:shown]]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32], metavar="BATCH")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], default=[case.name for case in CASES], metavar="NAME")
    parser.add_argument("--search", action="store_true", help="try other launch parameters too")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("bench.attention needs a CUDA GPU")
    started = time.perf_counter()
    command = command_of("attention", argv)
    result: dict[str, Any] = {"machine": describe(), "triton": triton.__version__, "command": command, "rows": []}
    print(f"{'us':16} {'batch':>5} {'no PDL':>10} {'two':>10} {'one':>10} {'floor':>10}   (splits, keys of a tile, warps, rows)", flush=True)
    for batch in arguments.batches:
        for case in CASES:
            if case.name in arguments.cases:
                row = measure(case, batch, arguments.search)
                print(report(row), flush=True)
                result["rows"].append(row)
                if arguments.json:
                    arguments.json.write_text(json.dumps(result, indent=1))
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
