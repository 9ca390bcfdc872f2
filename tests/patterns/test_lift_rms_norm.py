"""RMSNorm: the spellings that are recognised, and the computations that only look like it."""

import pytest
import torch
from rewriting import kernels, rewritten

WIDTH = 24
SHAPES = [(5, WIDTH), (1, 1, WIDTH), (2, 3, WIDTH), (1, 1, 4, WIDTH), (2, 3, 4, WIDTH)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normed(x, eps=1e-6):
    wide = x.to(torch.float32)
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def weight_first(x, weight):
    return weight * normed(x).to(x.dtype)


def weight_last(x, weight):
    return normed(x).to(x.dtype) * weight


def spelled_with_functions(x, weight):
    wide = x.float()
    variance = torch.mean(torch.square(wide), dim=[-1], keepdim=True)
    return torch.mul(torch.mul(torch.rsqrt(1e-6 + variance), wide).type_as(x), weight)


class Norm(torch.nn.Module):
    """eps is a module's float, which dynamic=True turns into a graph input."""

    def __init__(self, eps):
        super().__init__()
        self.eps = eps

    def forward(self, x, weight):
        return weight * normed(x, self.eps).to(x.dtype)


def inputs(shape=(2, 3, WIDTH), dtype=torch.float32, weight_dtype=None):
    return torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(weight_dtype or dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_rank_and_dtype_matches(shape, dtype):
    report, graphs = rewritten(weight_first, *inputs(shape, dtype))
    assert kernels(report) == report.lifted == {"rms_norm": 1}
    assert [op.name for op in graphs.final] == ["qtts.rms_norm.default"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [weight_last, spelled_with_functions])
def test_other_spellings_match(function, dtype):
    assert rewritten(function, *inputs(dtype=dtype))[0].lifted == {"rms_norm": 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_weights_match(dtype):
    assert rewritten(weight_first, *inputs(dtype=dtype, weight_dtype=torch.float32))[0].lifted == {"rms_norm": 1}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("eps", [1e-12, 1e-6, 0.5])
def test_eps_is_read_off_the_graph(eps, dynamic):
    x, weight = inputs((2, 3, WIDTH))
    report, graphs = rewritten(Norm(eps), 0.01 * x, weight, dynamic=dynamic)
    assert report.lifted == {"rms_norm": 1}
    assert graphs.rewritten[-1].name == f"qtts.rms_norm.{'tensor_eps' if dynamic else 'default'}"


def test_eps_may_be_a_whole_number():
    assert rewritten(Norm(1), *inputs())[0].lifted == {"rms_norm": 1}


def test_a_norm_of_a_norm_matches_twice():
    report, graphs = rewritten(lambda x, weight: weight_first(weight_first(x, weight), weight), *inputs())
    assert report.lifted == {"rms_norm": 2}
    assert [op.name for op in graphs.rewritten] == ["qtts.rms_norm.default"] * 2


def test_rows_wider_than_the_kernel_takes_are_refused_with_its_reason():
    report, _ = rewritten(weight_first, *inputs((2, 20000)))
    assert report.lifted == {}
    assert ["16384" in refusal.reason for refusal in report.refusals] == [True]


def test_norms_with_different_eps_keep_their_own():
    def both(x, weight):
        return weight * normed(x, 1e-6), weight * normed(x, 0.25)

    assert rewritten(both, *inputs())[0].lifted == {"rms_norm": 2}


def test_transposed_input_matches():
    assert rewritten(lambda x, w: weight_first(x.transpose(1, 2), w), *inputs((2, 3, 4, WIDTH)))[0].lifted == {"rms_norm": 1}


def test_a_matched_norm_may_have_intermediate_results_that_are_read_elsewhere():
    def function(x, weight):
        wide = normed(x)
        return weight * wide.to(x.dtype), wide.sum()

    rewritten(function, *inputs())


def layer_norm(x, weight):
    return torch.nn.functional.layer_norm(x, (WIDTH,), weight, eps=1e-6)


def layer_norm_written_out(x, weight):
    centred = x - x.mean(-1, keepdim=True)
    return weight * (centred * torch.rsqrt((x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True) + 1e-6) + x)


def in_the_dtype_of_the_input(x, weight):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def over_another_dimension(x, weight):
    return weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-2, keepdim=True) + 1e-6)).to(x.dtype)


def over_two_dimensions(x, weight):
    return weight * (x.float() * torch.rsqrt(x.float().pow(2).mean((-2, -1), keepdim=True) + 1e-6)).to(x.dtype)


def sum_instead_of_mean(x, weight):
    return weight * (x.float() * torch.rsqrt(x.float().pow(2).sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def third_power(x, weight):
    return weight * (x.float() * torch.rsqrt(x.float().abs().pow(3).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def eps_outside_the_root(x, weight):
    return weight * (x.float() * (torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True)) + 0.5)).to(x.dtype)


def eps_subtracted(x, weight):
    return weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) - 1e-6)).to(x.dtype)


def another_tensor_is_scaled(x, weight):
    return weight * (x.flip(0).float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def weight_per_token(x, weight):
    return torch.stack([weight] * x.shape[-2]) * normed(x).to(x.dtype)


def eps_per_token(x, weight):
    return weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + weight[:, None].float().abs())).to(x.dtype)


def variance_of_another_tensor(x, weight):
    return weight * (x.float() * torch.rsqrt(x.flip(0).float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def one_weight_for_all(x, weight):
    return weight[:1] * normed(x).to(x.dtype)


NEAR_MISSES = [
    layer_norm,
    layer_norm_written_out,
    in_the_dtype_of_the_input,
    over_another_dimension,
    over_two_dimensions,
    sum_instead_of_mean,
    third_power,
    eps_outside_the_root,
    eps_subtracted,
    another_tensor_is_scaled,
    variance_of_another_tensor,
    eps_per_token,
    weight_per_token,
    one_weight_for_all,
]


@pytest.mark.parametrize("function", NEAR_MISSES)
def test_near_misses_are_left_alone_and_reported(function):
    # bf16, where the place of each rounding shows; square, so that a wrong dimension has the right size.
    x, weight = inputs((2, WIDTH, WIDTH), torch.bfloat16)
    report, _ = rewritten(function, x, weight)
    assert kernels(report) == report.lifted == {}
    assert [refusal.rewrite for refusal in report.refusals] == ["rms_norm"]
    assert report.refusals[0].reason and report.refusals[0].reason != "no candidate"


def test_a_weight_that_is_computed_still_matches():
    """weight + 1 after the rounding is a plain RMSNorm with a weight of its own."""
    report, _ = rewritten(lambda x, weight: normed(x).to(x.dtype) * (1.0 + weight), *inputs(dtype=torch.bfloat16))
    assert report.lifted == {"rms_norm": 1}


@pytest.mark.parametrize(
    "function",
    [
        lambda x, weight: (weight.float() * normed(x)).to(x.dtype),
        lambda x, weight: (normed(x) * (1.0 + weight.float())).to(x.dtype),
    ],
    ids=["weight", "weight-plus-one"],
)
def test_multiplied_before_rounding_matches_as_a_norm_in_float32_alone(function):
    """As Gemma writes it: the norm itself is one in float32, and the rounding stays where it is."""
    x, weight = inputs(dtype=torch.bfloat16)
    report, graphs = rewritten(function, x, weight)
    assert report.lifted == {"rms_norm": 1}
    names = [op.name for op in graphs.rewritten]
    assert names[-2:] == ["qtts.rms_norm.default", "prims.convert_element_type.default"]
    assert names.count("prims.convert_element_type.default") == 3
