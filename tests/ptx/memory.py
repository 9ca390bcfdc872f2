"""The memory that a kernel may use: the tensors of its launch, and nothing else."""

from __future__ import annotations

import ctypes

import numpy as np
import torch


class Memory:
    """Global memory, at the addresses of tensors."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._buffers: dict[int, np.ndarray] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                self._buffers[storage.data_ptr()] = np.ctypeslib.as_array((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()))

    def at(self, address: int, count: int, text: str, alignment: int | None = None) -> np.ndarray:
        """Return ``count`` bytes.

        Raises IndexError for what is in no tensor, and for an address that is not a multiple of the alignment, by default ``count``;
        ``text`` says who asks.
        """
        if address % (alignment or count):
            raise IndexError(f"{text}: {address:#x} is not a multiple of {alignment or count} bytes")
        for base, buffer in self._buffers.items():
            if base <= address and address + count <= base + len(buffer):
                return buffer[address - base : address - base + count]
        raise IndexError(f"{text}: {count} bytes at {address:#x} are in no tensor of the launch")

    def contents(self) -> list[np.ndarray]:
        """Return a copy of all of it."""
        return [buffer.copy() for buffer in self._buffers.values()]

    def restore(self, contents: list[np.ndarray]) -> None:
        """Write a copy back."""
        for buffer, copied in zip(self._buffers.values(), contents, strict=True):
            buffer[:] = copied


class Scratch:
    """Memory of a program's own, from the address ``first`` on, at first full of what a float reads as NaN."""

    def __init__(self, count: int, first: int = 0) -> None:
        self._bytes, self._first = np.full(count, 0xFF, np.uint8), first

    def at(self, address: int, count: int, text: str, alignment: int | None = None) -> np.ndarray:
        """Return ``count`` bytes. Raises IndexError as :meth:`Memory.at` does."""
        at = address - self._first
        if address % (alignment or count) or not 0 <= at <= len(self._bytes) - count:
            raise IndexError(f"{text}: {count} bytes at {address:#x} are not in the {len(self._bytes)} bytes from {self._first:#x} on")
        return self._bytes[at : at + count]
