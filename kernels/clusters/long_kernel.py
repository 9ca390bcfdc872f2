"""The kernel of ``norm_qkv_attention`` over more slots than a cluster has tiles for in shared memory.

As the one for a few, but the slots that count are dealt out to the CTAs of a cluster, as many to each warp, and go from global memory to the tensor
cores. Of the new token, key and value are read in the shared memory of the last CTA, which has the fewest slots and writes them into the cache while
the first joins what all found.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false
# Gluon's types do not know its tensors' operators, its static loops, conditions and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.columns import keep_or_send, send_all, send_nothing, store_found_in_tiles
from qtts_compile.kernels.clusters.dense_tiles import attend_to_shared_tile, attend_to_tiles, load_tile
from qtts_compile.kernels.clusters.heads import request_angles, request_head_weights, rotate_heads, store_heads, write_heads
from qtts_compile.kernels.clusters.instructions import (
    allocate,
    arrive_at_cluster,
    cluster_rank,
    expect_bytes,
    prepare_barriers,
    wait_for_bytes,
    wait_for_cluster,
)
from qtts_compile.kernels.clusters.join import store_joined
from qtts_compile.kernels.clusters.live import any_behind, deal, load_behind, row_of, send_flags
from qtts_compile.kernels.clusters.memory import ARRIVED, BYTES_OF_FLAGS, BYTES_OF_PARTIAL, END_OF_COLUMNS, KEYS, N_CTAS, N_WARPS, PADDED_HEAD, ROW
from qtts_compile.kernels.clusters.prefetch import prefetch_share
from qtts_compile.kernels.clusters.project import multiply, request_rows, send_rows, share_x, words_of_x
from qtts_compile.kernels.clusters.tiles import places
from qtts_compile.kernels.ptx.global_memory import as_words
from qtts_compile.kernels.ptx.pdl import announce, wait_for_inputs
from qtts_compile.kernels.ptx.shared_memory import wait_for_cta


@gluon.jit
def norm_qkv_long_attention_kernel(
    X_ptr, Norm_ptr, Q_proj_ptr, K_proj_ptr, V_proj_ptr, Q_weight_ptr, K_weight_ptr, Cos_ptr, Sin_ptr, K_cache_ptr, V_cache_ptr,
    Position_ptr, Mask_ptr, Out_ptr, Next_1_ptr, Next_2_ptr, next_bytes, eps, q_eps, k_eps, scale, k_stride_h, v_stride_h, stride_axis, S,
    K: gl.constexpr, TILES: gl.constexpr, HAS_SECTIONS: gl.constexpr, IS_INTERLEAVED: gl.constexpr, AXIS_1: gl.constexpr, AXIS_2: gl.constexpr,
    SHARED_BYTES: gl.constexpr, HAS_PDL: gl.constexpr,
):  # fmt: skip
    announce(HAS_PDL)
    memory, base = allocate(SHARED_BYTES)
    AXES: gl.constexpr = 3 if HAS_SECTIONS else 1
    HAS_MASK: gl.constexpr = Mask_ptr is not None
    prepare_barriers(base + ARRIVED)
    expect_bytes(base + ARRIVED, (4 + 2 + 2 * AXES) * ROW + (BYTES_OF_FLAGS if HAS_MASK else 0))
    expect_bytes(base + ARRIVED + 8, N_CTAS * BYTES_OF_PARTIAL)
    k_head, rank = gl.program_id(0), cluster_rank()

    # Requests that wait for no other kernel.
    w_ptrs, tiles = request_rows(Q_proj_ptr, K_proj_ptr, V_proj_ptr, k_head, rank, K)
    x_words = words_of_x(K)
    norm = gl.load(as_words(Norm_ptr) + x_words)
    position = gl.load(Position_ptr, volatile=True)
    request_head_weights(base, Q_weight_ptr, K_weight_ptr)
    arrive_at_cluster()
    wait_for_inputs(HAS_PDL)

    # x first, then what attention needs.
    x = gl.load(as_words(X_ptr) + x_words)
    request_angles(base, Cos_ptr, Sin_ptr, stride_axis, AXES)
    K_cache_ptr += k_head.to(gl.int64) * k_stride_h
    V_cache_ptr += k_head.to(gl.int64) * v_stride_h
    share_x(base + END_OF_COLUMNS, x, norm)
    wait_for_cta()

    # What follows from the position comes after x, which would wait for it: it arrives with the weights.
    row, in_cache = row_of(position, S)
    is_last = rank == N_CTAS - 1
    if HAS_MASK:
        is_new_live = gl.load(Mask_ptr + row)
        behind = load_behind(Mask_ptr, rank, row, S)
    y = multiply(base + END_OF_COLUMNS, w_ptrs, tiles, eps, K)
    wait_for_cluster()
    send_rows(y, rank, base, N_CTAS)

    # Most masks let the slots before the new token count, which are requested until all CTAs' looks have arrived. Without a mask all count.
    if HAS_MASK:
        send_flags(behind, rank, row, S, base)
    first_slot, own_tiles = deal((row + KEYS - 1) // KEYS if HAS_MASK else S // KEYS, rank, N_CTAS)
    tile = load_tile(K_cache_ptr, V_cache_ptr, Mask_ptr, 0, own_tiles, first_slot, row)
    prefetch_share(Next_1_ptr, Next_2_ptr, k_head, rank, next_bytes, own_tiles <= N_WARPS)
    wait_for_bytes(base + ARRIVED)
    if HAS_MASK:
        if any_behind(base):
            first_slot, own_tiles = deal(S // KEYS, rank, N_CTAS)
            tile = load_tile(K_cache_ptr, V_cache_ptr, Mask_ptr, 0, own_tiles, first_slot, row)
    if is_last | (own_tiles > 0):
        a, b = rotate_heads(base, q_eps, k_eps, HAS_SECTIONS, IS_INTERLEAVED, AXIS_1, AXIS_2)
        store_heads(base, a, b, 0, is_last)
        wait_for_cta()
        if own_tiles > 0:
            found_in_tiles = attend_to_tiles(base, tile, K_cache_ptr, V_cache_ptr, Mask_ptr, own_tiles, first_slot, row, scale, TILES)
            if TILES > N_WARPS:
                prefetch_share(Next_1_ptr, Next_2_ptr, k_head, rank, next_bytes, own_tiles > N_WARPS)
            store_found_in_tiles(base, found_in_tiles, 8 * places()[1], PADDED_HEAD // 2)
        if is_last:  # the new token
            warp, g, _, which = places()
            is_live = (g + 8 * which == 0) & (warp >= 0)
            if HAS_MASK:
                is_live = is_live & is_new_live.to(gl.int1)
            keep_or_send(base, rank, attend_to_shared_tile(base, is_live, scale), own_tiles > 0)
        if own_tiles > 0:
            send_all(base, rank, 0, is_last, False)
        if is_last:
            write_heads(a, b, K_cache_ptr, V_cache_ptr, row, in_cache)
    else:
        send_nothing(base, rank, 0)
    if rank == 0:
        store_joined(base, Out_ptr, k_head, N_CTAS)
        gl.device_assert(in_cache, "kv_write: position is out of range")
    memory._keep_alive()
