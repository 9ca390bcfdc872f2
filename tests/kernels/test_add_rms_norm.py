import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import DTYPES, LAYOUTS, assert_accurate, dtypes, layouts, poisoned_memory, random_tensor, seeds

from qtts_compile.kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference, add_rms_norm_triton

EPS = 1e-6


@given(st.integers(1, 3), st.integers(1, 5), st.sampled_from([40, 96, 128, 513]), dtypes, dtypes, layouts, layouts, seeds)
def test_kernel_is_as_accurate_as_eager(device, batch, tokens, width, dtype, weight_dtype, layout, residual_layout, seed):
    x = random_tensor(seed, (batch, tokens, width), dtype, device, layout)
    residual = random_tensor(seed + 1, (batch, tokens, width), dtype, device, residual_layout)
    weight = random_tensor(seed + 2, (width,), weight_dtype, device)
    with poisoned_memory():
        normed, total = add_rms_norm_triton(x, residual, weight, EPS)
    reference, reference_total = add_rms_norm_reference(x, residual, weight, EPS)
    assert torch.equal(total, reference_total)
    wide = total.double()
    assert_accurate(normed, wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double(), reference)
    assert normed.is_contiguous() and total.is_contiguous()


def test_no_rows(device):
    x, weight = torch.empty(0, 64, device=device), torch.ones(64, device=device)
    normed, total = add_rms_norm_triton(x, x, weight, EPS)
    assert normed.shape == total.shape == (0, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(device, dtype, layout):
    x = random_tensor(0, (2, 3, 4, 40), dtype, device, layout)
    residual = random_tensor(1, (2, 3, 4, 40), dtype, device)
    weight = torch.ones(40, device=device)
    torch.library.opcheck(torch.ops.qtts.add_rms_norm.default, (x, residual, weight, EPS))
    torch.library.opcheck(torch.ops.qtts.add_rms_norm.tensor_eps, (x, residual, weight, torch.tensor(EPS, dtype=torch.float64)))


def test_eps_as_a_tensor(device):
    x, weight = random_tensor(0, (3, 40), torch.float32, device), torch.ones(40, device=device)
    by_tensor = torch.ops.qtts.add_rms_norm(x, x, weight, torch.tensor(0.5, dtype=torch.float64))
    for actual, expected in zip(by_tensor, add_rms_norm(x, x, weight, 0.5), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("residual", "error", "message"),
    [
        (torch.ones(2, 8, dtype=torch.float16), TypeError, "residual must have the dtype of x, torch.float32, got torch.float16"),
        (torch.ones(1, 8), ValueError, r"residual must have the shape \(2, 8\), got \(1, 8\)"),
        (torch.ones(2, 8, device="meta"), ValueError, "residual must be on the device of x, cpu, got meta"),
    ],
)
def test_bad_input(residual, error, message):
    with pytest.raises(error, match=message):
        add_rms_norm(torch.ones(2, 8), residual, torch.ones(8), EPS)
