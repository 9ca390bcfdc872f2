"""Test inputs in every layout, and the accuracy that a kernel owes: that of eager PyTorch in the same dtype, against a float64 oracle."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from hypothesis import strategies as st

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LAYOUTS = ["contiguous", "transposed", "sliced", "strided"]
EVERY_OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")

dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(0, 2**16)


def random_tensor(seed: int, shape: Sequence[int], dtype: torch.dtype, device: str, layout: str = "contiguous") -> torch.Tensor:
    """Return normal values in contiguous memory or a view of it: dimensions 1 and -2 swapped, a slice, or every second element."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "transposed" and len(shape) > 2:
        swapped = list(shape)
        swapped[1], swapped[-2] = swapped[-2], swapped[1]
        return torch.randn(swapped, generator=generator).to(device, dtype).transpose(1, -2)
    if layout == "sliced":
        wider = [size + 2 for size in shape]
        return torch.randn(wider, generator=generator).to(device, dtype)[tuple(slice(1, size + 1) for size in shape)]
    if layout == "strided":
        return torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(device, dtype)[..., ::2]
    return torch.randn(shape, generator=generator).to(device, dtype)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN, so that an element that a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def rotations(weight: torch.Tensor) -> torch.Tensor:
    """Return the rows of ``weight`` [N, K] followed by themselves rotated, [N * R, K] in all: at least 64 outputs of one distribution.

    The largest error of a few sums says little about their arithmetic: it may be zero by chance. That of many is a measure.
    """
    return torch.cat([weight.roll(turn, 1) for turn in range(-(-64 // len(weight)))])


def with_other_scales(x: torch.Tensor) -> torch.Tensor:
    """Return rows ``x`` [..., K] that a norm divides by their length, and the same rows of three other lengths, [4, ..., K].

    The error of a row's scale is in all of its outputs, and small by chance, however many outputs there are.
    """
    return torch.stack([x, x * 0.875, x * 0.75, x * 0.625])


def assert_accurate(actual: torch.Tensor, oracle: torch.Tensor, reference: torch.Tensor, leading: bool = False) -> None:
    """Assert that ``actual`` is finite and within twice the error of ``reference`` plus a rounding of the largest value.

    leading: ``oracle`` and ``reference`` have more rows or outputs than ``actual``, which are there to measure the reference's error.
    """
    error_of_all = (reference.double() - oracle).abs()
    largest = oracle.abs()
    if leading:
        oracle, reference = (t[tuple(map(slice, actual.shape))] for t in (oracle, reference))
    assert actual.shape == reference.shape and actual.dtype == reference.dtype, (
        f"{actual.shape} {actual.dtype}, not {reference.shape} {reference.dtype}"
    )
    assert actual.device.type == oracle.device.type and oracle.dtype == torch.float64
    if actual.numel() == 0:
        return
    assert actual.isfinite().all(), "the result is not finite"
    error = (actual.double() - oracle).abs().max().item()
    reference_error = error_of_all.max().item()
    budget = 2 * (reference_error + torch.finfo(actual.dtype).eps * largest.max().item())
    assert error <= budget, f"kernel error {error:.3e} exceeds the budget {budget:.3e}; the reference's error is {reference_error:.3e}"
