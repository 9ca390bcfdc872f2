"""Lloyd-Max quantisers of the normal distribution (Lloyd, 1982; Max, 1960), which TurboQuant (arXiv 2504.19874) rounds rotated coordinates to."""

import functools
import math
from typing import NamedTuple

import torch

BITS = (2, 3, 4)


class Codebook(NamedTuple):
    """The scalar quantiser of N(0, 1) with the least mean squared error for its number of levels.

    ``centroids`` are the ``2**bits`` levels in ascending order, ``boundaries`` the ``2**bits - 1`` values between them: a coordinate's index
    is the number of boundaries below it. ``levels`` are the centroids in bfloat16, which is what codes stand for.
    ``mse`` is the expected squared error of the centroids.
    """

    centroids: tuple[float, ...]
    boundaries: tuple[float, ...]
    levels: tuple[float, ...]
    mse: float


@functools.cache
def codebook(bits: int) -> Codebook:
    """Compute the codebook of 2, 3 or 4 ``bits``. Raises ``ValueError`` for another number."""
    if bits not in BITS:
        raise ValueError(f"bits must be 2, 3 or 4, got {bits}")
    # By symmetry only the positive half is sought: each boundary midway between its neighbours, each centroid the mean between its boundaries.
    n_levels = 2 ** (bits - 1)
    centroids, previous = [(i + 0.5) / bits for i in range(n_levels)], [math.inf] * n_levels
    edges = []
    while max(abs(new - old) for new, old in zip(centroids, previous)) > 1e-14:
        edges = [0.0, *((low + high) / 2 for low, high in zip(centroids, centroids[1:])), math.inf]
        previous, centroids = centroids, [_mass_times_x(low, high) / _mass(low, high) for low, high in zip(edges, edges[1:])]
    energy = 2 * sum(_mass(low, high) * level**2 for low, high, level in zip(edges, edges[1:], centroids))
    inner = edges[1:-1]
    every = (*(-level for level in reversed(centroids)), *centroids)
    return Codebook(
        centroids=every,
        boundaries=(*(-edge for edge in reversed(inner)), 0.0, *inner),
        levels=tuple(torch.tensor(every).bfloat16().tolist()),
        mse=1 - energy,
    )


def _mass(low: float, high: float) -> float:
    """Integrate the normal density."""
    return (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2


def _mass_times_x(low: float, high: float) -> float:
    """Integrate x times the normal density."""
    return (math.exp(-(low**2) / 2) - math.exp(-(high**2) / 2)) / math.sqrt(2 * math.pi)
