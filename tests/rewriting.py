"""Run a model case eagerly and with backend="qtts" side by side, and see the graphs on the way."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import torch
from models import ModelCase, Session
from torch import nn
from torch._functorch import config as functorch_config

from qtts_compile import backend
from qtts_compile.kernels.gemv import MAX_ROWS
from qtts_compile.report import GraphReport, collect

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Op:
    """One operator call of a graph: its overload's name, e.g. "aten.cos.default", the shape of its result, and the names of what it reads."""

    name: str
    shape: tuple | None
    inputs: tuple[str, ...]


@dataclass
class Graphs:
    """The operators of one compiled graph: as AOTAutograd gives it, after the rewrites, and (executor="eager") as it runs."""

    before: list[Op] = field(default_factory=list)
    rewritten: list[Op] = field(default_factory=list)
    final: list[Op] = field(default_factory=list)


def ops(graph: torch.fx.Graph) -> list[Op]:
    """List the operator calls of a graph; an auto-functionalized call counts as the operator it calls."""
    calls = []
    for node in graph.nodes:
        if node.op == "call_function":
            target = node.args[0] if node.args and isinstance(node.args[0], torch._ops.OpOverload) else node.target
            value = node.meta.get("val")
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else None
            calls.append(Op(str(target), shape, tuple(each.name for each in node.all_input_nodes)))
    return calls


def count(calls: list[Op], *names: str) -> int:
    """Count the calls whose name contains one of ``names``."""
    return sum(any(name in op.name for name in names) for op in calls)


def prefetched(calls: list[Op]) -> list[bool]:
    """Tell of each joined projection and attention whether it prefetches what the norm_swiglu of the same place reads, a norm's and two weights."""
    weights = [op.inputs[2:4] for op in calls if "norm_swiglu" in op.name]
    return [set(both) <= set(op.inputs) for op, both in zip((op for op in calls if "norm_qkv" in op.name), weights, strict=True)]


@contextlib.contextmanager
def captured() -> Iterator[list[Graphs]]:
    """Collect the graphs that backend="qtts" rewrites inside the ``with`` block. None comes from AOTAutograd's cache, already rewritten."""
    graphs: list[Graphs] = []
    rewrite, interpret = backend.rewrite, backend._interpret

    def seen_rewrite(gm: torch.fx.GraphModule, options: Any) -> GraphReport:
        graphs.append(Graphs(before=ops(gm.graph)))
        report = rewrite(gm, options)
        graphs[-1].rewritten = ops(gm.graph)
        return report

    def seen_interpret(gm: torch.fx.GraphModule, **kwargs: Any) -> Any:
        run = interpret(gm, **kwargs)
        graphs[-1].final = ops(gm.graph)
        return run

    with functorch_config.patch(enable_autograd_cache=False):
        with mock.patch.object(backend, "rewrite", seen_rewrite), mock.patch.object(backend, "_interpret", seen_interpret):
            yield graphs


def expected_kernels(case: ModelCase, phase: Phase, cache: str, rows: int | None, most_rows: int = MAX_ROWS) -> Counter[str]:
    """Return how many ops of each rewrite stand in a graph: a function of the structure, the phase, the cache and the rows.

    cache: "static", "dynamic" or "quantized".
    rows: tokens of all sequences together, None where they are a symbol.
    most_rows: that linear kernels multiply.
    """
    layers = case.layers
    few = rows is not None and rows <= most_rows
    if few:
        kernels = Counter(rms_norm=1, norm_linears=layers, norm_swiglu=layers, linear_add=2 * layers)
    else:
        kernels = Counter(rms_norm=1, add_rms_norm=2 * layers, swiglu=layers)
    if phase == "decode" and cache != "dynamic":
        attention = "attention" if cache == "static" else "quantized_attention"
        if rows == 1 and not case.biased:  # caches of these tests are short
            del kernels["norm_linears"]
            kernels[f"norm_qkv_{attention}"] = layers
        else:
            kernels[f"qk_norm_rope_{attention}"] = layers
        return kernels
    if phase == "decode":
        kernels["attention"] = layers
    kernels["rotary_qk"] = layers
    if case.qk_norm:
        kernels["rms_norm"] += 2 * layers
    if cache == "static":
        kernels["kv_write"] = 2 * layers
    return kernels


