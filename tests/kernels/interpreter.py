"""A repair of Triton's interpreter, which truncates float32 to bfloat16 where the GPU rounds to the nearest even."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast_impl = InterpreterBuilder.cast_impl


def round_to_nearest_even() -> None:
    """Make the interpreter convert between float32 and bfloat16 as PyTorch and the GPU do."""
    InterpreterBuilder.cast_impl = _cast_as_torch


def _cast_as_torch(self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
    data = np.ascontiguousarray(src.data).reshape(src.data.shape)
    if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
        bits = torch.from_numpy(data).to(torch.bfloat16).view(torch.int16)
        return TensorHandle(bits.numpy().view(np.uint16), tl.bfloat16)
    if (src.dtype.scalar, dst_type.scalar) == (tl.bfloat16, tl.float32):
        return TensorHandle(torch.from_numpy(data.view(np.int16)).view(torch.bfloat16).to(torch.float32).numpy(), tl.float32)
    return _cast_impl(self, src, dst_type)
