"""Fusions of recognised blocks: what may be joined, and what only stands near."""

import pytest
import torch
import torch.nn.functional as F
from rewriting import count, kernels, rewritten

EPS = 1e-6
BATCH, HEADS, KV_HEADS, SLOTS, WIDTH = 2, 4, 2, 8, 16


def norm(x, weight):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos.unsqueeze(1) + torch.cat((-x[..., half:], x[..., :half]), -1) * sin.unsqueeze(1)


def streams(dtype=torch.float32):
    return torch.randn(2, 3, 24).to(dtype), torch.randn(2, 3, 24).to(dtype), torch.randn(24).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_addition_and_norm_become_one_kernel_that_gives_both(dtype):
    def function(x, residual, weight):
        total = residual + x
        return norm(total, weight), total

    report, graphs = rewritten(function, *streams(dtype))
    assert kernels(report) == {"add_rms_norm": 1} and report.lifted == {"rms_norm": 1}
    assert count(graphs.rewritten, "aten.add") == 0


def test_a_sum_that_is_not_read_again():
    assert kernels(rewritten(lambda x, r, w: norm(x + r, w), *streams())[0]) == {"add_rms_norm": 1}


def test_a_chain_of_residual_additions():
    def function(x, residual, weight):
        for _ in range(3):
            residual = residual + x
            x = norm(residual, weight)
        return x, residual

    assert kernels(rewritten(function, *streams())[0]) == {"add_rms_norm": 3}


def test_two_norms_of_one_sum_share_it():
    def function(x, residual, weight):
        total = x + residual
        return norm(total, weight), norm(total, weight.flip(0)), total

    assert kernels(rewritten(function, *streams())[0]) == {"add_rms_norm": 1, "rms_norm": 1}


def test_a_sum_that_is_read_before_its_norm():
    def function(x, residual, weight):
        total = x + residual
        return total * 2, norm(total, weight)

    assert kernels(rewritten(function, *streams())[0]) == {"add_rms_norm": 1}


def test_a_weight_that_is_computed_after_the_addition_is_refused():
    def function(x, residual, weight):
        total = x + residual
        return norm(total, total.mean((0, 1)) * weight)

    report, _ = rewritten(function, *streams())
    assert kernels(report) == {"rms_norm": 1}
    assert [(r.rewrite, r.reason) for r in report.refusals] == [("add_rms_norm", "the weight is computed after the addition")]


@pytest.mark.parametrize(
    ("function", "reported"),
    [
        (lambda x, r, w: norm(torch.add(x, r, alpha=2), w), False),
        (lambda x, r, w: norm(x - r, w), False),
        (lambda x, r, w: norm(x + 1.0, w), True),
        (lambda x, r, w: norm(x + r[:1], w), True),
        (lambda x, r, w: norm(x + r[..., :1], w), True),
        (lambda x, r, w: norm(x + w, w), True),
        (lambda x, r, w: norm(x.bfloat16() + r, w), True),
    ],
    ids=["alpha", "difference", "number", "broadcast-batch", "broadcast-width", "bias", "promoted"],
)
def test_other_additions_are_left_alone(function, reported):
    report, _ = rewritten(function, *streams())
    assert kernels(report) == {"rms_norm": 1}
    assert [r.rewrite for r in report.refusals] == ["add_rms_norm"] * reported


def layer_inputs(layers=2, tokens=1, dtype=torch.float32):
    """Projections, caches and what all layers share: tables, position and mask."""
    tensors = []
    for _ in range(layers):
        tensors += [torch.randn(BATCH, tokens, heads, WIDTH).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        tensors += [torch.rand(WIDTH).to(dtype) + 0.5 for _ in range(2)]
        tensors += [torch.randn(BATCH, KV_HEADS, SLOTS, WIDTH).to(dtype) for _ in range(2)]
    angles = torch.randn(BATCH, tokens, WIDTH // 2).repeat(1, 1, 2)
    position = torch.arange(5, 5 + tokens)
    mask = (torch.arange(SLOTS) <= position[:, None]).expand(BATCH, 1, tokens, SLOTS).clone()
    return *tensors, angles.cos().to(dtype), angles.sin().to(dtype), position, mask


def attend(q, k, v, mask):
    k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(x.shape[0], HEADS, *x.shape[2:]) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.25)


def layer(q, k, v, q_weight, k_weight, k_cache, v_cache, cos, sin, position, mask, k_position=None):
    q = rotate(norm(q, q_weight).transpose(1, 2), cos, sin)
    k = rotate(norm(k, k_weight).transpose(1, 2), cos, sin)
    k_cache.index_copy_(2, position if k_position is None else k_position, k)
    v_cache.index_copy_(2, position, v.transpose(1, 2))
    return attend(q, k_cache, v_cache, mask)


def two_layers(*tensors):
    shared = tensors[14:]
    return layer(*tensors[:7], *shared), layer(*tensors[7:14], *shared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2])
