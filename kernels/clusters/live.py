"""Which slots of a quantised cache an attention reads, for kernels of clusters to use."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.attend import keys_layout
from qtts_compile.kernels.clusters.instructions import as_words, store_shared
from qtts_compile.kernels.clusters.memory import FLAGS, KEYS, N_WARPS, everywhere
from qtts_compile.kernels.clusters.words import any_of_warp


@gluon.jit
def live_kept(Mask_ptr, kept_tile, row, start, SINKS: gl.constexpr, WINDOW: gl.constexpr):
    """Tell which rows of a CTA's tile of kept tokens hold one that is attended to."""
    kept_row = kept_tile * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, keys_layout()))
    age = row % WINDOW - (kept_row - SINKS)
    slot = gl.where(kept_row < SINKS, start + kept_row, row - gl.where(age < 0, age + WINDOW, age))
    is_sink = (slot >= start) & (slot < start + SINKS)
    # The new token is read where recent ones are, and other sinks where sinks are.
    is_live = (kept_row < SINKS + WINDOW) & (slot >= 0) & gl.where(kept_row < SINKS, slot < row, (slot == row) | ~is_sink)
    if Mask_ptr is not None:
        is_live = is_live & gl.load(Mask_ptr + slot, mask=is_live, other=0).to(gl.int1)
    return is_live


@gluon.constexpr_function
def _mask_layout(words):
    """Words of a mask [128 threads, n]."""
    return gl.BlockedLayout([1, words], [32, 1], [4, 1], [1, 0], cga_layout=everywhere(2))


@gluon.jit
def look_behind(base, Mask_ptr, row, S, WORDS: gl.constexpr):
    """Store for each warp whether it sees that the mask lets a slot behind the new token count: a thread looks at as many ``WORDS`` of it."""
    layout: gl.constexpr = _mask_layout(WORDS)
    thread = gl.arange(0, 32 * N_WARPS, layout=gl.SliceLayout(1, layout))
    word = (thread * WORDS)[:, None] + gl.arange(0, WORDS, layout=gl.SliceLayout(0, layout))[None, :]
    n_before = gl.minimum(gl.maximum(row + 1 - 4 * word, 0), 4)
    behind = gl.load(as_words(Mask_ptr) + word, mask=(word < S // 4) & (n_before < 4), other=0) >> (8 * gl.minimum(n_before, 3))
    count = gl.sum((behind != 0).to(gl.int32), axis=1)
    store_shared(base + FLAGS + thread // 32 * 4, any_of_warp(count), thread * 0 + 1)
