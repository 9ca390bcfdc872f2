"""Repairs of Triton's interpreter, which rounds float32 to bfloat16 by truncation, adds one after the other where a GPU adds in a tree,
and patches its language again and again."""

from types import SimpleNamespace

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

_cast_impl = InterpreterBuilder.cast_impl


def repair_interpreter() -> None:
    """Make the interpreter convert between float32 and bfloat16 and add up as the GPU does, and patch the language once for the process.

    It patches at every launch and every call of a device function, tl.sum among them, which is half of a kernel's time.
    """
    InterpreterBuilder.cast_impl = _cast_as_torch
    ReduceOps.sum = _sum_in_a_tree
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


def _sum_in_a_tree(self: ReduceOps, input: tl.tensor) -> tl.tensor:
    # The error of numpy's sum over any axis but the last grows with the number of terms, that of threads that add in pairs with its logarithm.
    data = input.handle.data
    terms = data.reshape(-1) if self.axis is None else np.moveaxis(data, self.axis, 0)
    while len(terms) > 1:  # a power of two
        terms = terms[: len(terms) // 2] + terms[len(terms) // 2 :]
    kept_axes = tuple(range(data.ndim)) if self.axis is None else self.axis
    return self.to_tensor(np.expand_dims(terms[0], kept_axes) if self.keep_dims else terms[0], input.dtype)
