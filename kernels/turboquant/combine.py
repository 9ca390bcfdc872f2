"""The second launch of attention over a quantised KV cache: what programs found in codes is rotated back, once, and joined with the rest."""

# pyright: reportCallIssue=false
# Triton's stubs type a launch as a call of the kernel itself, without its launch options.

import torch
import triton
import triton.language as tl

from qtts_compile.kernels.combine import load_weights
from qtts_compile.kernels.flash_decoding_launch import Partials
from qtts_compile.kernels.pdl import announce, pdl_options, wait_for_inputs
from qtts_compile.kernels.sizes import next_power_of_2
from qtts_compile.kernels.turboquant.format import E4M3_BITS
from qtts_compile.kernels.turboquant.rotation import unrotate_rows


@triton.jit
def _combine_kernel(
    Partial_ptr, Max_ptr, Sum_ptr, Out_ptr, n_rows, n_splits, n_of_codes,
    D: tl.constexpr, BLOCK_S: tl.constexpr, HAS_PDL: tl.constexpr,
):  # fmt: skip
    announce(HAS_PDL)
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, BLOCK_S)
    columns = tl.arange(0, D)
    split_rows = splits.to(tl.int64) * n_rows + row
    wait_for_inputs(HAS_PDL)
    weights = load_weights(Max_ptr, Sum_ptr, split_rows, splits < n_splits)
    # Only what counts, unlike combine_kernel: a program has all columns here, and to request all splits took longer.
    partial = tl.load(Partial_ptr + split_rows[:, None] * D + columns[None, :], mask=(weights > 0)[:, None], other=0.0)
    of_codes = tl.sum(partial * tl.where(splits < n_of_codes, weights, 0.0)[:, None], axis=0)
    out = unrotate_rows(of_codes) + tl.sum(partial * tl.where(splits < n_of_codes, 0.0, weights)[:, None], axis=0)
    tl.store(Out_ptr + row * D + columns, out.to(Out_ptr.dtype.element_ty))


def combine(partials: Partials, out: torch.Tensor, n_of_codes: int, bits: int) -> torch.Tensor:
    """Return ``out``, completed by a second launch: the first ``n_of_codes`` splits found values as codes of so many ``bits`` are rotated."""
    if bits == E4M3_BITS:
        return partials.combine(out)
    assert partials.max is not None  # the new token has a split of its own
    n_splits, n_rows, width = partials.out.shape
    _combine_kernel[(n_rows,)](
        *partials, out, n_rows, n_splits, n_of_codes, D=width, BLOCK_S=next_power_of_2(n_splits),
        **pdl_options(out.device), num_warps=2,
    )  # fmt: skip
    return out
