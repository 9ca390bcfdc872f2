"""SwiGLU: the spellings that are recognised, and other gates."""

import pytest
import torch
import torch.nn.functional as F
from rewriting import kernels, rewritten


def inputs(shape=(2, 3, 24), dtype=torch.float32):
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 8), (1, 1, 24), (2, 3, 24), (2, 3, 4, 8)], ids=str)
def test_every_rank_and_dtype_matches(shape, dtype):
    report, graphs = rewritten(lambda gate, up: F.silu(gate) * up, *inputs(shape, dtype))
    assert kernels(report) == report.lifted == {"swiglu": 1}
    assert [op.name for op in graphs.final] == ["qtts.swiglu.default"]


@pytest.mark.parametrize(
    "function",
    [
        lambda gate, up: up * F.silu(gate),
        lambda gate, up: torch.nn.SiLU()(gate) * up,
        lambda gate, up: F.silu(gate, inplace=False).mul(up),
        lambda gate, up: F.silu(gate.transpose(1, 2)) * up.transpose(1, 2),
        lambda gate, up: F.silu(gate[..., :12]) * gate[..., 12:],
        lambda gate, up: F.silu(gate) * gate,
    ],
    ids=["up-first", "module", "method", "transposed", "halves-of-one-tensor", "gate-is-up"],
)
def test_other_spellings_match(function):
    assert rewritten(function, *inputs())[0].lifted == {"swiglu": 1}


def test_gate_and_up_are_not_swapped():
    gate, up = inputs()
    report, _ = rewritten(lambda a, b: (F.silu(a) * b, F.silu(b) * a), gate, up)
    assert report.lifted == {"swiglu": 2}
    assert not torch.allclose(F.silu(gate) * up, F.silu(up) * gate)


def test_the_gate_may_be_read_elsewhere():
    def function(gate, up):
        hidden = F.silu(gate)
        return hidden * up, hidden

    rewritten(function, *inputs())


@pytest.mark.parametrize(
    "function",
    [
        lambda gate, up: F.gelu(gate) * up,
        lambda gate, up: F.gelu(gate, approximate="tanh") * up,
        lambda gate, up: F.relu(gate) * up,
        lambda gate, up: F.mish(gate) * up,
        lambda gate, up: torch.sigmoid(gate) * up,
        lambda gate, up: gate * torch.sigmoid(1.702 * gate) * up,
        lambda gate, up: F.silu(gate) + up,
        lambda gate, up: F.silu(gate) / up,
        lambda gate, up: F.silu(gate),
        lambda gate, up: F.silu(gate) * 2.0,
        lambda gate, up: F.silu(gate) * up[..., :1],
        lambda gate, up: F.silu(gate) * up[:, :1],
        lambda gate, up: F.silu(gate[:1]) * up,
        lambda gate, up: gate / (1 + torch.exp(gate)) * up,
        lambda gate, up: up / (1 + torch.exp(-gate)) * up,
    ],
    ids=(
        "gelu gelu-tanh relu mish sigmoid-only quick-gelu plus divided alone doubled up-broadcast-last up-broadcast-tokens "
        "gate-broadcast wrong-sign two-gates"
    ).split(),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_gates_are_left_alone(function, dtype):
    report, _ = rewritten(function, *inputs(dtype=dtype))
    assert kernels(report) == report.lifted == {}


def test_a_product_that_broadcasts_is_reported():
    report, _ = rewritten(lambda gate, up: F.silu(gate) * up[..., :1], *inputs())
    assert [refusal.rewrite for refusal in report.refusals] == ["swiglu"]
    assert "(2, 3, 24)" in report.refusals[0].reason and "(2, 3, 1)" in report.refusals[0].reason
