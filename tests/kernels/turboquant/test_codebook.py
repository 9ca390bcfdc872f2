import pytest
import torch

from qtts_compile.kernels.turboquant.codebook import BITS, codebook

# The positive half as published for N(0, 1): centroids, boundaries above 0, mean squared error.
PUBLISHED = {
    2: ([0.45278, 1.51042], [0.98160], 0.11748),
    3: ([0.24509, 0.75601, 1.34391, 2.15195], [0.50055, 1.04996, 1.74793], 0.03455),
    4: (
        [0.12840, 0.38805, 0.65676, 0.94234, 1.25623, 1.61805, 2.06902, 2.73259],
        [0.25822, 0.52240, 0.79955, 1.09929, 1.43714, 1.84353, 2.40080],
        0.00950,
    ),
}


@pytest.mark.parametrize("bits", BITS)
def test_equals_the_published_table(bits):
    centroids, boundaries, mse = PUBLISHED[bits]
    book = codebook(bits)
    assert book.centroids == pytest.approx([-x for x in reversed(centroids)] + centroids, abs=6e-6)
    assert book.boundaries == pytest.approx([-x for x in reversed(boundaries)] + [0.0] + boundaries, abs=6e-6)
    assert book.mse == pytest.approx(mse, abs=6e-6)


@pytest.mark.parametrize("bits", BITS)
def test_is_a_fixed_point(bits):
    # The mean of the density between two boundaries, by numerical integration, is the centroid; the boundaries are midway.
    book = codebook(bits)
    x = torch.linspace(-9, 9, 1_800_001, dtype=torch.float64)
    density = torch.exp(-x * x / 2)
    index = torch.bucketize(x, torch.tensor(book.boundaries, dtype=torch.float64))
    mass = torch.zeros(2**bits, dtype=torch.float64).index_add(0, index, density)
    means = torch.zeros(2**bits, dtype=torch.float64).index_add(0, index, density * x) / mass
    centroids = torch.tensor(book.centroids, dtype=torch.float64)
    assert torch.allclose(means, centroids, atol=2e-5)
    assert torch.allclose((centroids[1:] + centroids[:-1]) / 2, torch.tensor(book.boundaries, dtype=torch.float64), atol=1e-12)
    assert ((x - centroids[index]).square() * density).sum() / density.sum() == pytest.approx(book.mse, abs=1e-7)


@pytest.mark.parametrize("bits", [0, 1, 5, 8])
def test_other_bits(bits):
    with pytest.raises(ValueError, match=f"bits must be 2, 3 or 4, got {bits}"):
        codebook(bits)
