"""RMSNorm, q/k/v projections, per-head norms, rotary embedding, KV-cache write and attention of one token in one launch, for up to 8192 slots.

On Hopper, for the sizes of Qwen3: the kernel is one of clusters, of which there are two, for up to 256 slots and for more. Elsewhere its two parts
are launched one after the other.
"""

from collections.abc import Sequence
from typing import Any

import torch

from qtts_compile.kernels.clusters import device as clusters
from qtts_compile.kernels.clusters.kernel import norm_qkv_attention_kernel
from qtts_compile.kernels.clusters.long_kernel import norm_qkv_long_attention_kernel
from qtts_compile.kernels.clusters.memory import END_OF_COLUMNS, END_OF_PARTIALS, HEAD, KEYS, PARTIALS, shared_bytes
from qtts_compile.kernels.gemv import as_matrix
from qtts_compile.kernels.library import define_op
from qtts_compile.kernels.norm_linears import norm_linears_reference, norm_linears_triton
from qtts_compile.kernels.norm_qkv import (
    allocate,
    are_aligned,
    are_served,
    as_heads,
    check_prefetch,
    check_projections,
    check_slots,
    launch,
    prefetch_arguments,
)
from qtts_compile.kernels.qk_norm_rope_attention import (
    check_qk_norm_rope_attention,
    qk_norm_rope_attention_reference,
    qk_norm_rope_attention_triton,
)
from qtts_compile.kernels.rotary import Angles, as_angles
from qtts_compile.kernels.sizes import cdiv


