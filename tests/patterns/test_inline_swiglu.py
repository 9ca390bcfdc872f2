"""SwiGLU given back to Inductor: where, what the report says, and that nothing else changes."""

import pytest
import torch
import torch.nn.functional as F
from rewriting import ops
from torch import fx

from qtts_compile.options import Options
from qtts_compile.patterns.tracing import TensorSpec, trace
from qtts_compile.report import GraphReport, Report
from qtts_compile.rewriter import rewrite


def swiglu(gate, up):
    return F.silu(gate) * up


def rewritten(shape, device, **options) -> tuple[GraphReport, list[str]]:
    """Rewrite the graph of a SwiGLU on a device that need not be there."""
    spec = TensorSpec.dense(shape, torch.bfloat16, torch.device(device))
    graph = fx.Graph()
    graph.output(graph.graph_copy(trace(swiglu, (spec, spec), ()), {}))
    gm = fx.GraphModule(torch.nn.Module(), graph)
    report = rewrite(gm, Options.parse(None, options))
    return report, [op.name for op in ops(gm.graph)]


@pytest.mark.parametrize("shape", [(1, 3072), (1, 1, 3072), (1, 1, 96), (1,), (3072,)], ids=str)
def test_one_short_row_on_a_gpu_is_inductor_s(shape):
    report, names = rewritten(shape, "cuda", strict=True)
    assert "qtts.swiglu.default" not in names and "aten.exp.default" in names
    assert report.lifted == {"swiglu": 1} and report.kernels == {} and report.refusals == []
    (declined,) = report.declined
    assert declined.rewrite == "swiglu" and str(shape[-1]) in declined.reason
    assert "left to Inductor: swiglu x1" in str(Report([report]))


@pytest.mark.parametrize(("shape", "device"), [((1, 6144), "cuda"), ((2, 3072), "cuda"), ((1, 2, 96), "cuda"), ((1, 3072), "cpu")], ids=str)
def test_other_shapes_keep_the_kernel(shape, device):
    report, names = rewritten(shape, device)
    assert names == ["qtts.swiglu.default"] and report.declined == []


def test_what_is_given_back_is_what_was_there():
    before = trace(swiglu, (TensorSpec.dense((1, 64), torch.bfloat16, torch.device("cuda")),) * 2, ())
    _, names = rewritten((1, 64), "cuda")
    assert names == [op.name for op in ops(before)]
