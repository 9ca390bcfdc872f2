"""Rotary embedding: one axis and three, as model code writes it, and rotations of other kinds."""

import pytest
import torch
from rewriting import count, kernels, rewritten

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SECTIONS = [(4, 2, 2), (3, 3, 2), (2, 2, 2), (24, 20, 20)]


def rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)


def interleave(x, sections, axes=(1, 2), stride=3):
    merged = x[0].clone()
    for axis in axes:
        stop = sections[axis] * stride
        merged[..., axis:stop:stride] = x[axis, ..., axis:stop:stride]
    return merged


def interleaved(q, k, cos, sin, sections, merge=interleave):
    half = cos.shape[-1] // 2
    cos = torch.cat([merge(cos[..., :half], sections)] * 2, dim=-1)
    sin = torch.cat([merge(sin[..., :half], sections)] * 2, dim=-1)
    return apply_rotary(q, k, cos, sin)


def concatenated(q, k, cos, sin, sections, order=(0, 1, 2)):
    def merge(x):
        return torch.cat([m[order[i % 3]] for i, m in enumerate(x.split(list(sections) * 2, dim=-1))], dim=-1)

    return apply_rotary(q, k, merge(cos), merge(sin))


LAYOUTS = {"single": lambda q, k, c, s, _: apply_rotary(q, k, c, s), "interleaved": interleaved, "concatenated": concatenated}


def inputs(width=16, tokens=3, axes=(3,), batch=2, dtype=torch.float32, heads=(4, 2)):
    """Queries and keys as projections leave them, and tables with halves that repeat, as a rotary module gives them."""
    q, k = (torch.randn(batch, tokens, h, width).to(dtype).transpose(1, 2) for h in heads)
    angles = torch.randn(*axes, batch, tokens, width // 2).repeat_interleave(2, -1).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return q, k, angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_length_and_dtype_matches(layout, batch, tokens, dtype):
    q, k, cos, sin = inputs(tokens=tokens, batch=batch, dtype=dtype, axes=() if layout == "single" else (3,))
    report, graphs = rewritten(lambda *args: LAYOUTS[layout](*args, (4, 2, 2)), q, k, cos, sin)
    assert report.lifted == {"rotary": 2}
    assert kernels(report) == {"rotary_qk": 1}
    assert count(graphs.rewritten, "aten.cat", "slice_scatter") == 0, "a merged table is still built"


@pytest.mark.parametrize("sections", SECTIONS, ids=str)
@pytest.mark.parametrize("layout", ["interleaved", "concatenated"])
def test_sections_are_read_off_the_graph(layout, sections):
    report, _ = rewritten(lambda *args: LAYOUTS[layout](*args, sections), *inputs(width=2 * sum(sections)))
    assert kernels(report) == {"rotary_qk": 1}


def test_equal_head_counts_and_keys_alone():
    assert kernels(rewritten(apply_rotary, *inputs(axes=(), heads=(2, 2)))[0]) == {"rotary_qk": 1}
    assert kernels(rewritten(lambda q, k, c, s: apply_rotary(q, k, c, s)[0], *inputs(axes=()))[0]) == {"rotary": 1}


def test_the_operands_of_the_sum_may_be_swapped():
    def function(q, k, cos, sin):
        return [sin.unsqueeze(1) * rotate_half(x) + cos.unsqueeze(1) * x for x in (q, k)]

    assert kernels(rewritten(function, *inputs(axes=()))[0]) == {"rotary_qk": 1}


def test_an_inverse_rotation_is_one_with_another_table():
    report, _ = rewritten(lambda q, k, cos, sin: apply_rotary(q, k, cos, -sin), *inputs(axes=()))
    assert kernels(report) == {"rotary_qk": 1}


def test_queries_and_keys_with_tables_of_their_own_are_not_paired():
    def function(q, k, cos, sin):
        return apply_rotary(q, q, cos, sin)[0], apply_rotary(k, k, cos, sin.flip(-2))[0]

    report, _ = rewritten(function, *inputs(axes=()))
    assert kernels(report) == {"rotary": 2}


def test_tables_of_another_length_are_refused():
    def function(q, k, cos, sin):
        return apply_rotary(q, q, cos, sin)[0], apply_rotary(k[:, :, :1], k, cos, sin)[0]

    report, _ = rewritten(function, *inputs(axes=()))
    assert kernels(report) == {"rotary": 1}
    assert [(refusal.rewrite, "cos must have the shape" in refusal.reason) for refusal in report.refusals] == [("rotary", True)]


def test_a_rotation_that_feeds_the_next_is_not_paired_with_it():
    def twice(q, k, cos, sin):
        once = apply_rotary(q, k, cos, sin)[0]
        return apply_rotary(once, k, cos, sin)[0]

    assert kernels(rewritten(twice, *inputs(axes=()))[0]) == {"rotary": 2}


def test_part_of_the_dimensions_rotates_as_a_smaller_head():
    """The rotated slice is a rotary embedding; what passes through is not touched."""

    def partial(q, k, cos, sin):
        rotated = apply_rotary(q[..., :8], k[..., :8], cos[..., :8], sin[..., :8])
        return [torch.cat((r, x[..., 8:]), dim=-1) for r, x in zip(rotated, (q, k), strict=True)]

    report, graphs = rewritten(partial, *inputs(axes=()))
    assert kernels(report) == {"rotary_qk": 1}
    assert count(graphs.rewritten, "aten.cat") == 2


def pairs(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def other_sign(x):
    return torch.cat((x[..., x.shape[-1] // 2 :], -x[..., : x.shape[-1] // 2]), dim=-1)


def unequal_parts(x):
    return torch.cat((-x[..., 4:], x[..., :4]), dim=-1)


def flipped(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2].flip(-1)), dim=-1)


@pytest.mark.parametrize("rotate", [pairs, other_sign, unequal_parts, flipped])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_rotations_are_left_alone(rotate, dtype):
    def function(q, k, cos, sin):
        return [x * cos.unsqueeze(1) + rotate(x) * sin.unsqueeze(1) for x in (q, k)]

    report, _ = rewritten(function, *inputs(axes=(), dtype=dtype))
    assert kernels(report) == report.lifted == {}


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, cos, sin: [x * cos.unsqueeze(1) - rotate_half(x) * sin.unsqueeze(1) for x in (q, k)],
        lambda q, k, cos, sin: [x * cos.unsqueeze(1) + rotate_half(y) * sin.unsqueeze(1) for x, y in ((q, q.flip(1)), (k, k.flip(1)))],
        lambda q, k, cos, sin: apply_rotary(q, k, cos[..., :1], sin),
        lambda q, k, cos, sin: apply_rotary(q, k, cos[:1], sin[:1]),
        lambda q, k, cos, sin: apply_rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2),
    ],
    ids=["subtracted", "two-tensors", "one-cosine", "tables-broadcast-over-batch", "tokens-before-heads"],
)
def test_look_alikes_equal_eager(function):
    """Recognised or not, the result stays eager's; what is refused is reported."""
    report, _ = rewritten(function, *inputs(axes=()))
    assert report.lifted["rotary"] == 2 or {refusal.rewrite for refusal in report.refusals} == {"rotary"}


