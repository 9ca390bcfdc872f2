import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import DTYPES, LAYOUTS, assert_accurate, dtypes, layouts, poisoned_memory, random_tensor, seeds

from qtts_compile.kernels.swiglu import swiglu, swiglu_reference, swiglu_triton


@given(st.lists(st.integers(1, 4), max_size=3).map(tuple), st.sampled_from([1, 40, 96, 513, 1200]), dtypes, layouts, layouts, seeds)
def test_kernel_is_as_accurate_as_eager(device, shape, width, dtype, gate_layout, up_layout, seed):
    gate = 4 * random_tensor(seed, (*shape, width), dtype, device, gate_layout)
    up = random_tensor(seed + 1, (*shape, width), dtype, device, up_layout)
    with poisoned_memory():
        y = swiglu_triton(gate, up)
    assert_accurate(y, gate.double() * gate.double().sigmoid() * up.double(), swiglu_reference(gate, up))
    assert y.is_contiguous()


def test_halves_of_one_projection(device):
    gate, up = random_tensor(0, (2, 3, 96), torch.bfloat16, device).chunk(2, dim=-1)
    assert_accurate(swiglu_triton(gate, up), gate.double() * gate.double().sigmoid() * up.double(), swiglu_reference(gate, up))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_silu_before_the_product(device, dtype):
    gate, up = random_tensor(0, (4000,), dtype, device), random_tensor(1, (4000,), dtype, device)
    y = swiglu_triton(gate, up)
    rounded_once = (torch.nn.functional.silu(gate.float()) * up.float()).to(dtype)
    assert (y == swiglu_reference(gate, up)).double().mean() > 0.99
    assert (y == rounded_once).double().mean() < 0.9


def test_large_gates_neither_overflow_nor_vanish(device):
    gate = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4], device=device)
    y = swiglu_triton(gate, torch.ones_like(gate))
    assert torch.equal(y[2:], gate[2:])
    assert y[:2].abs().max() < 1e-30


def test_no_rows(device):
    x = torch.empty(2, 0, 64, device=device)
    assert swiglu_triton(x, x).shape == (2, 0, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(device, dtype, layout):
    gate = random_tensor(0, (2, 3, 4, 40), dtype, device, layout)
    torch.library.opcheck(torch.ops.qtts.swiglu.default, (gate, random_tensor(1, (2, 3, 4, 40), dtype, device)))


@pytest.mark.parametrize(
    ("gate", "up", "error", "message"),
    [
        (torch.ones(8, dtype=torch.float64), torch.ones(8), TypeError, "gate must be .*float64"),
        (
            torch.ones(8),
            torch.ones(8, dtype=torch.bfloat16),
            TypeError,
            "up must have the dtype of gate, torch.float32, got torch.bfloat16",
        ),
        (torch.ones(2, 8), torch.ones(8), ValueError, r"up must have the shape \(2, 8\), got \(8,\)"),
        (torch.ones(8), torch.ones(8, device="meta"), ValueError, "up must be on the device of gate"),
        (torch.ones(()), torch.ones(()), ValueError, r"got \(\)"),
    ],
)
def test_bad_input(gate, up, error, message):
    with pytest.raises(error, match=message):
        swiglu(gate, up)
