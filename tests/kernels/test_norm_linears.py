import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numerics import DTYPES, LAYOUTS, assert_accurate, dtypes, layouts, poisoned_memory, random_tensor, rotations, seeds, with_other_scales

from qtts_compile.kernels.launch_table import Launch
from qtts_compile.kernels.norm_linears import norm_linears, norm_linears_reference, norm_linears_triton
from qtts_compile.kernels.rms_norm import rms_norm_reference

EPS = 1e-6
shapes = st.sampled_from([(), (1,), (1, 1), (2,), (3, 1), (1, 5), (2, 4), (2, 3, 2), (16,), (17,), (2, 16)])


def oracle(x, norm_weight, weights, biases):
    x = x.double()
    if norm_weight is not None:
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * norm_weight.double()
    return [x @ weight.double().T + (0.0 if bias is None else bias.double()) for weight, bias in zip(weights, biases, strict=True)]


def check(x, norm_weight, weights, biases, launch=None):
    with poisoned_memory():
        ys = norm_linears_triton(x, norm_weight, weights, biases, EPS, launch)
    many = [rotations(weight) for weight in weights]
    biases = [bias if bias is None else bias.repeat(len(more) // len(bias)) for bias, more in zip(biases, many)]
    more = x[None] if norm_weight is None else with_other_scales(x)
    references = norm_linears_reference(more, norm_weight, many, biases, EPS)
    for y, expected, reference in zip(ys, oracle(more, norm_weight, many, biases), references, strict=True):
        assert_accurate(y[None], expected, reference, leading=True)
        assert y.is_contiguous()
    return ys


@given(
    shapes, st.sampled_from([1, 40, 64, 100, 513]), st.lists(st.tuples(st.integers(1, 20), st.booleans()), min_size=1, max_size=3),
    st.booleans(), dtypes, layouts, st.sampled_from(["contiguous", "sliced"]), seeds,
)  # fmt: skip
def test_kernel_is_as_accurate_as_eager(device, shape, width, sizes, has_norm, dtype, x_layout, weight_layout, seed):
    x = random_tensor(seed, (*shape, width), dtype, device, x_layout)
    norm_weight = random_tensor(seed + 1, (width,), dtype, device) if has_norm else None
    weights = [random_tensor(seed + 2 + i, (size, width), dtype, device, weight_layout) for i, (size, _) in enumerate(sizes)]
    biases = [random_tensor(seed + 5 + i, (size,), dtype, device) if has_bias else None for i, (size, has_bias) in enumerate(sizes)]
    check(x, norm_weight, weights, biases)


@given(
    st.integers(1, 16), st.sampled_from([30, 256]), st.sampled_from([1, 2, 8, 16]), st.sampled_from([2, 4, 16]),
    st.sampled_from([16, 64, 256]), st.sampled_from([1, 2, 4]), st.integers(0, 3), dtypes, seeds,
)  # fmt: skip
@example(2, 256, 1, 2, 256, 1, 0, torch.float32, 10380)  # failed where the interpreter added 64 sums one after the other
def test_launch_parameters_do_not_change_results(device, rows, width, block_m, block_n, block_k, num_warps, in_flight, dtype, seed):
    block_m = max(block_m, 1 << (rows - 1).bit_length())
    x, norm_weight = random_tensor(seed, (rows, width), dtype, device), random_tensor(seed + 1, (width,), dtype, device)
    weights = [random_tensor(seed + 2 + i, (size, width), dtype, device) for i, size in enumerate((9, 5))]
    check(x, norm_weight, weights, [None, None], Launch(block_m, block_n, block_k, num_warps, in_flight))


@pytest.mark.parametrize("rows", [1, 2, 7, 24])
@pytest.mark.parametrize("width", [1024, 2048, 3072])
def test_wide_rows(device, rows, width):
    x, norm_weight = random_tensor(0, (rows, width), torch.bfloat16, device), random_tensor(1, (width,), torch.bfloat16, device)
    weights = [random_tensor(2 + i, (size, width), torch.bfloat16, device) for i, size in enumerate((12, 3, 4))]
    check(x, norm_weight, weights, [None, random_tensor(9, (3,), torch.bfloat16, device), None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 16])
def test_rounds_the_norm_of_many_rows_as_rms_norm_and_of_one_only_in_the_result(device, dtype, rows):
    x, norm_weight = random_tensor(0, (rows, 64), dtype, device), random_tensor(1, (64,), dtype, device)
    eye = torch.eye(64, dtype=dtype, device=device)
    (y,) = norm_linears_triton(x, norm_weight, [eye], [None], EPS)
    rounded_once = rms_norm_reference(x.float(), norm_weight.float(), EPS).to(dtype)
    rounded_twice = rms_norm_reference(x, norm_weight, EPS)
    expected, other = (rounded_once, rounded_twice) if rows == 1 else (rounded_twice, rounded_once)
    assert (y == expected).double().mean() > 0.99
    assert (y == other).double().mean() < 0.9


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("width", [1024, 2048])
def test_squares_beyond_float16_and_a_row_of_zeros(device, rows, width):
    x = random_tensor(0, (rows, width), torch.float16, device) * 1e4
    x[-1, ::2] = 0.0
    norm_weight, weight = random_tensor(1, (width,), torch.float16, device), random_tensor(2, (6, width), torch.float16, device)
    check(x, norm_weight, [weight], [None])
    check(torch.zeros_like(x), norm_weight, [weight], [None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 16])
def test_adds_the_bias_before_rounding(device, dtype, rows):
    # Two terms of less than half a unit in the last place: each would be lost if the sum were rounded between them.
    unit = torch.finfo(dtype).eps
    x = torch.ones(rows, 2, dtype=dtype, device=device)
    weight = torch.tensor([[1.0, 0.3 * unit]], dtype=dtype, device=device)
    (y,) = norm_linears_triton(x, None, [weight], [torch.tensor([0.3 * unit], dtype=dtype, device=device)], EPS)
    assert (y == 1 + unit).all()


@pytest.mark.parametrize("rows", [1, 8])
def test_memory_around_the_inputs_has_no_effect(device, rows):
    padded = [random_tensor(seed, shape, torch.bfloat16, device) for seed, shape in enumerate([(rows + 2, 72), (13, 72), (7, 72)])]
    inner = [(slice(1, -1), slice(8, 48))] * 3
    clean = check(*_arguments([tensor[where] for tensor, where in zip(padded, inner, strict=True)]))
    for tensor, where in zip(padded, inner, strict=True):
        values = tensor[where].clone()
        tensor.fill_(float("nan"))
        tensor[where] = values
    for y, expected in zip(check(*_arguments([tensor[where] for tensor, where in zip(padded, inner, strict=True)])), clean, strict=True):
        assert torch.equal(y, expected)


def _arguments(tensors):
    x, *weights = tensors
    return x, torch.ones(x.shape[-1], dtype=x.dtype, device=x.device), weights, [None] * len(weights)


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40)])
def test_no_rows(device, shape):
    ys = norm_linears_triton(torch.empty(shape, device=device), None, [torch.ones(3, 40, device=device)] * 2, [None, None], EPS)
    assert [y.shape for y in ys] == [(*shape[:-1], 3)] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(device, dtype, layout):
    x, norm_weight = random_tensor(0, (2, 3, 2, 40), dtype, device, layout), random_tensor(1, (40,), dtype, device)
    weights = [random_tensor(2, (8, 40), dtype, device), random_tensor(3, (3, 40), dtype, device)]
    biases = [None, random_tensor(4, (3,), dtype, device)]
    torch.library.opcheck(torch.ops.qtts.norm_linears.default, (x, norm_weight, weights, biases, EPS))
    torch.library.opcheck(torch.ops.qtts.norm_linears.default, (x, None, weights[:1], biases[:1], EPS))
    eps = torch.tensor(EPS, dtype=torch.float64)
    torch.library.opcheck(torch.ops.qtts.norm_linears.tensor_eps, (x, norm_weight, weights, biases, eps))


