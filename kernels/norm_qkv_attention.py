"""RMSNorm, q/k/v projections, per-head norms, rotary embedding, KV-cache write and attention of one token in one launch, for up to 256 slots.

On Hopper, for the sizes of Qwen3: the kernel is one of clusters. Elsewhere its two parts are launched one after the other.
"""

# pyright: reportCallIssue=false
# Triton's stubs type a launch as a call of the kernel itself, without its launch options.

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from qtts_compile.kernels.checks import check_rank
from qtts_compile.kernels.clusters import device as clusters
from qtts_compile.kernels.clusters.kernel import norm_qkv_attention_kernel
from qtts_compile.kernels.clusters.memory import GROUP, HEAD, KEYS, shared_bytes
from qtts_compile.kernels.gemv import as_matrix
from qtts_compile.kernels.library import define_op
from qtts_compile.kernels.norm_linears import check_norm_linears, norm_linears_reference, norm_linears_triton
from qtts_compile.kernels.pdl import pdl_options
from qtts_compile.kernels.qk_norm_rope_attention import (
    check_qk_norm_rope_attention,
    qk_norm_rope_attention_reference,
    qk_norm_rope_attention_triton,
)
from qtts_compile.kernels.rotary import Angles, as_angles

MAX_SLOTS = KEYS.value * clusters.CTAS
WIDTHS = (512, 1024, 2048)  # of x: with more the kernel runs out of registers


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
) -> torch.Tensor:
    """Return the attention of one token whose hidden state is ``x``, and write its key and value into the caches.

    ``x`` is ``[..., K]`` of one row, ``weights`` are those of queries ``[Hq D, K]``, keys and values ``[Hk D, K]``, the caches
    ``[1, Hk, S, D]`` of at most 256 slots, ``position`` int64 ``[1]``. The steps are those of ``norm_linears``, without biases, and
    ``qk_norm_rope_attention``, with the arguments and the rounding of both. The result ``[1, Hq, 1, D]`` is contiguous.

    All parameters and ``position`` must be at rest, as for those two.

    Raises ``TypeError`` or ``ValueError`` as those two do, and ``ValueError`` for more than one row or 256 slots, or other than three weights.
    """
    return torch.ops.qtts.norm_qkv_attention.default(
        x, norm_weight, weights, eps, q_weight, k_weight, q_eps, k_eps, cos, sin, sections, interleaved, k_cache, v_cache, position, mask, scale
    )


def _heads(results: Sequence[torch.Tensor], width: int) -> list[torch.Tensor]:
    """Return projections ``[..., H D]`` of one row as heads ``[1, H, 1, D]``."""
    return [result.view(1, -1, 1, width) for result in results]


