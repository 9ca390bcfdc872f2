"""The matcher itself: operands in any order, reasons for what does not match, and the limits a user sets."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from qtts_compile.options import Options
from qtts_compile.patterns.lift import rms_norm
from qtts_compile.patterns.matching import find, nearest_failure
from qtts_compile.patterns.scope import layer_count, layer_index
from qtts_compile.patterns.tracing import TensorSpec, trace
from qtts_compile.rewriter import rewrite

CPU = torch.device("cpu")


def traced(function, *inputs):
    """The graph that a backend is handed for a functional function of these tensors."""
    graph = copy.deepcopy(trace(function, tuple(TensorSpec.of(x) for x in inputs), ()))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


class Order:
    """Writes commutative products and sums with operands in a drawn order."""

    def __init__(self, flips):
        self.flips = list(flips)

    def mul(self, a, b):
        return b * a if self.flips.pop() else a * b

    def add(self, a, b):
        return b + a if self.flips.pop() else a + b


def norm(order, x, weight):
    wide = x.float()
    root = torch.rsqrt(order.add(wide.pow(2).mean(-1, keepdim=True), 1e-6))
    return order.mul(weight, order.mul(wide, root).to(x.dtype))


def gated(order, gate, up):
    return order.mul(F.silu(gate), up)


def rotated(order, x, cos, sin):
    half = x.shape[-1] // 2
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return order.add(order.mul(x, cos), order.mul(torch.cat((-x[..., half:], x[..., :half]), -1), sin))


def interleaved(order, x, cos, sin):
    def merge(table):
        table = table[..., : table.shape[-1] // 2]
        merged = table[0].clone()
        for axis, stop in ((1, 6), (2, 6)):
            merged[..., axis:stop:3] = table[axis, ..., axis:stop:3]
        return torch.cat([merged, merged], -1)

    return rotated(order, x, merge(cos), merge(sin))


def block(order, x, residual, weight, gate):
    """Norm after an addition, and a gate: operands of three rewrites in one graph."""
    total = order.add(residual, x)
    return order.add(gated(order, gate, norm(order, total, weight)), total)


SHAPES = {
    norm: ([(2, 3, 16), (16,)], {"rms_norm": 1}),
    gated: ([(2, 3, 16), (2, 3, 16)], {"swiglu": 1}),
    rotated: ([(2, 4, 3, 16), (2, 3, 16), (2, 3, 16)], {"rotary": 1}),
    interleaved: ([(2, 4, 3, 16), (3, 2, 3, 16), (3, 2, 3, 16)], {"rotary": 1}),
    block: ([(2, 3, 16), (2, 3, 16), (16,), (2, 3, 16)], {"add_rms_norm": 1, "swiglu": 1}),
}


@pytest.mark.parametrize("function", SHAPES, ids=lambda f: f.__name__)
@given(flips=st.lists(st.booleans(), min_size=8, max_size=8), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_any_order_of_commutative_operands_matches(function, flips, dtype):
    shapes, expected = SHAPES[function]
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype) for shape in shapes]

    def call(*tensors):
        return function(Order(flips), *tensors)

    gm = traced(call, *inputs)
    report = rewrite(gm, Options())
    assert {name: len(paths) for name, paths in report.kernels.items()} == expected
    assert report.refusals == []
    result = gm(*inputs)
    torch.testing.assert_close(result[0] if isinstance(result, (tuple, list)) else result, call(*inputs))


@given(
    width=st.integers(2, 40).map(lambda n: 2 * n),
    tokens=st.integers(1, 5),
    heads=st.integers(1, 5),
    axes=st.sampled_from([(), (3,)]),
)
def test_any_size_of_a_rotation_matches(width, tokens, heads, axes):
    inputs = [torch.randn(2, heads, tokens, width), *(torch.randn(*axes, 2, tokens, width) for _ in range(2))]

    def call(x, cos, sin):
        return rotated(Order([False] * 3), x, *(table[0] if axes else table for table in (cos, sin)))

    gm = traced(call, *inputs)
    report = rewrite(gm, Options())
    assert report.lifted == {"rotary": 1}
    result = gm(*inputs)
    torch.testing.assert_close(result[0] if isinstance(result, (tuple, list)) else result, call(*inputs))


def test_the_nearest_failure_names_both_operators():
    def function(x, weight):
        return weight * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6))

    gm = traced(function, torch.randn(2, 16), torch.randn(16))
    (root,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.rsqrt.default)
    assert nearest_failure(rms_norm.PATTERN, gm.graph, root) == "aten.sum.dim_IntList where aten.mean.dim was expected"


def test_near_misses_are_handed_to_the_caller():
    def function(x, weight):
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    refused = []
    gm = traced(function, torch.randn(2, 16), torch.randn(2, 16))
    assert find(rms_norm.PATTERN, gm.graph, lambda node, reason: refused.append(reason)) == []
    assert refused == ["weight of shape (2, 16) for rows of 16"]


def test_a_graph_with_nothing_to_rewrite_is_left_as_it_is():
    gm = traced(lambda x: (x @ x).relu(), torch.randn(4, 4))
    before = gm.code
    report = rewrite(gm, Options(strict=True))
    assert gm.code == before
    assert report.kernels == {} and report.lifted == {} and report.refusals == [] and report.layers == 0


def test_equal_computations_are_merged_before_matching():
    def function(x, weight, other):
        def scale():
            return x.cos() + x.sin()

        return weight * scale(), other * scale()

    gm = traced(function, *torch.randn(3, 4))
    rewrite(gm, Options())
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.cos.default)) == 1


@pytest.mark.parametrize(
    ("path", "index"),
    [("layers.3.self_attn.q_norm", 3), ("model.layers.12.mlp", 12), ("norm", None), ("", None), ("layers.1.experts.7", 1)],
)
def test_the_layer_is_the_first_number_of_the_module_path(path, index):
    node = torch.fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"a": (f"L['self'].{path}", torch.nn.Linear)} if path else {}
    assert layer_index(node) == index
    assert layer_count([node]) == (0 if index is None else index + 1)
