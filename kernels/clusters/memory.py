"""Where things lie: the shared memory of a CTA, by address, and the layouts that Gluon needs for it and for tensors that all CTAs hold alike."""

# pyright: reportArgumentType=false, reportCallIssue=false
# Gluon's types do not know that constants may be given as plain values.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qtts_compile.kernels.clusters.device import CTAS, WARPS

HEAD, GROUP = gl.constexpr(128), gl.constexpr(2)  # width of a head, query heads of a key head
KEYS = gl.constexpr(16)  # of a tile of the cache
TILES_IN_FLIGHT = gl.constexpr(4)  # of 256 columns of weights, in 128 registers of a thread
TILES_OF_WARP = gl.constexpr(2)  # of codes that are requested at once
N_WARPS, N_CTAS = gl.constexpr(WARPS), gl.constexpr(CTAS)
LOG2_E = gl.constexpr(1.4426950408889634)

# Shared memory of a CTA, in bytes
ARRIVED = gl.constexpr(0)  # the barrier for what a CTA attends with, and after it that for what the first one joins
ROWS = gl.constexpr(256)  # products: two query heads, a key, a value
Q_HEADS = gl.constexpr(1280)  # normalised and rotated
SCORES = gl.constexpr(1792)  # [2, 16] float32
MASK = gl.constexpr(1920)
K_TILE = gl.constexpr(2048)
V_TILE = gl.constexpr(6144)
HEAD_WEIGHTS = gl.constexpr(10240)  # of the norms of queries and keys
COS = gl.constexpr(10752)  # of up to three axes
SIN = gl.constexpr(11520)
STATS = gl.constexpr(12288)  # [2, 16 tiles] of maximum and sum
PARTIALS = gl.constexpr(12544)  # [16 tiles, 2, 128] float32
END_OF_PARTIALS = gl.constexpr(28928)
ROW = gl.constexpr(256)  # of a head
BYTES_OF_HEADS = gl.constexpr((4 + 2) * 256)  # products and weights of norms
BYTES_OF_PARTIAL = gl.constexpr(2 * (4 * 128 + 8))

# ... and of one that attends to many tiles
PEAKS = gl.constexpr(1792)  # [2, 4 warps] float32: the largest scores in tiles
SUMS = gl.constexpr(1824)  # [2, 4 warps] float32: of their weights
KEPT_STATS = gl.constexpr(1856)  # [2] of maximum and sum: of kept tokens
BEHIND = gl.constexpr(1920)  # [4 warps]: whether the mask of a text lets slots behind the new token count
Q_ROTATED = gl.constexpr(28928)  # [2, 128] bfloat16
FLAGS = gl.constexpr(29440)  # [16 CTAs, 4 warps]: whether the mask lets slots behind the new token count; then
KEPT_COLUMNS = gl.constexpr(29440)  # [2, 128] float32: sums of kept values
COLUMNS = gl.constexpr(30464)  # [4 warps, 2, 144] float32: sums of values of tiles
SIGNS = gl.constexpr(35072)  # [64] of two bfloat16: of a rotation
END_OF_COLUMNS = gl.constexpr(35328)
BYTES_OF_TILE = gl.constexpr(8192)  # of keys and values; kept tokens' second tile and those after it come last
PADDED_HEAD = gl.constexpr(576)  # of float32
BYTES_OF_BIT = gl.constexpr(16)  # of the codes of a head, for each of their bits
BYTES_OF_FLAGS = gl.constexpr(4 * CTAS * WARPS)


def shared_bytes(width: int, end: int) -> int:
    """Return the shared memory of a CTA: with x in float32 and a sum of each thread's squares after what attention needs, which has this ``end``."""
    return end + 4 * width + 4 * 32 * WARPS


@gluon.constexpr_function
def tiles_of_step(tiles, bits):
    """Return how many of a CTA's tiles of codes of so many ``bits`` are requested at once; of bfloat16 it is one for each warp."""
    return WARPS * min(TILES_OF_WARP.value if bits < 8 else 1, (tiles + WARPS - 1) // WARPS)


@gluon.constexpr_function
def everywhere(rank):
    """Return the part of a layout which says that all CTAs of a cluster hold the same elements."""
    return [[0] * rank for _ in range(4)]  # of CTAS = 2 ** 4


@gluon.constexpr_function
def linear_layout(registers, lanes, warps, shape):
    """Return the layout of a tensor whose coordinates the bits of a register, a lane and a warp add to."""
    return gl.DistributedLinearLayout(registers, lanes, warps, everywhere(len(shape)), shape)


@gluon.constexpr_function
def memory_layout():
    """Return the layout of shared memory that is used by address."""
    return gl.SwizzledSharedLayout(1, 1, 1, [0], cga_layout=everywhere(1))
