"""What operators have in common that project one token and attend with it, over whatever cache: its heads, checks, and the kernels of clusters."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from qtts_compile.kernels.checks import check_rank, check_shape
from qtts_compile.kernels.clusters import device as clusters
from qtts_compile.kernels.clusters.memory import GROUP, HEAD, KEYS
from qtts_compile.kernels.norm_linears import check_norm_linears
from qtts_compile.kernels.pdl import pdl_options
from qtts_compile.kernels.rotary import Angles
from qtts_compile.kernels.turboquant.format import Format

MAX_SLOTS = 8192  # of a cache: the threads of a cluster look at four bytes of its mask each
WIDTHS = (512, 1024, 2048)  # of x: with more the kernels run out of registers
PREFETCHED = 4 * 2**20  # bytes, of two weights together: about what memory brings while attention leaves it idle
MAX_KEPT = KEYS.value * clusters.CTAS  # tokens that it keeps as they are: a tile for each CTA
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # queries, keys and values, each [1, H, 1, D]


def as_heads(results: Sequence[torch.Tensor], width: int) -> Heads:
    """Return the projections ``[..., H D]`` of one row as heads."""
    q, k, v = (result.view(1, -1, 1, width) for result in results)
    return q, k, v


def allocate(x: torch.Tensor, weights: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    """Allocate the attention ``[1, Hq, 1, D]`` of a token."""
    return torch.empty((1, weights[0].shape[0] // width, 1, width), dtype=x.dtype, device=x.device)


def check_slots(name: str, cache: torch.Tensor, attention: str) -> None:
    """Raise ``ValueError`` unless a ``cache`` ``[1, Hk, S, D]`` has 1 to :data:`MAX_SLOTS` slots; ``attention`` is the operator that takes more."""
    check_rank(name, cache, "1, Hk, S, D")
    if not 0 < cache.shape[2] <= MAX_SLOTS:
        raise ValueError(f"{name} must have 1 to {MAX_SLOTS} slots, got {tuple(cache.shape)}; call norm_linears and {attention} for more")


def check_projections(
    x: torch.Tensor, norm_weight: torch.Tensor | None, weights: Sequence[torch.Tensor], eps: float, width: int, attention: str
) -> Heads:
    """Raise ``TypeError`` or ``ValueError`` unless these are one row and what projects it to heads of a ``width``.

    ``attention`` is the operator that takes more rows. Returns what has the shape, dtype and device of the heads, and no memory of its own.
    """
    check_norm_linears(x, norm_weight, weights, [None] * len(weights), eps)
    if len(weights) != 3:
        raise ValueError(f"weights must be those of queries, keys and values, got {len(weights)}")
    if x.numel() != x.shape[-1]:
        raise ValueError(f"x must have one row, got {tuple(x.shape)}; call norm_linears and {attention} for more")
    for i, weight in enumerate(weights):
        if width == 0 or weight.shape[0] % width:
            raise ValueError(f"weights[{i}] must be [H D, K] of heads as wide as the cache's, {width}, got {tuple(weight.shape)}")
    q, k, v = (x.reshape(-1)[0].expand(1, weight.shape[0] // width, 1, width) for weight in weights)
    return q, k, v


def are_served(
    x: torch.Tensor, norm_weight: torch.Tensor | None, weights: Sequence[torch.Tensor], q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    angles: Angles, mask: torch.Tensor | None, slots: int, width: int,
) -> bool:  # fmt: skip
    """Tell whether kernels of clusters take a token: their sizes are fixed, and what they copy in bulk lies at multiples of 16 bytes.

    Where the cache lies is for the operator to judge.
    """
    if not clusters.has_clusters(x.device) or x.dtype != torch.bfloat16 or norm_weight is None or q_weight is None or k_weight is None:
        return False
    are_heads_served = width == HEAD.value and weights[0].shape[0] == GROUP.value * weights[1].shape[0]
    are_sizes_served = are_heads_served and x.shape[-1] in WIDTHS and slots % KEYS.value == 0
    if not are_sizes_served or not all(weight.is_contiguous() for weight in weights) or angles.stride_axis % 8:
        return False
    if mask is not None and (mask.dtype != torch.bool or mask.numel() != slots or mask.stride(-1) != 1):
        return False
    return are_aligned(x, norm_weight, *weights, q_weight, k_weight, angles.cos, angles.sin, *([] if mask is None else [mask]))


def are_codes_served(k_codes: torch.Tensor, v_codes: torch.Tensor, scales: torch.Tensor, kept: torch.Tensor, sinks: int, format: str) -> bool:
    """Tell whether kernels of clusters take a quantised cache, as far as its format and one text's rows go."""
    parsed, n_kept = Format.parse(format), kept.shape[3]
    if not sinks <= KEYS.value <= n_kept - sinks or n_kept > MAX_KEPT:
        return False
    rows = (k_codes, parsed.key_bytes(HEAD.value)), (v_codes, parsed.value_bytes(HEAD.value))
    are_rows_served = all(codes.stride()[2:] == (row, 1) and codes.stride(1) % 16 == 0 for codes, row in rows)
    are_kept_served = scales.stride(3) == 1 and kept.stride()[3:] == (HEAD.value, 1)
    are_heads_served = all(tensor.stride(axis) % 8 == 0 for tensor in (scales, kept) for axis in (0, 2))
    return are_rows_served and are_kept_served and are_heads_served and are_aligned(k_codes, v_codes, scales, kept)


def bits_of(format: str) -> dict[str, int]:
    """Return the constants by which kernels of clusters know a quantised cache."""
    parsed = Format.parse(format)
    return dict(K_BITS=parsed.k_bits, V_BITS=parsed.v_bits)


def are_aligned(*tensors: torch.Tensor) -> bool:
    """Tell whether tensors begin where bulk copies can."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def check_prefetch(prefetch: Sequence[torch.Tensor] | None, x: torch.Tensor) -> None:
    """Raise ``ValueError`` unless these are two weights ``[N, K]`` of the same shape on the device of ``x``, or None."""
    if prefetch is None:
        return
    if len(prefetch) != 2:
        raise ValueError(f"prefetch must be two weights or None, got {len(prefetch)}")
    check_shape("prefetch[1]", prefetch[1], *prefetch[0].shape)
    for i, weight in enumerate(prefetch):
        if weight.device != x.device or not weight.is_contiguous():
            raise ValueError(f"prefetch[{i}] must be contiguous on {x.device}, got strides {weight.stride()} on {weight.device}")


def prefetch_arguments(prefetch: Sequence[torch.Tensor] | None, x: torch.Tensor, key_heads: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return what a kernel of clusters prefetches of two weights: these, and how many bytes of each are a CTA's share."""
    if prefetch is None or not are_aligned(*prefetch):
        return x, x, 0
    first, second = prefetch
    bytes = min(PREFETCHED // 2, first.nbytes, second.nbytes)
    return first, second, bytes // (key_heads * clusters.CTAS) // 16 * 16


def launch(kernel: Any, n_clusters: int, device: torch.device, arguments: Sequence[Any], **constants: Any) -> Any:
    """Launch a kernel of so many clusters and return what it was compiled to, or None if the GPU has no room for a cluster."""
    options = dict(**constants, **pdl_options(device), num_warps=clusters.WARPS, num_ctas=clusters.CTAS, debug=True, sanitize_overflow=False)
    run = partial(kernel.run, *arguments, grid=(n_clusters,), **options)
    if not clusters.have_room(device, partial(run, warmup=True)):
        return None
    return run(warmup=False)
