"""Caches for the tests of the operators that write and read them."""

from typing import NamedTuple

import torch

from qtts_compile.kernels.turboquant.codebook import codebook
from qtts_compile.kernels.turboquant.codec import unpack
from qtts_compile.kernels.turboquant.format import E4M3_BITS, Format
from qtts_compile.kernels.turboquant.rotation import rotate

FORMATS = ["int4", "k4v3", "int3", "fp8"]


class Buffers(NamedTuple):
    """The buffers of a cache, in the order of the operators' arguments."""

    k_codes: torch.Tensor
    v_codes: torch.Tensor
    scales: torch.Tensor
    kept: torch.Tensor

    def clone(self) -> "Buffers":
        """Return a copy in memory of its own."""
        return Buffers(*(tensor.clone() for tensor in self))


def poisoned(
    format: str, batch: int, heads: int, slots: int, width: int, n_kept: int, dtype: torch.dtype, device: str, layout: str = "contiguous"
) -> Buffers:
    """Return buffers full of what no write stores: NaN and, in the codes, 165; ``layout`` as for ``random_tensor``."""
    parsed = Format.parse(format)

    def full(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        value = 165 if dtype == torch.uint8 else float("nan")
        if layout == "sliced":
            edges = [1] * (len(shape) - 1) + [4 if dtype == torch.uint8 else 1]  # codes are read in words
            whole = torch.full([size + 2 * edge for size, edge in zip(shape, edges)], value, dtype=dtype, device=device)
            return whole[tuple(slice(edge, edge + size) for size, edge in zip(shape, edges))]
        if layout == "transposed":
            return torch.full([*shape[:-3], shape[-2], shape[-3], shape[-1]], value, dtype=dtype, device=device).transpose(-3, -2)
        return torch.full(shape, value, dtype=dtype, device=device)

    return Buffers(
        full((batch, heads, slots, parsed.key_bytes(width)), torch.uint8),
        full((batch, heads, slots, parsed.value_bytes(width)), torch.uint8),
        full((2, batch, heads, slots), torch.float16),
        full((2, batch, heads, n_kept, width), dtype),
    )


def assert_same_codes(actual: torch.Tensor, expected: torch.Tensor, x: torch.Tensor, bits: int) -> None:
    """Assert that codes of ``x`` are equal, but for coordinates that lie on the boundary of two centroids as nearly as float32 can tell."""
    if bits == E4M3_BITS or torch.equal(actual, expected):
        assert torch.equal(actual, expected)
        return
    moved = unpack(actual, bits) != unpack(expected, bits)
    z = rotate(x.double() / x.double().norm(dim=-1, keepdim=True)) * x.shape[-1] ** 0.5
    distances = (z.unsqueeze(-1) - torch.tensor(codebook(bits).boundaries, device=z.device)).abs().amin(-1)
    assert (distances[moved] < 1e-5).all(), f"codes differ {distances[moved].max().item():g} from a boundary"
