"""Every kernel at the shapes that a frame of the published models gives it: what it reads, what computes the same, and arguments for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench import linears
from bench.quantized_attention import KEPT, PROTECT
from bench.registry import POSITIONS
from qtts_compile.kernels.launch_search import COLD_BYTES
from qtts_compile.kernels.turboquant.format import Format

HEADS, KV_HEADS, WIDTH, EPS = 16, 8, 128, 1e-6
SECTIONS = [24, 20, 20]


@dataclass(frozen=True)
class KernelCase:
    """A kernel at one shape.

    Attributes:
        name: of the shape.
        op: of the operator.
        arguments: ``(rows, device, dtype, copies)`` -> that many sets of arguments, which differ in the memory of what is read cold.
        read_bytes: ``(rows, element size)`` -> bytes that a call must read from the GPU's memory; 0 where it only touches what the cache holds.
        library: computes the same by cuBLAS or another of PyTorch's own kernels.
        written: arguments that a call writes to.
        fixed: arguments whose dtype is not the model's.
        most_rows: that it takes together.
        own_rows: that it is timed with, where models give it others than a row for each text.
        is_compiled: whether Inductor takes the formula, which must not depend on numbers that it reads on the host.
    """

    name: str
    op: str
    arguments: Callable[[int, str, torch.dtype, int], list[tuple[Any, ...]]]
    read_bytes: Callable[[int, int], float] = lambda rows, size: 0
    library: Callable[..., Any] | None = None
    written: tuple[int, ...] = ()
    fixed: tuple[int, ...] = ()
    most_rows: int | None = None
    own_rows: tuple[int, ...] = ()
    is_compiled: bool = True

    @property
    def kernel(self) -> Callable[..., Any]:
        """The operator, which runs the kernel on a GPU and plain PyTorch on a CPU."""
        return getattr(self._module, self.op)

    @property
    def reference(self) -> Callable[..., Any]:
        """The same in plain PyTorch, as a model spells it."""
        return getattr(self._module, f"{self.op}_reference")

    @property
    def _module(self) -> Any:
        return import_module(f"qtts_compile.kernels.{self.op}")

    def copies(self, rows: int, size: int) -> int:
        """Return how many sets of arguments it takes that none is found in the L2 cache when its turn comes again."""
        return math.ceil(COLD_BYTES / self.read_bytes(rows, size)) if self.read_bytes(rows, size) else 1

    def outputs(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor]:
        """Return what a function gives and writes."""
        result = function(*arguments)
        results = [result] if isinstance(result, Tensor) else list(result or ())
        return [*results, *(arguments[index] for index in self.written)]


def _linear(case: linears.Case) -> KernelCase:
    def arguments(rows: int, device: str, dtype: torch.dtype, copies: int) -> list[tuple[Any, ...]]:
        return linears.build_arguments(case, rows, device, copies, dtype)

    def read_bytes(rows: int, size: int) -> float:
        return case.weight_bytes // 2 * size

    own_rows = () if case.rows == linears.ROWS else case.rows
    return KernelCase(case.name, case.op, arguments, read_bytes, partial(linears.call_library, case), own_rows=own_rows)


def _attention(name: str, slots: int, position: int) -> KernelCase:
    def arguments(rows: int, device: str, dtype: torch.dtype, copies: int) -> list[tuple[Any, ...]]:
        new = partial(torch.randn, device=device, dtype=dtype)
        q, mask = new(rows, HEADS, 1, WIDTH), _mask(slots, position, device)
        return [(q, new(rows, KV_HEADS, slots, WIDTH), new(rows, KV_HEADS, slots, WIDTH), mask, WIDTH**-0.5) for _ in range(copies)]

    def read_bytes(rows: int, size: int) -> float:
        return rows * 2 * KV_HEADS * (position + 1) * WIDTH * size

    return KernelCase(name, "decode_attention", arguments, read_bytes, _sdpa)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    return scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


def _heads(sections: list[int], rows: int, new: Callable[..., Tensor]) -> tuple[Any, ...]:
    """Return the heads of a token of each text, and what they are normalised and rotated by."""
    angles = (len(sections), 1, 1, WIDTH) if sections else (1, 1, WIDTH)
    states = (new(rows, heads, 1, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return (*states, new(WIDTH), new(WIDTH), EPS, EPS, new(angles), new(angles), sections, bool(sections))


def _mask(slots: int, position: int, device: str) -> Tensor:
    return (torch.arange(slots, device=device) <= position)[None, None, None]


def _qk_norm(name: str, slots: int, sections: list[int], position: int, attends: bool = False) -> KernelCase:
    """Return a case of ``qk_norm_rope_kv_write``, or with ``attends`` of that and attention in one launch."""

    def arguments(rows: int, device: str, dtype: torch.dtype, copies: int) -> list[tuple[Any, ...]]:
        new = partial(torch.randn, device=device, dtype=dtype)
        given = _heads(sections, rows, new)
        rest = (torch.tensor([position], device=device), *((_mask(slots, position, device), WIDTH**-0.5) if attends else ()))
        return [(*given, *(new(rows, KV_HEADS, slots, WIDTH) for _ in range(2)), *rest) for _ in range(copies)]

    def read_bytes(rows: int, size: int) -> float:
        return rows * 2 * KV_HEADS * position * WIDTH * size if attends else 0

    return KernelCase(name, "qk_norm_rope_attention" if attends else "qk_norm_rope_kv_write", arguments, read_bytes, written=(11, 12))


def _quantized(name: str, slots: int, sections: list[int], position: int, format: str) -> KernelCase:
    """Return a case of ``qk_norm_rope_quantized_attention``, over random codes."""
    parsed = Format.parse(format)

    def arguments(rows: int, device: str, dtype: torch.dtype, copies: int) -> list[tuple[Any, ...]]:
        new = partial(torch.randn, device=device, dtype=dtype)
        given = _heads(sections, rows, new)
        place, start = torch.tensor([position], device=device), torch.zeros(rows, dtype=torch.long, device=device)
        rest = place, start, PROTECT.sinks, format, _mask(slots, position, device), WIDTH**-0.5

        def buffers() -> tuple[Tensor, ...]:
            shape = rows, KV_HEADS, slots
            sizes = parsed.key_bytes(WIDTH), parsed.value_bytes(WIDTH)
            codes = (torch.randint(256, (*shape, size), dtype=torch.uint8, device=device) for size in sizes)
            return *codes, torch.rand(2, *shape, device=device).half(), new(2, rows, KV_HEADS, KEPT, WIDTH)

        return [(*given, *buffers(), *rest) for _ in range(copies)]

    def read_bytes(rows: int, size: int) -> float:
        packed = max(0, position + 1 - KEPT)
        return rows * KV_HEADS * (2 * (position - packed) * WIDTH * size + packed * parsed.bytes_per_token(WIDTH))

    # Of what is written, codes are not compared: a rounding may change them.
    return KernelCase(name, "qk_norm_rope_quantized_attention", arguments, read_bytes, written=(14,), fixed=(13,), is_compiled=False)


def _norm_qkv(attention: KernelCase, hidden: int) -> KernelCase:
    """Return a case of the projections of a text alone with the attention of another case."""

    def arguments(rows: int, device: str, dtype: torch.dtype, copies: int) -> list[tuple[Any, ...]]:
        new = partial(torch.randn, device=device, dtype=dtype)
        x, norm = new(rows, 1, hidden), new(hidden)
        weights = [[new(heads * WIDTH, hidden) * hidden**-0.5 for heads in (HEADS, KV_HEADS, KV_HEADS)] for _ in range(copies)]
        return [(x, norm, each, EPS, *rest[3:]) for each, rest in zip(weights, attention.arguments(rows, device, dtype, copies))]

    def read_bytes(rows: int, size: int) -> float:
        return (HEADS + 2 * KV_HEADS) * WIDTH * hidden * size + attention.read_bytes(rows, size)

    op = attention.op.replace("qk_norm_rope", "norm_qkv")
    written, fixed = ([place + 1 for place in places] for places in (attention.written, attention.fixed))
    return replace(attention, op=op, arguments=arguments, read_bytes=read_bytes, written=tuple(written), fixed=tuple(fixed), most_rows=1)


def _sample(name: str, vocabulary: int, is_penalised: bool, width: int | None = None) -> KernelCase:
    """Return a case of the sampler, which with a ``width`` also looks up the embeddings of what it draws."""

    def arguments(rows: int, device: str, dtype: torch.dtype, copies: int) -> list[tuple[Any, ...]]:
        logits = torch.randn(rows, vocabulary, device=device, dtype=dtype)
        controls = torch.tensor([1.0, 0.9, 50.0, 1.0, 1.05 if is_penalised else 1.0], device=device)
        masks = [torch.rand(rows, vocabulary, device=device) < 0.1 for _ in range(2)] if is_penalised else [None, None]
        tables = [] if width is None else [torch.randn(vocabulary, width, device=device, dtype=dtype)]
        return [(logits, controls, torch.arange(rows, device=device), torch.tensor([3], device=device), *masks, *tables)]

    return KernelCase(name, "sample" if width is None else "sample_embedding", arguments, library=_multinomial, is_compiled=False)


def _multinomial(
    logits: Tensor, controls: Tensor, seed: Tensor, offset: Tensor, seen: Tensor | None, blocked: Tensor | None, table: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw from the 50 likeliest, as transformers' processors do, and look up what was drawn in a table."""
    scores = logits.float()
    if seen is not None and blocked is not None:
        scores = torch.where(seen, torch.where(scores > 0, scores / 1.05, scores * 1.05), scores).masked_fill(blocked, float("-inf"))
    scores = scores / 0.9
    scores = scores.masked_fill(scores < scores.topk(50).values[:, -1:], float("-inf"))
    tokens = scores.softmax(-1).multinomial(1)[:, 0]
    return tokens if table is None else (tokens, torch.nn.functional.embedding(tokens, table))


