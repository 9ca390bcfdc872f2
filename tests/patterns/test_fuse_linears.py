"""Linear layers of few rows with what stands around them: what becomes one launch, and what must not."""

import pytest
import torch
import torch.nn.functional as F
from rewriting import count, kernels, rewritten

from qtts_compile.kernels.gemv import MAX_ROWS
from qtts_compile.kernels.skinny import launch as skinny

K, N = 24, 40
EPS = 1e-6


def norm(x, weight):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def rows(count=3, dtype=torch.float32, width=K):
    return torch.randn(1, count, width).to(dtype)


def weights(number, dtype=torch.float32, n=N, k=K):
    return [torch.randn(n, k).to(dtype) / k**0.5 for _ in range(number)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_norm_and_the_layers_that_read_it_become_one_launch(dtype, number):
    def function(x, weight, *linears):
        normed = norm(x, weight)
        return [F.linear(normed, w) for w in linears]

    report, graphs = rewritten(function, rows(dtype=dtype), torch.randn(K).to(dtype), *weights(number, dtype))
    assert kernels(report) == {"norm_linears": 1} and report.lifted == {"rms_norm": 1}
    assert count(graphs.rewritten, "aten.mm") == 0


def test_biases_and_unequal_sizes():
    def function(x, weight, q, k, bias):
        normed = norm(x, weight)
        return F.linear(normed, q, bias), F.linear(normed, k)

    report, graphs = rewritten(function, rows(), torch.randn(K), *weights(1), *weights(1, n=9), torch.randn(N))
    assert kernels(report) == {"norm_linears": 1} and count(graphs.rewritten, "aten.mm", "aten.addmm") == 0


def test_a_norm_that_is_read_elsewhere_too_stays_and_is_read():
    def function(x, weight, q):
        normed = norm(x, weight)
        return F.linear(normed, q), normed

    assert kernels(rewritten(function, rows(), torch.randn(K), *weights(1))[0]) == {"norm_linears": 1, "rms_norm": 1}


def test_more_than_three_layers_are_left_to_the_library():
    function = lambda x, *linears: [F.linear(x, w) for w in linears]  # noqa: E731
    report, graphs = rewritten(function, rows(), *weights(4))
    assert kernels(report) == {} and count(graphs.rewritten, "aten.mm") == 4


@pytest.mark.parametrize("number", [1, MAX_ROWS, MAX_ROWS + 1])
def test_rows_decide(number):
    report, graphs = rewritten(lambda x, w: F.linear(x, w), rows(number), *weights(1))
    assert kernels(report) == ({"norm_linears": 1} if number <= MAX_ROWS else {})
    assert count(graphs.rewritten, "aten.mm") == (number > MAX_ROWS)


@pytest.mark.parametrize(("number", "dtype", "width"), [(17, torch.bfloat16, 512), (32, torch.bfloat16, 1024)])
def test_rows_that_tensor_cores_multiply_alone(monkeypatch, number, dtype, width):
    monkeypatch.setattr(skinny, "has_tensor_cores", lambda device: True)
    report, graphs = rewritten(lambda x, w: F.linear(x, w), rows(number, dtype, width), *weights(1, dtype, k=width))
    assert kernels(report) == {"norm_linears": 1} and count(graphs.rewritten, "aten.mm") == 0


@pytest.mark.parametrize(
    ("number", "dtype", "width"), [(33, torch.bfloat16, 512), (17, torch.float16, 512), (17, torch.float32, 512), (17, torch.bfloat16, 640)]
)
def test_rows_that_tensor_cores_do_not_multiply_are_left_to_the_library(monkeypatch, number, dtype, width):
    monkeypatch.setattr(skinny, "has_tensor_cores", lambda device: True)
    report, graphs = rewritten(lambda x, w: F.linear(x, w), rows(number, dtype, width), *weights(1, dtype, k=width))
    assert kernels(report) == {} and count(graphs.rewritten, "aten.mm") == 1


def test_a_symbol_of_columns_is_no_reason_to_refuse():
    report, _ = rewritten(lambda x, w: F.linear(x, w), rows(1), *weights(1), dynamic=True)
    assert kernels(report) == {"norm_linears": 1}


def test_a_symbol_of_rows_is_left_to_the_library():
    x = rows(5)
    torch._dynamo.mark_dynamic(x, 1)
    assert kernels(rewritten(lambda x, w: F.linear(x, w), x, *weights(1))[0]) == {}


def test_a_weight_that_is_computed_is_left_to_the_library():
    """The kernels read parameters before the kernel ahead of them has ended."""
    report, graphs = rewritten(lambda x, w, scale: F.linear(x, w * scale), rows(), *weights(1), torch.randn(N, 1))
    assert kernels(report) == {} and count(graphs.rewritten, "aten.mm") == 1


def test_a_norm_whose_weight_is_computed_stays():
    """A weight stored as its difference from one, for example."""
    report, _ = rewritten(lambda x, weight, w: F.linear(norm(x, 1 + weight), w), rows(), torch.randn(K), *weights(1))
    assert kernels(report) == {"rms_norm": 1, "norm_linears": 1}


def test_a_bias_with_gaps_is_left_to_the_library():
    function = lambda x, w, bias: F.linear(x, w, bias)  # noqa: E731
    assert kernels(rewritten(function, rows()[0], *weights(1), torch.randn(N))[0]) == {"norm_linears": 1}
    assert kernels(rewritten(function, rows()[0], *weights(1), torch.randn(2 * N)[::2])[0]) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_projections_and_swiglu_become_one_launch(dtype):
    function = lambda x, weight, gate, up: F.silu(F.linear(norm(x, weight), gate)) * F.linear(norm(x, weight), up)  # noqa: E731
    report, graphs = rewritten(function, rows(dtype=dtype), torch.randn(K).to(dtype), *weights(2, dtype))
    assert kernels(report) == {"norm_swiglu": 1} and report.lifted == {"rms_norm": 1, "swiglu": 1}
    assert [op.name for op in graphs.rewritten if op.name.startswith("qtts")] == ["qtts.norm_swiglu.default"]


def test_gate_and_up_are_not_swapped():
    gate, up = weights(2)
    function = lambda x, a, b: F.silu(F.linear(x, a)) * F.linear(x, b)  # noqa: E731
    assert kernels(rewritten(function, rows(), gate, up)[0]) == {"norm_swiglu": 1}
    assert not torch.allclose(function(rows(), gate, up), function(rows(), up, gate))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y, gate, up: F.silu(F.linear(x, gate)) * F.linear(y, up),
        lambda x, y, gate, up: (lambda product: (F.silu(F.linear(x, gate)) * product, product))(F.linear(x, up)),
    ],
    ids=["two-inputs", "up-read-elsewhere"],
)
def test_projections_that_do_not_belong_together(function):
    assert "norm_swiglu" not in kernels(rewritten(function, rows(), rows(), *weights(2))[0])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("order", ["residual first", "product first"])
