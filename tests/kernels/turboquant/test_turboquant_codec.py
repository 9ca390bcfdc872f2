import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import dtypes, random_tensor, seeds

from qtts_compile.kernels.turboquant.codebook import codebook
from qtts_compile.kernels.turboquant.codec import dequantize, pack, quantize, unpack

N = 20_000
MARGIN = 1.02


@functools.cache
def sphere_theory(bits: int, width: int) -> float:
    """Return the squared error, relative to the norm's square, of uniform directions whose norm is stored.

    A coordinate of a vector of norm sqrt(D) has the density (1 - t^2 / D)^((D - 3) / 2), a little narrower than N(0, 1).
    """
    root = width**0.5
    t = torch.linspace(-root, root, 400_001, dtype=torch.float64)[1:-1]
    density = ((width - 3) / 2 * torch.log1p(-t * t / width)).exp()
    book = codebook(bits)
    c = torch.tensor(book.centroids, dtype=torch.float64)[torch.bucketize(t, torch.tensor(book.boundaries, dtype=torch.float64))]
    return float(((t - c).square() * density).sum() / density.sum())


def distortion(x: torch.Tensor, bits: int, unbiased: bool) -> float:
    """Return the mean squared error of the decoded vectors, relative to their norm's square."""
    x = x.double()
    decoded = dequantize(*quantize(x.float(), bits, unbiased), bits).double()
    return float(((decoded - x).square().sum(-1) / x.square().sum(-1)).mean())


