"""The kernel of ``qk_norm_rope_attention`` for one new token of each of several texts, whose heads the CTAs of a cluster share.

As the one of ``norm_qkv_attention`` for long caches, but that the projections come from memory: so many CTAs ("parts") attend for each text and each
of its key heads, the first of them joins what they found, and the last, which has the fewest slots, attends to the new token and writes it into the
cache. Each looks at the text's whole mask itself.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false
# Gluon's types do not know its tensors' operators, its static loops, conditions and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.columns import send_all, send_nothing, store_all, store_found_in_shared_tile, store_found_in_tiles
from qtts_compile.kernels.clusters.dense_tiles import attend_to_one_round, attend_to_shared_tile, attend_to_tiles, load_tile
from qtts_compile.kernels.clusters.heads import load_heads, request_angles, request_head_weights, rotate_words, store_heads, write_heads
from qtts_compile.kernels.clusters.instructions import (
    allocate,
    arrive_at_cluster,
    expect_bytes,
    prepare_barriers,
    wait_for_bytes,
    wait_for_cluster,
)
from qtts_compile.kernels.clusters.join import store_joined
from qtts_compile.kernels.clusters.live import deal, row_of
from qtts_compile.kernels.clusters.memory import ARRIVED, BYTES_OF_PARTIAL, KEYS, N_WARPS, PADDED_HEAD, ROW
from qtts_compile.kernels.clusters.texts import any_seen, look_behind, place_of, store_looks
from qtts_compile.kernels.clusters.tiles import places
from qtts_compile.kernels.ptx.pdl import announce, wait_for_inputs
from qtts_compile.kernels.ptx.shared_memory import wait_for_cta


@gluon.jit
def heads_attention_kernel(
    Q_ptr, K_ptr, V_ptr, Q_weight_ptr, K_weight_ptr, Cos_ptr, Sin_ptr, K_cache_ptr, V_cache_ptr, Position_ptr, Mask_ptr, Out_ptr,
    q_eps, k_eps, scale, pairs, H_k, S, q_strides, k_strides, v_strides, k_cache_strides, v_cache_strides, mask_stride, angle_strides,
    PARTS: gl.constexpr, TILES: gl.constexpr, LOOKS: gl.constexpr,
    HAS_SECTIONS: gl.constexpr, IS_INTERLEAVED: gl.constexpr, AXIS_1: gl.constexpr, AXIS_2: gl.constexpr,
    SHARED_BYTES: gl.constexpr, HAS_PDL: gl.constexpr,
):  # fmt: skip
    announce(HAS_PDL)
    memory, base = allocate(SHARED_BYTES)
    AXES: gl.constexpr = 3 if HAS_SECTIONS else 1
    HAS_MASK: gl.constexpr = Mask_ptr is not None
    prepare_barriers(base + ARRIVED)
    expect_bytes(base + ARRIVED, (2 + 2 * AXES) * ROW)
    if PARTS > 1:
        expect_bytes(base + ARRIVED + 8, PARTS * BYTES_OF_PARTIAL)
    part, pair, first, exists = place_of(pairs, PARTS)
    position = gl.load(Position_ptr, volatile=True)
    request_head_weights(base, Q_weight_ptr, K_weight_ptr)
    if PARTS > 1:
        arrive_at_cluster()
    wait_for_cta()  # for the barriers
    text, k_head = (pair // H_k).to(gl.int64), pair % H_k
    wait_for_inputs(HAS_PDL)

    # All that is known to be needed is requested together, to wait for memory once.
    a, b = load_heads(Q_ptr, K_ptr, V_ptr, text, k_head, q_strides, k_strides, v_strides)
    request_angles(base, Cos_ptr + text * angle_strides[1], Sin_ptr + text * angle_strides[1], angle_strides[0], AXES)
    K_cache_ptr += text * k_cache_strides[0] + k_head * k_cache_strides[1]
    V_cache_ptr += text * v_cache_strides[0] + k_head * v_cache_strides[1]
    row, in_cache = row_of(position, S)
    n_tiles = S // KEYS
    if HAS_MASK:
        Mask_ptr += text * mask_stride
        n_tiles = (row + KEYS - 1) // KEYS
    first_slot, own_tiles = deal(gl.where(exists, n_tiles, 0), part, PARTS)
    tile = load_tile(K_cache_ptr, V_cache_ptr, Mask_ptr, 0, own_tiles, first_slot, row)
    if HAS_MASK:
        is_new_live = gl.load(Mask_ptr + row)
        looks = look_behind(Mask_ptr, row, S, LOOKS)

    wait_for_bytes(base + ARRIVED)
    a, b = rotate_words(base, a, b, q_eps, k_eps, HAS_SECTIONS, IS_INTERLEAVED, AXIS_1, AXIS_2)
    is_last = exists & (part == PARTS - 1)
    store_heads(base, a, b, 0, is_last)
    if HAS_MASK:
        store_looks(base, looks)
    wait_for_cta()
    # Most masks let the slots before the new token count, which are requested until the look at the others is over. Without a mask all count.
    if HAS_MASK:
        if any_seen(base):
            first_slot, own_tiles = deal(gl.where(exists, S // KEYS, 0), part, PARTS)
            tile = load_tile(K_cache_ptr, V_cache_ptr, Mask_ptr, 0, own_tiles, first_slot, row)
    if PARTS > 1:
        wait_for_cluster()
    if is_last | (own_tiles > 0):
        if TILES > N_WARPS:
            found_in_tiles = attend_to_tiles(base, tile, K_cache_ptr, V_cache_ptr, Mask_ptr, own_tiles, first_slot, row, scale, TILES, False)
        else:
            found_in_tiles = attend_to_one_round(base, tile, scale)
        store_found_in_tiles(base, found_in_tiles, 8 * places()[1], PADDED_HEAD // 2)
        if is_last:  # the new token
            warp, g, _, which = places()
            is_live = (g + 8 * which == 0) & (warp >= 0)
            if HAS_MASK:
                is_live = is_live & is_new_live.to(gl.int1)
            store_found_in_shared_tile(base, attend_to_shared_tile(base, is_live, scale))
        if PARTS > 1:
            send_all(base, part, first, is_last, False)
        else:
            store_all(base, Out_ptr, pair, False)
        if is_last:
            write_heads(a, b, K_cache_ptr, V_cache_ptr, row, in_cache)
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