def test_every_layer_writes_its_own_keys_and_values(dtype, tokens):
    """The layers share position and tables, and nothing else tells their keys and values apart."""
    tensors = layer_inputs(tokens=tokens, dtype=dtype)
    tolerance = None if dtype == torch.float32 else torch.finfo(dtype).eps * max(x.abs().max().item() for x in tensors[:14])
    report, graphs = rewritten(two_layers, *tensors, tolerance=tolerance)
    assert kernels(report) == {"qk_norm_rope_attention": 2}
    assert count(graphs.final, "clone", "copy", "index_put", "rsqrt") == 0


def test_layers_whose_writes_all_come_before_the_attentions():
    def function(*tensors):
        cos, sin, position, mask = tensors[14:]
        queries = []
        for q, k, v, q_weight, k_weight, k_cache, v_cache in (tensors[:7], tensors[7:14]):
            queries.append(rotate(norm(q, q_weight).transpose(1, 2), cos, sin))
            k_cache.index_copy_(2, position, rotate(norm(k, k_weight).transpose(1, 2), cos, sin))
            v_cache.index_copy_(2, position, v.transpose(1, 2))
        return [attend(q, tensors[i + 5], tensors[i + 6], mask) for q, i in zip(queries, (0, 7), strict=True)]

    report, _ = rewritten(function, *layer_inputs())
    assert kernels(report) == {"qk_norm_rope_attention": 2}


def test_a_layer_that_reads_another_layer_s_keys():
    """Layer 1 attends to layer 0's keys with values of its own, as models with shared caches do."""

    def function(*tensors):
        cos, sin, position, mask = tensors[14:]
        q, k, v, q_weight, k_weight, k_cache, v_cache = tensors[:7]
        q1, _, v1, q1_weight, _, _, v1_cache = tensors[7:14]
        k_cache.index_copy_(2, position, rotate(norm(k, k_weight).transpose(1, 2), cos, sin))
        for cache, value in ((v_cache, v), (v1_cache, v1)):
            cache.index_copy_(2, position, value.transpose(1, 2))
        first = attend(rotate(norm(q, q_weight).transpose(1, 2), cos, sin), k_cache, v_cache, mask)
        return first, attend(rotate(norm(q1, q1_weight).transpose(1, 2), cos, sin), k_cache, v1_cache, mask)

    found = kernels(rewritten(function, *layer_inputs())[0])
    assert found["qk_norm_rope_attention"] == found["attention"] == 1


def one_layer(change):
    def function(*tensors):
        return change(*tensors[:7], *tensors[14:])

    return function


def test_without_norms():
    def function(q, k, v, _, __, k_cache, v_cache, cos, sin, position, mask):
        k_cache.index_copy_(2, position, rotate(k.transpose(1, 2), cos, sin))
        v_cache.index_copy_(2, position, v.transpose(1, 2))
        return attend(rotate(q.transpose(1, 2), cos, sin), k_cache, v_cache, mask)

    assert kernels(rewritten(one_layer(function), *layer_inputs())[0]) == {"qk_norm_rope_attention": 1}


def test_a_norm_on_the_queries_alone():
    def function(q, k, v, q_weight, _, k_cache, v_cache, cos, sin, position, mask):
        k_cache.index_copy_(2, position, rotate(k.transpose(1, 2), cos, sin))
        v_cache.index_copy_(2, position, v.transpose(1, 2))
        return attend(rotate(norm(q, q_weight).transpose(1, 2), cos, sin), k_cache, v_cache, mask)

    assert kernels(rewritten(one_layer(function), *layer_inputs())[0]) == {"qk_norm_rope_attention": 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda *t: layer(*t, k_position=t[-2] - 1), "keys and values are written at different positions"),
        (lambda *t: layer(*t) + rotated_keys(*t).sum(), "the rotated keys are read elsewhere"),
        (lambda *t: other_tables(*t), "queries and keys are not rotated by the same tables"),
        (lambda *t: unrotated(*t), "queries and keys are not rotated by the same tables"),
    ],
    ids=["positions", "keys-read", "tables", "unrotated"],
)
def test_what_is_not_one_layer_is_refused_with_its_reason(change, reason):
    report, _ = rewritten(one_layer(change), *layer_inputs())
    assert "qk_norm_rope_kv_write" not in kernels(report) and kernels(report)["kv_write"] == 2 and kernels(report)["attention"] == 1
    assert [(r.rewrite, r.reason) for r in report.refusals] == [("qk_norm_rope_kv_write", reason)]


def rotated_keys(q, k, v, q_weight, k_weight, k_cache, v_cache, cos, sin, position, mask):
    return rotate(norm(k, k_weight).transpose(1, 2), cos, sin)


