"""Projections of one token with the attention that alone reads them: what becomes one launch, and what stays two."""

import pytest
import torch
import torch.nn.functional as F
from rewriting import count, kernels, prefetched, rewritten
from test_fuse import HEADS, KV_HEADS, WIDTH, attend, norm, rotate

from qtts_compile.kernels.norm_qkv import MAX_SLOTS

K = 24
JOINED, APART = {"norm_qkv_attention": 1}, {"norm_linears": 1, "qk_norm_rope_attention": 1}


def inputs(batch=1, slots=8):
    """Hidden states, the weights of norm, projections and heads' norms, caches, tables, position and mask."""
    weights = [torch.randn(heads * WIDTH, K) / K**0.5 for heads in (HEADS, KV_HEADS, KV_HEADS)]
    caches = [torch.randn(batch, KV_HEADS, slots, WIDTH) for _ in range(2)]
    angles, position = torch.randn(batch, 1, WIDTH // 2).repeat(1, 1, 2), torch.tensor([5])
    mask = (torch.arange(slots) <= position[:, None]).expand(batch, 1, 1, slots).clone()
    norms = [torch.rand(size) + 0.5 for size in (K, WIDTH, WIDTH)]
    return torch.randn(batch, 1, K), norms[0], *weights, *norms[1:], *caches, angles.cos(), angles.sin(), position, mask


def project(x, norm_weight, *weights, biases=(None, None, None)):
    normed = norm(x, norm_weight)
    return [F.linear(normed, weight, bias) for weight, bias in zip(weights, biases)]


def attention(q, k, v, q_norm, k_norm, k_cache, v_cache, cos, sin, position, mask):
    q, k, v = (states.view(states.shape[0], 1, -1, WIDTH) for states in (q, k, v))
    k_cache.index_copy_(2, position, rotate(norm(k, k_norm).transpose(1, 2), cos, sin))
    v_cache.index_copy_(2, position, v.transpose(1, 2))
    return attend(rotate(norm(q, q_norm).transpose(1, 2), cos, sin), k_cache, v_cache, mask)


def layer(*tensors):
    return attention(*project(*tensors[:5]), *tensors[5:])


def test_projections_and_attention_become_one_launch():
    report, graphs = rewritten(layer, *inputs())
    assert kernels(report) == JOINED and report.refusals == []
    assert count(graphs.final, "clone", "copy", "index_put", "aten.mm", "rsqrt") == 0


def test_projections_in_another_order():
    def function(x, norm_weight, q, k, v, *rest):
        values, queries, keys = project(x, norm_weight, v, q, k)
        return attention(queries, keys, values, *rest)

    assert kernels(rewritten(function, *inputs())[0]) == JOINED


def test_without_norms():
    def function(x, _, q, k, v, q_norm, k_norm, k_cache, v_cache, cos, sin, position, mask):
        queries, keys, values = (F.linear(x, weight).view(1, 1, -1, WIDTH).transpose(1, 2) for weight in (q, k, v))
        k_cache.index_copy_(2, position, rotate(keys, cos, sin))
        v_cache.index_copy_(2, position, values)
        return attend(rotate(queries, cos, sin), k_cache, v_cache, mask)

    assert kernels(rewritten(function, *inputs())[0]) == JOINED


@pytest.mark.parametrize(("slots", "expected"), [(MAX_SLOTS, JOINED), (MAX_SLOTS + 1, APART)])
def test_a_cache_of_more_slots_than_a_cluster_has_room_for(slots, expected):
    report, _ = rewritten(layer, *inputs(slots=slots))
    assert kernels(report) == expected and report.refusals == []


def test_two_texts():
    report, _ = rewritten(layer, *inputs(batch=2))
    assert kernels(report) == APART and report.refusals == []


def test_biases():
    def function(bias, *tensors):
        return attention(*project(*tensors[:5], biases=(bias, None, None)), *tensors[5:])

    report, _ = rewritten(function, torch.randn(HEADS * WIDTH), *inputs())
    assert kernels(report) == APART and report.refusals == []


def test_a_projection_that_is_read_elsewhere():
    def function(*tensors):
        states = project(*tensors[:5])
        return attention(*states, *tensors[5:]), states[2] * 2

    report, _ = rewritten(function, *inputs())
    assert kernels(report) == APART
    assert [(r.rewrite, r.reason) for r in report.refusals] == [("norm_qkv_attention", "a projection is read elsewhere")]


def mlp(x, norm_weight, gate, up):
    normed = norm(x, norm_weight)
    return F.silu(F.linear(normed, gate)) * F.linear(normed, up)


def mlp_inputs():
    return torch.rand(HEADS * WIDTH) + 0.5, *(torch.randn(40, HEADS * WIDTH) / 8 for _ in range(2))


def layer_and_mlp(norm_weight, gate, up, *tensors):
    return mlp(layer(*tensors).reshape(1, 1, -1), norm_weight, gate, up)


def test_the_weights_that_an_mlp_reads_next_are_prefetched():
    report, graphs = rewritten(layer_and_mlp, *mlp_inputs(), *inputs())
    assert kernels(report) == {**JOINED, "norm_swiglu": 1} and prefetched(graphs.final) == [True]


def test_weights_with_gaps_are_not_prefetched():
    norm_weight, gate, up = mlp_inputs()
    report, graphs = rewritten(layer_and_mlp, norm_weight, F.pad(gate, (0, 8))[:, :-8], up, *inputs())
    assert kernels(report) == {**JOINED, "norm_swiglu": 1} and prefetched(graphs.final) == [False]


def test_each_attention_prefetches_for_the_mlp_before_the_next():
    def function(norm_weight, gate, up, *tensors):
        first, second = layer(*tensors[:13]), layer(*tensors[13:])
        return mlp((first + second).reshape(1, 1, -1), norm_weight, gate, up)

    report, graphs = rewritten(function, *mlp_inputs(), *inputs(), *inputs())
    first, second = (op.inputs for op in graphs.rewritten if "norm_qkv" in op.name)
    (weights,) = (op.inputs[2:4] for op in graphs.rewritten if "norm_swiglu" in op.name)
    assert set(weights) <= set(second) and set(weights).isdisjoint(first)


def test_it_can_be_switched_off():
    report, _ = rewritten(layer, *inputs(), disable=["norm_qkv_attention"])
    assert kernels(report) == APART and report.refusals == []
