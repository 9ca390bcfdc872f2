"""The levels of two codes at a time, in a table of 1.25 KiB that kernels look up instead of computing."""

# pyright: reportReturnType=false
# Triton's stubs do not know its tensors.

import torch
import triton
import triton.language as tl

from qtts_compile.kernels.checks import check_device, check_shape
from qtts_compile.kernels.turboquant.codebook import codebook

THREE_BITS = tl.constexpr(256)  # where the pairs of 3 bits begin
ENTRIES = 320


def centroid_pairs(device: torch.device | str) -> torch.Tensor:
    """Return the table, int32 ``[320]``, that ``quantized_kv_read`` and attention over a quantised cache are given.

    Entries are two levels of :func:`codebook` in bfloat16, that of the lower code in the lower half: entry b of the first 256 for the two
    codes of 4 bits in the byte b, entry b of the other 64 for the two codes of 3 bits in the 6 bits b.
    """
    tables = []
    for bits in (4, 3):
        levels = torch.tensor(codebook(bits).levels).bfloat16().view(torch.int16)
        places = torch.arange(2 ** (2 * bits))
        tables.append(torch.stack((levels[places % 2**bits], levels[places >> bits]), -1))
    return torch.cat(tables).view(torch.int32).squeeze(-1).to(device)


def check_pairs(pairs: torch.Tensor, name: str, reference: torch.Tensor) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``pairs`` can be the table, on the device of ``reference``, which is called ``name``."""
    if pairs.dtype != torch.int32:
        raise TypeError(f"pairs must be the int32 table that centroid_pairs() makes, got {pairs.dtype}")
    check_shape("pairs", pairs, ENTRIES)
    check_device("pairs", pairs, name, reference)


@triton.jit
def look_up(Pairs_ptr, codes):
    """Return the levels, bfloat16, of the lower and of the higher of the codes that each entry of ``codes`` holds."""
    pair = tl.load(Pairs_ptr + codes)
    return pair.to(tl.int16).to(tl.bfloat16, bitcast=True), (pair >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
