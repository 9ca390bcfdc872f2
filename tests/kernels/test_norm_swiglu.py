import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numerics import DTYPES, LAYOUTS, assert_accurate, dtypes, layouts, poisoned_memory, random_tensor, rotations, seeds, with_other_scales

from qtts_compile.kernels.launch_table import Launch
from qtts_compile.kernels.norm_swiglu import norm_swiglu, norm_swiglu_reference, norm_swiglu_triton
from qtts_compile.kernels.rms_norm import rms_norm_reference
from qtts_compile.kernels.swiglu import swiglu_reference

EPS = 1e-6
shapes = st.sampled_from([(), (1,), (1, 1), (2,), (3, 1), (1, 5), (2, 4), (2, 3, 2), (16,), (17,), (2, 16)])


def oracle(x, norm_weight, gate_weight, up_weight):
    x = x.double()
    if norm_weight is not None:
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * norm_weight.double()
    gate = x @ gate_weight.double().T
    return gate * gate.sigmoid() * (x @ up_weight.double().T)


def check(x, norm_weight, gate_weight, up_weight, launch=None):
    with poisoned_memory():
        y = norm_swiglu_triton(x, norm_weight, gate_weight, up_weight, EPS, launch)
    weights = rotations(gate_weight), rotations(up_weight)
    more = x[None] if norm_weight is None else with_other_scales(x)
    assert_accurate(y[None], oracle(more, norm_weight, *weights), norm_swiglu_reference(more, norm_weight, *weights, EPS), leading=True)
    assert y.is_contiguous()
    return y


def random_weights(seed, size, width, dtype, device):
    """Return gate and up weights that keep the variance of a normalised input."""
    gate, up = (random_tensor(seed + i, (size, width), dtype, device) * width**-0.5 for i in range(2))
    return gate, up


@given(shapes, st.sampled_from([1, 40, 64, 100, 513]), st.integers(1, 40), st.booleans(), dtypes, layouts, seeds)
def test_kernel_is_as_accurate_as_eager(device, shape, width, size, has_norm, dtype, layout, seed):
    x = random_tensor(seed, (*shape, width), dtype, device, layout)
    norm_weight = random_tensor(seed + 1, (width,), dtype, device) if has_norm else None
    check(x, norm_weight, *random_weights(seed + 2, size, width, dtype, device))


@given(
    st.integers(1, 16), st.sampled_from([30, 256]), st.sampled_from([1, 2, 8, 16]), st.sampled_from([2, 4, 16]),
    st.sampled_from([16, 64, 256]), st.sampled_from([1, 2, 4]), st.integers(0, 3), dtypes, seeds,
)  # fmt: skip
@example(4, 30, 4, 2, 16, 1, 0, torch.float32, 224)  # where eager PyTorch happens to round the scale of the largest outputs to the truth
def test_launch_parameters_do_not_change_results(device, rows, width, block_m, block_n, block_k, num_warps, in_flight, dtype, seed):
    block_m = max(block_m, 1 << (rows - 1).bit_length())
    x, norm_weight = random_tensor(seed, (rows, width), dtype, device), random_tensor(seed + 1, (width,), dtype, device)
    weights = random_weights(seed + 2, 9, width, dtype, device)
    check(x, norm_weight, *weights, Launch(block_m, block_n, block_k, num_warps, in_flight))


@pytest.mark.parametrize("rows", [1, 2, 7, 24])
@pytest.mark.parametrize("width", [2048, 3072])
def test_wide_rows(device, rows, width):
    x, norm_weight = random_tensor(0, (rows, width), torch.bfloat16, device), random_tensor(1, (width,), torch.bfloat16, device)
    check(x, norm_weight, *random_weights(2, 11, width, torch.bfloat16, device))


@pytest.mark.parametrize("rows", [1, 8])
def test_weights_of_different_strides(device, rows):
    x = random_tensor(0, (rows, 40), torch.bfloat16, device)
    both = random_tensor(1, (22, 48), torch.bfloat16, device)
    check(x, None, both[:11, :40], random_tensor(2, (11, 40), torch.bfloat16, device))
    check(x, None, both[:11, 5:45], both[11:, :40])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 16])
