"""What the CTAs of a cluster found, joined by the first of them, for kernels of clusters to use."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.instructions import wait_for_bytes
from qtts_compile.kernels.clusters.memory import ARRIVED, GROUP, HEAD, N_CTAS, PARTIALS, STATS, linear_layout
from qtts_compile.kernels.clusters.softmax import origin_of
from qtts_compile.kernels.clusters.tiles import places
from qtts_compile.kernels.ptx.global_memory import as_words, store_global
from qtts_compile.kernels.ptx.shared_memory import load_floats_2, load_floats_4
from qtts_compile.kernels.ptx.words import pack


def _send_pair(condition: str) -> str:
    """Return PTX by which those threads send two float32 to a CTA that meet a condition on t, the thread."""
    return f"""{{
        .reg .pred p; .reg .u32 t, to, bar;
        mov.u32 t, %tid.x;
        {condition}
        mapa.shared::cluster.u32 to, $3, $5;
        mapa.shared::cluster.u32 bar, $4, $5;
        @p st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [to], {{$1, $2}}, [bar];
        mov.u32 $0, 0;
        }}"""


FROM_ALL = gl.constexpr(_send_pair("setp.lt.u32 p, t, 128;"))
FROM_FIRST_LANES = gl.constexpr(_send_pair("setp.lt.u32 p, t, 64; and.b32 t, t, 31; setp.eq.and.u32 p, t, 0, p;"))


@gluon.jit
def send_columns(first, second, addresses, barrier, target):
    """Send two columns that follow each other to the CTA of the rank ``target``: every lane does."""
    gl.inline_asm_elementwise(FROM_ALL, "=r,f,f,r,r,r", [first, second, addresses, barrier, target], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def send_stats(peak, total, addresses, barrier, target):
    """Send maximum and sum to the CTA of the rank ``target``: the first two warps have a head each, and lane 0 sends."""
    gl.inline_asm_elementwise(FROM_FIRST_LANES, "=r,f,f,r,r,r", [peak, total, addresses, barrier, target], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def _words_layout():
    """Heads and words of two columns [2, 64]: a warp has one head and half the words, a lane one of them."""
    return linear_layout([], [[0, 2**i] for i in range(5)], [[1, 0], [0, 32]], [2, 64])


@gluon.jit
def store_joined(base, Out_ptr, k_head, N_PARTS: gl.constexpr):
    """Store both heads' columns of so many CTAs, once what they send has arrived, divided by the sums of weights; zeros where nothing counts."""
    layout: gl.constexpr = _words_layout()
    head, word = gl.arange(0, GROUP, layout=gl.SliceLayout(1, layout)), gl.arange(0, HEAD // 2, layout=gl.SliceLayout(0, layout))
    address = base + PARTIALS + (head * (4 * HEAD))[:, None] + (word * 8)[None, :]
    wait_for_bytes(base + ARRIVED + 8)
    peaks, sums, columns = (), (), ()
    for part in gl.static_range(0, N_PARTS, 2):
        stats = load_floats_4(base + STATS + head * (8 * N_CTAS) + part * 8)
        peaks, sums = peaks + (stats[0], stats[2]), sums + (stats[1], stats[3])
    for part in gl.static_range(N_PARTS):
        columns = columns + (load_floats_2(address + part * (4 * GROUP * HEAD)),)
    peak = peaks[0]
    for part in gl.static_range(1, N_PARTS):
        peak = gl.maximum(peak, peaks[part])
    origin = origin_of(peak)
    total = head * 0.0
    even, odd = gl.zeros([GROUP, HEAD // 2], gl.float32, layout=layout), gl.zeros([GROUP, HEAD // 2], gl.float32, layout=layout)
    for part in gl.static_range(N_PARTS):
        factor = gl.exp2(peaks[part] - origin)
        total += sums[part] * factor
        even += columns[part][0] * factor[:, None]
        odd += columns[part][1] * factor[:, None]
    inverse = inverse_of(total)[:, None]
    ptrs = as_words(Out_ptr) + k_head * HEAD + (head * (HEAD // 2))[:, None] + word[None, :]
    store_global(ptrs, pack(even * inverse, odd * inverse), (word >= 0).to(gl.int32)[None, :])


@gluon.jit
def inverse_of(total):
    """Return what columns are multiplied by, given the sum of their weights: they are zeros where that is zero."""
    return 1.0 / gl.where(total == 0, 1.0, total)


@gluon.jit
def send_found(base, rank, found):
    """Send what the warps found in the tile in shared memory to the first CTA: the lane t = 0 of each group has the first head, t = 1 the second."""
    peaks, sums, even, odd = found
    warp, g, _, head = places()
    barrier = base + ARRIVED + 8 + 0 * head
    columns = base + PARTIALS + rank * (4 * GROUP * HEAD) + head * (4 * HEAD) + (16 * warp + 2 * g) * 8
    gl.inline_asm_elementwise(
        """{
        .reg .pred p, second; .reg .u32 t, to, bar; .reg .f32 a, b, c, d;
        mov.u32 t, %laneid;
        and.b32 t, t, 3;
        setp.lt.u32 p, t, 2;
        setp.eq.u32 second, t, 1;
        selp.f32 a, $3, $2, second;
        selp.f32 b, $5, $4, second;
        selp.f32 c, $7, $6, second;
        selp.f32 d, $9, $8, second;
        selp.b32 to, $11, $10, second;
        mapa.shared::cluster.u32 to, to, 0;
        mapa.shared::cluster.u32 bar, $12, 0;
        @p st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], {a, b, c, d}, [bar];
        mov.u32 $0, 0; mov.u32 $1, 0;
        }""",
        "=r,=r,f,f,f,f,f,f,f,f,r,r,r,r", [even[0], odd[0], even[1], odd[1], columns, barrier], dtype=gl.int32, is_pure=False, pack=2,
    )  # fmt: skip
    gl.inline_asm_elementwise(
        """{
        .reg .pred p, second; .reg .u32 t, to, bar; .reg .f32 a, b;
        mov.u32 t, %tid.x;
        setp.lt.u32 p, t, 2;
        setp.eq.u32 second, t, 1;
        selp.f32 a, $3, $2, second;
        selp.f32 b, $5, $4, second;
        selp.b32 to, $7, $6, second;
        mapa.shared::cluster.u32 to, to, 0;
        mapa.shared::cluster.u32 bar, $8, 0;
        @p st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [to], {a, b}, [bar];
        mov.u32 $0, 0; mov.u32 $1, 0;
        }""",
        "=r,=r,f,f,f,f,r,r,r,r", [peaks, sums, base + STATS + rank * 8 + head * 128, barrier], dtype=gl.int32, is_pure=False, pack=2,
    )  # fmt: skip
