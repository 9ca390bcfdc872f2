"""RMSNorm, q/k/v projections and a decode step over a quantised KV cache, for one token in one launch and up to 8192 slots.

On Hopper, for the sizes of Qwen3: the kernel is one of clusters. Elsewhere its two parts are launched one after the other.
"""

from collections.abc import Sequence
from typing import Any

import torch

from qtts_compile.kernels.checks import check_rank
from qtts_compile.kernels.clusters import device as clusters
from qtts_compile.kernels.clusters.memory import END_OF_COLUMNS, KEYS, shared_bytes
from qtts_compile.kernels.clusters.quantized_kernel import norm_qkv_quantized_attention_kernel
from qtts_compile.kernels.gemv import as_matrix
from qtts_compile.kernels.library import define_op
from qtts_compile.kernels.norm_linears import norm_linears_reference, norm_linears_triton
from qtts_compile.kernels.norm_qkv import (
    allocate,
    are_codes_served,
    are_served,
    as_heads,
    bits_of,
    check_prefetch,
    check_projections,
    check_slots,
    launch,
    prefetch_arguments,
)
from qtts_compile.kernels.qk_norm_rope_quantized_attention import (
    check_qk_norm_rope_quantized_attention,
    qk_norm_rope_quantized_attention_reference,
    qk_norm_rope_quantized_attention_triton,
)
from qtts_compile.kernels.rotary import Angles, as_angles
from qtts_compile.kernels.sizes import cdiv


