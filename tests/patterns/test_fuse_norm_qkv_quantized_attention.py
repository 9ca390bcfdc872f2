"""Projections of one token with the attention over a quantised cache that alone reads them: what becomes one launch, and what stays two."""

# pyright: reportCallIssue=false, reportArgumentType=false
# Arguments are cut from lists, whose lengths pyright takes for unknown.

import pytest
import torch
from rewriting import count, kernels, rewritten
from test_fuse import HEADS, KV_HEADS
from test_fuse_norm_qkv_attention import K, project
from test_fuse_quantized_attention import SLOTS, WIDTH, layer_inputs
from test_fuse_quantized_attention import layer as attention

from qtts_compile.kernels.norm_qkv import MAX_SLOTS

FUSED = "norm_qkv_quantized_attention"
JOINED, APART = {FUSED: 1}, {"norm_linears": 1, "qk_norm_rope_quantized_attention": 1}


def inputs(format="int4", batch=1, slots=SLOTS):
    """Hidden states, the weights of norm and projections, and all that attention reads besides."""
    weights = [torch.randn(heads * WIDTH, K) / K**0.5 for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return torch.randn(batch, 1, K), torch.rand(K) + 0.5, *weights, *layer_inputs(format, batch=batch, slots=slots)[3:]


def heads(states):
    return [each.view(each.shape[0], 1, -1, WIDTH) for each in states]


def layer(*tensors, format="int4"):
    return attention(*heads(project(*tensors[:5])), *tensors[5:], format=format)


@pytest.mark.parametrize("format", ["int4", "k4v3", "int3", "fp8"])
def test_projections_and_attention_of_every_layer_become_one_launch(format):
    def function(*tensors):
        return layer(*tensors[:16], format=format), layer(*tensors[16:], format=format)

    report, graphs = rewritten(function, *inputs(format), *inputs(format))
    assert kernels(report) == {FUSED: 2} and report.refusals == []
    assert count(graphs.final, "quantized_kv", "clone", "copy", "aten.mm", "rsqrt") == 0


def test_projections_in_another_order():
    def function(x, norm_weight, q, k, v, *rest):
        values, queries, keys = heads(project(x, norm_weight, v, q, k))
        return attention(queries, keys, values, *rest)

    assert kernels(rewritten(function, *inputs())[0]) == JOINED


@pytest.mark.parametrize(("slots", "expected"), [(MAX_SLOTS, JOINED), (MAX_SLOTS + 1, APART)])
def test_a_cache_of_more_slots_than_a_cluster_has_room_for(slots, expected):
    report, _ = rewritten(layer, *inputs(slots=slots))
    assert kernels(report) == expected and report.refusals == []


def test_two_texts():
    report, _ = rewritten(layer, *inputs(batch=2))
    assert kernels(report) == APART and report.refusals == []


def test_a_projection_that_is_read_elsewhere():
    def function(*tensors):
        states = project(*tensors[:5])
        return attention(*heads(states), *tensors[5:]), states[2] * 2

    report, _ = rewritten(function, *inputs())
    assert kernels(report) == APART
    assert [(r.rewrite, r.reason) for r in report.refusals] == [(FUSED, "a projection is read elsewhere")]


@pytest.mark.parametrize("dynamic", [None, True])
def test_an_eps_that_is_an_input(dynamic):
    report, _ = rewritten(layer, *inputs(), dynamic=dynamic)
    assert kernels(report) == JOINED and report.refusals == []


def test_it_can_be_switched_off():
    report, _ = rewritten(layer, *inputs(), disable=[FUSED])
    assert kernels(report) == APART and report.refusals == []
