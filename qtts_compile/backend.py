"""The entry of ``torch.compile(model, backend="qtts")``.

Graphs are rewritten between AOTAutograd and Inductor: the compiler that AOTAutograd calls is wrapped, so Inductor sees (and caches) the
rewritten graph, and a pass of the user's own in Inductor's hooks runs as ever. AOTAutograd's cache, on whose hits nothing is rewritten, holds the
reports beside the graphs (see :mod:`qtts_compile.autograd_cache`).
"""

from __future__ import annotations

import functools
import logging
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch._inductor.runtime.compile_tasks import _set_triton_ptxas_path

from qtts_compile.autograd_cache import inductors_own_cache, settings, storable
from qtts_compile.cache_check import check_kv_cache
from qtts_compile.kernels.library import register_lowerings
from qtts_compile.options import Options
from qtts_compile.report import GraphReport, publish
from qtts_compile.rewriter import rewrite

log = logging.getLogger(__name__)


def qtts(gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None) -> Any:
    """Compile a Dynamo graph with Qwen3-TTS's building blocks rewritten to ``qtts::`` kernels.

    Args:
        gm: graph from TorchDynamo.
        example_inputs: its inputs.
        mode: torch.compile's mode; None means "default".
        options: see :class:`qtts_compile.options.Options`.

    Raises:
        ValueError: an unknown or impossible option, or a graph over another cache than ``kv_cache``.
        NotRewritten: with ``strict``, when an expected rewrite did not match.
    """
    parsed = Options.parse(mode, options)
    register_lowerings()
    # Inductor does so when it compiles a kernel. Where it finds all in its cache, ours would go through another ptxas, which their cache lacks.
    _set_triton_ptxas_path()
    # Padded products, which Inductor chooses by timing them, would make what is rewritten a matter of chance.
    patches = {"shape_padding": False, **parsed.config_patches()}
    if hasattr(inductor_config.triton, "enable_pdl"):
        patches["triton.enable_pdl"] = False  # which an environment variable can switch on and options may not
    cache, keys = settings(gm, example_inputs, parsed, missing_compiler())
    with functorch_config.patch(cache):
        return compile_fx(gm, list(example_inputs), inner_compile=functools.partial(_compile_graph, options=parsed), config_patches=patches | keys)


def reset() -> None:
    """Forget captured CUDA graphs (called by ``torch.compiler.reset()``)."""
    if torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


qtts.reset = reset  # pyright: ignore[reportFunctionMemberAccess]


def _compile_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Options, **kwargs: Any) -> Any:
    if not kwargs.get("is_backward"):
        check_kv_cache(gm, options.kv_cache)
    if kwargs.get("is_inference"):
        report = rewrite(gm, options)
    else:
        report = GraphReport(notes=["a graph that needs gradients is left to Inductor: run it under torch.inference_mode() or torch.no_grad()"])
    executor = options.executor
    if executor == "inductor" and _on_cpu(gm) and (missing := missing_compiler()):
        warnings.warn(f"qtts: {missing}; the rewritten graph runs op by op instead of through generated C++", stacklevel=2)
        report.notes.append(f"{missing}: the graph runs op by op")
        executor = "eager"
    publish(report)
    if executor == "eager":
        return storable(_interpret(gm, **kwargs), report)
    with inductors_own_cache():
        return storable(compile_fx_inner(gm, example_inputs, **kwargs), report)


def _interpret(gm: fx.GraphModule, is_inference: bool = False, **kwargs: Any) -> Callable:
    """Run the graph that Inductor would lower, op by op. In-place ops stay in place, as Inductor's passes leave them."""
    view_to_reshape(gm)
    post_grad_passes(gm, is_inference)
    gm.recompile()

    def run(args: list[Any]) -> Any:
        values = list(args)
        args.clear()
        return gm(*values)

    run._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]
    return run


def _on_cpu(gm: fx.GraphModule) -> bool:
    values = (node.meta.get("val") for node in gm.graph.nodes)
    return not any(isinstance(value, torch.Tensor) and value.device.type != "cpu" for value in values)


@functools.cache
def missing_compiler() -> str | None:
    """Say what Inductor's C++ code generation lacks on this machine, or None."""
    compilers = inductor_config.cpp.cxx
    names = [name for name in (compilers if isinstance(compilers, (tuple, list)) else [compilers]) if name]
    if not any(shutil.which(name) for name in names):
        return f"no C++ compiler ({' or '.join(names)}) is installed"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "the Python headers (Python.h) are not installed"
    return None