def norm_qkv_quantized_attention(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    weights: list[torch.Tensor],
    eps: float,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    q_eps: float,
    k_eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    sections: list[int],
    interleaved: bool,
    k_codes: torch.Tensor,
    v_codes: torch.Tensor,
    scales: torch.Tensor,
    kept: torch.Tensor,
    position: torch.Tensor,
    start: torch.Tensor,
    sinks: int,
    format: str,
    mask: torch.Tensor | None,
    scale: float,
    prefetch: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the attention of one token whose hidden state is ``x``, and write its key and value into a quantised cache.

    ``x`` is ``[..., K]`` of one row, ``weights`` are those of queries ``[Hq D, K]``, keys and values ``[Hk D, K]``; the arguments from
    ``k_codes`` on are those of ``qk_norm_rope_quantized_attention``, for one text and at most 8192 slots. The steps are those of
    ``norm_linears``, without biases, and ``qk_norm_rope_quantized_attention``, with the arguments and the rounding of both. The result
    ``[1, Hq, 1, D]`` is contiguous.

    ``prefetch`` are two weights ``[N, K]`` that a kernel after the next reads, of any dtype; while attention leaves memory idle, where it is computed
    by a kernel of clusters, that brings the beginning of both to the L2 cache. They change no result.

    All parameters, ``position`` and ``start`` must be at rest, as for those two.

    Raises ``TypeError`` or ``ValueError`` as those two do, and ``ValueError`` for more than one row or 8192 slots, other than three weights
    or two to prefetch, and those of other shapes or not contiguous.
    """
    return torch.ops.qtts.norm_qkv_quantized_attention.default(
        x, norm_weight, weights, eps, q_weight, k_weight, q_eps, k_eps, cos, sin, sections, interleaved,
        k_codes, v_codes, scales, kept, position, start, sinks, format, mask, scale, prefetch,
    )  # fmt: skip


def norm_qkv_quantized_attention_reference(
    x: torch.Tensor, norm_weight: torch.Tensor | None, weights: Sequence[torch.Tensor], eps: float,
    q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, q_eps: float, k_eps: float,
    cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool,
    k_codes: torch.Tensor, v_codes: torch.Tensor, scales: torch.Tensor, kept: torch.Tensor, position: torch.Tensor, start: torch.Tensor,
    sinks: int, format: str, mask: torch.Tensor | None, scale: float,
    prefetch: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Compute :func:`norm_qkv_quantized_attention` in plain PyTorch."""
    heads = as_heads(norm_linears_reference(x, norm_weight, weights, [None] * 3, eps), kept.shape[4])
    return qk_norm_rope_quantized_attention_reference(
        *heads, q_weight, k_weight, q_eps, k_eps, cos, sin, sections, interleaved,
        k_codes, v_codes, scales, kept, position, start, sinks, format, mask, scale,
    )  # fmt: skip


def check_norm_qkv_quantized_attention(
    x: torch.Tensor, norm_weight: torch.Tensor | None, weights: Sequence[torch.Tensor], eps: float,
    q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, q_eps: float, k_eps: float,
    cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool,
    k_codes: torch.Tensor, v_codes: torch.Tensor, scales: torch.Tensor, kept: torch.Tensor, position: torch.Tensor, start: torch.Tensor,
    sinks: int, format: str, mask: torch.Tensor | None, scale: float,
    prefetch: Sequence[torch.Tensor] | None = None,
) -> None:  # fmt: skip
    """Raise ``TypeError`` or ``ValueError`` unless :func:`norm_qkv_quantized_attention` accepts the arguments."""
    check_prefetch(prefetch, x)
    check_slots("k_codes", k_codes, "qk_norm_rope_quantized_attention")
    check_rank("kept", kept, "2, 1, Hk, sinks + window, D")
    heads = check_projections(x, norm_weight, weights, eps, kept.shape[4], "qk_norm_rope_quantized_attention")
    check_qk_norm_rope_quantized_attention(
        *heads, q_weight, k_weight, q_eps, k_eps, cos, sin, sections, interleaved,
        k_codes, v_codes, scales, kept, position, start, sinks, format, mask, scale,
    )  # fmt: skip


def _is_served(
    x: torch.Tensor, norm_weight: torch.Tensor | None, weights: Sequence[torch.Tensor], q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    angles: Angles, k_codes: torch.Tensor, v_codes: torch.Tensor, scales: torch.Tensor, kept: torch.Tensor, sinks: int, format: str,
    mask: torch.Tensor | None,
) -> bool:  # fmt: skip
    """Tell whether the kernel of clusters can be launched."""
    is_cache_served = are_codes_served(k_codes, v_codes, scales, kept, sinks, format)
    return is_cache_served and are_served(x, norm_weight, weights, q_weight, k_weight, angles, mask, k_codes.shape[2], kept.shape[4])


def norm_qkv_quantized_attention_triton(
    x: torch.Tensor, norm_weight: torch.Tensor | None, weights: Sequence[torch.Tensor], eps: float,
    q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, q_eps: float, k_eps: float,
    cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool,
    k_codes: torch.Tensor, v_codes: torch.Tensor, scales: torch.Tensor, kept: torch.Tensor, position: torch.Tensor, start: torch.Tensor,
    sinks: int, format: str, mask: torch.Tensor | None, scale: float,
    prefetch: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Launch the kernel of :func:`norm_qkv_quantized_attention`, or those of its two parts."""
    x = as_matrix(x)
    angles = as_angles(cos, sin, sections, interleaved)
    if _is_served(x, norm_weight, weights, q_weight, k_weight, angles, k_codes, v_codes, scales, kept, sinks, format, mask):
        out = allocate(x, weights, kept.shape[4])
        width, slots = x.shape[-1], k_codes.shape[2]
        tiles = cdiv(slots, KEYS.value * clusters.CTAS)
        shared = shared_bytes(width, END_OF_COLUMNS.value)
        arguments = (
            x, norm_weight, *weights, q_weight, k_weight, angles.cos, angles.sin, k_codes, v_codes, scales, kept, position, start, mask, out,
            *prefetch_arguments(prefetch, x, k_codes.shape[1]),
            eps, q_eps, k_eps, scale, slots, k_codes.stride(1), v_codes.stride(1), scales.stride(0), scales.stride(2),
            kept.stride(0), kept.stride(2), angles.stride_axis,
        )  # fmt: skip
        bits = bits_of(format)
        constants = dict(K=width, TILES=tiles, SINKS=sinks, WINDOW=kept.shape[3] - sinks, **bits, **angles.constants, SHARED_BYTES=shared)
        if launch(norm_qkv_quantized_attention_kernel, k_codes.shape[1], x.device, arguments, **constants) is not None:
            return out
    heads = as_heads(norm_linears_triton(x, norm_weight, weights, [None] * 3, eps), kept.shape[4])
    return qk_norm_rope_quantized_attention_triton(
        *heads, q_weight, k_weight, q_eps, k_eps, cos, sin, sections, interleaved,
        k_codes, v_codes, scales, kept, position, start, sinks, format, mask, scale,
    )  # fmt: skip


def norm_qkv_quantized_attention_fake(x: torch.Tensor, norm_weight: object, weights: Sequence[torch.Tensor], eps: float, *rest: Any) -> torch.Tensor:
    """Allocate the result of :func:`norm_qkv_quantized_attention`."""
    return allocate(x, weights, rest[11].shape[4])


define_op(
    "norm_qkv_quantized_attention(Tensor x, Tensor? norm_weight, Tensor[] weights, float eps, Tensor? q_weight, Tensor? k_weight, "
    "float q_eps, float k_eps, Tensor cos, Tensor sin, int[] sections, bool interleaved, "
    "Tensor(a!) k_codes, Tensor(b!) v_codes, Tensor(c!) scales, Tensor(d!) kept, Tensor position, Tensor start, "
    "int sinks, str format, Tensor? mask, float scale, Tensor[]? prefetch=None) -> Tensor",
    check=check_norm_qkv_quantized_attention,
    cuda=norm_qkv_quantized_attention_triton,
    cpu=norm_qkv_quantized_attention_reference,
    fake=norm_qkv_quantized_attention_fake,
)
