"""Strided access to the rows ``[..., D]`` of a tensor, shared by the row-wise kernels."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from qtts_compile.kernels.sizes import next_power_of_2


class Rows(NamedTuple):
    """A tensor ``[..., D]`` seen as rows: row ``i`` begins at element ``row_offset(i, *layout)``."""

    tensor: torch.Tensor
    layout: tuple[int, int, int, int, int]


def as_rows(tensor: torch.Tensor) -> Rows:
    """Describe the rows of ``tensor`` ``[..., D]`` by three strides; copy it only if its layout needs more, or the last stride is not 1."""
    tensor = with_unit_stride(tensor)
    if tensor.is_contiguous():
        return Rows(tensor, (1, 1, tensor.shape[-1], 0, 0))
    sizes, strides = [], []
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size == 1:
            continue
        if sizes and strides[-1] == size * stride:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    if len(sizes) > 3:
        return as_rows(tensor.contiguous())
    # Padding goes inside: Triton folds divisions by a size of 1, so one stride costs no division.
    sizes += [1] * (3 - len(sizes))
    strides += [0] * (3 - len(strides))
    return Rows(tensor, (sizes[1], sizes[2], strides[0], strides[1], strides[2]))


def with_unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor``, copied if its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def row_blocks(n_rows: int, width: int) -> tuple[int, int, int]:
    """Choose ``(BLOCK_R, BLOCK_D, num_warps)``: whole rows, about 512 elements or one row a program, 16 bytes of bf16 a thread."""
    block_d = next_power_of_2(width)
    block_r = max(1, min(512 // block_d, next_power_of_2(n_rows)))
    return block_r, block_d, min(16, max(1, block_r * block_d // 256))


@triton.jit
def row_offset(row, size_1, size_2, stride_0, stride_1, stride_2):
    """Return the int64 offset of ``row``, a flat index into leading dimensions ``[size_0, size_1, size_2]``."""
    index_2 = row % size_2
    index_1 = row // size_2 % size_1
    index_0 = row // size_2 // size_1
    return index_0.to(tl.int64) * stride_0 + index_1.to(tl.int64) * stride_1 + index_2.to(tl.int64) * stride_2
