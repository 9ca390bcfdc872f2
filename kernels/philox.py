"""Philox-4x32-10 (Salmon et al., 2011): random numbers that depend on a seed and on what they are for, and on nothing before them."""

import torch
import triton
import triton.language as tl

from qtts_compile.kernels.sizes import cdiv


def philox_reference(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Compute the four words of Philox-4x32-10 for a ``counter`` of four words and a ``key`` of two, each an int64 tensor of 32-bit values."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product_0, product_2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (product_2 >> 32 & low) ^ c1 ^ k0, product_2 & low
        c2, c3 = (product_0 >> 32 & low) ^ c3 ^ k1, product_0 & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return c0, c1, c2, c3


def uniform_reference(seed: torch.Tensor, offset: torch.Tensor, n: int) -> torch.Tensor:
    """Return the float32 numbers ``[B, n]``, inside (0, 1), of draw ``offset`` int64 ``[1]`` for ``seed`` int64 ``[B]``.

    Number v is word v % 4 for the key ``seed`` and the counter (v // 4, offset).
    """
    low = 0xFFFFFFFF
    quads = torch.arange(cdiv(n, 4), device=seed.device)
    key = (seed[:, None] & low, seed[:, None] >> 32 & low)
    words = philox_reference((quads, offset & low, offset >> 32 & low, torch.zeros_like(quads)), key)
    return ((torch.stack(words, -1).flatten(1)[:, :n] >> 9).float() + 0.5) * 2**-23


@triton.jit
def uniform(seed, offset, BLOCK: tl.constexpr):
    """Return the numbers of :func:`uniform_reference` for one row."""
    offset_low = offset.to(tl.uint32)
    offset_high = (offset >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, tl.arange(0, BLOCK // 4), offset_low, offset_high, 0)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK])
    return ((words >> 9).to(tl.float32) + 0.5) * 2**-23
