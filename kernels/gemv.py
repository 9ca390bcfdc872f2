"""Products of a few rows with weight matrices: what ``norm_linears``, ``norm_swiglu`` and ``linear_add`` share.

Such a product takes as long as its weights take to read. Weights do not depend on earlier kernels, so every program requests the first of
them before it waits for its other inputs (programmatic dependent launch), and keeps several tiles of them in flight, in registers.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportAssignmentType=false
# Triton's stubs do not know its static loops, its tuples and that constants may be given as plain values.

import math

import torch
import triton
import triton.language as tl

from qtts_compile.kernels.checks import check_float_dtype, check_like, check_rank, check_shape
from qtts_compile.kernels.interpreted import IS_INTERPRETED
from qtts_compile.kernels.rms_norm import check_rms_norm
from qtts_compile.kernels.rows import with_unit_stride
from qtts_compile.kernels.skinny import launch as skinny

MAX_ROWS = 16  # of these kernels; the tensor cores' kernel takes more
WIDE = tl.constexpr(1024)  # columns, beyond which _multiply_one_by_one makes sure that all tiles of x are requested at once


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` ``[..., K]`` as ``[M, K]`` with contiguous rows; it is copied only if its layout needs that."""
    return with_unit_stride(x.reshape(-1, x.shape[-1]))


def most_rows(dtype: torch.dtype, width: int, device: torch.device) -> int:
    """Return how many rows of a width kernels multiply; PyTorch multiplies more."""
    return skinny.MAX_ROWS if skinny.serves_rows_of(dtype, width, device) else MAX_ROWS


def check_rows(x: torch.Tensor) -> None:
    """Raise unless ``x`` is ``[..., K]`` of a supported dtype, with at most as many rows as any kernel takes, and K > 0."""
    check_float_dtype("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have the shape [..., K] with K > 0, got {tuple(x.shape)}")
    rows = math.prod(x.shape[:-1])
    if rows > skinny.MAX_ROWS:
        raise ValueError(f"x must have at most {skinny.MAX_ROWS} rows, got {rows} in {tuple(x.shape)}; use torch.nn.functional.linear for more")


def check_weight(name: str, weight: torch.Tensor, x: torch.Tensor) -> None:
    """Raise unless ``weight`` is ``[N, K]`` with N > 0 and contiguous rows, of the dtype and on the device of ``x``."""
    check_like(name, weight, "x", x)
    check_rank(name, weight, "N, K")
    check_shape(name, weight, weight.shape[0], x.shape[-1])
    if weight.shape[0] == 0:
        raise ValueError(f"{name} must have the shape [N, K] with N > 0, got {tuple(weight.shape)}")
    _check_unit_stride(name, weight)


def check_vector(name: str, vector: torch.Tensor | None, width: int, x: torch.Tensor) -> None:
    """Raise unless ``vector``, a bias or the weight of a norm, is None or a contiguous ``[width]`` of the dtype and on the device of ``x``."""
    if vector is not None:
        check_like(name, vector, "x", x)
        check_shape(name, vector, width)
        _check_unit_stride(name, vector)


def check_norm_weight(norm_weight: torch.Tensor | None, x: torch.Tensor, eps: float) -> None:
    """Raise unless ``norm_weight`` is None or what ``rms_norm`` accepts for ``x``, contiguous and of its dtype."""
    if norm_weight is not None:
        check_rms_norm(x, norm_weight, eps)
        check_vector("norm_weight", norm_weight, x.shape[-1], x)


def _check_unit_stride(name: str, tensor: torch.Tensor) -> None:
    # A copy made in passing would not be complete when the kernel reads it.
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}; call .contiguous() on it beforehand")


@triton.jit
def request_weights(Row_ptrs, K: tl.constexpr, BLOCK_K: tl.constexpr, IN_FLIGHT: tl.constexpr):
    """Load the first ``IN_FLIGHT`` tiles ``[R, BLOCK_K]`` of the weight rows that begin at ``Row_ptrs`` ``[R, 1]``."""
    tiles = ()
    for tile in tl.static_range(IN_FLIGHT):
        tiles = tiles + (_load_tile(Row_ptrs, tile, K, BLOCK_K, "evict_first"),)
    return tiles


