"""The softmax of two query heads over keys that a warp meets tile by tile, for kernels of clusters to use (Milakov and Gimelshein,
"Online normalizer calculation for softmax", 2018).

What a warp has found is a tuple: the largest scores, the sums of weights that are counted from these, and the sums of the even and of the odd columns
of values, so weighted. Pairs are of both heads.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.tiles import each, max_of_groups, zeros


@gluon.jit
def nothing(N_WORDS: gl.constexpr):
    """Return what a warp has found that has met no key; of values, a lane has so many words of two columns."""
    columns = ()
    for _ in gl.static_range(N_WORDS):
        columns = columns + (zeros(),)
    return zeros() - float("inf"), zeros(), columns, columns


@gluon.jit
def masked(first, second, is_live):
    """Return the scores of the keys g and g + 8 for both heads, and -inf for those of which a pair tells that they do not count."""
    live_first, live_second = each(is_live.to(gl.float32))
    return gl.where(live_first != 0, first, float("-inf")), gl.where(live_second != 0, second, float("-inf"))


@gluon.jit
def origin_of(peak):
    """Return what scores are counted from before they become weights: the largest, or zero if none counts."""
    return gl.where(peak == float("-inf"), 0.0, peak)


@gluon.jit
def meet(found, scores):
    """Return what was found, counted from the largest score so far, and the weights of scores, which are not added yet.

    Scores and weights are those of tiles, of each a pair: of the keys g and g + 8.
    """
    old_peaks, sums, even, odd = found
    peaks = gl.maximum(old_peaks, _largest(scores))
    origins = origin_of(peaks)
    factors = gl.exp2(old_peaks - origins)
    new_even, new_odd = (), ()
    for i in gl.static_range(len(even)):
        new_even, new_odd = new_even + (even[i] * factors,), new_odd + (odd[i] * factors,)
    return (peaks, sums * factors, new_even, new_odd), _weights(scores, origins)


@gluon.jit
def meet_first(scores, N_WORDS: gl.constexpr):
    """Return what :func:`meet` does of a warp that has met no key, in fewer registers."""
    peaks = _largest(scores)
    _, sums, even, odd = nothing(N_WORDS)
    return (peaks, sums, even, odd), _weights(scores, origin_of(peaks))


@gluon.jit
def _largest(scores):
    largest = gl.maximum(scores[0][0], scores[0][1])
    for i in gl.static_range(1, len(scores)):
        largest = gl.maximum(largest, gl.maximum(scores[i][0], scores[i][1]))
    return max_of_groups(largest)


@gluon.jit
def _weights(scores, origins):
    weights = ()
    for i in gl.static_range(len(scores)):
        weights = weights + ((gl.exp2(scores[i][0] - origins), gl.exp2(scores[i][1] - origins)),)
    return weights


@gluon.jit
def exchange(first, second):
    """Round the weights of the keys g and g + 8 to bfloat16; return words of both heads, pairs of the keys 2 t, 2 t + 1 and of 2 t + 8, 2 t + 9."""
    return gl.inline_asm_elementwise(
        """{
        .reg .u32 lane, other; .reg .b32 a, b;
        cvt.rn.bf16x2.f32 a, $5, $4;
        cvt.rn.bf16x2.f32 b, $7, $6;
        mov.u32 lane, %laneid;
        and.b32 lane, lane, 3;
        shl.b32 lane, lane, 3;
        add.u32 other, lane, 4;
        shfl.sync.idx.b32 $0, a, lane, 31, -1;
        shfl.sync.idx.b32 $1, a, other, 31, -1;
        shfl.sync.idx.b32 $2, b, lane, 31, -1;
        shfl.sync.idx.b32 $3, b, other, 31, -1;
        }""",
        "=&r,=&r,=&r,=&r,f,f,f,f", [first, second], dtype=(gl.int32, gl.int32), is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def of_own_head(first, second):
    """Return, of what :func:`exchange` returned, the words of the head g % 2: of the keys 2 t and 2 t + 1, and of 2 t + 8 and 2 t + 9."""
    return gl.inline_asm_elementwise(
        """{
        .reg .u32 head;
        mov.u32 head, %laneid;
        shr.u32 head, head, 2;
        and.b32 head, head, 1;
        mad.lo.u32 head, head, 0x2222, 0x5410;
        prmt.b32 $0, $2, $3, head;
        prmt.b32 $1, $4, $5, head;
        }""",
        "=&r,=&r,r,r,r,r", [first, second], dtype=gl.int32, is_pure=True, pack=2,
    )  # fmt: skip