def norm_qkv_attention_reference(
    x: torch.Tensor, norm_weight: torch.Tensor | None, weights: Sequence[torch.Tensor], eps: float,
    q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, q_eps: float, k_eps: float,
    cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool,
    k_cache: torch.Tensor, v_cache: torch.Tensor, position: torch.Tensor, mask: torch.Tensor | None, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Compute :func:`norm_qkv_attention` in plain PyTorch."""
    heads = _heads(norm_linears_reference(x, norm_weight, weights, [None] * 3, eps), k_cache.shape[3])
    return qk_norm_rope_attention_reference(
        *heads, q_weight, k_weight, q_eps, k_eps, cos, sin, sections, interleaved, k_cache, v_cache, position, mask, scale
    )


def check_norm_qkv_attention(
    x: torch.Tensor, norm_weight: torch.Tensor | None, weights: Sequence[torch.Tensor], eps: float,
    q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, q_eps: float, k_eps: float,
    cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool,
    k_cache: torch.Tensor, v_cache: torch.Tensor, position: torch.Tensor, mask: torch.Tensor | None, scale: float,
) -> None:  # fmt: skip
    """Raise ``TypeError`` or ``ValueError`` unless :func:`norm_qkv_attention` accepts the arguments."""
    check_norm_linears(x, norm_weight, weights, [None] * len(weights), eps)
    if len(weights) != 3:
        raise ValueError(f"weights must be those of queries, keys and values, got {len(weights)}")
    if x.numel() != x.shape[-1]:
        raise ValueError(f"x must have one row, got {tuple(x.shape)}; call norm_linears and qk_norm_rope_attention for more")
    check_rank("k_cache", k_cache, "1, Hk, S, D")
    slots, width = k_cache.shape[2:]
    if not 0 < slots <= MAX_SLOTS:
        raise ValueError(
            f"k_cache must have 1 to {MAX_SLOTS} slots, got {tuple(k_cache.shape)}; call norm_linears and qk_norm_rope_attention for more"
        )
    for i, weight in enumerate(weights):
        if width == 0 or weight.shape[0] % width:
            raise ValueError(f"weights[{i}] must be [H D, K] of heads as wide as k_cache's, {width}, got {tuple(weight.shape)}")
    heads = [x.reshape(-1)[0].expand(1, weight.shape[0] // width, 1, width) for weight in weights]  # of no memory of their own
    check_qk_norm_rope_attention(*heads, q_weight, k_weight, q_eps, k_eps, cos, sin, sections, interleaved, k_cache, v_cache, position, mask, scale)


def _is_served(
    x: torch.Tensor, norm_weight: torch.Tensor | None, weights: Sequence[torch.Tensor], q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    angles: Angles, k_cache: torch.Tensor, v_cache: torch.Tensor, mask: torch.Tensor | None,
) -> bool:  # fmt: skip
    """Tell whether the kernel of clusters can be launched: its sizes are fixed, and what it copies in bulk lies at multiples of 16 bytes."""
    if not clusters.has_clusters(x.device) or x.dtype != torch.bfloat16 or norm_weight is None or q_weight is None or k_weight is None:
        return False
    slots, width = k_cache.shape[2:]
    are_heads_served = width == HEAD.value and weights[0].shape[0] == GROUP.value * weights[1].shape[0]
    are_sizes_served = are_heads_served and x.shape[-1] in WIDTHS and slots % KEYS.value == 0
    are_rows_dense = all(cache.stride()[2:] == (HEAD.value, 1) and cache.stride(1) % 8 == 0 for cache in (k_cache, v_cache))
    if not are_sizes_served or not are_rows_dense or not all(weight.is_contiguous() for weight in weights) or angles.stride_axis % 8:
        return False
    if mask is not None and (mask.dtype != torch.bool or mask.numel() != slots or mask.stride(-1) != 1):
        return False
    read = [x, norm_weight, *weights, q_weight, k_weight, angles.cos, angles.sin, k_cache, v_cache, *([] if mask is None else [mask])]
    return all(tensor.data_ptr() % 16 == 0 for tensor in read)


def norm_qkv_attention_triton(
    x: torch.Tensor, norm_weight: torch.Tensor | None, weights: Sequence[torch.Tensor], eps: float,
    q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, q_eps: float, k_eps: float,
    cos: torch.Tensor, sin: torch.Tensor, sections: list[int], interleaved: bool,
    k_cache: torch.Tensor, v_cache: torch.Tensor, position: torch.Tensor, mask: torch.Tensor | None, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Launch the kernel of :func:`norm_qkv_attention`, or those of its two parts."""
    x = as_matrix(x)
    angles = as_angles(cos, sin, sections, interleaved)
    if _is_served(x, norm_weight, weights, q_weight, k_weight, angles, k_cache, v_cache, mask):
        out = _allocate(x, weights, k_cache)
        width, tiles = x.shape[-1], k_cache.shape[2] // KEYS.value
        arguments = (
            x, norm_weight, *weights, q_weight, k_weight, angles.cos, angles.sin, k_cache, v_cache, position, mask, out,
            eps, q_eps, k_eps, scale, k_cache.stride(1), v_cache.stride(1), angles.stride_axis,
        )  # fmt: skip
        options = dict(
            K=width, N_TILES=tiles, **angles.constants, SHARED_BYTES=shared_bytes(width, tiles),
            **pdl_options(x.device), num_warps=clusters.WARPS, num_ctas=clusters.CTAS, debug=True, sanitize_overflow=False,
        )  # fmt: skip
        launch = partial(norm_qkv_attention_kernel.run, *arguments, grid=(k_cache.shape[1],), **options)
        if clusters.have_room(x.device, partial(launch, warmup=True)):
            launch(warmup=False)
            return out
    heads = _heads(norm_linears_triton(x, norm_weight, weights, [None] * 3, eps), k_cache.shape[3])
    return qk_norm_rope_attention_triton(
        *heads, q_weight, k_weight, q_eps, k_eps, cos, sin, sections, interleaved, k_cache, v_cache, position, mask, scale
    )


def norm_qkv_attention_fake(x: torch.Tensor, norm_weight: object, weights: Sequence[torch.Tensor], eps: float, *rest: Any) -> torch.Tensor:
    """Allocate the result of :func:`norm_qkv_attention`."""
    return _allocate(x, weights, rest[8])


def _allocate(x: torch.Tensor, weights: Sequence[torch.Tensor], k_cache: torch.Tensor) -> torch.Tensor:
    width = k_cache.shape[3]
    return torch.empty((1, weights[0].shape[0] // width, 1, width), dtype=x.dtype, device=x.device)


define_op(
    "norm_qkv_attention(Tensor x, Tensor? norm_weight, Tensor[] weights, float eps, Tensor? q_weight, Tensor? k_weight, "
    "float q_eps, float k_eps, Tensor cos, Tensor sin, int[] sections, bool interleaved, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor position, Tensor? mask, float scale) -> Tensor",
    check=check_norm_qkv_attention,
    cuda=norm_qkv_attention_triton,
    cpu=norm_qkv_attention_reference,
    fake=norm_qkv_attention_fake,
)
