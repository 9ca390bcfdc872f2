"""Scores of tiles, and the largest of them, which weights are counted from, for kernels of clusters to use."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.attend import origin_of
from qtts_compile.kernels.clusters.instructions import load_floats, load_shared_2, store_floats
from qtts_compile.kernels.clusters.memory import ALL_SCORES, GROUP, KEYS, N_WARPS, PEAKS, SCORES_OF_TILES
from qtts_compile.kernels.clusters.tiles import each, max_of_quad, places


@gluon.jit
def store_tile(base, first, second, is_live, tile, peaks, STRIDE: gl.constexpr):
    """Store the scores of both heads for the keys g and g + 8 of a tile of each warp, and -inf for what does not count.

    Returns each lane's largest, of both heads.
    """
    warp, g, _, head = places()
    # A lane's two scores are of one key and both heads, what it knows of keys is of one head and both keys.
    live_first, live_second = each(is_live.to(gl.float32))
    first, second = gl.where(live_first != 0, first, float("-inf")), gl.where(live_second != 0, second, float("-inf"))
    address = base + SCORES_OF_TILES + head * STRIDE + ((tile + warp) * KEYS + g) * 4
    store_floats(address, first)
    store_floats(address + 32, second)
    return gl.maximum(peaks, gl.maximum(first, second))


@gluon.jit
def store_peaks(base, peaks):
    """Store the largest score of each warp and head."""
    peaks = gl.max(gl.reshape(peaks, [4, 8, 4, 2]), axis=1)
    layout: gl.constexpr = peaks.type.layout
    warp = gl.expand_dims(gl.expand_dims(gl.arange(0, 4, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout))), 1), 2)
    head = gl.expand_dims(gl.expand_dims(gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout))), 0), 1)
    address = gl.broadcast(base + PEAKS + warp * 8 + head * 4, peaks)[0]
    store_floats(address, peaks)


@gluon.jit
def largest_of(base, head, kept_peak):
    """Return the largest score of a head: of its kept tokens or of any warp's tiles."""
    peak = kept_peak
    for warp in gl.static_range(N_WARPS):
        peak = gl.maximum(peak, load_floats(base + PEAKS + warp * 8 + head * 4))
    return peak


@gluon.jit
def origins_of(base, STRIDE: gl.constexpr):
    """Return for each lane the largest score of the head g % 2, or zero if none counts."""
    _, g, t, which = places()
    address = base + ALL_SCORES + g % GROUP * STRIDE + (4 * t + which) * 4
    kept = gl.maximum(load_shared_2(address).to(gl.float32, bitcast=True), load_shared_2(address + 8).to(gl.float32, bitcast=True))
    return origin_of(largest_of(base, g % GROUP, max_of_quad(kept)))
