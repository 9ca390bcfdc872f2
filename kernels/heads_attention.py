"""Attention of one new token of each of several texts by kernels of clusters, in one launch.

It is chosen by the number of slots, as a CUDA graph knows no position, where it was faster in layers on an H200: early in caches of 8192 slots, but
not at their end, where of 8 texts the kernels of one block are.
"""

from typing import Any

import torch

from qtts_compile.kernels.clusters import device as clusters
from qtts_compile.kernels.clusters.coded_heads_kernel import coded_heads_attention_kernel
from qtts_compile.kernels.clusters.heads_kernel import heads_attention_kernel
from qtts_compile.kernels.clusters.memory import BYTES_OF_TILE, END_OF_COLUMNS, GROUP, HEAD, KEYS
from qtts_compile.kernels.norm_qkv import MAX_SLOTS, are_aligned, are_codes_served, bits_of, launch
from qtts_compile.kernels.rotary import Angles
from qtts_compile.kernels.sizes import cdiv

MAX_TEXTS = 32
PARTS, PARTS_OF_CODES = (1, 2, 4, 8, 16), (1, 2, 4, 8)  # of the CTAs of a cluster, for a key head of a text
# Over fewer slots, or of more texts, the kernels of one block are faster.
MIN_CHOSEN_SLOTS, MAX_CHOSEN_PAIRS = 256, 128  # of texts and key heads
MANY_CTAS, LONG_SLOTS = 256, 4096  # more take longer to join than to attend, but for caches that are longer, which take twice as many
LOOKED_AT = 16 * 32 * clusters.WARPS  # bytes of a mask by a CTA at once


def serves(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    angles: Angles, caches: tuple[torch.Tensor, ...], mask: torch.Tensor | None,
) -> bool:  # fmt: skip
    """Tell whether :func:`launch_heads` takes these heads ``[B, H, T, D]`` and caches ``[B, Hk, S, D]``, with an expanded mask ``[B, Hq, T, S]``."""
    if not are_heads_served(q, k, v, q_weight, k_weight, angles, mask):
        return False
    are_rows_dense = all(cache.stride()[2:] == (HEAD.value, 1) for cache in caches)
    return are_rows_dense and _are_slots_served(caches[0].shape[2]) and all(_lie_at_16_bytes(cache) for cache in caches)


def are_heads_served(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    angles: Angles, mask: torch.Tensor | None,
) -> bool:  # fmt: skip
    """Tell whether kernels of clusters take heads, whatever their cache: sizes are fixed, and what they copy in bulk is at multiples of 16 bytes."""
    batch, heads, tokens, width = q.shape
    if not clusters.has_clusters(q.device) or q.dtype != torch.bfloat16 or q_weight is None or k_weight is None:
        return False
    if not 2 <= batch <= MAX_TEXTS or tokens != 1 or width != HEAD.value or heads != GROUP.value * k.shape[1]:
        return False
    if mask is not None and not (mask.dtype == torch.bool and mask.stride(3) == 1 and mask.stride(1) == 0 and mask.stride(0) % 16 == 0):
        return False
    if angles.stride_axis % 8 or angles.stride_batch % 8 or not all(_lie_at_16_bytes(x) and x.stride(3) == 1 for x in (q, k, v)):
        return False
    return are_aligned(q_weight, k_weight, angles.cos, angles.sin, *([] if mask is None else [mask]))


def _are_slots_served(slots: int) -> bool:
    return slots % KEYS.value == 0 and 0 < slots <= MAX_SLOTS


def _lie_at_16_bytes(tensor: torch.Tensor) -> bool:
    """Tell whether each head of each text begins at a multiple of 16 bytes."""
    return are_aligned(tensor) and all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:2])


def launch_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, q_eps: float, k_eps: float,
    angles: Angles, k_cache: torch.Tensor, v_cache: torch.Tensor, position: torch.Tensor, mask: torch.Tensor | None, scale: float,
    out: torch.Tensor, parts: int | None,
) -> bool:  # fmt: skip
    """Launch the kernel of clusters, of whose 16 thread blocks ``parts`` share the slots of a key head of a text, and tell whether it was launched.

    With None it is launched where it serves the arguments and is chosen, with as many parts as :func:`choose_parts` chooses; with 0 it is not.

    Raises:
        ValueError: if parts are asked for and it does not serve the arguments or the GPU has no room for a cluster, or they are not of ``PARTS``.
    """
    batch, key_heads, slots, _ = k_cache.shape
    pairs, tiles = batch * key_heads, slots // KEYS.value
    chosen = choose_parts(pairs, slots, PARTS) if parts is None else parts
    if not chosen:
        return False
    if not serves(q, k, v, q_weight, k_weight, angles, (k_cache, v_cache), mask):
        return _refuse(parts, q.device)
    _check_parts(chosen, PARTS)
    arguments = (
        q, k, v, q_weight, k_weight, angles.cos, angles.sin, k_cache, v_cache, position, mask, out, q_eps, k_eps, scale, pairs, key_heads, slots,
        *(x.stride()[:2] for x in (q, k, v, k_cache, v_cache)), _stride_of(mask), (angles.stride_axis, angles.stride_batch),
    )  # fmt: skip
    constants = dict(PARTS=chosen, TILES=_most_tiles(tiles, chosen), SHARED_BYTES=END_OF_COLUMNS.value)
    return _launch(heads_attention_kernel, pairs, q.device, arguments, angles, slots, constants) or _refuse(parts, q.device)