def test_rounds_between_the_steps(device, dtype, rows):
    x, norm_weight = random_tensor(0, (rows, 64), dtype, device), random_tensor(1, (64,), dtype, device)
    weights = random_weights(2, 200, 64, dtype, device)
    y = norm_swiglu_triton(x, norm_weight, *weights, EPS)
    normed = rms_norm_reference(x, norm_weight, EPS) if rows > 1 else rms_norm_reference(x.float(), norm_weight.float(), EPS)
    gate, up = (normed.float() @ weight.float().T for weight in weights)
    silu = torch.nn.functional.silu
    expected = norm_swiglu_reference(x, norm_weight, *weights, EPS) if rows > 1 else swiglu_reference(gate.to(dtype), up.to(dtype))
    assert (y == expected).double().mean() > 0.98
    assert (y == (silu(gate) * up).to(dtype)).double().mean() < 0.9
    assert (y == (silu(gate.to(dtype).float()) * up.to(dtype).float()).to(dtype)).double().mean() < 0.9
    assert (y == silu(gate).to(dtype) * up.to(dtype)).double().mean() < 0.95


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40)])
def test_no_rows(device, shape):
    weight = torch.ones(3, 40, device=device)
    assert norm_swiglu_triton(torch.empty(shape, device=device), None, weight, weight, EPS).shape == (*shape[:-1], 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(device, dtype, layout):
    x, norm_weight = random_tensor(0, (2, 3, 2, 40), dtype, device, layout), random_tensor(1, (40,), dtype, device)
    weights = random_weights(2, 8, 40, dtype, device)
    torch.library.opcheck(torch.ops.qtts.norm_swiglu.default, (x, norm_weight, *weights, EPS))
    torch.library.opcheck(torch.ops.qtts.norm_swiglu.default, (x, None, *weights, EPS))
    torch.library.opcheck(torch.ops.qtts.norm_swiglu.tensor_eps, (x, norm_weight, *weights, torch.tensor(EPS, dtype=torch.float64)))


def test_eps_as_a_tensor(device):
    x, norm_weight = random_tensor(0, (3, 40), torch.float32, device), torch.ones(40, device=device)
    weights = random_weights(1, 8, 40, torch.float32, device)
    by_tensor = torch.ops.qtts.norm_swiglu(x, norm_weight, *weights, torch.tensor(0.5, dtype=torch.float64))
    assert torch.equal(by_tensor, norm_swiglu(x, norm_weight, *weights, 0.5))


X = torch.ones(2, 8)
W = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("x", "norm_weight", "gate_weight", "up_weight", "error", "message"),
    [
        (X.int(), None, W, W, TypeError, "x must be .*int32"),
        (torch.ones(5, 7, 8), None, W, W, ValueError, r"at most 32 rows, got 35 in \(5, 7, 8\); use torch.nn.functional.linear"),
        (X, torch.ones(8).half(), W, W, TypeError, "norm_weight must have the dtype of x"),
        (X, torch.ones(8, device="meta"), W, W, ValueError, "weight must be on the device of x, cpu, got meta"),
        (X, None, W.half(), W, TypeError, "gate_weight must have the dtype of x"),
        (X, None, W, W[:, :4], ValueError, r"up_weight must have the shape \(4, 8\), got \(4, 4\)"),
        (X, None, W, W[:3], ValueError, r"up_weight must have the shape \(4, 8\), got \(3, 8\)"),
        (X, None, W[:0], W[:0], ValueError, r"gate_weight .*N > 0, got \(0, 8\)"),
        (X, None, W, torch.ones(8, 4).T, ValueError, r"up_weight must be contiguous in its last dimension, got strides \(1, 4\); call"),
    ],
)
def test_bad_input(x, norm_weight, gate_weight, up_weight, error, message):
    with pytest.raises(error, match=message):
        norm_swiglu(x, norm_weight, gate_weight, up_weight, EPS)
