"""Let kernels run on a CPU as Triton compiles them for a GPU: their PTX, one instruction after the other.

Triton's interpreter runs what is written; this runs what became of it, layouts, shuffles and tensor cores included, where no GPU is at hand:
``python -m pytest -p tests.ptx.plugin tests/kernels/test_decode_attention.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
import triton

from bench.compiling import Target
from tests.ptx.machine import Machine
from tests.ptx.memory import Memory
from tests.ptx.program import parse

HOPPER = (9, 0)


def pytest_configure(config: pytest.Config) -> None:
    """Compile for Hopper, and run instead of launching."""
    triton.runtime.driver.set_active(cast(Any, Target(HOPPER)))
    compile_or_launch = triton.JITFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = compile_or_launch(self, *arguments, grid=grid, warmup=True, **options)
        bound = self.signature.bind(*arguments, **{name: value for name, value in options.items() if name in self.signature.parameters})
        if not warmup:
            places: Any = grid(bound.arguments) if callable(grid) else grid
            simulate(kernel, bound.arguments, places)
        return kernel

    triton.JITFunction.run = run


def simulate(kernel: Any, arguments: dict[str, Any], grid: tuple[int, ...]) -> None:
    """Run a compiled kernel for every place of a grid."""
    tensors: list[torch.Tensor] = []
    bits = [_as_bits(value, kind, tensors) for name, kind in kernel.src.signature.items() for value, kind in _flat(arguments.get(name), kind)]
    with_scratch = [*bits, 0, 0]  # of which no kernel here has any
    parameters = {f"{kernel.metadata.name}_param_{i}": value for i, value in enumerate(with_scratch)}
    program, memory = parse(kernel.asm["ptx"]), Memory(tensors)
    whole = (*grid, 1, 1)[:3]
    for place in itertools.product(*(range(count) for count in whole)):
        names = {f"%{kind}.{axis}": at[i] for kind, at in (("ctaid", place), ("nctaid", whole)) for i, axis in enumerate("xyz")}
        Machine(program, kernel.metadata.num_warps, parameters, memory, names).run()


def _flat(value: Any, kind: Any) -> Iterator[tuple[Any, str]]:
    """Yield what a kernel is passed of an argument: each entry of a tuple, nothing of a constant."""
    if isinstance(kind, (tuple, list)):
        for each in zip(value, kind, strict=True):
            yield from _flat(*each)
    elif kind != "constexpr":
        yield value, kind


def _as_bits(value: Any, kind: str, tensors: list[torch.Tensor]) -> int:
    if kind.startswith("*"):
        tensors.append(value)
        return value.data_ptr()
    if kind == "fp32":
        return int(np.float32(value).view(np.uint32))
    return int(value)