def norm_qkv_attention(
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
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    position: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    prefetch: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the attention of one token whose hidden state is ``x``, and write its key and value into the caches.

    ``x`` is ``[..., K]`` of one row, ``weights`` are those of queries ``[Hq D, K]``, keys and values ``[Hk D, K]``, the caches
    ``[1, Hk, S, D]`` of at most 8192 slots, ``position`` int64 ``[1]``. The steps are those of ``norm_linears``, without biases, and
    ``qk_norm_rope_attention``, with the arguments and the rounding of both. The result ``[1, Hq, 1, D]`` is contiguous.

    ``prefetch`` are two weights ``[N, K]`` that a kernel after the next reads, of any dtype; while attention leaves memory idle, where it is computed
    by a kernel of clusters, that brings the beginning of both to the L2 cache. They change no result.

    All parameters and ``position`` must be at rest, as for those two.

    Raises ``TypeError`` or ``ValueError`` as those two do, and ``ValueError`` for more than one row or 8192 slots, other than three weights
    or two to prefetch, and those of other shapes or not contiguous.
    """
    return torch.ops.qtts.norm_qkv_attention.default(
        x, norm_weight, weights, eps, q_weight, k_weight, q_eps, k_eps, cos, sin, sections, interleaved,
        k_cache, v_cache, position, mask, scale, prefetch,
    )  # fmt: skip


def norm_qkv_attention_reference(
    x: torch.Tensor, norm_weight: torch.Tensor | None, weights: Sequence[torch.Tensor], eps: float,
    q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, q_eps: float, k_eps: float,
    cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool,
    k_cache: torch.Tensor, v_cache: torch.Tensor, position: torch.Tensor, mask: torch.Tensor | None, scale: float,
    prefetch: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Compute :func:`norm_qkv_attention` in plain PyTorch."""
    heads = as_heads(norm_linears_reference(x, norm_weight, weights, [None] * 3, eps), k_cache.shape[3])
    return qk_norm_rope_attention_reference(
        *heads, q_weight, k_weight, q_eps, k_eps, cos, sin, sections, interleaved, k_cache, v_cache, position, mask, scale
    )


def check_norm_qkv_attention(
    x: torch.Tensor, norm_weight: torch.Tensor | None, weights: Sequence[torch.Tensor], eps: float,
    q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, q_eps: float, k_eps: float,
    cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool,
    k_cache: torch.Tensor, v_cache: torch.Tensor, position: torch.Tensor, mask: torch.Tensor | None, scale: float,
    prefetch: Sequence[torch.Tensor] | None = None,
) -> None:  # fmt: skip
    """Raise ``TypeError`` or ``ValueError`` unless :func:`norm_qkv_attention` accepts the arguments."""
    check_prefetch(prefetch, x)
    check_slots("k_cache", k_cache, "qk_norm_rope_attention")
    heads = check_projections(x, norm_weight, weights, eps, k_cache.shape[3], "qk_norm_rope_attention")
    check_qk_norm_rope_attention(*heads, q_weight, k_weight, q_eps, k_eps, cos, sin, sections, interleaved, k_cache, v_cache, position, mask, scale)


def _is_served(
    x: torch.Tensor, norm_weight: torch.Tensor | None, weights: Sequence[torch.Tensor], q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    angles: Angles, k_cache: torch.Tensor, v_cache: torch.Tensor, mask: torch.Tensor | None,
) -> bool:  # fmt: skip
    """Tell whether the kernel of clusters can be launched."""
    are_caches_served = all(cache.stride()[2:] == (HEAD.value, 1) and cache.stride(1) % 8 == 0 and are_aligned(cache) for cache in (k_cache, v_cache))
    return are_caches_served and are_served(x, norm_weight, weights, q_weight, k_weight, angles, mask, *k_cache.shape[2:])


def norm_qkv_attention_triton(
    x: torch.Tensor, norm_weight: torch.Tensor | None, weights: Sequence[torch.Tensor], eps: float,
    q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, q_eps: float, k_eps: float,
    cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool,
    k_cache: torch.Tensor, v_cache: torch.Tensor, position: torch.Tensor, mask: torch.Tensor | None, scale: float,
    prefetch: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Launch the kernel of :func:`norm_qkv_attention`, or those of its two parts."""
    x = as_matrix(x)
    angles = as_angles(cos, sin, sections, interleaved)
    if _is_served(x, norm_weight, weights, q_weight, k_weight, angles, k_cache, v_cache, mask):
        out = allocate(x, weights, k_cache.shape[3])
        width, slots = x.shape[-1], k_cache.shape[2]
        arguments = (
            x, norm_weight, *weights, q_weight, k_weight, angles.cos, angles.sin, k_cache, v_cache, position, mask, out,
            *prefetch_arguments(prefetch, x, k_cache.shape[1]),
            eps, q_eps, k_eps, scale, k_cache.stride(1), v_cache.stride(1), angles.stride_axis,
        )  # fmt: skip
        constants = dict(K=width, **angles.constants)
        tiles, kernel = slots // KEYS.value, norm_qkv_attention_kernel
        if tiles <= clusters.CTAS:
            end = END_OF_PARTIALS if tiles > 1 else PARTIALS
            constants |= dict(N_TILES=tiles, SHARED_BYTES=shared_bytes(width, end.value))
        else:
            tiles, kernel, arguments = cdiv(tiles, clusters.CTAS), norm_qkv_long_attention_kernel, (*arguments, slots)
            constants |= dict(TILES=tiles, SHARED_BYTES=shared_bytes(width, END_OF_COLUMNS.value))
        if launch(kernel, k_cache.shape[1], x.device, arguments, **constants) is not None:
            return out
    heads = as_heads(norm_linears_triton(x, norm_weight, weights, [None] * 3, eps), k_cache.shape[3])
    return qk_norm_rope_attention_triton(
        *heads, q_weight, k_weight, q_eps, k_eps, cos, sin, sections, interleaved, k_cache, v_cache, position, mask, scale
    )


def norm_qkv_attention_fake(x: torch.Tensor, norm_weight: object, weights: Sequence[torch.Tensor], eps: float, *rest: Any) -> torch.Tensor:
    """Allocate the result of :func:`norm_qkv_attention`."""
    return allocate(x, weights, rest[8].shape[3])


define_op(
    "norm_qkv_attention(Tensor x, Tensor? norm_weight, Tensor[] weights, float eps, Tensor? q_weight, Tensor? k_weight, "
    "float q_eps, float k_eps, Tensor cos, Tensor sin, int[] sections, bool interleaved, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor position, Tensor? mask, float scale, Tensor[]? prefetch=None) -> Tensor",
    check=check_norm_qkv_attention,
    cuda=norm_qkv_attention_triton,
    cpu=norm_qkv_attention_reference,
    fake=norm_qkv_attention_fake,
)