def other_tables(q, k, v, q_weight, k_weight, k_cache, v_cache, cos, sin, position, mask):
    k_cache.index_copy_(2, position, rotate(norm(k, k_weight).transpose(1, 2), sin, cos))
    v_cache.index_copy_(2, position, v.transpose(1, 2))
    return attend(rotate(norm(q, q_weight).transpose(1, 2), cos, sin), k_cache, v_cache, mask)


def unrotated(q, k, v, q_weight, k_weight, k_cache, v_cache, cos, sin, position, mask):
    k_cache.index_copy_(2, position, norm(k, k_weight).transpose(1, 2))
    v_cache.index_copy_(2, position, v.transpose(1, 2))
    return attend(norm(q, q_weight).transpose(1, 2), k_cache, v_cache, mask)


def test_a_cache_that_is_only_read_is_no_refusal():
    def function(q, k, v, q_weight, k_weight, k_cache, v_cache, cos, sin, position, mask):
        return attend(rotate(norm(q, q_weight).transpose(1, 2), cos, sin), k_cache, v_cache, mask)

    report, _ = rewritten(one_layer(function), *layer_inputs())
    assert kernels(report) == {"rms_norm": 1, "rotary": 1, "attention": 1} and report.refusals == []


def test_a_cache_that_is_read_between_the_writes_is_refused():
    def function(q, k, v, q_weight, k_weight, k_cache, v_cache, cos, sin, position, mask):
        k_cache.index_copy_(2, position, rotate(norm(k, k_weight).transpose(1, 2), cos, sin))
        between = k_cache.sum() * v
        v_cache.index_copy_(2, position, between.transpose(1, 2))
        return attend(rotate(norm(q, q_weight).transpose(1, 2), cos, sin), k_cache, v_cache, mask)

    report, _ = rewritten(one_layer(function), *layer_inputs())
    assert [r.reason for r in report.refusals] == ["a result is read before both caches are written"]


def queries_read(q, k, v, q_weight, k_weight, k_cache, v_cache, cos, sin, position, mask):
    q, k = (rotate(norm(x, weight).transpose(1, 2), cos, sin) for x, weight in ((q, q_weight), (k, k_weight)))
    k_cache.index_copy_(2, position, k)
    v_cache.index_copy_(2, position, v.transpose(1, 2))
    return attend(q, k_cache, v_cache, mask), q * 2


def computed_weight(q, k, v, q_weight, *others):
    return layer(q, k, v, 1.0 + q_weight, *others)


def mask_from_the_cache(q, k, v, q_weight, k_weight, k_cache, v_cache, cos, sin, position, mask):
    k_cache.index_copy_(2, position, rotate(norm(k, k_weight).transpose(1, 2), cos, sin))
    v_cache.index_copy_(2, position, v.transpose(1, 2))
    return attend(rotate(norm(q, q_weight).transpose(1, 2), cos, sin), k_cache, v_cache, mask & (k_cache[:, :1, :, 0] < 1)[:, :, None])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (queries_read, "the rotated queries are read elsewhere"),
        (computed_weight, "the weight of a norm is computed in the graph"),
        (mask_from_the_cache, "a cache is read between its write and the attention"),
    ],
    ids=["queries-read", "weight", "cache-read"],
)
def test_an_attention_that_stays_by_itself_says_why(change, reason):
    report, _ = rewritten(one_layer(change), *layer_inputs())
    assert kernels(report) == {"qk_norm_rope_kv_write": 1, "attention": 1}
    assert [(r.rewrite, r.reason) for r in report.refusals] == [("qk_norm_rope_attention", reason)]


def test_caches_that_are_read_after_the_attention():
    def function(*t):
        return layer(*t), t[5].sum(), t[6] * 2

    report, graphs = rewritten(one_layer(function), *layer_inputs())
    assert kernels(report) == {"qk_norm_rope_attention": 1} and report.refusals == []
    assert count(graphs.final, "clone", "copy") == 0


def test_an_attention_without_a_mask():
    def function(*t):
        return layer(*t[:-1], mask=None)

    assert kernels(rewritten(one_layer(function), *layer_inputs())[0]) == {"qk_norm_rope_attention": 1}


def test_the_joined_attention_can_be_switched_off():
    report, _ = rewritten(two_layers, *layer_inputs(), disable=["qk_norm_rope_attention"])
    assert kernels(report) == {"qk_norm_rope_kv_write": 2, "attention": 2} and report.refusals == []


def test_prompts_keep_single_writes():
    report, _ = rewritten(two_layers, *layer_inputs(tokens=3))
    assert kernels(report) == {"rms_norm": 4, "rotary_qk": 2, "kv_write": 4}