@triton.jit
def request_norm_weight(Norm_ptr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load all tiles ``[1, BLOCK_K]`` of the weight of a norm; without a norm there are none."""
    tiles = ()
    if Norm_ptr is not None:
        for tile in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
            tiles = tiles + (_load_tile(Norm_ptr + tl.zeros([1, 1], tl.int32), tile, K, BLOCK_K, ""),)
    return tiles


@triton.jit
def multiply_rows(
    X_ptr, x_stride, M, norm_tiles, eps, Row_ptrs, tiles, K: tl.constexpr, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr, Index_ptr=None
):  # fmt: skip
    """Return the products ``[R, BLOCK_M]``, in float32, of the weight rows at ``Row_ptrs`` ``[R, 1]`` with the ``M`` rows of x.

    A norm's result is rounded to the dtype, as by ``rms_norm``, for the tensor cores alone: they serve half precision of more than 2 rows, or of
    more than 4 with some launches.
    ``tiles`` and ``norm_tiles`` are what :func:`request_weights` and :func:`request_norm_weight` returned. The rows of x are its first, or those
    whose numbers, int64 ``[M]``, lie at ``Index_ptr``. Columns from ``M`` on repeat column ``M - 1``.
    """
    if X_ptr.dtype.element_ty.primitive_bitwidth == 16 and BLOCK_M >= 8:
        return _multiply_together(X_ptr, x_stride, M, norm_tiles, eps, Row_ptrs, tiles, K, BLOCK_M, SPLITS, Index_ptr)
    else:
        return _multiply_one_by_one(X_ptr, x_stride, M, norm_tiles, eps, Row_ptrs, tiles, K, BLOCK_M, Index_ptr)


@triton.jit
def _row_start(X_ptr, x_stride, row, M, Index_ptr):
    """Return where row ``row`` of x begins, or its last if it has not so many."""
    row = tl.minimum(row, M - 1).to(tl.int64)
    if Index_ptr is not None:
        row = tl.load(Index_ptr + row)
    return X_ptr + row * x_stride


@triton.jit
def _multiply_one_by_one(X_ptr, x_stride, M, norm_tiles, eps, Row_ptrs, tiles, K: tl.constexpr, BLOCK_M: tl.constexpr, Index_ptr):
    """Multiply with one row of x after the other. The scale of a norm is applied to the products, which need not wait for it.

    In the SASS a request of x moves to where its tile is multiplied, so that memory is waited for again and again. In a wide row the first tile needs
    all squares, for the 0 that is their minimum with 0: all tiles are requested at once. Narrow rows are faster without, in fewer registers.
    """
    IN_FLIGHT: tl.constexpr = len(tiles)
    BLOCK_N: tl.constexpr = tiles[0].shape[0]
    BLOCK_K: tl.constexpr = tiles[0].shape[1]
    N_TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    # The columns that a thread loads at once are added up without leaving it.
    FOLD: tl.constexpr = min(BLOCK_K, 128 // X_ptr.dtype.element_ty.primitive_bitwidth)
    x_ptrs = ()
    squares = ()
    sums = ()
    for row in tl.static_range(BLOCK_M):
        row_ptr = _row_start(X_ptr, x_stride, row, M, Index_ptr) + tl.zeros([1, 1], tl.int32)
        x_ptrs = x_ptrs + (row_ptr,)
        if len(norm_tiles) > 0:
            squares = squares + (_sum_squares(row_ptr, K, BLOCK_K, FOLD),)
        sums = sums + (tl.zeros([BLOCK_N, BLOCK_K // FOLD], tl.float32),)
    for tile in tl.static_range(N_TILES):
        w = tiles[tile].to(tl.float32)
        new_sums = ()
        for row in tl.static_range(BLOCK_M):
            x = _load_tile(x_ptrs[row], tile, K, BLOCK_K, "").to(tl.float32)
            if len(norm_tiles) > 0:
                norm = norm_tiles[tile].to(tl.float32)
                if tile == 0 and K > WIDE:
                    norm = tl.reshape(tl.reshape(norm, [1, BLOCK_K // FOLD, FOLD]) + tl.minimum(squares[row], 0.0)[:, :, None], [1, BLOCK_K])
                x *= norm
            products = tl.reshape(w * x, [BLOCK_N, BLOCK_K // FOLD, FOLD])
            new_sums = new_sums + (sums[row] + tl.sum(products, axis=2),)
        sums = new_sums
        if tile + IN_FLIGHT < N_TILES:
            tiles = tiles + (_load_tile(Row_ptrs, tile + IN_FLIGHT, K, BLOCK_K, "evict_first"),)
    products = _add_up(sums)
    if len(norm_tiles) > 0:
        products *= tl.rsqrt(_add_up(squares) / K + eps)
    return products


@triton.jit
def _sum_squares(Row_ptr, K: tl.constexpr, BLOCK_K: tl.constexpr, FOLD: tl.constexpr):
    """Return the squares of the row that begins at ``Row_ptr`` ``[1, 1]``, added up to ``[1, BLOCK_K / FOLD]``."""
    squares = tl.zeros([1, BLOCK_K // FOLD], tl.float32)
    for tile in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
        x = tl.reshape(_load_tile(Row_ptr, tile, K, BLOCK_K, "").to(tl.float32), [1, BLOCK_K // FOLD, FOLD])
        squares += tl.sum(x * x, axis=2)
    return squares


@triton.jit
def _add_up(sums):
    """Return the sums ``[R, M]`` of the columns of ``M`` tensors ``[R, N]``, one for each row of x."""
    # The rows of x are interleaved, so that the reduction over the threads, whose steps are slow, serves all of them at once.
    BLOCK_M: tl.constexpr = len(sums)
    for _ in tl.static_range(4):
        if len(sums) > 1:
            pairs = ()
            for row in tl.static_range(len(sums) // 2):
                pairs = pairs + (tl.join(sums[row], sums[row + len(sums) // 2]),)
            sums = pairs
    return tl.sum(tl.reshape(sums[0], [sums[0].shape[0], sums[0].shape[1], BLOCK_M]), axis=1)


@triton.jit
def _multiply_together(
    X_ptr, x_stride, M, norm_tiles, eps, Row_ptrs, tiles, K: tl.constexpr, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr, Index_ptr
):  # fmt: skip
    """Multiply with all rows of x at once, on the tensor cores; ``SPLITS`` warps share the columns of a tile."""
    IN_FLIGHT: tl.constexpr = len(tiles)
    BLOCK_N: tl.constexpr = tiles[0].shape[0]
    BLOCK_K: tl.constexpr = tiles[0].shape[1]
    N_TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    x_ptrs = _row_start(X_ptr, x_stride, tl.arange(0, BLOCK_M)[:, None], M, Index_ptr)
    scale = _rms_scale(x_ptrs, norm_tiles, eps, K, BLOCK_K)
    sums = tl.zeros([SPLITS, BLOCK_N, BLOCK_M], tl.float32)
    for tile in tl.static_range(N_TILES):
        w = tiles[tile]
        x = _load_normed(x_ptrs, scale, norm_tiles, tile, K, BLOCK_K)
        if IS_INTERPRETED:  # it would multiply the bits of bfloat16
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        w = tl.permute(tl.reshape(w, [BLOCK_N, SPLITS, BLOCK_K // SPLITS]), (1, 0, 2))
        x = tl.permute(tl.reshape(x, [BLOCK_M, SPLITS, BLOCK_K // SPLITS]), (1, 2, 0))
        sums = tl.dot(w, x, sums)
        if tile + IN_FLIGHT < N_TILES:
            tiles = tiles + (_load_tile(Row_ptrs, tile + IN_FLIGHT, K, BLOCK_K, "evict_first"),)
    return tl.sum(sums, axis=0)


@triton.jit
def _load_tile(Row_ptrs, tile: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, EVICTION: tl.constexpr):
    """Load tile ``tile`` ``[R, BLOCK_K]`` of the rows that begin at ``Row_ptrs`` ``[R, 1]``, zero beyond column ``K``."""
    columns = tile * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    if (tile + 1) * BLOCK_K > K:
        return tl.load(Row_ptrs + columns, mask=columns < K, other=0.0, eviction_policy=EVICTION)
    else:
        return tl.load(Row_ptrs + columns, eviction_policy=EVICTION)


@triton.jit
def _load_normed(X_ptrs, scale, norm_tiles, tile: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load tile ``tile`` ``[R, BLOCK_K]`` of x, normalised with the rounding of ``rms_norm`` if there is a norm."""
    x = _load_tile(X_ptrs, tile, K, BLOCK_K, "")
    if len(norm_tiles) > 0:
        normed = (x.to(tl.float32) * scale).to(x.dtype).to(tl.float32)
        x = (norm_tiles[tile].to(tl.float32) * normed).to(x.dtype)
    return x


@triton.jit
def _rms_scale(X_ptrs, norm_tiles, eps, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return one over the root mean square ``[R, 1]`` of the rows that begin at ``X_ptrs`` ``[R, 1]``; 1 if there is no norm."""
    if len(norm_tiles) == 0:
        return tl.full(X_ptrs.shape, 1.0, tl.float32)
    else:
        squares = tl.zeros([X_ptrs.shape[0], BLOCK_K], tl.float32)
        for tile in tl.static_range(len(norm_tiles)):
            x = _load_tile(X_ptrs, tile, K, BLOCK_K, "").to(tl.float32)
            squares += x * x
        return tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / K + eps)