def choose_parts(pairs: int, slots: int, allowed: tuple[int, ...]) -> int | None:
    """Return into how many parts each of so many pairs of a text and a key head is shared, or None if other kernels are chosen.

    They are as many as keep the GPU busy, if each has a tile for each of its warps.
    """
    if slots < MIN_CHOSEN_SLOTS or pairs > MAX_CHOSEN_PAIRS:
        return None
    ctas = MANY_CTAS if slots <= LONG_SLOTS else 2 * MANY_CTAS
    most = min(ctas // pairs, slots // (KEYS.value * clusters.WARPS))
    return max(parts for parts in allowed if parts <= most)


def _check_parts(parts: int, allowed: tuple[int, ...]) -> None:
    if parts not in allowed:
        raise ValueError(f"parts={parts}: give one of {', '.join(map(str, allowed))}, or 0 for the kernels of one block")


def _refuse(parts: int | None, device: torch.device) -> bool:
    """Return False if other kernels may be launched, as no parts were asked for."""
    if parts is None:
        return False
    raise ValueError(f"parts={parts}: kernels of clusters do not serve these arguments on {device}; leave it out")


def _launch(kernel: Any, pairs: int, device: torch.device, arguments: tuple[Any, ...], angles: Angles, slots: int, constants: dict[str, Any]) -> bool:
    """Launch a kernel, or tell that the GPU has no room for a cluster."""
    n_clusters = cdiv(pairs * constants["PARTS"], clusters.CTAS)
    launched = launch(kernel, n_clusters, device, arguments, LOOKS=cdiv(slots, LOOKED_AT), **constants, **angles.constants)
    if launched is None:
        return False
    clusters.divide_memory(launched)
    return True


def _most_tiles(tiles: int, parts: int) -> int:
    """Return what a kernel is told of a CTA's tiles: whether a warp may have several, and not how many, as it is compiled for each case."""
    return clusters.WARPS + (cdiv(tiles, parts) > clusters.WARPS)


def _stride_of(mask: torch.Tensor | None) -> int:
    return 0 if mask is None else mask.stride(0)


def serves_codes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, angles: Angles,
    k_codes: torch.Tensor, v_codes: torch.Tensor, scales: torch.Tensor, kept: torch.Tensor, sinks: int, format: str, mask: torch.Tensor | None,
) -> bool:  # fmt: skip
    """Tell whether :func:`launch_coded_heads` takes these heads, this quantised cache and this expanded mask."""
    if not are_heads_served(q, k, v, q_weight, k_weight, angles, mask) or not are_codes_served(k_codes, v_codes, scales, kept, sinks, format):
        return False
    are_texts_served = all(_lie_at_16_bytes(tensor) for tensor in (k_codes, v_codes, scales, kept))
    return are_texts_served and _are_slots_served(k_codes.shape[2])


def launch_coded_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, q_eps: float, k_eps: float,
    angles: Angles,
    k_codes: torch.Tensor, v_codes: torch.Tensor, scales: torch.Tensor, kept: torch.Tensor, position: torch.Tensor, start: torch.Tensor,
    sinks: int, format: str, mask: torch.Tensor | None, scale: float, out: torch.Tensor, parts: int | None,
) -> bool:  # fmt: skip
    """Launch the kernel of clusters over codes as :func:`launch_heads` does, with one of ``PARTS_OF_CODES``."""
    batch, key_heads, slots, _ = k_codes.shape
    pairs, tiles = batch * key_heads, slots // KEYS.value
    chosen = choose_parts(pairs, slots, PARTS_OF_CODES) if parts is None else parts
    if not chosen:
        return False
    if not serves_codes(q, k, v, q_weight, k_weight, angles, k_codes, v_codes, scales, kept, sinks, format, mask):
        return _refuse(parts, q.device)
    _check_parts(chosen, PARTS_OF_CODES)
    kept_tiles = cdiv(cdiv(kept.shape[3], KEYS.value), chosen)  # of a CTA
    arguments = (
        q, k, v, q_weight, k_weight, angles.cos, angles.sin, k_codes, v_codes, scales, kept, position, start, mask, out, q_eps, k_eps, scale,
        pairs, key_heads, slots, start.stride(0), *(x.stride()[:2] for x in (q, k, v, k_codes, v_codes)), scales.stride()[:3], kept.stride()[:3],
        _stride_of(mask), (angles.stride_axis, angles.stride_batch),
    )  # fmt: skip
    constants = dict(
        PARTS=chosen, TILES=_most_tiles(tiles, chosen), KEPT_TILES=kept_tiles, SINKS=sinks, WINDOW=kept.shape[3] - sinks, **bits_of(format),
        SHARED_BYTES=END_OF_COLUMNS.value + (kept_tiles - 1) * BYTES_OF_TILE.value,
    )  # fmt: skip
    return _launch(coded_heads_attention_kernel, pairs, q.device, arguments, angles, slots, constants) or _refuse(parts, q.device)
