"""explain() and the report it returns."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import Session, case
from rewriting import expected_kernels, expected_lifted

from qtts_compile import Report, collect, explain
from qtts_compile.patterns.scope import Refusal
from qtts_compile.report import GraphReport, publish

SMALL = replace(case("predictor"), layers=2)


@pytest.fixture(scope="module")
def prefill():
    model = SMALL.build(torch.float32)
    session = Session(model, SMALL)
    return model, session, explain(model, options={"executor": "eager"}, **session.prefill_inputs(20))


def test_explain_counts_and_places(prefill):
    _, _, report = prefill
    (graph,) = report.graphs
    assert report.kernels == expected_kernels(SMALL, "prefill", "static", rows=20)
    assert report.lifted == expected_lifted(SMALL, "prefill", "static")
    assert graph.kernels["swiglu"] == ["layers.0.mlp", "layers.1.mlp"]
    assert report.refusals == [] and report.graph_breaks == [] and report.cudagraph_skips == 0
    assert graph.nodes[1] < graph.nodes[0] and 0 < graph.seconds < 60


def test_explain_makes_a_real_call_and_leaves_the_module_uncompiled(prefill):
    model, session, _ = prefill
    assert model._compiled_call_impl is None
    assert session.cache.layers[0].keys[:, :, :20].abs().sum() > 0
    assert session.cache.layers[0].keys[:, :, 20:].abs().sum() == 0


def test_the_table_names_every_rewrite_and_folds_layers(prefill):
    text = str(prefill[2])
    rows = {line.split()[0]: line for line in text.splitlines()}
    assert rows["swiglu"].split() == ["swiglu", "2", "2", "layers.*.mlp", "x2"]
    assert rows["kv_write"].split()[1:3] == ["4", "4"]
    assert rows["rotary_qk"].split()[1:3] == ["-", "2"]
    assert "refused: nothing" in text and "graphs: 1, graph breaks: 0, CUDA-graph skips: 0" in text


def test_to_dict_is_json(prefill):
    data = json.loads(json.dumps(prefill[2].to_dict()))
    assert data["kernels"] == dict(expected_kernels(SMALL, "prefill", "static", rows=20))
    assert data["graphs"][0]["kernels"]["swiglu"] == ["layers.0.mlp", "layers.1.mlp"]
    assert set(data) == {"kernels", "lifted", "graphs", "graph_breaks", "cudagraph_skips"}


def test_explain_takes_a_mode_and_reports_options_errors():
    module = torch.nn.Identity()
    with pytest.raises(Exception, match="unknown option 'stict'"):
        explain(torch.nn.Linear(2, 2), torch.ones(2), options={"stict": True})
    assert explain(module, torch.ones(2), mode="max-autotune").graphs == []


def test_refusals_and_notes_are_printed_with_counts():
    def graph():
        return GraphReport(refusals=[Refusal("rms_norm", f"layers.{i}.norm", "sum instead of mean") for i in range(3)], notes=["a note"])

    text = str(Report([graph(), graph()]))
    assert "refused: rms_norm x6 at layers.*.norm: sum instead of mean" in text
    assert text.count("note: a note") == 1
    data = Report([graph()]).to_dict()
    assert json.loads(json.dumps(data))["graphs"][0]["refusals"][0] == {
        "rewrite": "rms_norm",
        "module": "layers.0.norm",
        "reason": "sum instead of mean",
    }


def test_graph_breaks_are_reported_and_each_graph_counts():
    class Broken(torch.nn.Module):
        def forward(self, gate, up):
            first = torch.nn.functional.silu(gate) * up
            torch._dynamo.graph_break()
            return torch.nn.functional.silu(first) * up

    gate, up = torch.randn(2, 2, 8)
    report = explain(Broken(), gate, up, options={"executor": "eager"})
    assert len(report.graphs) == 2 and report.kernels == {"swiglu": 2}
    assert len(report.graph_breaks) == 1 and f"graph break: {report.graph_breaks[0]}" in str(report)


def test_cuda_graph_skips_are_those_of_the_block():
    from torch._dynamo.utils import counters

    counters["inductor"]["cudagraph_skips"] += 5
    with collect() as report:
        counters["inductor"]["cudagraph_skips"] += 2
    assert report.cudagraph_skips == 2


def test_collectors_nest():
    graph = GraphReport()
    with collect() as outer:
        with collect() as inner:
            publish(graph)
        publish(graph)
    publish(graph)
    assert (len(outer.graphs), len(inner.graphs)) == (2, 1)


def test_an_empty_report_says_why_it_may_be():
    with collect() as report:
        pass
    assert "no graph was compiled" in str(report) and report.to_dict()["kernels"] == {}


def test_code_compiled_before_is_not_reported_again():
    torch._dynamo.reset()
    function = torch.compile(lambda gate, up: torch.nn.functional.silu(gate) * up, backend="qtts", options={"executor": "eager"})
    gate, up = torch.randn(2, 2, 8)
    with torch.inference_mode():
        function(gate, up)
        with collect() as report:
            function(gate, up)
    assert report.graphs == []


def test_kernels_from_the_hub_are_named(monkeypatch):
    """A forward that transformers replaced by a hub kernel's hides the block; the report says which class."""
    model = SMALL.build(torch.float32)
    monkeypatch.setattr(type(model.norm), "kernel_layer_name", "RMSNorm", raising=False)
    options = {"executor": "eager"}
    plain = explain(model, options=options, **Session(model, SMALL).prefill_inputs(4))
    assert not any("hub" in note for graph in plain.graphs for note in graph.notes)
    norm: Any = model.norm
    monkeypatch.setattr(norm, "forward", norm.forward)
    hidden = explain(model, options=options, **Session(model, SMALL).prefill_inputs(4))
    assert [type(model.norm).__name__ in note for note in hidden.graphs[0].notes if "hub" in note] == [True]
