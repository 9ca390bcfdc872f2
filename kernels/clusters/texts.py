"""Which text each CTA of a cluster attends for, and what a CTA sees in the mask of its own, for kernels of clusters to use."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.instructions import cluster_rank
from qtts_compile.kernels.clusters.live import threads_layout
from qtts_compile.kernels.clusters.memory import BEHIND, KEYS, N_CTAS, N_WARPS
from qtts_compile.kernels.ptx.global_memory import load_global_4


@gluon.jit
def place_of(pairs, PARTS: gl.constexpr):
    """Return this CTA's part, its pair of a text and a key head, the rank of the CTA that joins, and whether there is such a pair.

    A CTA without one takes part in what the others do together, and in nothing else.
    """
    rank = cluster_rank()
    part = rank % PARTS
    pair = gl.program_id(0) * (N_CTAS // PARTS) + rank // PARTS
    return part, gl.minimum(pair, pairs - 1), rank - part, pair < pairs


@gluon.jit
def look_behind(Mask_ptr, row, S, LOOKS: gl.constexpr):
    """Load what a text's mask tells of slots behind the new token, as words: each thread looks at 16 bytes so many times.

    A CTA looks on its own: those of a cluster attend to several texts.
    """
    layout: gl.constexpr = threads_layout()
    thread = gl.arange(0, 32 * N_WARPS, layout=layout)
    looks = ()
    for i in gl.static_range(LOOKS):
        slot = (thread + i * 32 * N_WARPS) * KEYS
        words = load_global_4(Mask_ptr + slot, ((slot + KEYS - 1 > row) & (slot < S)).to(gl.int32))
        any = thread * 0
        for j in gl.static_range(4):
            n_before = row + 1 - (slot + 4 * j)  # bytes of the word that tell of other slots
            any = any | gl.where(n_before < 4, words[j] >> (8 * gl.minimum(gl.maximum(n_before, 0), 3)), 0)
        looks = looks + (any,)
    return looks


@gluon.jit
def store_looks(base, looks):
    """Store of each warp whether it saw a slot that counts, for :func:`any_seen` behind a barrier."""
    layout: gl.constexpr = threads_layout()
    words = looks[0]
    for i in gl.static_range(1, len(looks)):
        words = words | looks[i]
    gl.inline_asm_elementwise(
        """{
        .reg .pred p; .reg .u32 lane; .reg .b32 any;
        mov.u32 lane, %laneid;
        setp.eq.u32 p, lane, 0;
        redux.sync.or.b32 any, $1, -1;
        @p st.shared.b32 [$2], any;
        mov.u32 $0, 0;
        }""",
        "=r,r,r", [words, base + BEHIND + gl.arange(0, 32 * N_WARPS, layout=layout) // 32 * 4], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def any_seen(base):
    """Tell whether any warp of the CTA saw a slot that counts."""
    seen = gl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c, d;
        ld.shared.v4.b32 {a, b, c, d}, [$1];
        or.b32 a, a, b;
        or.b32 c, c, d;
        or.b32 $0, a, c;
        }""",
        "=r,r", [base + BEHIND], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    return seen != 0
