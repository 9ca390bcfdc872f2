"""The kernel of ``norm_qkv_attention``: one token of Qwen3's attention, up to what the output projection reads, by a cluster for each key head.

Each of its 16 CTAs multiplies 32 of the 512 rows of two query heads, their key and their value, and sends the results into the shared memory of the
CTAs that attend, of which each has 16 keys of the cache. Where several attend, the first joins what they found. What the next step needs is known
there when it has arrived; all else that is read was requested before. Only the row of the cache and the result go to global memory.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.attend import attend, send, store
from qtts_compile.kernels.clusters.columns import send_nothing
from qtts_compile.kernels.clusters.heads import place_heads, request_angles, request_head_weights, rotate_heads
from qtts_compile.kernels.clusters.instructions import (
    allocate,
    arrive_at_cluster,
    cluster_rank,
    expect_bytes,
    prepare_barriers,
    request_bytes,
    wait_for_bytes,
    wait_for_cluster,
)
from qtts_compile.kernels.clusters.join import store_joined
from qtts_compile.kernels.clusters.live import any_live
from qtts_compile.kernels.clusters.memory import (
    ARRIVED,
    BYTES_OF_HEADS,
    BYTES_OF_PARTIAL,
    END_OF_PARTIALS,
    HEAD,
    K_TILE,
    KEYS,
    MASK,
    PARTIALS,
    ROW,
    V_TILE,
)
from qtts_compile.kernels.clusters.prefetch import prefetch_share
from qtts_compile.kernels.clusters.project import multiply, request_rows, send_rows, share_x, words_of_x
from qtts_compile.kernels.ptx.global_memory import as_words
from qtts_compile.kernels.ptx.pdl import announce, wait_for_inputs
from qtts_compile.kernels.ptx.shared_memory import wait_for_cta


@gluon.jit
def _request_tile(base, k_head_ptr, v_head_ptr, tile):
    request_bytes(base + K_TILE, k_head_ptr + tile * (KEYS * HEAD), KEYS * ROW, base + ARRIVED)
    request_bytes(base + V_TILE, v_head_ptr + tile * (KEYS * HEAD), KEYS * ROW, base + ARRIVED)


@gluon.jit
def norm_qkv_attention_kernel(
    X_ptr, Norm_ptr, Q_proj_ptr, K_proj_ptr, V_proj_ptr, Q_weight_ptr, K_weight_ptr, Cos_ptr, Sin_ptr, K_cache_ptr, V_cache_ptr,
    Position_ptr, Mask_ptr, Out_ptr, Next_1_ptr, Next_2_ptr, next_bytes, eps, q_eps, k_eps, scale, k_stride_h, v_stride_h, stride_axis,
    K: gl.constexpr, N_TILES: gl.constexpr, HAS_SECTIONS: gl.constexpr, IS_INTERLEAVED: gl.constexpr, AXIS_1: gl.constexpr, AXIS_2: gl.constexpr,
    SHARED_BYTES: gl.constexpr, HAS_PDL: gl.constexpr,
):  # fmt: skip
    announce(HAS_PDL)
    memory, base = allocate(SHARED_BYTES)
    AXES: gl.constexpr = 3 if HAS_SECTIONS else 1
    BYTES_OF_MASK: gl.constexpr = 0 if Mask_ptr is None else KEYS
    HAS_DEAD_TILES: gl.constexpr = N_TILES > 1 and Mask_ptr is not None
    X: gl.constexpr = END_OF_PARTIALS if N_TILES > 1 else PARTIALS
    prepare_barriers(base + ARRIVED)
    expect_bytes(base + ARRIVED + 8, N_TILES * BYTES_OF_PARTIAL)
    k_head, rank = gl.program_id(0), cluster_rank()
    attends = rank < N_TILES

    # Requests that wait for no other kernel.
    w_ptrs, tiles = request_rows(Q_proj_ptr, K_proj_ptr, V_proj_ptr, k_head, rank, K)
    x_words = words_of_x(K)
    norm = gl.load(as_words(Norm_ptr) + x_words)
    position = gl.load(Position_ptr, volatile=True)
    position = gl.where(position < 0, position + N_TILES * KEYS, position)
    if attends:
        request_head_weights(base, Q_weight_ptr, K_weight_ptr)
    arrive_at_cluster()
    wait_for_inputs(HAS_PDL)

    # x first, then what attention needs. Of the row that is written nothing is used, whatever was read.
    x = gl.load(as_words(X_ptr) + x_words)
    k_head_ptr = K_cache_ptr + k_head.to(gl.int64) * k_stride_h
    v_head_ptr = V_cache_ptr + k_head.to(gl.int64) * v_stride_h
    is_before, counts = rank * KEYS <= position, True
    if N_TILES > 1 and Mask_ptr is not None:
        counts = any_live(Mask_ptr + rank * KEYS, attends)
    if attends:
        if is_before | (not HAS_DEAD_TILES):
            _request_tile(base, k_head_ptr, v_head_ptr, rank)
        if Mask_ptr is not None:
            request_bytes(base + MASK, Mask_ptr.to(gl.int64) + rank * KEYS, KEYS, base + ARRIVED)
        request_angles(base, Cos_ptr, Sin_ptr, stride_axis, AXES)
    share_x(base + X, x, norm)
    wait_for_cta()
    # Tiles behind the new token wait for the mask, which comes with x and seldom lets one count.
    if HAS_DEAD_TILES:
        if attends & counts & ~is_before:
            _request_tile(base, k_head_ptr, v_head_ptr, rank)
    tile_bytes = 2 * KEYS * ROW * (is_before | counts).to(gl.int32) if HAS_DEAD_TILES else 2 * KEYS * ROW
    expect_bytes(base + ARRIVED, BYTES_OF_HEADS + 2 * ROW * AXES + BYTES_OF_MASK + tile_bytes)
    y = multiply(base + X, w_ptrs, tiles, eps, K)
    wait_for_cluster()
    send_rows(y, rank, base, N_TILES)
    prefetch_share(Next_1_ptr, Next_2_ptr, k_head, rank, next_bytes, True)

    if attends:
        wait_for_bytes(base + ARRIVED)
        # Where nothing counts there may be the new token to write.
        if (is_before & (position < (rank + 1) * KEYS)) | counts:
            a, b = rotate_heads(base, q_eps, k_eps, HAS_SECTIONS, IS_INTERLEAVED, AXIS_1, AXIS_2)
            place_heads(base, a, b, k_head_ptr, v_head_ptr, position, rank)
            wait_for_cta()
            row_max, row_sum, even, odd = attend(base, scale, Mask_ptr is not None)
            if N_TILES > 1:
                send(base, rank, row_max, row_sum, even, odd)
            else:
                store(Out_ptr, k_head, row_sum, even, odd)
        else:
            send_nothing(base, rank, 0)
        if rank == 0:
            if N_TILES > 1:
                store_joined(base, Out_ptr, k_head, N_TILES)
            gl.device_assert((position >= 0) & (position < N_TILES * KEYS), "kv_write: position is out of range")
    memory._keep_alive()
