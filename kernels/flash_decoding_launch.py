"""How the kernels that attend to the keys of a cache are launched."""

# pyright: reportCallIssue=false
# Triton's stubs type a launch as a call of the kernel itself, without its launch options.

import functools
from typing import Any, NamedTuple

import torch

from qtts_compile.kernels.combine import combine_kernel
from qtts_compile.kernels.pdl import pdl_options
from qtts_compile.kernels.sizes import cdiv, next_power_of_2

MAX_SPLITS = 64
PROGRAMS_PER_SM = 16  # of one warp
MAX_TILES_OF_ONE_SPLIT = 2
COMBINED_COLUMNS = 32  # of a program of the second launch
MAX_LOOK_AHEAD, MAX_ONLY_LOOK = 8, 16  # tiles of one of several looks ahead, and of a single one


@functools.cache
def _sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def have_room(programs: int, device: torch.device, per_sm: int) -> bool:
    """Tell whether so many programs have room on a GPU at once."""
    return programs <= per_sm * _sm_count(device)


def choose_splits(n_tiles: int, n_programs: int, sm_count: int, most: int = MAX_SPLITS) -> int:
    """Choose how many programs share the tiles of one key head: enough to fill the GPU, one if a second launch would not pay."""
    if n_tiles <= MAX_TILES_OF_ONE_SPLIT:
        return 1
    splits = max(1, min(n_tiles, most, PROGRAMS_PER_SM * sm_count // n_programs))
    return cdiv(n_tiles, cdiv(n_tiles, splits))  # fewer that take no more tiles each


def plan_looks(tiles_per_split: int) -> tuple[int, int]:
    """Return in how many looks ahead, at how many tiles each, a program sees which of its tiles are attended to."""
    tiles = next_power_of_2(tiles_per_split)
    look_ahead = tiles if tiles <= MAX_ONLY_LOOK else MAX_LOOK_AHEAD
    return tiles // look_ahead, look_ahead


class Plan(NamedTuple):
    """The grid of a launch over a cache, with its constants and launch options."""

    grid: tuple[int, int]
    options: dict[str, Any]


class _Mask(NamedTuple):
    """What a plan depends on of an expanded mask: its dtype, and whether its rows differ between heads and between tokens."""

    dtype: torch.dtype
    between_heads: bool
    between_tokens: bool

    @staticmethod
    def of(mask: torch.Tensor | None) -> "_Mask | None":
        if mask is None:
            return None
        return _Mask(mask.dtype, *(size > 1 and stride != 0 for size, stride in zip(mask.shape[1:3], mask.stride()[1:3])))

    def rows(self, tokens: int, block_m: int) -> int:
        """Count the different rows among ``block_m`` rows of queries, in which ``tokens`` take turns."""
        if not (self.between_heads or self.between_tokens):
            return 1
        return tokens if not self.between_heads and block_m % tokens == 0 else block_m


def plan_launch(
    q: torch.Tensor, cache: torch.Tensor, mask: torch.Tensor | None,
    n_splits: int | None, block_n: int | None, num_warps: int | None, block_m: int | None, other_splits: int = 0,
) -> Plan:  # fmt: skip
    """Plan a launch for queries ``[B, Hq, T, D]``, a cache ``[B, Hk, S, D]`` and a mask from :func:`expand_mask`.

    ``other_splits`` is how many there will be beside those that are planned.

    ``n_splits`` (programs that share the keys of one head), ``block_n`` (keys in a tile), ``num_warps`` and ``block_m`` (rows of queries that a
    program serves) override what is chosen: small tiles for programs of one warp, which serve all rows of a key head, up to 4, but only one query
    head's if there is room for all programs at once. On an H200, 16 keys of 128 take 1.8 us with one warp and one of two heads, 2.1 us with one warp
    and both and 2.7 us with two warps; a cache of 2048 slots at position 512 takes 6.3 us by 64 splits of one warp, 16 keys and one head, 6.6 us with
    both heads, and 10.6 us by as many splits of four warps and 32 keys.
    """
    sizes = (*q.shape, *cache.shape[1:3])
    grid, options = _plan(sizes, _Mask.of(mask), n_splits, block_n, num_warps, block_m, other_splits, _sm_count(q.device))
    return Plan(grid, options | pdl_options(q.device))


@functools.lru_cache(maxsize=256)  # where no CUDA graph launches, the host does, hundreds of kernels a frame
def _plan(
    sizes: tuple[int, ...], mask: _Mask | None,
    n_splits: int | None, block_n: int | None, num_warps: int | None, block_m: int | None, other_splits: int, sm_count: int,
) -> Plan:  # fmt: skip
    batch, q_heads, tokens, width, k_heads, keys = sizes
    rows = q_heads // k_heads * tokens
    block_d = next_power_of_2(width)
    block_m = block_m or _choose_rows(tokens, rows, batch * k_heads, sm_count)
    block_n = block_n or max(16, min(32, 2048 // block_d, next_power_of_2(keys)))
    n_tiles = cdiv(keys, block_n)
    n_programs = batch * k_heads * cdiv(rows, block_m)
    n_splits = n_splits or choose_splits(n_tiles, n_programs, sm_count, MAX_SPLITS - other_splits)
    n_looks, look_ahead = plan_looks(cdiv(n_tiles, n_splits))
    options = dict(
        T=tokens, GROUP=q_heads // k_heads, D=width, MASK_ROWS=1 if mask is None else mask.rows(tokens, block_m),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, N_LOOKS=n_looks, LOOK_AHEAD=look_ahead,
        FLOOR=torch.finfo(mask.dtype).min if mask is not None and mask.dtype != torch.bool else 0.0,
        IS_ONE_TILE=n_tiles == n_splits == 1, num_warps=num_warps or max(1, block_n * block_d // 2048),
    )  # fmt: skip
    return Plan((n_programs, n_splits), options)


def _choose_rows(tokens: int, rows: int, heads: int, sm_count: int) -> int:
    """Choose how many of the ``rows`` of queries of each of ``heads`` key heads a program serves."""
    whole, own = min(4, next_power_of_2(rows)), next_power_of_2(tokens)
    return own if own < whole and heads * cdiv(rows, own) * MAX_SPLITS <= PROGRAMS_PER_SM * sm_count else whole


def expand_mask(mask: torch.Tensor | None, q: torch.Tensor, keys: int) -> torch.Tensor | None:
    """Return a mask of full shape for the kernels, which know no float64."""
    return None if mask is None else (mask.float() if mask.dtype == torch.float64 else mask).expand(*q.shape[:3], keys)


def mask_strides(mask: torch.Tensor | None) -> tuple[int, ...]:
    """Return the strides of an expanded mask, which are of no matter without one."""
    return (0, 0, 0, 0) if mask is None else mask.stride()


class Partials(NamedTuple):
    """Where the programs of a launch store: the result itself, or what each split contributes to it, for :meth:`combine`."""

    out: torch.Tensor
    max: torch.Tensor | None
    sum: torch.Tensor | None

    @staticmethod
    def empty(out: torch.Tensor, n_splits: int) -> "Partials":
        """Allocate for the result ``out`` ``[B, Hq, T, D]``, in memory ``[B, T, Hq, D]``."""
        if n_splits == 1:
            return Partials(out, None, None)
        n_rows = out.numel() // out.shape[-1]
        partial = torch.empty((n_splits, n_rows, out.shape[-1]), dtype=torch.float32, device=out.device)
        return Partials(partial, *torch.empty((2, n_splits, n_rows), dtype=torch.float32, device=out.device))

    def combine(self, out: torch.Tensor) -> torch.Tensor:
        """Return ``out``, completed by a second launch if several splits contribute."""
        if self.max is not None:
            n_splits, n_rows, width = self.out.shape
            combine_kernel[n_rows, cdiv(width, COMBINED_COLUMNS)](
                *self, out, n_rows, n_splits, D=width, BLOCK_S=next_power_of_2(n_splits), BLOCK_D=COMBINED_COLUMNS,
                **pdl_options(out.device), num_warps=2,
            )  # fmt: skip
        return out
