import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import DTYPES, LAYOUTS, assert_accurate, dtypes, layouts, poisoned_memory, random_tensor, rotations, seeds

from qtts_compile.kernels.launch_table import Launch
from qtts_compile.kernels.linear_add import linear_add, linear_add_reference, linear_add_triton
from qtts_compile.kernels.norm_linears import norm_linears
from qtts_compile.kernels.norm_swiglu import norm_swiglu

shapes = st.sampled_from([(), (1,), (1, 1), (2,), (3, 1), (1, 5), (2, 4), (2, 3, 2), (16,), (17,), (2, 16)])


def check(x, weight, bias, residual, launch=None):
    with poisoned_memory():
        y = linear_add_triton(x, weight, bias, residual, launch)
    many = rotations(weight)
    turns = len(many) // len(weight)
    bias, residual = bias if bias is None else bias.repeat(turns), residual.repeat(*(1 for _ in x.shape[:-1]), turns)
    oracle = residual.double() + x.double() @ many.double().T + (0.0 if bias is None else bias.double())
    assert_accurate(y, oracle, linear_add_reference(x, many, bias, residual), leading=True)
    assert y.is_contiguous()
    return y


@given(shapes, st.sampled_from([1, 40, 64, 100, 513]), st.integers(1, 40), st.booleans(), dtypes, layouts, layouts, seeds)
def test_kernel_is_as_accurate_as_eager(device, shape, width, size, has_bias, dtype, x_layout, residual_layout, seed):
    x = random_tensor(seed, (*shape, width), dtype, device, x_layout)
    residual = random_tensor(seed + 1, (*shape, size), dtype, device, residual_layout)
    bias = random_tensor(seed + 2, (size,), dtype, device) if has_bias else None
    check(x, random_tensor(seed + 3, (size, width), dtype, device), bias, residual)


@given(
    st.integers(1, 16), st.sampled_from([30, 256]), st.sampled_from([1, 2, 8, 16]), st.sampled_from([2, 4, 16]),
    st.sampled_from([16, 64, 256]), st.sampled_from([1, 2, 4]), st.integers(0, 3), dtypes, seeds,
)  # fmt: skip
def test_launch_parameters_do_not_change_results(device, rows, width, block_m, block_n, block_k, num_warps, in_flight, dtype, seed):
    block_m = max(block_m, 1 << (rows - 1).bit_length())
    x, residual, weight = (random_tensor(seed + i, shape, dtype, device) for i, shape in enumerate([(rows, width), (rows, 9), (9, width)]))
    check(x, weight, None, residual, Launch(block_m, block_n, block_k, num_warps, in_flight))


@pytest.mark.parametrize("rows", [1, 2, 7, 24])
@pytest.mark.parametrize("width", [3072, 6144, 20000])
def test_wide_rows(device, rows, width):
    x, residual, weight = (random_tensor(i, shape, torch.bfloat16, device) for i, shape in enumerate([(rows, width), (rows, 6), (6, width)]))
    check(x, weight, None, residual)


@pytest.mark.parametrize("rows", [1, 8])
def test_unaligned_weights(device, rows):
    x, residual = random_tensor(0, (rows, 48), torch.bfloat16, device), random_tensor(1, (rows, 9), torch.bfloat16, device)
    wider = random_tensor(2, (9, 64), torch.bfloat16, device)
    for first in (0, 1, 8):
        check(x, wider[:, first : first + 48], None, residual)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 16])
def test_rounds_before_the_residual(device, dtype, rows):
    x, residual, weight = (random_tensor(i, shape, dtype, device) for i, shape in enumerate([(rows, 8), (rows, 300), (300, 8)]))
    y = linear_add_triton(x, weight, None, residual)
    rounded_once = (residual.float() + x.float() @ weight.float().T).to(dtype)
    assert (y == linear_add_reference(x, weight, None, residual)).double().mean() > 0.99
    assert (y == rounded_once).double().mean() < 0.95


def test_overlapping_residual(device):
    x, weight = random_tensor(0, (3, 40), torch.float32, device), random_tensor(1, (9, 40), torch.float32, device)
    check(x, weight, None, random_tensor(2, (1, 9), torch.float32, device).expand(3, 9))


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40)])
def test_no_rows(device, shape):
    residual = torch.empty(*shape[:-1], 3, device=device)
    assert linear_add_triton(torch.empty(shape, device=device), torch.ones(3, 40, device=device), None, residual).shape == residual.shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(device, dtype, layout):
    x, residual = random_tensor(0, (2, 3, 2, 40), dtype, device, layout), random_tensor(1, (2, 3, 2, 8), dtype, device, layout)
    weight = random_tensor(2, (8, 40), dtype, device)
    torch.library.opcheck(torch.ops.qtts.linear_add.default, (x, weight, None, residual))
    torch.library.opcheck(torch.ops.qtts.linear_add.default, (x, weight, random_tensor(3, (8,), dtype, device), residual))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 16, 32])
def test_chained_launches_see_each_others_results(rows):
    """A graph of launches that overlap gives what the same launches give with a wait after each."""
    width, inner = 512, 1024
    shapes = [(width, width)] * 3 + [(inner, width)] * 2 + [(width, inner)]
    weights = [[random_tensor(layer, shape, torch.bfloat16, "cuda") * shape[1] ** -0.5 for shape in shapes] for layer in range(6)]
    norm_weight = torch.ones(width, dtype=torch.bfloat16, device="cuda")
    x = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda")

    def stack(wait):
        hidden = x
        for q, k, o, gate, up, down in weights:
            a, b = norm_linears(hidden, norm_weight, [q, k], [None, None], 1e-6)
            wait()
            hidden = linear_add(a + b.tanh(), o, None, hidden)
            wait()
            hidden = linear_add(norm_swiglu(hidden, norm_weight, gate, up, 1e-6), down, None, hidden)
            wait()
        return hidden

    stack(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = stack(lambda: None)
    for seed in range(20):
        x.copy_(random_tensor(seed, (rows, width), torch.bfloat16, "cuda"))
        graph.replay()
        assert torch.equal(captured, stack(torch.cuda.synchronize)), f"replay {seed}"


X = torch.ones(2, 8)
W = torch.ones(4, 8)
R = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "residual", "error", "message"),
    [
        (X.double(), W, None, R, TypeError, "x must be .*float64"),
        (torch.ones(33, 8), W, None, torch.ones(33, 4), ValueError, r"at most 32 rows, got 33 in \(33, 8\); use torch.nn.functional.linear"),
        (X, W.half(), None, R, TypeError, "weight must have the dtype of x"),
        (X, W[:, :4], None, R, ValueError, r"weight must have the shape \(4, 8\), got \(4, 4\)"),
        (X, torch.ones(8, 4).T, None, R, ValueError, r"weight must be contiguous in its last dimension, got strides \(1, 4\); call"),
        (X, W, torch.ones(8)[::2], R, ValueError, r"bias must be contiguous in its last dimension, got strides \(2,\); call"),
        (X, W, torch.ones(3), R, ValueError, r"bias must have the shape \(4,\), got \(3,\)"),
        (X, W, None, R.half(), TypeError, "residual must have the dtype of x"),
        (X, W, None, R.to("meta"), ValueError, "residual must be on the device of x"),
        (X, W, None, R[:1], ValueError, r"residual must have the shape \(2, 4\), got \(1, 4\)"),
    ],
)
def test_bad_input(x, weight, bias, residual, error, message):
    with pytest.raises(error, match=message):
        linear_add(x, weight, bias, residual)
