"""The kernel of ``qk_norm_rope_quantized_attention`` for one new token of each of several texts, whose heads the CTAs of a cluster share.

As the one over bfloat16, over codes of 3, 4 or 8 bits and kept tokens. Codes are dealt out to the CTAs of a pair of a text and a key head from the
first on, and from the last on the kept tokens, of which the new one is one and whose tiles a CTA has in shared memory. The last also writes the new
token's codes while the first joins what all found.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false
# Gluon's types do not know its tensors' operators, its static loops, conditions and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.coded_tiles import attend_to_codes, attend_to_one_round, load_coded_tiles, store_rotated
from qtts_compile.kernels.clusters.columns import send_all, send_nothing, store_all, store_found_in_shared_tile, store_found_in_tiles
from qtts_compile.kernels.clusters.encode import write_codes
from qtts_compile.kernels.clusters.heads import load_heads, request_angles, request_head_weights, rotate_words, write_heads
from qtts_compile.kernels.clusters.instructions import (
    allocate,
    arrive_at_cluster,
    expect_bytes,
    prepare_barriers,
    wait_for_bytes,
    wait_for_cluster,
)
from qtts_compile.kernels.clusters.join import store_joined
from qtts_compile.kernels.clusters.kept_tiles import are_kept_live, attend_to_kept, place_in_kept, request_kept
from qtts_compile.kernels.clusters.live import deal, end_of_codes, row_of
from qtts_compile.kernels.clusters.memory import ARRIVED, BYTES_OF_BIT, BYTES_OF_PARTIAL, HEAD, KEYS, N_WARPS, ROW
from qtts_compile.kernels.clusters.rotation import store_signs
from qtts_compile.kernels.clusters.texts import any_seen, look_behind, place_of, store_looks
from qtts_compile.kernels.clusters.tiles import places
from qtts_compile.kernels.ptx.pdl import announce, wait_for_inputs
from qtts_compile.kernels.ptx.shared_memory import wait_for_cta


@gluon.jit
def coded_heads_attention_kernel(
    Q_ptr, K_ptr, V_ptr, Q_weight_ptr, K_weight_ptr, Cos_ptr, Sin_ptr, K_codes_ptr, V_codes_ptr, Scales_ptr, Kept_ptr,
    Position_ptr, Start_ptr, Mask_ptr, Out_ptr, q_eps, k_eps, scale, pairs, H_k, S, start_stride,
    q_strides, k_strides, v_strides, k_codes_strides, v_codes_strides, scales_strides, kept_strides, mask_stride, angle_strides,
    PARTS: gl.constexpr, TILES: gl.constexpr, KEPT_TILES: gl.constexpr, LOOKS: gl.constexpr,
    SINKS: gl.constexpr, WINDOW: gl.constexpr, K_BITS: gl.constexpr, V_BITS: gl.constexpr,
    HAS_SECTIONS: gl.constexpr, IS_INTERLEAVED: gl.constexpr, AXIS_1: gl.constexpr, AXIS_2: gl.constexpr,
    SHARED_BYTES: gl.constexpr, HAS_PDL: gl.constexpr,
):  # fmt: skip
    announce(HAS_PDL)
    memory, base = allocate(SHARED_BYTES)
    AXES: gl.constexpr = 3 if HAS_SECTIONS else 1
    HAS_MASK: gl.constexpr = Mask_ptr is not None
    IS_ROTATED: gl.constexpr = K_BITS < 8
    prepare_barriers(base + ARRIVED)
    part, pair, first, exists = place_of(pairs, PARTS)
    first_kept = (PARTS - 1 - part) * (KEPT_TILES * KEYS)  # the first CTAs have codes, the last have kept tokens, and some both
    own_kept = gl.minimum(gl.maximum(SINKS + WINDOW - first_kept, 0), KEPT_TILES * KEYS)
    expect_bytes(base + ARRIVED, (2 + 2 * AXES) * ROW + own_kept * (2 * ROW))
    if PARTS > 1:
        expect_bytes(base + ARRIVED + 8, PARTS * BYTES_OF_PARTIAL)
    text, k_head = (pair // H_k).to(gl.int64), pair % H_k
    position = gl.load(Position_ptr, volatile=True)
    start = gl.load(Start_ptr + text * start_stride).to(gl.int32)
    request_head_weights(base, Q_weight_ptr, K_weight_ptr)
    if IS_ROTATED:
        store_signs(base)
    if PARTS > 1:
        arrive_at_cluster()
    wait_for_cta()  # for the barriers
    wait_for_inputs(HAS_PDL)

    # All that is known to be needed is requested together, to wait for memory once. Of the row that is written nothing is used, whatever was read.
    a, b = load_heads(Q_ptr, K_ptr, V_ptr, text, k_head, q_strides, k_strides, v_strides)
    request_angles(base, Cos_ptr + text * angle_strides[1], Sin_ptr + text * angle_strides[1], angle_strides[0], AXES)
    K_kept_ptr = Kept_ptr + text * kept_strides[1] + k_head * kept_strides[2]
    V_kept_ptr = K_kept_ptr + kept_strides[0]
    request_kept(base, K_kept_ptr + first_kept * HEAD, V_kept_ptr + first_kept * HEAD, own_kept, KEPT_TILES)
    K_codes_ptr += text * k_codes_strides[0] + k_head * k_codes_strides[1]
    V_codes_ptr += text * v_codes_strides[0] + k_head * v_codes_strides[1]
    K_scales_ptr = Scales_ptr + text * scales_strides[1] + k_head * scales_strides[2]
    V_scales_ptr = K_scales_ptr + scales_strides[0]
    pointers = K_codes_ptr, V_codes_ptr, K_scales_ptr, V_scales_ptr
    row, in_cache = row_of(position, S)
    n_tiles = S // KEYS
    if HAS_MASK:
        Mask_ptr += text * mask_stride
        n_tiles = (end_of_codes(row, start, SINKS, WINDOW) + KEYS - 1) // KEYS
    first_slot, own_tiles = deal(gl.where(exists, n_tiles, 0), part, PARTS)
    codes = load_coded_tiles(pointers, Mask_ptr, 0, own_tiles, first_slot, row, start, SINKS, WINDOW, N_WARPS, K_BITS, V_BITS)
    kept_live = are_kept_live(Mask_ptr, first_kept, row, start, SINKS, WINDOW, KEPT_TILES)
    if HAS_MASK:
        looks = look_behind(Mask_ptr, row, S, LOOKS)

    wait_for_bytes(base + ARRIVED)
    a, b = rotate_words(base, a, b, q_eps, k_eps, HAS_SECTIONS, IS_INTERLEAVED, AXIS_1, AXIS_2)
    place_in_kept(base, a, b, K_kept_ptr, V_kept_ptr, gl.where(exists & in_cache, SINKS + row % WINDOW, -1), first_kept, KEPT_TILES)
    if IS_ROTATED:
        store_rotated(base, a, b)
    if HAS_MASK:
        store_looks(base, looks)
    wait_for_cta()
    # Most masks let the codes before the window count, which are requested until the look at the others is over. Without a mask all count.
    if HAS_MASK:
        if any_seen(base):
            first_slot, own_tiles = deal(gl.where(exists, S // KEYS, 0), part, PARTS)
            codes = load_coded_tiles(pointers, Mask_ptr, 0, own_tiles, first_slot, row, start, SINKS, WINDOW, N_WARPS, K_BITS, V_BITS)
    if PARTS > 1:
        wait_for_cluster()
    if exists & ((own_tiles > 0) | (own_kept > 0)):
        if TILES > N_WARPS:
            found_in_codes = attend_to_codes(
                base, codes, pointers, Mask_ptr, own_tiles, first_slot, row, start, scale, SINKS, WINDOW, TILES, N_WARPS, K_BITS, V_BITS, False
            )  # fmt: skip
        else:
            found_in_codes = attend_to_one_round(base, codes, scale, K_BITS, V_BITS)
        store_found_in_tiles(base, found_in_codes, 16 * places()[1], 4 * 8)
        if own_kept > 0:
            store_found_in_shared_tile(base, attend_to_kept(base, kept_live, scale))
        if PARTS > 1:
            send_all(base, part, first, own_kept > 0, IS_ROTATED)
        else:
            store_all(base, Out_ptr, pair, IS_ROTATED)
        if part == PARTS - 1:
            is_sink = in_cache & (row >= start) & (row < start + SINKS)
            write_heads(a, b, K_kept_ptr, V_kept_ptr, row - start, is_sink)
            write_codes(
                base, a, b, K_codes_ptr + row * (BYTES_OF_BIT * K_BITS), V_codes_ptr + row * (BYTES_OF_BIT * V_BITS),
                K_scales_ptr + row, V_scales_ptr + row, in_cache, K_BITS, V_BITS,
            )  # fmt: skip
    else:
        if PARTS > 1:
            if exists:
                send_nothing(base, part, first)
    if PARTS > 1:
        if exists & (part == 0):
            store_joined(base, Out_ptr, pair, PARTS)
    if part == 0:
        gl.device_assert(in_cache, "kv_write: position is out of range")
    memory._keep_alive()
