"""The codec of a quantised KV cache in plain PyTorch: TurboQuant (arXiv 2504.19874) for 3 and 4 bits, scaled e4m3 for 8."""

import math
from typing import NamedTuple

import torch

from qtts_compile.kernels.turboquant.codebook import codebook
from qtts_compile.kernels.turboquant.format import E4M3_BITS, check_head_dim
from qtts_compile.kernels.turboquant.rotation import rotate, unrotate


class _Plane(NamedTuple):
    """Some bits of all codes of a vector: numbers of ``dtype``, with ``width`` bits of one code at each of the ``shifts``."""

    width: int
    dtype: torch.dtype
    shifts: tuple[int, ...]


_PLANES = {
    3: (
        _Plane(2, torch.int32, tuple(4 * (i % 8) + 2 * (i // 8) for i in range(16))),
        _Plane(1, torch.int16, tuple(4 * (i % 4) + 3 - i // 4 for i in range(16))),
    ),
    4: (_Plane(4, torch.int32, tuple(range(0, 32, 4))),),
    E4M3_BITS: (_Plane(8, torch.uint8, (0,)),),
}
E4M3_MAX = 448.0
FLOAT16_MAX = 65504.0
TINY = 1e-30


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes ``[..., D]`` of 3, 4 or 8 ``bits`` into uint8 ``[..., bits * D / 8]``, laid out as :class:`Format` says.

    Raises ``ValueError`` for other bits and for a D that :func:`check_head_dim` refuses.
    """
    check_head_dim(codes.shape[-1])
    planes, first = [], 0
    for plane in _planes(bits):
        fields = (codes.long() >> first & (1 << plane.width) - 1).unflatten(-1, (-1, len(plane.shifts)))
        planes.append((fields << torch.tensor(plane.shifts, device=codes.device)).sum(-1).to(plane.dtype).contiguous().view(torch.uint8))
        first += plane.width
    return torch.cat(planes, dim=-1)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Invert :func:`pack`: return uint8 codes ``[..., D]``. Raises ``ValueError`` for other bits and a size that no D has."""
    planes = _planes(bits)
    width = 8 * packed.shape[-1] // bits
    check_head_dim(width)
    codes, first = torch.zeros(*packed.shape[:-1], width, dtype=torch.long, device=packed.device), 0
    for plane, numbers in zip(planes, packed.split([plane.width * width // 8 for plane in planes], dim=-1), strict=True):
        shifts = torch.tensor(plane.shifts, device=packed.device)
        fields = numbers.contiguous().view(plane.dtype).long().unsqueeze(-1) >> shifts & (1 << plane.width) - 1
        codes |= fields.flatten(-2) << first
        first += plane.width
    return codes.to(torch.uint8)


def quantize(x: torch.Tensor, bits: int, unbiased: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return uint8 codes ``[..., bits * D / 8]`` and float16 scales ``[...]`` of vectors ``x`` ``[..., D]``, computed in float32.

    With 3 or 4 ``bits``, y = :func:`rotate` (x) is scaled to a mean square of 1 and each coordinate goes to the level c of the nearest centroid
    of :func:`codebook`. The scale, which c is multiplied by to decode, is |x|^2 / <y, c> if ``unbiased`` (for keys: then <x, decoded> = |x|^2)
    and <y, c> / |c|^2 if not (for values: the least squared error). With 8 bits the codes are x / scale in e4m3, rounded to the nearest even
    and saturated, and the scale is the largest magnitude / 448. A vector of zeros has the scale 0. Below about 1e-4 scales are subnormal and
    coarser, down to 0.

    Raises ``ValueError`` for other bits, for a D that :func:`check_head_dim` refuses, and for vectors that are not finite or too large for a
    float16 scale: a norm of about 65504 * sqrt(D) for 3 and 4 bits, a magnitude of 2.9e7 for 8.
    """
    _planes(bits)
    check_head_dim(x.shape[-1])
    x = x.float()
    peak = x.abs().amax(-1, keepdim=True)
    if bits == E4M3_BITS:
        scale = _storable(peak / E4M3_MAX, x)
        ratio = torch.where(scale > 0, x / scale.float(), 0.0)
        return ratio.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8), scale.squeeze(-1)
    # Squares of the vector itself could overflow or vanish.
    peak = peak.clamp(min=TINY)
    x_unit = x * (1.0 / peak)
    norm = (x_unit * x_unit).sum(-1, keepdim=True).sqrt()
    root = x.shape[-1] ** 0.5
    z = rotate(x_unit) * (root / norm.clamp(min=TINY))
    book, half = codebook(bits), 2 ** (bits - 1)
    step = torch.bucketize(z.abs(), torch.tensor(book.boundaries[half:], device=x.device))
    indices = torch.where(z > 0, step, half + step)
    c = _levels(bits, x.device)[indices]
    product = (z * c).sum(-1, keepdim=True)
    ratio = x.shape[-1] / torch.where(norm == 0, 1.0, product) if unbiased else product / (c * c).sum(-1, keepdim=True)
    return pack(indices, bits), _storable(norm * ratio / root * peak, x).squeeze(-1)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the vectors, float32 ``[..., D]``, that codes ``[..., bits * D / 8]`` and scales ``[...]`` of :func:`quantize` stand for."""
    scale = scale.float().unsqueeze(-1)
    if bits == E4M3_BITS:
        return codes.view(torch.float8_e4m3fn).float() * scale
    return unrotate(_levels(bits, codes.device)[unpack(codes, bits).int()] * scale)


def _levels(bits: int, device: torch.device) -> torch.Tensor:
    """Return the level of each code."""
    positive = codebook(bits).levels[2 ** (bits - 1) :]
    return torch.tensor((*positive, *(-level for level in positive)), device=device)


def _planes(bits: int) -> tuple[_Plane, ...]:
    if bits not in _PLANES:
        raise ValueError(f"codes have 3, 4 or 8 bits, got {bits}")
    return _PLANES[bits]


def _storable(scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    refused = ~(scale <= FLOAT16_MAX).squeeze(-1)
    if refused.any():
        place = tuple(refused.nonzero()[0].tolist())
        largest = x[place].abs().amax().item()
        way = "keep this cache in bf16"
        if not math.isfinite(largest):
            way = "look for where the model leaves the range of its dtype (weights, inputs, activations), as a cache in bf16 would hold the same"
        raise ValueError(
            f"a quantised KV cache holds finite vectors with a scale of at most {FLOAT16_MAX:g}; that at {place} has the largest magnitude"
            f" {largest:g} and a norm of {x[place].double().norm().item():g}: {way}"
        )
    return scale.half()
