"""The second launch of attention that is split over the keys: what the splits found is joined (Flash-Decoding, Dao et al., 2023)."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# Triton's stubs do not know that constants may be given as plain values.

import triton
import triton.language as tl

from qtts_compile.kernels.pdl import announce, wait_for_inputs


@triton.jit
def load_weights(Max_ptr, Sum_ptr, split_rows, in_splits):
    """Return how much each split counts of one row, ``[N]``, zero where it has no key."""
    split_max = tl.load(Max_ptr + split_rows, mask=in_splits, other=float("-inf"))
    split_sum = tl.load(Sum_ptr + split_rows, mask=in_splits, other=0.0)
    row_max = tl.max(split_max, axis=0)
    origin = tl.where(row_max == float("-inf"), 0.0, row_max)
    rescale = tl.where(split_sum > 0, tl.exp2(split_max - origin), 0.0)
    row_sum = tl.sum(split_sum * rescale, axis=0)
    return rescale / tl.where(row_sum == 0, 1.0, row_sum)


@triton.jit
def combine_kernel(
    Partial_ptr, Max_ptr, Sum_ptr, Out_ptr, n_rows, n_splits,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, HAS_PDL: tl.constexpr,
):  # fmt: skip
    announce(HAS_PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    splits = tl.arange(0, BLOCK_S)
    split_rows = splits.to(tl.int64) * n_rows + row
    in_partial = (splits < n_splits)[:, None] & (columns < D)[None, :]
    wait_for_inputs(HAS_PDL)
    # Requested beside the weights, not after them: what a split without keys left in memory is not counted, whatever it is.
    partial = tl.load(Partial_ptr + split_rows[:, None] * D + columns[None, :], mask=in_partial, other=0.0)
    weights = load_weights(Max_ptr, Sum_ptr, split_rows, splits < n_splits)[:, None]
    out = tl.sum(tl.where(weights != 0, partial * weights, 0.0), axis=0)
    tl.store(Out_ptr + row * D + columns, out.to(Out_ptr.dtype.element_ty), mask=columns < D)
