"""The randomised Hadamard transform, which makes the coordinates of any vector look normally distributed (arXiv 2504.19874, 2404.00456)."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false
# Triton's stubs do not know its static loops and shapes.

import torch
import triton
import triton.language as tl

FACTORS = tl.constexpr((0xC2B2AE3D, 0x27D4EB2F))


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Return ``R x = H (s * x) / sqrt(D)`` in float32 for ``x`` ``[..., D]``: H is the Hadamard matrix, s the fixed :func:`signs`.

    Norms and dot products stay. Raises ``ValueError`` unless D is a power of two.
    """
    _check_power_of_two(x)
    return _hadamard(x.float() * signs(x.shape[-1], x.device)) * x.shape[-1] ** -0.5


def unrotate(y: torch.Tensor) -> torch.Tensor:
    """Invert :func:`rotate`."""
    _check_power_of_two(y)
    return _hadamard(y.float()) * signs(y.shape[-1], y.device) * y.shape[-1] ** -0.5


def signs(width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return float32 ``[width]`` of 1 and -1: the top bit of a 32-bit hash of the index."""
    first, second = FACTORS.value
    hashes = torch.arange(width, device=device) * first & 0xFFFFFFFF
    hashes = (hashes ^ hashes >> 15) * second & 0xFFFFFFFF
    return 1.0 - 2.0 * (hashes >> 31)


def _hadamard(x: torch.Tensor) -> torch.Tensor:
    # Each step combines neighbours and moves the lowest bit of the index to the top, so that after all steps every bit is back.
    for _ in range(x.shape[-1].bit_length() - 1):
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        x = torch.cat((even + odd, even - odd), dim=-1)
    return x


def _check_power_of_two(x: torch.Tensor) -> None:
    width = x.shape[-1]
    if width < 1 or width & (width - 1):
        raise ValueError(f"a Hadamard transform needs a width that is a power of two, got {tuple(x.shape)}")


@triton.constexpr_function
def log2(n):
    """Return the exponent of a power of two."""
    return n.bit_length() - 1


@triton.jit
def is_minus(column):
    """Tell which of :func:`signs` are -1."""
    hashes = column.to(tl.uint32) * FACTORS[0]
    hashes = (hashes ^ (hashes >> 15)) * FACTORS[1]
    return hashes >> 31 == 1


@triton.jit
def flip(x):
    """Multiply the last dimension of ``x``, ``[D]`` or ``[N, D]``, by its :func:`signs`."""
    is_flipped = is_minus(tl.arange(0, x.shape[len(x.shape) - 1]))
    if len(x.shape) == 1:
        return tl.where(is_flipped, -x, x)
    else:
        return tl.where(is_flipped[None, :], -x, x)


@triton.jit
def hadamard(x):
    """Multiply ``x``, ``[D]`` or rows ``[N, D]``, by the Hadamard matrix."""
    for _ in tl.static_range(log2(x.shape[len(x.shape) - 1])):
        if len(x.shape) == 1:  # a row of its own in two dimensions would be laid out as a column
            even, odd = tl.split(tl.reshape(x, [x.shape[0] // 2, 2]))
            x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (1, 0)), [x.shape[0]])
        else:
            even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
            x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), [x.shape[0], x.shape[1]])
    return x


@triton.jit
def rotate_row(x):
    """Apply :func:`rotate` to a float32 row ``[D]``."""
    return hadamard(flip(x)) * (x.shape[0] ** -0.5)


@triton.jit
def unrotate_rows(y):
    """Apply :func:`unrotate` to float32 ``[D]`` or ``[N, D]``."""
    return flip(hadamard(y)) * (y.shape[len(y.shape) - 1] ** -0.5)
