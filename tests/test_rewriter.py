"""The user's limits on the rewrites: layers, disable, strict."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from models import case
from rewriting import expected_kernels, kernels, side_by_side
from torch._dynamo.exc import BackendCompilerFailed

from qtts_compile import NotRewritten
from qtts_compile.patterns.catalogue import OPS

SMALL = replace(case("predictor"), layers=2)


@pytest.fixture(scope="module")
def model():
    return SMALL.build(torch.float32)


@pytest.mark.parametrize("layers", [(0, 1), (1, 2), (1, 3), (0, 3)], ids=str)
def test_layers_limits_the_rewrites_to_exactly_those(layers):
    c = replace(SMALL, layers=3)
    run = side_by_side(c, c.build(torch.float32), options={"layers": layers, "strict": True}, decode=1)
    wanted = [f"layers.{i}" for i in range(*layers)]
    for phase, report, _ in run.compiled_graphs():
        assert report.layers == 3
        expected = expected_kernels(replace(c, layers=len(wanted)), phase, "static", run.rows(phase))
        for name in (
            "norm_linears",
            "norm_qkv_attention",
            "norm_swiglu",
            "linear_add",
            "attention",
            "kv_write",
            "qk_norm_rope_kv_write",
            "qk_norm_rope_attention",
            "rotary_qk",
        ):
            paths = report.kernels.get(name, [])
            assert sorted({".".join(path.split(".")[:2]) for path in paths}) == (wanted if expected[name] else [])
            assert len(paths) == expected[name]
        # The norm after the last layer belongs to no layer, so it is rewritten whatever the range.
        norms = report.kernels.get("rms_norm", []) + report.kernels.get("add_rms_norm", [])
        assert {path for path in norms if not path.startswith(tuple(wanted))} == {"norm"}
    for step in run.steps:
        torch.testing.assert_close(step.compiled, step.eager, rtol=1e-5, atol=1e-5)


def test_layers_beyond_the_model_are_refused(model):
    with pytest.raises(BackendCompilerFailed, match=r"ValueError: layers=\(0, 3\) reaches beyond the 2 decoder layers.*0 to 2"):
        side_by_side(SMALL, model, options={"layers": (0, 3)})


# What no longer appears once a rewrite is off: itself, and the fusions that start from it.
DEPENDENT = {
    "rms_norm": {"rms_norm", "add_rms_norm", "norm_qkv_attention"},
    "swiglu": {"swiglu", "norm_swiglu"},
    "rotary": {"rotary", "rotary_qk", "qk_norm_rope_kv_write", "qk_norm_rope_attention", "norm_qkv_attention"},
    "kv_write": {"kv_write", "qk_norm_rope_kv_write", "qk_norm_rope_attention", "norm_qkv_attention"},
    "attention": {"attention", "qk_norm_rope_kv_write", "qk_norm_rope_attention", "norm_qkv_attention"},
    "qk_norm_rope_kv_write": {"qk_norm_rope_kv_write", "qk_norm_rope_attention", "norm_qkv_attention"},
    "qk_norm_rope_attention": {"qk_norm_rope_attention", "norm_qkv_attention"},
    "norm_linears": {"norm_linears", "norm_qkv_attention"},
}
# What takes over the pieces instead, in other numbers.
HEIRS = {
    "swiglu": {"norm_linears"},
    **{
        name: {"rms_norm", "kv_write", "rotary_qk", "attention", "norm_linears"}
        for name in ("rotary", "kv_write", "attention", "qk_norm_rope_kv_write")
    },
    "qk_norm_rope_attention": {"qk_norm_rope_kv_write", "attention", "norm_linears"},
    "norm_qkv_attention": {"qk_norm_rope_attention", "norm_linears"},
    "norm_swiglu": {"swiglu", "norm_linears"},
    "norm_linears": {"rms_norm", "qk_norm_rope_attention"},
    "linear_add": {"norm_linears", "add_rms_norm", "rms_norm"},
    "add_rms_norm": {"rms_norm"},
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("prefill", [6, 20])
def test_every_rewrite_can_be_switched_off(model, name, prefill):
    one = replace(SMALL, layers=1)
    run = side_by_side(one, one.build(torch.float32), options={"disable": [name], "strict": True}, decode=1, prefill=prefill)
    gone = DEPENDENT.get(name, {name})
    for phase, report, _ in run.compiled_graphs():
        found = kernels(report)
        assert found.keys().isdisjoint(gone)
        unaffected = expected_kernels(one, phase, "static", run.rows(phase)).keys() - gone - HEIRS.get(name, set())
        assert unaffected and all(found[n] == expected_kernels(one, phase, "static", run.rows(phase))[n] for n in unaffected)
        assert report.refusals == []
    for step in run.steps:
        torch.testing.assert_close(step.compiled, step.eager, rtol=1e-5, atol=1e-5)


def test_switching_everything_off_leaves_the_graph_alone(model):
    run = side_by_side(SMALL, model, options={"disable": list(OPS), "strict": True}, decode=1)
    for _, report, graphs in run.compiled_graphs():
        assert report.kernels == {} and Counter(op.name for op in graphs.rewritten).keys() <= Counter(op.name for op in graphs.before).keys()


class Altered(torch.nn.Module):
    """A norm that subtracts the mean first."""

    def __init__(self, original):
        super().__init__()
        self.weight = original.weight

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6))


@pytest.fixture
def altered():
    model = SMALL.build(torch.float32)
    name = "layers.1.post_attention_layernorm"
    model.set_submodule(name, Altered(model.get_submodule(name)))
    return model


def test_an_altered_block_is_refused_with_its_place_and_reason_and_the_rest_is_rewritten(altered):
    run = side_by_side(SMALL, altered, decode=1, prefill=20)
    for phase, report, _ in run.compiled_graphs():
        (refusal,) = report.refusals
        assert (refusal.rewrite, refusal.module) == ("rms_norm", "layers.1.post_attention_layernorm")
        assert "aten.sum" in refusal.reason and "aten.mean" in refusal.reason
        lost = Counter(add_rms_norm=1) if phase == "prefill" else Counter()  # in decoding, the layers after it go without the norm
        assert kernels(report) == expected_kernels(SMALL, phase, "static", run.rows(phase)) - lost
    for step in run.steps:
        torch.testing.assert_close(step.compiled, step.eager, rtol=1e-5, atol=1e-5)


def test_strict_raises_for_an_altered_block_and_names_it(altered):
    with pytest.raises(BackendCompilerFailed, match="(?s)NotRewritten: strict: 1 expected.*rms_norm at layers.1.post_attention") as caught:
        side_by_side(SMALL, altered, options={"strict": True})
    assert isinstance(caught.value.inner_exception, NotRewritten)
