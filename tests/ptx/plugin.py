"""Let kernels run on a CPU as Triton compiles them for a GPU: their PTX, one instruction after the other.

Triton's interpreter runs what is written; this runs what became of it, layouts, shuffles and tensor cores included, where no GPU is at hand:
``python -m pytest -p tests.ptx.plugin tests/kernels/test_decode_attention.py``.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
import triton

from bench.compiling import Target
from qtts_compile.kernels import pdl
from qtts_compile.kernels.clusters import device as clusters
from qtts_compile.kernels.skinny import launch as skinny
from tests.ptx.cluster import Cluster
from tests.ptx.machine import Machine
from tests.ptx.mbarrier import ClusterError
from tests.ptx.memory import Memory
from tests.ptx.program import Program, parse

HOPPER = (9, 0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ptx-seed", type=int, default=0, help="of the order in which warps of clusters run, and what they send each other arrives")


def pytest_configure(config: pytest.Config) -> None:
    """Compile for Hopper, and run instead of launching."""
    pdl.has_pdl = skinny.has_tensor_cores = clusters.has_clusters = clusters.have_room = lambda *_: True
    clusters.divide_memory = lambda kernel: None
    triton.runtime.driver.set_active(cast(Any, Target(HOPPER)))
    compile_or_launch = triton.JITFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = compile_or_launch(self, *arguments, grid=grid, warmup=True, **options)
        bound = self.signature.bind(*arguments, **{name: value for name, value in options.items() if name in self.signature.parameters})
        if not warmup:
            places: Any = grid(bound.arguments) if callable(grid) else grid
            simulate(kernel, bound.arguments, places, cast(int, config.getoption("--ptx-seed")))
        return kernel

    triton.JITFunction.run = run


def simulate(kernel: Any, arguments: dict[str, Any], grid: tuple[int, ...], seed: int = 0) -> None:
    """Run a compiled kernel for every place of a grid."""
    tensors: list[torch.Tensor] = []
    bits = [_as_bits(value, kind, tensors) for name, kind in kernel.src.signature.items() for value, kind in _flat(arguments.get(name), kind)]
    with_scratch = [*bits, 0, 0]  # of which no kernel here has any
    parameters = {f"{kernel.metadata.name}_param_{i}": value for i, value in enumerate(with_scratch)}
    program, memory = parse(kernel.asm["ptx"]), Memory(tensors)
    whole = (*grid, 1, 1)[:3]
    if kernel.metadata.num_ctas > 1:
        _run_clusters(program, kernel.metadata, parameters, memory, whole, seed)
        return
    for names in _places("ctaid", whole):
        Machine(program, kernel.metadata.num_warps, parameters, memory, names).run()


def _run_clusters(program: Program, metadata: Any, parameters: dict[str, int], memory: Memory, grid: tuple[int, ...], seed: int) -> None:
    """Run clusters twice: what they send arrives at once, then late. Raises ClusterError if that changes the result."""
    before, results = memory.contents(), []
    for order in (None, random.Random(seed)):
        memory.restore(before)
        for names in _places("clusterid", grid):
            is_late = order is not None
            Cluster(program, metadata.num_ctas, metadata.num_warps, parameters, memory, names, metadata.shared, order, is_late).run()
        results.append(memory.contents())
    if not all(np.array_equal(*both) for both in zip(*results, strict=True)):
        raise ClusterError(f"the result of {metadata.name} depends on the order in which things happen (--ptx-seed={seed})")


def _places(kind: str, grid: tuple[int, ...]) -> Iterator[dict[str, int]]:
    """Yield each place of a grid, and the grid's size, by the names of the registers that hold them."""
    for place in itertools.product(*(range(count) for count in grid)):
        yield {f"%{name}.{axis}": at[i] for name, at in ((kind, place), (f"n{kind}", grid)) for i, axis in enumerate("xyz")}


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