def test_a_layer_and_its_residual_become_one_launch(order, bias):
    def function(x, residual, w, b):
        product = F.linear(x, w, b if bias else None)
        return residual + product if order == "residual first" else product + residual

    report, graphs = rewritten(function, rows(), rows(width=N), *weights(1), torch.randn(N))
    assert kernels(report) == {"linear_add": 1} and count(graphs.rewritten, "aten.add", "aten.mm", "aten.addmm") == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda x, residual, w: (lambda product: (residual + product, product))(F.linear(x, w)),
        lambda x, residual, w: residual[:, :1] + F.linear(x, w),
        lambda x, residual, w: torch.add(residual, F.linear(x, w), alpha=2),
        lambda x, residual, w: F.linear(x, w) + 1.0,
    ],
    ids=["product-read-elsewhere", "broadcast", "scaled", "number"],
)
def test_additions_that_are_no_residual(function):
    assert kernels(rewritten(function, rows(), rows(width=N), *weights(1))[0]) == {"norm_linears": 1}


def test_a_whole_mlp_is_two_launches():
    def function(x, weight, gate, up, down):
        normed = norm(x, weight)
        return x + F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down)

    report, graphs = rewritten(function, rows(), torch.randn(K), *weights(2), *weights(1, n=K, k=N))
    assert kernels(report) == {"norm_swiglu": 1, "linear_add": 1}
    assert [op.name for op in graphs.rewritten if op.name.startswith("qtts")] == ["qtts.norm_swiglu.default", "qtts.linear_add.default"]


@pytest.mark.parametrize("number", [1, MAX_ROWS, MAX_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_of_embedded_tokens_reads_the_table(number, dtype):
    tokens, table, bias = torch.randint(30, (number, 1)), torch.randn(30, K).to(dtype), torch.randn(N).to(dtype)
    report, graphs = rewritten(lambda t, e, w, b: F.linear(F.embedding(t, e), w, b), tokens, table, *weights(1, dtype), bias)
    assert kernels(report) == ({"embedding_linear": 1} if number <= MAX_ROWS else {})
    assert count(graphs.rewritten, "aten.embedding") == (number > MAX_ROWS)


def test_an_embedding_that_is_read_elsewhere_too_stays_and_is_not_waited_for():
    def function(tokens, table, weight):
        embedded = F.embedding(tokens, table)
        return F.linear(embedded, weight), embedded

    report, graphs = rewritten(function, torch.tensor([[3]]), torch.randn(30, K), *weights(1))
    assert kernels(report) == {"embedding_linear": 1} and count(graphs.rewritten, "aten.embedding") == 1


def test_embeddings_that_are_changed_or_joined_before_the_layer_are_left_to_the_others():
    tokens, table, (weight,) = torch.tensor([[3], [5]]), torch.randn(30, K), weights(1)
    assert kernels(rewritten(lambda t, e, w: F.linear(F.embedding(t, e) * 2, w), tokens, table, weight)[0]) == {"norm_linears": 1}
    wide = weights(1, k=2 * K)[0]
    report, _ = rewritten(lambda t, e, w: F.linear(F.embedding(t, e).reshape(1, 2 * K), w), tokens, table, wide)
    assert kernels(report) == {"norm_linears": 1}  # a row of two embeddings


def test_embedding_linear_can_be_switched_off():
    arguments = torch.tensor([[3]]), torch.randn(30, K), *weights(1)
    report, _ = rewritten(lambda t, e, w: F.linear(F.embedding(t, e), w), *arguments, disable=["embedding_linear"])
    assert kernels(report) == {"norm_linears": 1}
