"""Repairs of Triton's interpreter, which rounds float32 to bfloat16 by truncation and patches its language again and again."""

from types import SimpleNamespace

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast_impl = InterpreterBuilder.cast_impl


def repair_interpreter() -> None:
    """Make the interpreter convert between float32 and bfloat16 as PyTorch and the GPU do, and patch the language once for the process.

    It does so at every launch and every call of a device function, tl.sum among them, which is half of a kernel's time.
    """
    InterpreterBuilder.cast_impl = _cast_as_torch
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: SimpleNamespace(restore=lambda: None)


def _cast_as_torch(self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
    data = np.ascontiguousarray(src.data).reshape(src.data.shape)
    if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
        bits = torch.from_numpy(data).to(torch.bfloat16).view(torch.int16)
        return TensorHandle(bits.numpy().view(np.uint16), tl.bfloat16)
    if (src.dtype.scalar, dst_type.scalar) == (tl.bfloat16, tl.float32):
        return TensorHandle(torch.from_numpy(data.view(np.int16)).view(torch.bfloat16).to(torch.float32).numpy(), tl.float32)
    return _cast_impl(self, src, dst_type)
