"""Attention over a quantised cache: what is joined into one kernel, and what is left as separate operators."""

# pyright: reportCallIssue=false, reportArgumentType=false
# Arguments are cut from lists, whose lengths pyright takes for unknown.

import pytest
import torch
from rewriting import count, kernels, rewritten
from test_fuse import HEADS, KV_HEADS, attend, norm, rotate

from qtts_compile.kernels.turboquant.format import Format
from qtts_compile.kernels.turboquant.read import quantized_kv_read
from qtts_compile.kernels.turboquant.write import quantized_kv_write

BATCH, SLOTS, WIDTH, SINKS, WINDOW, POSITION = 2, 8, 32, 1, 3, 5
FUSED = "qk_norm_rope_quantized_attention"


def layer_inputs(format="int4", dtype=torch.float32, batch=BATCH, slots=SLOTS):
    """What one layer reads, and its cache with five tokens in it."""
    q, k, v = (torch.randn(batch, 1, heads, WIDTH).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
    weights = [torch.rand(WIDTH).to(dtype) + 0.5 for _ in range(2)]
    angles = torch.randn(batch, 1, WIDTH // 2).repeat(1, 1, 2)
    parsed, start = Format.parse(format), torch.arange(batch)
    buffers = [torch.zeros(batch, KV_HEADS, slots, size, dtype=torch.uint8) for size in (parsed.key_bytes(WIDTH), parsed.value_bytes(WIDTH))]
    buffers += [torch.zeros(2, batch, KV_HEADS, slots, dtype=torch.float16), torch.zeros(2, batch, KV_HEADS, SINKS + WINDOW, WIDTH, dtype=dtype)]
    old = [torch.randn(batch, KV_HEADS, POSITION, WIDTH).to(dtype) for _ in range(2)]
    quantized_kv_write(*old, *buffers, torch.arange(POSITION), torch.tensor([POSITION - 1]), start, SINKS, format)
    mask = ((torch.arange(slots) <= POSITION) & (torch.arange(slots) >= start[:, None]))[:, None, None]
    return [q, k, v, *weights, angles.cos().to(dtype), angles.sin().to(dtype), *buffers, torch.tensor([POSITION]), start, mask]


def layer(q, k, v, q_weight, k_weight, cos, sin, k_codes, v_codes, scales, kept, position, start, mask, format="int4"):
    q = rotate(norm(q, q_weight).transpose(1, 2), cos, sin)
    k = rotate(norm(k, k_weight).transpose(1, 2), cos, sin)
    buffers = k_codes, v_codes, scales, kept
    quantized_kv_write(k, v.transpose(1, 2), *buffers, position, position, start, SINKS, format)
    return attend(q, *quantized_kv_read(*buffers, position, start, SINKS, format), mask)


@pytest.mark.parametrize("format", ["int4", "k4v3", "int3", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layer_becomes_one_kernel(format, dtype):
    def function(*tensors):
        return layer(*tensors[:14], format=format), layer(*tensors[14:], format=format)

    tensors = [*layer_inputs(format, dtype), *layer_inputs(format, dtype)]
    tolerance = None if dtype == torch.float32 else 4 * torch.finfo(dtype).eps * max(x.abs().max().item() for x in (tensors[2], tensors[10]))
    report, graphs = rewritten(function, *tensors, tolerance=tolerance)
    assert kernels(report) == {FUSED: 2} and not report.refusals
    assert count(graphs.before, "quantized_kv_read") == 2 and count(graphs.final, "quantized_kv", "clone", "copy", "rsqrt") == 0


def test_without_norms():
    def function(q, k, v, q_weight, k_weight, cos, sin, *rest):
        buffers, (position, start, mask) = rest[:4], rest[4:]
        quantized_kv_write(rotate(k.transpose(1, 2), cos, sin), v.transpose(1, 2), *buffers, position, position, start, SINKS, "int4")
        return attend(rotate(q.transpose(1, 2), cos, sin), *quantized_kv_read(*buffers, position, start, SINKS, "int4"), mask)

    assert kernels(rewritten(function, *layer_inputs())[0]) == {FUSED: 1}


def test_it_can_be_switched_off():
    report, _ = rewritten(layer, *layer_inputs(), disable=[FUSED])
    assert FUSED not in kernels(report) and kernels(report)["attention"] == 1


def other(q=None, k=None, write_at=None, written_last=None, read_start=None, read_sinks=SINKS, read=None):
    """Return a layer in which one thing differs from what is joined."""

    def function(*tensors):
        q_, k_, v, q_weight, k_weight, cos, sin, *buffers, position, start, mask = tensors
        q_ = rotate(norm(q_, q_weight).transpose(1, 2), cos, sin if q is None else q(sin))
        k_ = rotate(norm(k_, k_weight if k is None else k(k_weight)).transpose(1, 2), cos, sin)
        place = position if write_at is None else write_at(position)
        last = position if written_last is None else written_last(position)
        quantized_kv_write(k_, v.transpose(1, 2), *buffers, place, last, start, SINKS, "int4")
        given = start if read_start is None else read_start(start)
        keys, values = quantized_kv_read(*buffers, position, given, read_sinks, "int4")
        out = attend(q_, keys, values, mask)
        return out if read is None else (out, read(q_, k_, keys, buffers))

    return function


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (other(q=lambda sin: -sin), "not rotated by the same tables"),
        (other(k=lambda weight: weight * 2), "the weight of a norm is computed in the graph"),
        (other(write_at=lambda position: position - 1), "a token that is not the newest"),
        (other(written_last=lambda position: position + 1), "a token that is not the newest"),
        (other(read_start=lambda start: start + 1), "read with other arguments than it is written with"),
        (other(read_sinks=0), "read with other arguments than it is written with"),
        (other(read=lambda q, k, keys, buffers: q * 2), "read elsewhere too"),
        (other(read=lambda q, k, keys, buffers: k * 2), "read elsewhere too"),
        (other(read=lambda q, k, keys, buffers: keys * 2), "read elsewhere too"),
    ],
    ids=["tables", "weight", "position", "last", "start", "sinks", "queries", "keys", "dense"],
)
def test_what_is_not_one_layer_is_refused_with_its_reason(function, reason):
    report, _ = rewritten(function, *layer_inputs())
    assert FUSED not in kernels(report) and kernels(report)["attention"] == 1
    assert [r.rewrite for r in report.refusals] == [FUSED] and reason in report.refusals[0].reason


def test_a_cache_that_is_only_read_is_refused():
    def function(q, k, v, q_weight, k_weight, cos, sin, *rest):
        keys, values = quantized_kv_read(*rest[:4], *rest[4:6], SINKS, "int4")
        return attend(rotate(norm(q, q_weight).transpose(1, 2), cos, sin), keys, values, rest[6])

    report, _ = rewritten(function, *layer_inputs())
    assert FUSED not in kernels(report) and "not written, as a whole" in report.refusals[0].reason


def test_a_part_of_a_buffer_is_refused():
    def function(*tensors):
        parts = [tensor[..., :BATCH, :, :, :] if tensor.ndim == 4 and tensor.shape[0] == 2 * BATCH else tensor for tensor in tensors]
        return layer(*parts)

    tensors = layer_inputs()
    for place in (7, 8):  # the first half of a larger batch's codes
        tensors[place] = torch.cat([tensors[place], tensors[place]])
    report, _ = rewritten(function, *tensors)
    assert FUSED not in kernels(report) and "not written, as a whole" in report.refusals[0].reason