def expected_lifted(case: ModelCase, phase: Phase, cache: str) -> Counter[str]:
    """Return how many blocks are recognised in a graph before any fusion."""
    layers = case.layers
    lifted = Counter(rms_norm=(4 if case.qk_norm else 2) * layers + 1, rotary=2 * layers, swiglu=layers)
    if cache == "static":
        lifted["kv_write"] = 2 * layers
    if phase == "decode":
        lifted["attention"] = layers
    return lifted


def kernels(report: GraphReport) -> Counter[str]:
    """Return the number of ops by rewrite in one graph."""
    return Counter({name: len(paths) for name, paths in report.kernels.items()})


@dataclass
class Step:
    """One call of both models: hidden states of all layers where asked for, else the last alone, and what was compiled for it."""

    phase: Phase
    eager: list[torch.Tensor]
    compiled: list[torch.Tensor]
    reports: list[GraphReport]
    graphs: list[Graphs]


@dataclass
class Run:
    """A prefill and some decode steps of one model, eager and compiled."""

    case: ModelCase
    session: Session
    steps: list[Step]
    eager_cache: list[torch.Tensor]
    compiled_cache: list[torch.Tensor]
    dynamic: bool | None

    def rows(self, phase: Phase) -> int | None:
        """Return the tokens of all sequences in a call, None where they are a symbol."""
        rows = math.prod(next(step for step in self.steps if step.phase == phase).eager[-1].shape[:-1])
        return None if self.dynamic and rows > 1 else rows

    def compiled_graphs(self) -> Iterator[tuple[Phase, GraphReport, Graphs]]:
        for step in self.steps:
            for report, graphs in zip(step.reports, step.graphs, strict=True):
                yield step.phase, report, graphs


def side_by_side(
    case: ModelCase,
    model: nn.Module,
    *,
    options: dict[str, Any] | None = None,
    dynamic: bool | None = None,
    prefill: int = 6,
    decode: int = 3,
    hidden_states: bool = False,
    compiled: Any = None,
    **session: Any,
) -> Run:
    """Step ``model`` and its compilation (or ``compiled``, if given) through the same tokens on caches of their own.

    options: of the backend, by default the rewritten graph runs op by op, which needs no C++ compiler and little time.
    hidden_states: ask the model for the hidden states after every layer.
    session: of ``models.Session``.
    """
    if compiled is None:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend.qtts, options={"executor": "eager", **(options or {})}, dynamic=dynamic)
    eager_session = Session(model, case, **session)
    compiled_session = eager_session.clone()
    steps = []
    with torch.inference_mode():
        for index in range(decode + 1):
            phase: Phase = "decode" if index else "prefill"
            with collect() as report, captured() as graphs:
                outputs = [
                    function(
                        **(s.decode_inputs() if index else s.prefill_inputs(prefill)),
                        **({"output_hidden_states": True} if hidden_states else {}),
                    )
                    for function, s in ((model, eager_session), (compiled, compiled_session))
                ]
            states = [[t.clone() for t in (o.hidden_states if hidden_states else (o.last_hidden_state,))] for o in outputs]
            steps.append(Step(phase, states[0], states[1], report.graphs, graphs))
    return Run(case, eager_session, steps, cache_of(eager_session), cache_of(compiled_session), dynamic)


def cache_of(session: Session) -> list[torch.Tensor]:
    """Return keys and values of every layer."""
    return [tensor for layer in session.cache.layers for tensor in (layer.keys, layer.values)]


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the smallest cosine similarity of two tensors' last dimension."""
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).min().item()


def rewritten(
    function: Any, *inputs: torch.Tensor, dynamic: bool | None = None, tolerance: float | None = None, **options: Any
) -> tuple[GraphReport, Graphs]:
    """Compile a function of tensors that is one graph; check its results, and what it wrote into its inputs, against eager.

    tolerance: largest absolute difference, by default torch.testing's for the dtype.
    options: of the backend.
    """
    torch._dynamo.reset()
    bounds: dict[str, Any] = {} if tolerance is None else dict(rtol=0, atol=tolerance)
    copies = [x.clone() for x in inputs]
    with torch.inference_mode(), collect() as report, captured() as graphs:
        expected = function(*copies)
        options = {"executor": "eager", **options}
        result = torch.compile(function, backend=backend.qtts, fullgraph=True, dynamic=dynamic, options=options)(*inputs)
    torch.testing.assert_close(result, expected, **bounds)
    torch.testing.assert_close(inputs, tuple(copies))
    return report.graphs[0], graphs[0]
