"""In-place write of new keys or values into a KV cache."""

# pyright: reportCallIssue=false
# Triton's stubs type a launch as a call of the kernel itself, without its launch options.

import torch
import triton
import triton.language as tl

from qtts_compile.kernels.checks import check_device, check_float_dtype, check_like, check_rank, check_shape
from qtts_compile.kernels.library import define_op
from qtts_compile.kernels.rows import with_unit_stride
from qtts_compile.kernels.sizes import cdiv, next_power_of_2


def kv_write(cache: torch.Tensor, src: torch.Tensor, position: torch.Tensor) -> None:
    """Set ``cache[:, :, position] = src`` for ``cache`` ``[B, H, S, D]``, ``src`` ``[B, H, T, D]`` and ``position`` ``[T]``.

    ``position`` is int64 and counts from the end when negative, as in ``index_put_``; of tokens with equal positions any one is kept. A
    position outside ``[-S, S)`` raises ``IndexError`` on the CPU; on the GPU it is not written and trips a device-side assert.

    Raises ``TypeError`` for a cache other than bfloat16, float16 and float32, a ``src`` of another dtype or a ``position`` that is not
    int64, and ``ValueError`` for shapes that do not match, different devices or a cache whose last stride is not 1.
    """
    torch.ops.qtts.kv_write.default(cache, src, position)


def kv_write_reference(cache: torch.Tensor, src: torch.Tensor, position: torch.Tensor) -> None:
    """Compute :func:`kv_write` in plain PyTorch."""
    cache[:, :, position] = src


def check_kv_write(cache: torch.Tensor, src: torch.Tensor, position: torch.Tensor, name: str = "cache") -> None:
    """Raise ``TypeError`` or ``ValueError`` unless :func:`kv_write` accepts the arguments."""
    check_float_dtype(name, cache)
    check_like("src", src, name, cache)
    check_rank(name, cache, "B, H, S, D")
    check_rank("position", position, "T")
    if position.dtype != torch.int64:
        raise TypeError(f"position must be int64, got {position.dtype}; convert it with .long()")
    check_device("position", position, name, cache)
    if cache.stride(-1) != 1 and cache.shape[-1] > 1:
        raise ValueError(f"{name} must have a last stride of 1 to be written in place, got the strides {cache.stride()}")
    batch, heads, _, width = cache.shape
    check_shape("src", src, batch, heads, position.shape[0], width)


@triton.jit
def cache_row(Position_ptr, token, stride_position, S):
    """Return the cache row of ``token`` as int64 and whether the cache has it."""
    row = tl.load(Position_ptr + token * stride_position)
    row = tl.where(row < 0, row + S, row)
    return row, (row >= 0) & (row < S)


@triton.jit
def assert_in_cache(in_cache):
    """Trip the device-side assert unless the cache has a row. What a program reads after it waits for the position."""
    tl.device_assert(in_cache, "kv_write: position is out of range")


@triton.jit
def _kv_write_kernel(
    Cache_ptr, Src_ptr, Position_ptr, T, H, S, stride_position,
    cache_stride_b, cache_stride_h, cache_stride_s, src_stride_b, src_stride_h, src_stride_t,
    D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // T).to(tl.int64)
    token = (tl.program_id(0) % T).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    columns = tl.arange(0, BLOCK_D)
    in_bounds = (heads < H)[:, None] & (columns < D)[None, :]
    heads = heads.to(tl.int64)[:, None]
    row, in_cache = cache_row(Position_ptr, token, stride_position, S)
    assert_in_cache(in_cache)
    src_offsets = batch * src_stride_b + heads * src_stride_h + token * src_stride_t + columns[None, :]
    cache_offsets = batch * cache_stride_b + heads * cache_stride_h + row * cache_stride_s + columns[None, :]
    tl.store(Cache_ptr + cache_offsets, tl.load(Src_ptr + src_offsets, mask=in_bounds), mask=in_bounds & in_cache)


def kv_write_triton(cache: torch.Tensor, src: torch.Tensor, position: torch.Tensor) -> None:
    """Launch the kernel of :func:`kv_write`."""
    if src.numel() == 0:
        return
    src = with_unit_stride(src)
    batch, heads, tokens, width = src.shape
    block_d = next_power_of_2(width)
    block_h = max(1, min(1024 // block_d, next_power_of_2(heads)))
    _kv_write_kernel[(batch * tokens, cdiv(heads, block_h))](
        cache, src, position, tokens, heads, cache.shape[2], position.stride(0), *cache.stride()[:3], *src.stride()[:3],
        D=width, BLOCK_H=block_h, BLOCK_D=block_d, num_warps=4, debug=True, sanitize_overflow=False,
    )  # fmt: skip


def kv_write_fake(cache: torch.Tensor, src: torch.Tensor, position: torch.Tensor) -> None:
    """Allocate nothing: :func:`kv_write` has no result."""


define_op(
    "kv_write(Tensor(a!) cache, Tensor src, Tensor position) -> ()",
    check=check_kv_write,
    cuda=kv_write_triton,
    cpu=kv_write_reference,
    fake=kv_write_fake,
)
