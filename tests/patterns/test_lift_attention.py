"""Grouped-query attention of a few tokens: masks, groups and scales that are recognised, and attention of other kinds."""

import pytest
import torch
import torch.nn.functional as F
from rewriting import count, kernels, rewritten

SLOTS, WIDTH = 12, 16


def repeat_kv(x, groups):
    batch, heads, slots, width = x.shape
    if groups == 1:
        return x
    return x[:, :, None, :, :].expand(batch, heads, groups, slots, width).reshape(batch, heads * groups, slots, width)


def attention(q, k, v, mask=None, scale: float | None = 0.25, **options):
    groups = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, repeat_kv(k, groups), repeat_kv(v, groups), attn_mask=mask, scale=scale, **options)


def inputs(heads=4, kv_heads=2, batch=2, tokens=1, dtype=torch.float32):
    q = torch.randn(batch, tokens, heads, WIDTH).to(dtype).transpose(1, 2)
    return q, *(torch.randn(batch, kv_heads, SLOTS, WIDTH).to(dtype) for _ in range(2))


def bool_mask(*shape):
    mask = torch.rand(*shape) > 0.4
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
def test_every_mask_kind_and_dtype_matches(mask, batch, dtype):
    masks = {"none": [], "bool": [bool_mask(batch, 1, 1, SLOTS)]}
    masks["additive"] = [torch.zeros(batch, 1, 1, SLOTS).masked_fill(~bool_mask(batch, 1, 1, SLOTS), torch.finfo(dtype).min).to(dtype)]
    q, k, v = inputs(batch=batch, dtype=dtype)
    # In half precision PyTorch rounds the probabilities, and both sides round the result: half an ulp of the largest value each.
    tolerance = None if dtype == torch.float32 else torch.finfo(dtype).eps * v.abs().max().item()
    report, graphs = rewritten(attention, q, k, v, *masks[mask], tolerance=tolerance)
    assert kernels(report) == report.lifted == {"attention": 1}
    assert count(graphs.rewritten, "clone", "expand", "scaled_dot_product") == 0


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (4, 1), (6, 2), (8, 2), (8, 4), (16, 8), (16, 2), (32, 8)])
def test_keys_are_never_repeated_whatever_the_groups(heads, kv_heads):
    report, graphs = rewritten(attention, *inputs(heads, kv_heads), bool_mask(2, 1, 1, SLOTS))
    assert kernels(report) == {"attention": 1}
    assert [op.name for op in graphs.rewritten] == ["qtts.decode_attention.default"]


@pytest.mark.parametrize("shape", [(2, 1, 1, SLOTS), (1, 1, 1, SLOTS), (2, 4, 1, SLOTS), (1, 4, 1, SLOTS)], ids=str)
def test_masks_that_broadcast_match(shape):
    assert kernels(rewritten(attention, *inputs(), bool_mask(*shape))[0]) == {"attention": 1}


@pytest.mark.parametrize("scale", [0.25, 0.1, 1.0])
def test_the_scale_is_read_off_the_graph(scale):
    assert kernels(rewritten(lambda q, k, v: attention(q, k, v, scale=scale), *inputs())[0]) == {"attention": 1}


def test_two_attentions_keep_their_own_scale():
    def function(q, k, v):
        return attention(q, k, v, scale=0.5), attention(q, k, v, scale=0.05)

    assert kernels(rewritten(function, *inputs())[0]) == {"attention": 2}


def test_a_query_scaled_beforehand_keeps_both_scales():
    assert kernels(rewritten(lambda q, k, v: attention(q * 0.3, k, v, scale=0.7), *inputs())[0]) == {"attention": 1}


def test_keys_and_values_are_not_swapped():
    q, k, v = inputs()
    assert not torch.allclose(attention(q, k, v), attention(q, v, k))
    assert kernels(rewritten(lambda q, k, v: (attention(q, k, v), attention(q, v, k)), q, k, v)[0]) == {"attention": 2}


@pytest.mark.parametrize("heads", [4, 16])
def test_enable_gqa_matches(heads):
    function = F.scaled_dot_product_attention
    mask = bool_mask(2, 1, 1, SLOTS)
    report, graphs = rewritten(lambda *qkvm: function(*qkvm, scale=0.25, enable_gqa=True), *inputs(heads), mask)
    assert kernels(report) == {"attention": 1}
    assert count(graphs.rewritten, "clone", "expand") == 0


def test_two_tokens_match():
    report, graphs = rewritten(attention, *inputs(tokens=2), bool_mask(2, 1, 2, SLOTS))
    assert kernels(report) == {"attention": 1} and report.refusals == []
    assert count(graphs.rewritten, "scaled_dot_product", "expand") == 0


def test_a_prompt_keeps_pytorch_s_attention_without_a_refusal():
    report, graphs = rewritten(attention, *inputs(tokens=3), bool_mask(2, 1, 3, SLOTS))
    assert kernels(report) == {} and report.refusals == []
    assert count(graphs.rewritten, "scaled_dot_product") == 1


def tiled(x, groups):
    return x.repeat(1, groups, 1, 1)


def only_keys_grouped(q, k, v):
    return F.scaled_dot_product_attention(q, repeat_kv(k, 2), tiled(v, 2))


def tiled_heads(q, k, v):
    return F.scaled_dot_product_attention(q, tiled(k, 2), tiled(v, 2))


@pytest.mark.parametrize("function", [only_keys_grouped, tiled_heads])
def test_heads_repeated_in_another_order_are_not_grouped(function):
    _, graphs = rewritten(function, *inputs())
    assert count(graphs.rewritten, "repeat", "expand", "clone") > 0


def softcapped(q, k, v):
    weights = (torch.tanh(q @ repeat_kv(k, 2).transpose(2, 3) / 20) * 20).softmax(-1)
    return weights @ repeat_kv(v, 2)


def narrow_values(q, k, v):
    return attention(q, k, v[..., :8])


@pytest.mark.parametrize("function", [softcapped, narrow_values])
def test_attention_that_pytorch_writes_out_is_left_alone(function):
    assert kernels(rewritten(function, *inputs())[0]) == {}


def test_the_default_scale_is_left_alone_and_reported():
    report, _ = rewritten(lambda q, k, v: attention(q, k, v, scale=None), *inputs())
    assert kernels(report) == {}
    assert [refusal.rewrite for refusal in report.refusals] == ["attention"]


def test_dropout_is_left_alone():
    """Two runs with dropout differ, so only the graph is looked at; with nothing dropped the same function matches."""
    keep, drop = (
        rewritten(lambda q, k, v, p=p: attention(q, k, v, dropout_p=p) * 0 if p else attention(q, k, v, dropout_p=p), *inputs())[0]
        for p in (0.0, 0.5)
    )
    assert kernels(keep) == {"attention": 1}
    assert kernels(drop) == {}
