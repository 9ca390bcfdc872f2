"""Kept tokens of a quantised cache, of which a CTA has one tile or several in shared memory, for kernels of clusters to use."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAssignmentType=false
# Gluon's types do not know its tensors' operators, its static loops and tuples.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.dense_tiles import meet_shared_tile
from qtts_compile.kernels.clusters.heads import store_heads, write_heads
from qtts_compile.kernels.clusters.instructions import request_bytes
from qtts_compile.kernels.clusters.live import live_kept
from qtts_compile.kernels.clusters.memory import ARRIVED, BYTES_OF_TILE, END_OF_COLUMNS, HEAD, K_TILE, KEYS, Q_HEADS, ROW, V_TILE
from qtts_compile.kernels.clusters.softmax import nothing
from qtts_compile.kernels.clusters.tiles import load_queries

FIRST_SHIFT = gl.constexpr(END_OF_COLUMNS.value - K_TILE.value - BYTES_OF_TILE.value)


@gluon.jit
def _shift_of(tile):
    """Return how many bytes behind the place of the first tile in shared memory another lies."""
    return gl.where(tile == 0, 0, FIRST_SHIFT + tile * BYTES_OF_TILE)


@gluon.jit
def request_kept(base, K_kept_ptr, V_kept_ptr, rows, TILES: gl.constexpr):
    """Request so many rows of kept keys and values, from where the pointers say, into a CTA's tiles."""
    for tile in gl.static_range(TILES):
        bytes = gl.minimum(rows - tile * KEYS, KEYS) * ROW
        if bytes > 0:
            request_bytes(base + K_TILE + _shift_of(tile), K_kept_ptr + tile * (KEYS * HEAD), bytes, base + ARRIVED)
            request_bytes(base + V_TILE + _shift_of(tile), V_kept_ptr + tile * (KEYS * HEAD), bytes, base + ARRIVED)


@gluon.jit
def are_kept_live(Mask_ptr, first_row, row, start, SINKS: gl.constexpr, WINDOW: gl.constexpr, TILES: gl.constexpr):
    """Tell of each tile which rows g and g + 8 hold a token that is attended to."""
    live = ()
    for tile in gl.static_range(TILES):
        live = live + (live_kept(Mask_ptr, first_row // KEYS + tile, row, start, SINKS, WINDOW),)
    return live


@gluon.jit
def place_in_kept(base, a, b, k_head_ptr, v_head_ptr, row, first_row, TILES: gl.constexpr):
    """Put queries where attention expects them, and key and value into a ``row`` of kept tokens and of a CTA's tiles of these, if it is in one."""
    place = (row - first_row).to(gl.int32)
    has_place = (place >= 0) & (place < TILES * KEYS)
    tile = gl.where(has_place, place // KEYS, 0)
    store_heads(base, a, b, place % KEYS + _shift_of(tile) // ROW, has_place)
    write_heads(a, b, k_head_ptr, v_head_ptr, row, has_place)


@gluon.jit
def attend_to_kept(base, live, scale):
    """Return what each warp finds in a CTA's tiles, as of the one in shared memory; ``live`` is from :func:`are_kept_live`."""
    queries, found = load_queries(base + Q_HEADS, 16, 64), nothing(2)
    for tile in gl.static_range(len(live)):
        found = meet_shared_tile(found, queries, base + _shift_of(tile), live[tile], scale)
    return found
