"""Time the talker's attention in a decode step over a quantised KV cache beside that over bfloat16, in a CUDA graph with a cold L2 cache.

Run: ``python -m bench.quantized_attention [--batches 1 8 32] [--positions 512 2048 8000] [--slots 8192] [--formats bf16 int4 ...] [--search]
[--parts] [--json FILE]``. A cache has the default sinks and window. A result is checked against float32 over the decoded cache before it is timed.
``--search`` tries launch parameters, ``--parts`` kernels of clusters, ``--tiny`` tries the benchmark itself on a CPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import attention
from bench.attention import COMPILE_LIMIT_S, K_HEADS, ROW_BYTES, WIDTH, Case, cold_copies, step_arguments, timed
from bench.compiling import compiling_only
from bench.machine import describe
from bench.result_files import command_of
from qtts_compile.kernels import flash_decoding_launch
from qtts_compile.kernels.clusters.memory import KEYS
from qtts_compile.kernels.heads_attention import MAX_TEXTS, PARTS, PARTS_OF_CODES
from qtts_compile.kernels.qk_norm_rope_attention import qk_norm_rope_attention, qk_norm_rope_attention_triton
from qtts_compile.kernels.qk_norm_rope_quantized_attention import (
    qk_norm_rope_quantized_attention,
    qk_norm_rope_quantized_attention_reference,
    qk_norm_rope_quantized_attention_triton,
)
from qtts_compile.kernels.turboquant.format import Format
from qtts_compile.kernels.turboquant.write import quantized_kv_write
from qtts_compile.options import KV_CACHES
from qtts_compile.turboquant_cache import Protect

BATCHES, POSITIONS, TINY_POSITIONS = (1, 8, 32), (512, 2048, 8000), (200,)
SLOTS, TINY_SLOTS = 8192, 256
SECTIONS = (24, 20, 20)
PROTECT = Protect()
KEPT = PROTECT.sinks + PROTECT.window
CHUNK = 512  # tokens that are written at once
CODES = 11  # where the buffers of the cache begin among the arguments: codes of keys and of values, scales, kept tokens
MIN_EQUAL_CODES = 0.95  # of the bytes of the new token: rounding decides some
Launch = dict[str, Any]


def read_bytes(name: str, position: int, batch: int) -> int:
    """Return the bytes of keys, values and scales that one launch reads."""
    tokens = position + 1
    packed = 0 if name == "bf16" else max(0, tokens - KEPT)
    of_codes = 0 if name == "bf16" else K_HEADS * Format.parse(name).bytes_per_token(WIDTH)
    return batch * ((tokens - packed) * ROW_BYTES + packed * of_codes)


def build_arguments(name: str, case: Case, batch: int, device: str, copies: int | None = None) -> list[tuple[Any, ...]]:
    """Return arguments of the operator of a format: ``copies`` caches, by default as many as are read between two uses of one, of zeros."""
    given, position, mask = step_arguments(case, batch, device)
    shape = batch, K_HEADS, case.slots
    if name == "bf16":
        copies = copies or cold_copies(read_bytes(name, case.position, batch), batch * case.slots * ROW_BYTES)
        caches = torch.zeros(copies, 2, *shape, WIDTH, dtype=torch.bfloat16, device=device)
        return [(*given, *cache, position, mask, WIDTH**-0.5) for cache in caches]
    parsed = Format.parse(name)
    held = batch * K_HEADS * (case.slots * parsed.bytes_per_token(WIDTH) + KEPT * 4 * WIDTH)
    copies = copies or cold_copies(read_bytes(name, case.position, batch), held)
    codes = (torch.zeros(copies, *shape, size, dtype=torch.uint8, device=device) for size in (parsed.key_bytes(WIDTH), parsed.value_bytes(WIDTH)))
    scales = torch.zeros(copies, 2, *shape, dtype=torch.float16, device=device)
    kept = torch.zeros(copies, 2, batch, K_HEADS, KEPT, WIDTH, dtype=torch.bfloat16, device=device)
    start = torch.zeros(batch, dtype=torch.long, device=device)
    rest = position, start, PROTECT.sinks, name, mask, WIDTH**-0.5
    return [(*given, *buffers, *rest) for buffers in zip(*codes, scales, kept)]


def write_prompt(name: str, case: Case, sets: Sequence[tuple[Any, ...]]) -> None:
    """Write the same random prompt into all caches, up to the position of the step."""
    first = sets[0]
    batch, device = len(first[0]), first[0].device
    for begin in range(0, case.position, CHUNK):
        places = torch.arange(begin, min(begin + CHUNK, case.position), device=device)
        k, v = torch.randn(2, batch, K_HEADS, len(places), WIDTH, dtype=torch.bfloat16, device=device)
        if name == "bf16":
            first[CODES][:, :, places], first[CODES + 1][:, :, places] = k, v
        else:
            k_codes, v_codes, scales, kept, position, start = first[CODES : CODES + 6]
            quantized_kv_write(k, v, k_codes, v_codes, scales, kept, places, position - 1, start, PROTECT.sinks, name)
    buffers = slice(CODES, CODES + (2 if name == "bf16" else 4))
    for others in sets[1:]:
        for target, source in zip(others[buffers], first[buffers]):
            target.copy_(source)


def judge_of(arguments: tuple[Any, ...]) -> Callable[[Callable[..., torch.Tensor], tuple[Any, ...]], bool]:
    """Return what tells whether a function over a quantised cache is right: it is given as :func:`bench.attention.timed` gives it.

    The result has to be about as near to float32 over the decoded cache as eager PyTorch's, and the new token's codes have to be the codec's.
    """

    def run(function: Callable[..., torch.Tensor], widen: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        inputs = [*arguments[:CODES], *(buffer.clone() for buffer in arguments[CODES : CODES + 4]), *arguments[CODES + 4 :]]
        if widen:
            inputs = [x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x for x in inputs]
        result = function(*inputs).float()
        return result, [codes[:, :, arguments[CODES + 4]] for codes in inputs[CODES : CODES + 2]]

    reference, codes = run(qk_norm_rope_quantized_attention_reference, False)
    exact, _ = run(qk_norm_rope_quantized_attention_reference, True)
    budget = 2 * ((reference - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max())

    def is_right(function: Callable[..., torch.Tensor], _: tuple[Any, ...]) -> bool:
        result, written = run(function, False)
        equal = [(ours == theirs).float().mean() for ours, theirs in zip(written, codes)]
        return bool((result - exact).abs().max() <= budget) and bool(min(equal) >= MIN_EQUAL_CODES)

    return is_right


def candidates(name: str, case: Case, batch: int, sms: int) -> Iterator[Launch]:
    """Yield the launch parameters that a search tries."""
    programs = batch * K_HEADS
    splits = sorted({max(1, min(64, case.slots // 64, per_sm * sms // programs)) for per_sm in (1, 2, 4, 8, 16)})
    for n_splits, block_n, num_warps, block_m in itertools.product(splits, (16, 32, 64), (1, 2, 4), (1, 2)):
        if 512 <= block_n * WIDTH // num_warps <= 4096:  # more spill registers
            yield dict(n_splits=n_splits, block_n=block_n, num_warps=num_warps, block_m=block_m)


def parts(name: str, slots: int, batch: int) -> Iterator[Launch]:
    """Yield as launch parameters how many thread blocks of a cluster may attend for each key head, each to 16 slots or more; 0 is for no cluster."""
    if 2 <= batch <= MAX_TEXTS:
        for n_parts in (0, *(PARTS if name == "bf16" else PARTS_OF_CODES)):
            if n_parts * KEYS.value <= slots:
                yield dict(parts=n_parts)


def kernel_of(name: str, device: str) -> Callable[..., torch.Tensor]:
    """Return what computes attention over a format: on a CPU plain PyTorch."""
    if device == "cpu":
        return qk_norm_rope_attention if name == "bf16" else qk_norm_rope_quantized_attention
    return qk_norm_rope_attention_triton if name == "bf16" else qk_norm_rope_quantized_attention_triton


def compile_launch(job: tuple[tuple[int, int], int, str, Case, int, Launch]) -> bool:
    """Compile one launch, as it would be planned on a GPU of so many multiprocessors; return whether that worked in time."""
    capability, sms, name, case, batch, launch = job
    try:
        with (
            compiling_only(capability, COMPILE_LIMIT_S),
            mock.patch.object(flash_decoding_launch, "_sm_count", lambda device: sms),
        ):
            kernel_of(name, "cuda")(*build_arguments(name, case, batch, "cpu", copies=1)[0], **launch)
        return True
    except (Exception, KeyboardInterrupt):  # a variant that does not compile must not end the others
        return False


def measure(name: str, case: Case, batch: int, launches: Sequence[Launch], device: str, rounds: int = 9) -> dict[str, Any]:
    """Check and time one format with each of the launch parameters, of which {} are those that are chosen for it."""
    sets = build_arguments(name, case, batch, device)
    write_prompt(name, case, sets)
    is_right = attention.is_accurate if name == "bf16" else judge_of(sets[0])
    row: dict[str, Any] = dict(format=name, batch=batch, position=case.position, copies=len(sets), bytes=read_bytes(name, case.position, batch))
    entries = []
    for launch in launches:
        us = timed(f"{name}, batch {batch}, position {case.position}, {launch}", partial(kernel_of(name, device), **launch), sets, rounds, is_right)
        if not launch:
            row["us"] = us
        elif us is not None:
            entries.append(dict(us=us, **launch))
    return row | {"search": sorted(entries, key=lambda entry: entry["us"])}


def table(rows: Sequence[dict[str, Any]], shown: int = 3) -> str:
    """Return the rows as text, with the best launch parameters of a search below each."""
    lines = [f"{'format':6} {'batch':>5} {'position':>8} {'us':>9} {'MB read':>9} {'TB/s':>6} {'bf16 / us':>9}"]
    for row in rows:
        us, size = row["us"], row["bytes"] / 1e6
        ratio = f"{row['bf16_us'] / us:9.2f}" if us and row["bf16_us"] else f"{'-':>9}"
        cells = f"{us:9.2f} {size:9.2f} {size / us:6.2f} {ratio}" if us else f"{'failed':>9} {size:9.2f}"
        lines.append(f"{row['format']:6} {row['batch']:5} {row['position']:8} {cells}")
        lines += [f"{'':21} {entry['us']:9.2f}   {tuple(entry.values())[1:]}" for entry in row["search"][:shown]]
    return "\n".join(lines)


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quantized_attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", nargs="+", type=int, metavar="BATCH")
    parser.add_argument("--positions", nargs="+", type=int, metavar="TOKENS")
    parser.add_argument("--formats", nargs="+", choices=KV_CACHES, default=["bf16", "int4", "k4v3", "int3", "fp8"], metavar="FORMAT")
    parser.add_argument("--slots", type=int, metavar="SLOTS", help=f"of the cache (default: {SLOTS})")
    parser.add_argument("--search", action="store_true", help="try other launch parameters too")
    parser.add_argument("--parts", action="store_true", help="try kernels of clusters too, of several texts")
    parser.add_argument("--tiny", action="store_true", help="plain PyTorch on the CPU, which tries the benchmark and measures nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as they come")
    arguments = parser.parse_args(argv)
    slots, batches, positions = (TINY_SLOTS, BATCHES[:1], TINY_POSITIONS) if arguments.tiny else (SLOTS, BATCHES, POSITIONS)
    arguments.slots = arguments.slots or slots
    arguments.batches, arguments.positions = arguments.batches or batches, arguments.positions or positions
    if not KEPT < min(arguments.positions) <= max(arguments.positions) < arguments.slots:
        parser.error(f"--positions: give {KEPT + 1} to {arguments.slots - 1}, so that something is read from codes")
    return arguments


def rows_of(arguments: argparse.Namespace, pool: Pool) -> Iterator[dict[str, Any]]:
    """Yield the rows, of kernels that the processes of ``pool`` compile meanwhile."""
    cases = [Case("talker", arguments.slots, position, SECTIONS) for position in arguments.positions]
    plan: dict[tuple[int, str], list[Launch]] = {(batch, name): [{}] for batch in arguments.batches for name in arguments.formats}
    compiled: Iterator[bool] = itertools.repeat(True)
    if not arguments.tiny:
        gpu = torch.cuda.get_device_properties(0)
        for (batch, name), launches in plan.items() if arguments.search else ():
            launches += candidates(name, cases[0], batch, gpu.multi_processor_count)
        for (batch, name), launches in plan.items() if arguments.parts else ():
            launches += parts(name, arguments.slots, batch)
        target = (gpu.major, gpu.minor), gpu.multi_processor_count
        compiled = pool.imap(compile_launch, [(*target, name, cases[0], batch, launch) for (batch, name), each in plan.items() for launch in each])
    bf16: dict[tuple[int, int], float | None] = {}
    for (batch, name), launches in plan.items():
        usable = [launch for launch, is_compiled in [(launch, next(compiled)) for launch in launches] if is_compiled or not launch]
        for case in cases:
            row = measure(name, case, batch, usable, "cpu" if arguments.tiny else "cuda")
            if name == "bf16":
                bf16[batch, case.position] = row["us"]
            yield row | {"bf16_us": bf16.get((batch, case.position))}


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; return how many rows failed."""
    arguments, started = arguments_of(argv), time.perf_counter()
    # Processes that are forked before CUDA starts compile without it; what they compile is then found on disk.
    with multiprocessing.get_context("fork").Pool(1 if arguments.tiny else max(1, (os.cpu_count() or 1) - 1)) as pool:
        if not arguments.tiny and not torch.cuda.is_available():
            raise SystemExit("bench.quantized_attention needs a CUDA GPU; --tiny tries it on a CPU")
        command = command_of("quantized_attention", argv)
        result: dict[str, Any] = {"machine": describe(), "command": command, "rows": []}
        for row in rows_of(arguments, pool):
            print(f"[{time.perf_counter() - started:5.0f} s] {table([row]).splitlines()[1]}", flush=True)
            result["rows"].append(row)
            if arguments.json:
                arguments.json.write_text(json.dumps(result, indent=1))
    print(table(result["rows"]))
    return sum(row["us"] is None for row in result["rows"])


if __name__ == "__main__":
    sys.exit(min(1, main()))
