"""AOTAutograd's cache for rewritten graphs: a warm start neither traces nor rewrites, and still reports what was rewritten.

An entry bundles Inductor's compiled graph with the report of its rewriting. It is found by Dynamo's graph and torch's settings, as ever, and by what
else decides how a graph is rewritten (:func:`key`). Graphs that need gradients, and graphs that run op by op, are not stored.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import CompiledTritonKernels
from torch._inductor.output_code import CompiledFxGraph, OutputCode

from qtts_compile import kernels, patterns
from qtts_compile.options import Options
from qtts_compile.patterns.graph import module_path
from qtts_compile.patterns.tracing import hint
from qtts_compile.report import GraphReport, publish

log = logging.getLogger(__name__)

# Inductor's setting that maps names of functions to cache keys; all of it is part of every key, and no function is called like this.
KEYS, NAME = "unsafe_marked_cacheable_functions", "qtts_compile.rewriter.rewrite"


class ReportedGraph(CompiledFxGraph):
    """Inductor's compiled graph, with the report to publish when it comes out of the cache."""

    report: GraphReport
    compiled_fn_runner: Any = None  # __del__ reads it, also of an entry whose reading broke off

    @classmethod
    def of(cls, graph: Any, report: GraphReport) -> ReportedGraph:
        """Turn Inductor's graph into one with a report."""
        graph.__class__, graph.report = cls, copy.deepcopy(report)
        return graph

    def post_compile(self, *args: Any, **kwargs: Any) -> None:
        """Make the graph callable after loading. Inductor does the same to a new graph before it becomes one of this class."""
        super().post_compile(*args, **kwargs)
        log.info("a rewritten graph from AOTAutograd's cache: %s", {name: len(paths) for name, paths in self.report.kernels.items()})
        publish(replace(self.report, seconds=0.0))


class UnstoredGraph(OutputCode):
    """What AOTAutograd runs and does not store."""

    def __init__(self, run: Callable[[list[Any]], Any]) -> None:
        self._run, self._boxed_call = run, True

    def __call__(self, inputs: Any) -> Any:
        """Run the graph on a list of inputs, which it empties."""
        return self._run(inputs)

    def prepare_for_serialization(self) -> None:
        """Keep AOTAutograd from storing this."""
        raise BypassAOTAutogradCache("qtts: Inductor has no code for this graph, or does not store it either")


def storable(compiled: Any, report: GraphReport) -> OutputCode:
    """Return what the inner compiler gave in a form that AOTAutograd stores with its report, or knows not to store."""
    if type(compiled) is not CompiledFxGraph or compiled._fx_graph_cache_key is None:
        return UnstoredGraph(compiled)
    return ReportedGraph.of(compiled, report)


def settings(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, compiler: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of AOTAutograd and of Inductor under which a graph is looked up, compiled and stored.

    compiler: what is missing of a compiler, if anything.
    """
    known = hasattr(functorch_config, "bundled_autograd_cache") and hasattr(inductor_config, KEYS)
    if not known:
        log.warning("this torch has not the settings that AOTAutograd's cache needs to hold rewritten graphs: each process traces them anew")
    if not known or _needs_gradients(gm, example_inputs):
        return {"enable_autograd_cache": False}, {}
    CompiledTritonKernels.cache_clear()  # as before every other compilation: a kernel belongs to one graph
    keys = options.config_patches().get(KEYS, getattr(inductor_config, KEYS))
    return {"bundled_autograd_cache": True}, {KEYS: {**keys, NAME: key(gm, example_inputs, options, compiler)}}


@contextlib.contextmanager
def inductors_own_cache() -> Iterator[None]:
    """Compile as if AOTAutograd's cache were not there: Inductor's holds rewritten graphs, whatever they were rewritten from."""
    keys = dict(getattr(inductor_config, KEYS, {}))
    with contextlib.ExitStack() as stack:
        if keys.pop(NAME, None):
            stack.enter_context(functorch_config.patch(bundled_autograd_cache=False))
            stack.enter_context(inductor_config.patch({KEYS: keys}))
        yield


def key(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, compiler: str | None) -> str:
    """Return a digest of what decides how a graph is rewritten and is not in torch's own key.

    That is the options, this package's code, the modules that operators stand in (reports name them, and ``layers`` goes by them), and the values of
    symbolic sizes, which patterns are compared at. Torch's key also lacks which inputs keep their address; CUDA graphs copy the others.
    """
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    places = [module_path(node) for graph in graphs for node in graph.nodes]
    static = [node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") for node in gm.graph.find_nodes(op="placeholder")]
    sizes = [hint(value) for value in example_inputs if not isinstance(value, torch.Tensor)]
    chosen = options.layers, sorted(options.disable), options.strict, options.executor, options.kv_cache
    return hashlib.sha256(repr((source_digest(), chosen, compiler, sizes, static, places)).encode()).hexdigest()


@functools.cache
def source_digest() -> str:
    """Return a digest of this package's code."""
    digest = hashlib.sha256()
    for folder in (Path(__file__).parent, *map(Path, (*kernels.__path__, *patterns.__path__))):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _needs_gradients(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    tensors = (*example_inputs, *gm.parameters(), *gm.buffers())
    if not any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors):
        return False
    return torch.is_grad_enabled() or any(node.target is torch._C._set_grad_enabled and node.args[0] for node in gm.graph.nodes)
