"""KV-cache write: in place at given positions, and writes of other kinds."""

import pytest
import torch
from rewriting import count, kernels, rewritten

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(tokens=2, batch=2, heads=4, slots=8, width=16, dtype=torch.float32):
    cache = torch.randn(batch, heads, slots, width).to(dtype)
    return cache, torch.randn(batch, heads, tokens, width).to(dtype), torch.arange(3, 3 + tokens)


def index_copy_(cache, source, position):
    cache.index_copy_(2, position, source)
    return cache.sum()


def index_put_(cache, source, position):
    cache[:, :, position] = source
    return cache.sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(("function", "batch"), [(index_copy_, 1), (index_copy_, 2), (index_put_, 2)])
def test_both_spellings_write_in_place(function, batch, tokens, dtype):
    report, graphs = rewritten(function, *inputs(tokens, batch, dtype=dtype))
    assert kernels(report) == report.lifted == {"kv_write": 1}
    assert count(graphs.final, "clone", "copy", "index_put", "as_strided") == 0


def test_source_as_a_projection_leaves_it():
    def function(cache, source, position):
        cache.index_copy_(2, position, source.transpose(1, 2))

    cache, source, position = inputs()
    assert kernels(rewritten(function, cache, source.transpose(1, 2).contiguous(), position)[0]) == {"kv_write": 1}


def test_a_write_that_is_not_in_place_keeps_the_cache():
    report, _ = rewritten(lambda cache, source, position: cache.index_copy(2, position, source), *inputs())
    assert kernels(report) == {"kv_write": 1}


def test_two_writes_into_one_cache_follow_each_other_in_place():
    def function(cache, source, position):
        cache.index_copy_(2, position, source)
        first = cache.sum()
        cache.index_copy_(2, position + 1, 2 * source)
        return first, cache.sum()

    report, graphs = rewritten(function, *inputs())
    assert kernels(report) == {"kv_write": 2}
    assert count(graphs.final, "clone", "index_put") == 0


def test_an_assignment_to_one_row_drops_its_dimension_and_is_reported():
    """Python's ``cache[:, :, position] = source`` strips leading ones from ``source``, which makes it another computation."""
    report, _ = rewritten(index_put_, *inputs(batch=1))
    assert [refusal.rewrite for refusal in report.refusals] == ["kv_write"]


def test_a_reader_of_the_old_cache_sees_it():
    def function(cache, source, position):
        before = cache * 2
        cache.index_copy_(2, position, source)
        return before, cache.sum()

    assert kernels(rewritten(function, *inputs())[0]) == {"kv_write": 1}


def test_negative_and_equal_positions():
    cache, source, _ = inputs()
    assert kernels(rewritten(index_put_, cache, source, torch.tensor([-1, -8]))[0]) == {"kv_write": 1}


def add_into(cache, source, position):
    cache.index_add_(2, position, source)
    return cache.sum()


def accumulate(cache, source, position):
    torch.ops.aten.index_put_(cache, [None, None, position], source, True)
    return cache.sum()


def other_dimension(cache, source, position):
    cache.index_copy_(3, position, source.transpose(2, 3)[:, :, :8])
    return cache.sum()


def along_heads(cache, source, position):
    cache[:, position % 2] = source[:, :2, :1].expand(-1, -1, cache.shape[2], -1)
    return cache.sum()


def slice_assignment(cache, source, position):
    cache[:, :, 3:5] = source
    return cache.sum()


def one_position_per_row(cache, source, position):
    cache[torch.arange(2)[:, None], :, position[None] + torch.arange(2)[:, None]] = source.transpose(1, 2)
    return cache.sum()


def broadcast_source(cache, source, position):
    cache[:, :, position] = source[:, :1]
    return cache.sum()


def number(cache, source, position):
    cache[:, :, position] = 1.0
    return cache.sum()


def int32_position(cache, source, position):
    cache[:, :, position.int()] = source
    return cache.sum()


def three_dimensional(cache, source, position):
    view = cache.flatten(0, 1)
    view[:, position] = source.flatten(0, 1)
    return cache.sum()


@pytest.mark.parametrize(
    "function",
    [
        add_into,
        accumulate,
        other_dimension,
        along_heads,
        slice_assignment,
        one_position_per_row,
        broadcast_source,
        number,
        int32_position,
        three_dimensional,
    ],
)
def test_other_writes_are_left_alone(function):
    report, _ = rewritten(function, *inputs())
    assert kernels(report) == report.lifted == {}


def test_a_source_that_is_rounded_into_the_cache():
    def function(cache, source, position):
        cache.index_copy_(2, position, source.to(cache.dtype))

    cache, source, position = inputs()
    assert kernels(rewritten(function, cache.bfloat16(), source, position)[0]) == {"kv_write": 1}