def _rows(name: str, op: str, *shapes: tuple[int, ...], eps: bool = True) -> KernelCase:
    """Return a case whose arguments are tensors of these shapes, of which an empty first dimension stands for the rows."""

    def arguments(rows: int, device: str, dtype: torch.dtype, copies: int) -> list[tuple[Any, ...]]:
        tensors = (torch.randn([rows if size == 0 else size for size in shape], device=device, dtype=dtype) for shape in shapes)
        return [(*tensors, EPS) if eps else tuple(tensors)]

    return KernelCase(name, op, arguments)


def _cases() -> Iterator[KernelCase]:
    yield from map(_linear, linears.CASES)
    for owner, width, inner in (("talker", 2048, 6144), ("predictor", 1024, 3072)):
        yield _rows(f"{owner} norm", "rms_norm", (0, width), (width,))
        yield _rows(f"{owner} add, norm", "add_rms_norm", (0, width), (0, width), (width,))
        yield _rows(f"{owner} swiglu", "swiglu", (0, inner), (0, inner), eps=False)
    for position in POSITIONS:
        slots = -(-(position + 1) // 1024) * 1024
        yield _attention(f"talker attention, position {position}", slots, position)
        yield _qk_norm(f"talker qk-norm, rotary, attention, position {position}", slots, SECTIONS, position, attends=True)
    yield _norm_qkv(_qk_norm("talker of 0.6B norm, qkv, attention, position 64", 256, SECTIONS, 64, attends=True), 1024)
    for slots, position in ((256, 64), (512, 500), (2048, 2000), (8192, 8000)):
        yield _norm_qkv(_qk_norm(f"talker norm, qkv, attention, position {position}", slots, SECTIONS, position, attends=True), 2048)
        yield _norm_qkv(_quantized(f"talker norm, qkv, int4 attention, position {position}", slots, SECTIONS, position, "int4"), 2048)
    yield _norm_qkv(_qk_norm("predictor norm, qkv, attention", 16, [], 8, attends=True), 1024)
    yield _attention("predictor attention", 16, 8)
    yield _qk_norm("predictor qk-norm, rotary, attention", 16, [], 8, attends=True)
    yield _qk_norm("talker qk-norm, rotary, kv-write", 2048, SECTIONS, 100)
    yield _qk_norm("predictor qk-norm, rotary, kv-write", 16, [], 8)
    yield _sample("talker sampler", 3072, True)
    yield _sample("predictor sampler, embedding", 2048, False, 1024)


KERNEL_CASES = {case.name: case for case in _cases()}