def three_axis_near_misses():
    def swapped_axes(x, sections):
        merged = x[0].clone()
        for axis, source in ((1, 2), (2, 1)):
            merged[..., axis : sections[axis] * 3 : 3] = x[source, ..., axis : sections[axis] * 3 : 3]
        return merged

    def base_is_axis_one(x, sections):
        return interleave(x.roll(1, 0), sections)

    return {
        "stride-two": lambda x, s: interleave(x, s, stride=2),
        "one-axis-missing": lambda x, s: interleave(x, s, axes=(1,)),
        "other-order": lambda x, s: interleave(x, s, axes=(2, 1)),
        "swapped-axes": swapped_axes,
        "rolled-axes": base_is_axis_one,
    }


@pytest.mark.parametrize("name", three_axis_near_misses())
def test_other_interleavings_equal_eager_and_are_never_taken_for_the_published_one(name):
    merge = three_axis_near_misses()[name]
    report, graphs = rewritten(lambda q, k, cos, sin: interleaved(q, k, cos, sin, (4, 2, 2), merge), *inputs())
    # A merge that the pattern does not know stays in the graph, in front of a rotation with one table.
    if name != "rolled-axes":
        assert count(graphs.rewritten, "aten.cat", "slice_scatter") > 0


def test_interleaved_sections_that_differ_between_cos_and_sin_are_not_merged():
    def function(q, k, cos, sin):
        half = cos.shape[-1] // 2
        cos = torch.cat([interleave(cos[..., :half], (4, 2, 2))] * 2, dim=-1)
        sin = torch.cat([interleave(sin[..., :half], (3, 3, 2))] * 2, dim=-1)
        return apply_rotary(q, k, cos, sin)

    _, graphs = rewritten(function, *inputs())
    assert count(graphs.rewritten, "slice_scatter") > 0


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (2, 1, 0), (0, 0, 0), (0, 1, 1)], ids=str)
def test_concatenated_sections_out_of_order_are_not_merged(order):
    _, graphs = rewritten(lambda q, k, cos, sin: concatenated(q, k, cos, sin, (4, 2, 2), order), *inputs())
    assert count(graphs.rewritten, "aten.cat") > 0


@pytest.mark.parametrize("sections", [(4, 4), (4, 2, 1, 1)], ids=str)
def test_another_number_of_sections_is_not_merged(sections):
    def function(q, k, cos, sin):
        def merge(x):
            return torch.cat([m[i % len(sections)] for i, m in enumerate(x.split(list(sections) * 2, dim=-1))], dim=-1)

        return apply_rotary(q, k, merge(cos), merge(sin))

    _, graphs = rewritten(function, *inputs(axes=(len(sections),)))
    assert count(graphs.rewritten, "aten.cat") > 0
