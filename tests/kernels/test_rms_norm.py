import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import DTYPES, LAYOUTS, assert_accurate, dtypes, layouts, poisoned_memory, random_tensor, seeds

from qtts_compile.kernels.rms_norm import rms_norm, rms_norm_reference, rms_norm_triton

EPS = 1e-6
shapes = st.lists(st.integers(1, 5), max_size=3).map(tuple)
widths = st.sampled_from([1, 40, 64, 80, 96, 128, 513])


def oracle(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


@given(shapes, widths, dtypes, dtypes, layouts, seeds)
def test_kernel_is_as_accurate_as_eager(device, shape, width, dtype, weight_dtype, layout, seed):
    x = random_tensor(seed, (*shape, width), dtype, device, layout)
    weight = random_tensor(seed + 1, (width,), weight_dtype, device)
    with poisoned_memory():
        y = rms_norm_triton(x, weight, EPS)
    assert_accurate(y, oracle(x, weight), rms_norm_reference(x, weight, EPS))
    assert y.is_contiguous()


@pytest.mark.parametrize("width", [2048, 16384])
def test_wide_rows(device, width):
    x = random_tensor(0, (2, width), torch.bfloat16, device)
    weight = random_tensor(1, (width,), torch.bfloat16, device)
    assert_accurate(rms_norm_triton(x, weight, EPS), oracle(x, weight), rms_norm_reference(x, weight, EPS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_before_the_weight(device, dtype):
    x, weight = random_tensor(0, (50, 96), dtype, device), random_tensor(1, (96,), dtype, device)
    y = rms_norm_triton(x, weight, EPS)
    rounded_once = rms_norm_reference(x.float(), weight.float(), EPS).to(dtype)
    assert (y == rms_norm_reference(x, weight, EPS)).double().mean() > 0.99
    assert (y == rounded_once).double().mean() < 0.9


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 3, 64)])
def test_no_rows(device, shape):
    x = torch.empty(shape, device=device)
    assert rms_norm_triton(x, torch.ones(64, device=device), EPS).shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(device, dtype, layout):
    x = random_tensor(0, (2, 3, 4, 40), dtype, device, layout)
    for weight_dtype in (dtype, torch.float32):
        weight = torch.ones(40, dtype=weight_dtype, device=device)
        torch.library.opcheck(torch.ops.qtts.rms_norm.default, (x, weight, EPS))
        torch.library.opcheck(torch.ops.qtts.rms_norm.tensor_eps, (x, weight, torch.tensor(EPS, dtype=torch.float64)))


def test_eps_as_a_tensor(device):
    x, weight = random_tensor(0, (3, 40), torch.float32, device), torch.ones(40, device=device)
    by_tensor = torch.ops.qtts.rms_norm(x, weight, torch.tensor(0.5, dtype=torch.float64))
    assert torch.equal(by_tensor, rms_norm(x, weight, 0.5))


@pytest.mark.parametrize(
    ("x", "weight", "error", "message"),
    [
        (torch.ones(2, 8, dtype=torch.int32), torch.ones(8), TypeError, "x must be .*int32"),
        (torch.ones(2, 8), torch.ones(8, dtype=torch.float64), TypeError, "weight must be .*float64"),
        (torch.ones(2, 8), torch.ones(4), ValueError, r"weight must have the shape \(8,\), got \(4,\)"),
        (torch.ones(2, 8), torch.ones(8, device="meta"), ValueError, "weight must be on the device of x, cpu, got meta"),
        (torch.ones(2, 0), torch.ones(0), ValueError, r"0 < D <= 16384, got \(2, 0\)"),
        (torch.ones(1, 16385), torch.ones(16385), ValueError, r"0 < D <= 16384, got \(1, 16385\)"),
        (torch.ones(()), torch.ones(1), ValueError, r"got \(\)"),
    ],
)
def test_bad_input(x, weight, error, message):
    with pytest.raises(error, match=message):
        rms_norm(x, weight, EPS)
