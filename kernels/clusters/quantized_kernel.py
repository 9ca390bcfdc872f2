"""The kernel of ``norm_qkv_quantized_attention``: as ``norm_qkv_attention``'s, over codes and kept tokens, however many slots there are.

Codes have 3, 4 or 8 bits. The slots that count are dealt out to the CTAs of a cluster, as many to each warp, from the first on, and from the last on
the kept tokens, of which the new one is one. The last CTA also writes the new token's codes while the first joins what all found.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false
# Gluon's types do not know its tensors' operators, its static loops, conditions and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.coded_tiles import attend_to_codes, load_coded_tiles, store_rotated
from qtts_compile.kernels.clusters.columns import keep_or_send, send_all, send_nothing, store_found_in_tiles
from qtts_compile.kernels.clusters.dense_tiles import attend_to_shared_tile
from qtts_compile.kernels.clusters.encode import write_codes
from qtts_compile.kernels.clusters.heads import place_heads, request_angles, request_head_weights, rotate_heads, write_heads
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
from qtts_compile.kernels.clusters.live import any_behind, deal, end_of_codes, live_kept, load_behind, row_of, send_flags
from qtts_compile.kernels.clusters.memory import (
    ARRIVED,
    BYTES_OF_BIT,
    BYTES_OF_FLAGS,
    BYTES_OF_PARTIAL,
    END_OF_COLUMNS,
    HEAD,
    K_TILE,
    KEYS,
    N_CTAS,
    ROW,
    V_TILE,
    tiles_of_step,
)
from qtts_compile.kernels.clusters.prefetch import prefetch_share
from qtts_compile.kernels.clusters.project import multiply, request_rows, send_rows, share_x, words_of_x
from qtts_compile.kernels.clusters.rotation import store_signs
from qtts_compile.kernels.clusters.tiles import places
from qtts_compile.kernels.ptx.global_memory import as_words
from qtts_compile.kernels.ptx.pdl import announce, wait_for_inputs
from qtts_compile.kernels.ptx.shared_memory import wait_for_cta


@gluon.jit
def norm_qkv_quantized_attention_kernel(
    X_ptr, Norm_ptr, Q_proj_ptr, K_proj_ptr, V_proj_ptr, Q_weight_ptr, K_weight_ptr, Cos_ptr, Sin_ptr, K_codes_ptr, V_codes_ptr, Scales_ptr, Kept_ptr,
    Position_ptr, Start_ptr, Mask_ptr, Out_ptr, Next_1_ptr, Next_2_ptr, next_bytes, eps, q_eps, k_eps, scale, S, k_codes_stride_h, v_codes_stride_h,
    scales_stride, scales_stride_h, kept_stride, kept_stride_h, stride_axis,
    K: gl.constexpr, TILES: gl.constexpr, SINKS: gl.constexpr, WINDOW: gl.constexpr, K_BITS: gl.constexpr, V_BITS: gl.constexpr,
    HAS_SECTIONS: gl.constexpr, IS_INTERLEAVED: gl.constexpr, AXIS_1: gl.constexpr, AXIS_2: gl.constexpr,
    SHARED_BYTES: gl.constexpr, HAS_PDL: gl.constexpr,
):  # fmt: skip
    announce(HAS_PDL)
    memory, base = allocate(SHARED_BYTES)
    AXES: gl.constexpr = 3 if HAS_SECTIONS else 1
    HAS_MASK: gl.constexpr = Mask_ptr is not None
    IS_ROTATED: gl.constexpr = K_BITS < 8
    STEP: gl.constexpr = tiles_of_step(TILES, K_BITS)
    prepare_barriers(base + ARRIVED)
    k_head, rank = gl.program_id(0), cluster_rank()

    # Requests that wait for no other kernel.
    w_ptrs, tiles = request_rows(Q_proj_ptr, K_proj_ptr, V_proj_ptr, k_head, rank, K)
    x_words = words_of_x(K)
    norm = gl.load(as_words(Norm_ptr) + x_words)
    position = gl.load(Position_ptr, volatile=True)
    start = gl.load(Start_ptr).to(gl.int32)
    request_head_weights(base, Q_weight_ptr, K_weight_ptr)
    if IS_ROTATED:
        store_signs(base)
    arrive_at_cluster()
    wait_for_inputs(HAS_PDL)

    # x first, then what attention needs. Of the row that is written nothing is used, whatever was read.
    x = gl.load(as_words(X_ptr) + x_words)
    request_angles(base, Cos_ptr, Sin_ptr, stride_axis, AXES)
    kept_tile = N_CTAS - 1 - rank  # the first CTAs have codes, the last have kept tokens, and some both
    own_kept = gl.minimum(gl.maximum(SINKS + WINDOW - kept_tile * KEYS, 0), KEYS)
    k_head = k_head.to(gl.int64)
    K_codes_ptr += k_head * k_codes_stride_h
    V_codes_ptr += k_head * v_codes_stride_h
    K_scales_ptr = Scales_ptr + k_head * scales_stride_h
    V_scales_ptr = K_scales_ptr + scales_stride
    pointers = K_codes_ptr, V_codes_ptr, K_scales_ptr, V_scales_ptr
    K_kept_ptr = Kept_ptr + k_head * kept_stride_h
    V_kept_ptr = K_kept_ptr + kept_stride
    if own_kept > 0:
        request_bytes(base + K_TILE, K_kept_ptr + kept_tile * (KEYS * HEAD), own_kept * ROW, base + ARRIVED)
        request_bytes(base + V_TILE, V_kept_ptr + kept_tile * (KEYS * HEAD), own_kept * ROW, base + ARRIVED)
    expect_bytes(base + ARRIVED, (4 + 2 + 2 * AXES) * ROW + own_kept * (2 * ROW) + (BYTES_OF_FLAGS if HAS_MASK else 0))
    expect_bytes(base + ARRIVED + 8, N_CTAS * BYTES_OF_PARTIAL)
    share_x(base + END_OF_COLUMNS, x, norm)
    wait_for_cta()

    # What follows from the position comes after x, which would wait for it: it arrives with the weights.
    row, in_cache = row_of(position, S)
    kept_row = gl.where(in_cache, SINKS + row % WINDOW, -1)
    is_kept_live = live_kept(Mask_ptr, kept_tile, row, start, SINKS, WINDOW)
    if HAS_MASK:
        behind = load_behind(Mask_ptr, rank, row, S)
    y = multiply(base + END_OF_COLUMNS, w_ptrs, tiles, eps, K)
    wait_for_cluster()
    send_rows(y, rank, base, N_CTAS)

    # Most masks let the codes before the window count, which are requested until all CTAs' looks have arrived. Without a mask all count.
    if HAS_MASK:
        send_flags(behind, rank, row, S, base)
    first_slot, own_tiles = deal((end_of_codes(row, start, SINKS, WINDOW) + KEYS - 1) // KEYS if HAS_MASK else S // KEYS, rank, N_CTAS)
    codes = load_coded_tiles(pointers, Mask_ptr, 0, own_tiles, first_slot, row, start, SINKS, WINDOW, STEP, K_BITS, V_BITS)
    prefetch_share(Next_1_ptr, Next_2_ptr, k_head, rank, next_bytes, own_tiles <= STEP)
    wait_for_bytes(base + ARRIVED)
    if HAS_MASK:
        if any_behind(base):
            first_slot, own_tiles = deal(S // KEYS, rank, N_CTAS)
            codes = load_coded_tiles(pointers, Mask_ptr, 0, own_tiles, first_slot, row, start, SINKS, WINDOW, STEP, K_BITS, V_BITS)
    if (own_tiles > 0) | (own_kept > 0):
        a, b = rotate_heads(base, q_eps, k_eps, HAS_SECTIONS, IS_INTERLEAVED, AXIS_1, AXIS_2)
        place_heads(base, a, b, K_kept_ptr, V_kept_ptr, kept_row, kept_tile)
        if IS_ROTATED:
            if own_tiles > 0:
                store_rotated(base, a, b)
        wait_for_cta()
        if own_tiles > 0:
            found_in_codes = attend_to_codes(
                base, codes, pointers, Mask_ptr, own_tiles, first_slot, row, start, scale, SINKS, WINDOW, TILES, STEP, K_BITS, V_BITS
            )  # fmt: skip
            if TILES > STEP:
                prefetch_share(Next_1_ptr, Next_2_ptr, k_head, rank, next_bytes, own_tiles > STEP)
            store_found_in_tiles(base, found_in_codes, 16 * places()[1], 4 * 8)
        if own_kept > 0:
            keep_or_send(base, rank, attend_to_shared_tile(base, is_kept_live, scale), own_tiles > 0)
        if own_tiles > 0:
            send_all(base, rank, 0, own_kept > 0, IS_ROTATED)
        if rank == N_CTAS - 1:
            is_sink = in_cache & (row >= start) & (row < start + SINKS)
            write_heads(a, b, K_kept_ptr, V_kept_ptr, row - start, is_sink)
            write_codes(
                base, a, b, K_codes_ptr + row * (BYTES_OF_BIT * K_BITS), V_codes_ptr + row * (BYTES_OF_BIT * V_BITS),
                K_scales_ptr + row, V_scales_ptr + row, in_cache, K_BITS, V_BITS,
            )  # fmt: skip
    else:
        send_nothing(base, rank, 0)
    if rank == 0:
        store_joined(base, Out_ptr, k_head, N_CTAS)
        gl.device_assert(in_cache, "kv_write: position is out of range")
    memory._keep_alive()