def heavy(width: int) -> torch.Tensor:
    """Return normal vectors with four channels of ten."""
    return random_tensor(0, (N, width), torch.float32, "cpu") * torch.where(torch.arange(width) % (width // 4) == 3, 10.0, 1.0)


@given(st.sampled_from([3, 4, 8]), st.sampled_from([32, 64, 128]), st.sampled_from([(), (3,), (2, 0), (2, 3)]), seeds)
def test_pack_and_unpack(bits, width, shape, seed):
    indices = torch.randint(2**bits, (*shape, width), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    codes = pack(indices, bits)
    assert codes.dtype == torch.uint8 and codes.shape == (*shape, bits * width // 8)
    assert torch.equal(unpack(codes, bits), indices)


def test_layout_of_codes():
    # Each coordinate alone, at the bits that Format describes.
    for j in range(64):
        one = (torch.arange(64) == j).to(torch.uint8)
        assert _set_bits(pack(15 * one, 4)) == {4 * j + bit for bit in range(4)}
        magnitudes, signs = pack(7 * one, 3).split([16, 8])
        word, i = divmod(j, 16)
        first = 32 * word + (4 * i if i < 8 else 4 * (i - 8) + 2)
        assert _set_bits(magnitudes) == {first, first + 1}
        assert _set_bits(signs) == {16 * word + (3, 7, 11, 15, 2, 6, 10, 14, 1, 5, 9, 13, 0, 4, 8, 12)[i]}
        assert pack(255 * one, 8).tolist() == (255 * one).tolist()


def _set_bits(packed):
    return {8 * i + bit for i, byte in enumerate(packed.tolist()) for bit in range(8) if byte >> bit & 1}


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("bits", [3, 4])
def test_distortion_is_that_of_theory(bits, width):
    x = random_tensor(bits, (N, width), torch.float32, "cpu")
    theory = sphere_theory(bits, width)
    assert theory == pytest.approx(codebook(bits).mse, rel=4 / width)  # the published table is for D without end
    codes, _ = quantize(x, bits, unbiased=True)
    norm_scale = x.norm(dim=-1) / width**0.5
    of_the_codes = float(((dequantize(codes, norm_scale, bits) - x).square().sum(-1) / x.square().sum(-1)).mean())
    assert of_the_codes == pytest.approx(theory, rel=0.01)
    # The best scale leaves the sine of the angle between a vector and its centroids, the unbiased one its tangent.
    assert theory * (1 - 3 / width) < distortion(x, bits, unbiased=False) < of_the_codes
    assert theory * (1 - 3 / width) < distortion(x, bits, unbiased=True) < MARGIN * theory / (1 - theory)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("bits", [3, 4])
def test_outliers_and_a_common_mean_cost_nothing(bits, width):
    for x in (random_tensor(1, (N, width), torch.float32, "cpu") + 1, heavy(width)):
        for unbiased in (True, False):
            assert distortion(x, bits, unbiased) < MARGIN * sphere_theory(bits, width)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("bits", [3, 4])
def test_keys_are_unbiased(bits, width):
    for x in (random_tensor(2, (N, width), torch.float32, "cpu"), heavy(width)):
        decoded = dequantize(*quantize(x, bits, unbiased=True), bits)
        products = (x * decoded).sum(-1) / (x * x).sum(-1)
        assert products.mean().item() == pytest.approx(1, abs=5e-4) and products.std() < 1e-3  # what rounding the scale to float16 leaves


@given(st.sampled_from([3, 4]), st.sampled_from([32, 64, 128]), seeds)
def test_values_have_the_best_scale(bits, width, seed):
    x = random_tensor(seed, (5, width), torch.float32, "cpu")
    codes, scale = quantize(x, bits, unbiased=False)
    error = (dequantize(codes, scale, bits) - x).square().sum(-1)
    for factor in (0.99, 1.01):
        assert (error < (dequantize(codes, scale.float() * factor, bits) - x).square().sum(-1)).all()


@given(st.sampled_from([3, 4]), st.booleans(), st.integers(-10, 10), dtypes, seeds)
def test_scales_with_its_input(bits, unbiased, exponent, dtype, seed):
    x = random_tensor(seed, (4, 64), dtype, "cpu").float()
    codes, scale = quantize(x, bits, unbiased)
    scaled_codes, scaled = quantize(x * 2.0**exponent, bits, unbiased)
    assert torch.equal(codes, scaled_codes)
    assert torch.allclose(scaled.float(), scale.float() * 2.0**exponent, rtol=2e-3, atol=2**-24)


@given(st.floats(1e-3, 1e3), seeds)
def test_e4m3(factor, seed):
    x = random_tensor(seed, (6, 64), torch.float32, "cpu") * factor
    codes, scale = quantize(x, 8, unbiased=True)
    largest = x.abs().amax(-1)
    assert torch.allclose(scale.float(), largest / 448, rtol=2**-11, atol=2**-25)
    error = (dequantize(codes, scale, 8) - x).abs()
    assert (error <= (x.abs() / 16).maximum(scale.float()[:, None] * 2**-10) + largest[:, None] * 2**-11).all()
    assert (codes & 0x7F).amax() <= 0x7E


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("unbiased", [True, False])
def test_zeros_and_vanishing_vectors(bits, unbiased):
    x = torch.zeros(4, 64)
    x[1], x[2], x[3, 5] = 1e-30, 1e-45, -1e-38
    codes, scale = quantize(x, bits, unbiased)
    assert (scale == 0).all()
    assert (dequantize(codes, scale, bits) == 0).all()
    assert bits != 8 or (codes == 0).all()


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("value", [1e30, -3e38, float("inf"), float("-inf"), float("nan")])
def test_what_no_scale_fits_is_refused(bits, unbiased, value):
    way = "keep this cache in bf16" if math.isfinite(value) else "look for where the model leaves the range of its dtype"
    for place in (slice(None), 7):
        x = random_tensor(0, (2, 3, 64), torch.bfloat16, "cpu")
        x[1, 2, place] = value
        with pytest.raises(ValueError, match=rf"\(1, 2\) has the largest magnitude .*: {way}"):
            quantize(x, bits, unbiased)


@pytest.mark.parametrize("unbiased", [True, False])
def test_large_norms_that_fit(unbiased):
    x = random_tensor(0, (50, 128), torch.float32, "cpu") * 5e4
    decoded = dequantize(*quantize(x, 4, unbiased), 4)
    assert ((decoded - x).norm(dim=-1) / x.norm(dim=-1)).max() < 0.15


@pytest.mark.parametrize("bits", [2, 5, 16])
def test_other_bits(bits):
    for function in (lambda x: pack(x, bits), lambda x: unpack(x, bits), lambda x: quantize(x.float(), bits, True)):
        with pytest.raises(ValueError, match=f"3, 4 or 8 bits, got {bits}"):
            function(torch.zeros(2, 32, dtype=torch.uint8))


@pytest.mark.parametrize("width", [8, 16, 24, 96])
def test_other_widths(width):
    for function in (lambda x: pack(x, 4), lambda x: quantize(x.float(), 4, True)):
        with pytest.raises(ValueError, match=f"power of two from 32 on, got {width}"):
            function(torch.zeros(2, width, dtype=torch.uint8))
    with pytest.raises(ValueError, match="power of two from 32 on, got 18"):
        unpack(torch.zeros(2, 7, dtype=torch.uint8), 3)