def test_eps_as_a_tensor(device):
    x, weight = random_tensor(0, (3, 40), torch.float32, device), random_tensor(1, (8, 40), torch.float32, device)
    norm_weight = torch.ones(40, device=device)
    (by_tensor,) = torch.ops.qtts.norm_linears(x, norm_weight, [weight], [None], torch.tensor(0.5, dtype=torch.float64))
    assert torch.equal(by_tensor, norm_linears(x, norm_weight, [weight], [None], 0.5)[0])


def test_compiles_with_inductor(device):
    x, norm_weight = random_tensor(0, (1, 1, 40), torch.float32, device), torch.ones(40, device=device)
    weights = [random_tensor(1, (8, 40), torch.float32, device), random_tensor(2, (3, 40), torch.float32, device)]
    bias = torch.ones(3, device=device)

    def step(x):
        q, k = norm_linears(x * 2, norm_weight, weights, [None, bias], EPS)
        return q.sin(), k + 1

    torch.testing.assert_close(torch.compile(step, fullgraph=True)(x), step(x))


X = torch.ones(2, 8)
W = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("x", "norm_weight", "weights", "biases", "error", "message"),
    [
        (X.double(), None, [W], [None], TypeError, "x must be .*float64"),
        (torch.ones(()), None, [W], [None], ValueError, r"x must have the shape \[\.\.\., K\] with K > 0, got \(\)"),
        (torch.ones(2, 0), None, [W], [None], ValueError, r"K > 0, got \(2, 0\)"),
        (torch.ones(33, 8), None, [W], [None], ValueError, r"at most 32 rows, got 33 in \(33, 8\); use torch.nn.functional.linear"),
        (X, torch.ones(8).half(), [W], [None], TypeError, "norm_weight must have the dtype of x, torch.float32, got torch.float16"),
        (X, torch.ones(4), [W], [None], ValueError, r"weight must have the shape \(8,\), got \(4,\)"),
        (X, torch.ones(16)[::2], [W], [None], ValueError, r"norm_weight must be contiguous in its last dimension, got strides \(2,\)"),
        (X, None, [], [], ValueError, "1 to 3 tensors, got 0"),
        (X, None, [W] * 4, [None] * 4, ValueError, "1 to 3 tensors, got 4"),
        (X, None, [W, W], [None], ValueError, "biases must hold a tensor or None for each of the 2 weights, got 1"),
        (X, None, [W, W.half()], [None, None], TypeError, r"weights\[1\] must have the dtype of x"),
        (X, None, [W.to("meta")], [None], ValueError, r"weights\[0\] must be on the device of x"),
        (X, None, [W[0]], [None], ValueError, r"weights\[0\] must have the shape \[N, K\], got \(8,\)"),
        (X, None, [W[:, :4]], [None], ValueError, r"weights\[0\] must have the shape \(4, 8\), got \(4, 4\)"),
        (X, None, [W[:0]], [None], ValueError, r"N > 0, got \(0, 8\)"),
        (X, None, [torch.ones(8, 4).T], [None], ValueError, r"weights\[0\] must be contiguous in its last dimension, got strides \(1, 4\); call"),
        (X, None, [W], [torch.ones(5)], ValueError, r"biases\[0\] must have the shape \(4,\), got \(5,\)"),
        (X, None, [W], [torch.ones(4).half()], TypeError, r"biases\[0\] must have the dtype of x"),
    ],
)  # fmt: skip
def test_bad_input(x, norm_weight, weights, biases, error, message):
    with pytest.raises(error, match=message):
        norm_linears(x, norm_weight, weights, biases, EPS)
