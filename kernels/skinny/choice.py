"""How the kernels of linear layers of a few rows are launched: by rule, and what a search tries.

A launch is one of :mod:`many_rows`, whose programs load x once, or of :mod:`kernel`, whose programs load it for each tile again unless their
registers hold it.
"""

from __future__ import annotations

from qtts_compile.kernels.launch_table import Launch
from qtts_compile.kernels.sizes import cdiv, next_power_of_2

TILE, LANES_COLUMNS = 16, 32  # rows of a weight, or of two together, and columns, that a warp multiplies at a time
FEW_ROWS, MAX_ROWS = 16, 32  # of x
BYTES_IN_FLIGHT, BYTES_BESIDE_MANY_ROWS = 256, 192  # of weights for each thread, in 64 registers, or in 48 beside more than FEW_ROWS of x
X_REGISTERS = 64  # of x that is requested at once
MAX_REGISTERS = {4: 236, 8: 236, 16: 124}  # of a thread, by warps: about what a multiprocessor has for one program
MAX_TILES = 6  # of a program of :mod:`kernel`, each of which makes it longer
WARPS_AND_TILES = ((8, 6), (8, 2), (4, 4), (8, 3), (8, 4), (4, 2), (4, 3), (8, 8))  # of a program of :mod:`many_rows`, likely ones first
MULTIPROCESSORS = 132  # of a Hopper GPU
BYTES_OF_SUMS = 512  # of a warp, of 16 rows of weights and 8 of x: those of a tile and, if there is one, the next
MAX_SHARED_BYTES = 40 * 1024  # beyond 48 KiB Triton has the multiprocessor divide its memory anew between shared memory and L1 cache, which waits


def choose_launch(rows: int, outputs: int, width: int, matrices: int) -> Launch:
    """Choose by rule: one program for each multiprocessor of an H200, if that gives each no more tiles than it may have."""
    tiles = min(MAX_TILES, cdiv(outputs * matrices, TILE * MULTIPROCESSORS))
    launch = _launch(rows, width, matrices, 8, tiles, BYTES_IN_FLIGHT if rows <= FEW_ROWS else BYTES_BESIDE_MANY_ROWS)
    if rows > FEW_ROWS and tiles > 1 and not _is_x_held(launch, width):
        return _of_many_rows(width, matrices, 8, min(each for each in (2, 3, 4, 6) if each >= tiles), BYTES_IN_FLIGHT)
    return launch


def candidates(rows: int, outputs: int, width: int, matrices: int) -> list[Launch]:
    """Return what a search tries, the rule's choice first, then launches of :mod:`many_rows`: programs that a GPU runs together.

    As much is in flight as their registers hold.
    """
    launches = [choose_launch(rows, outputs, width, matrices)]
    for num_warps, tiles in WARPS_AND_TILES if rows > FEW_ROWS else ():
        if tiles <= 2 * cdiv(outputs * matrices, TILE * MULTIPROCESSORS):
            launches += [_of_many_rows(width, matrices, num_warps, tiles, bytes_of_thread) for bytes_of_thread in (128, 256, 384)]
    few = {cdiv(outputs * matrices, TILE * MULTIPROCESSORS * share // 2) for share in (1, 2, 4)}
    for num_warps in (4, 8, 16) if width <= 1024 else (8, 16):
        if width % (LANES_COLUMNS * num_warps * 2):
            continue
        for tiles in (tiles for tiles in sorted({1, *few}) if tiles <= MAX_TILES):
            for bytes_of_thread in (128, 256, 512) if rows <= FEW_ROWS else (128, 192, 256):
                launch = _launch(rows, width, matrices, num_warps, tiles, bytes_of_thread)
                of_sums = launch.block_m // 8 * num_warps * BYTES_OF_SUMS * min(tiles, 2)
                if _registers(launch, width, tiles) <= MAX_REGISTERS[num_warps] and of_sums <= MAX_SHARED_BYTES:
                    launches.append(launch)
    return list(dict.fromkeys(launches))


def is_of_many_rows(launch: Launch) -> bool:
    """Tell whether a launch is one of :mod:`many_rows`: with 32 rows of x and steps of 32 columns for each warp."""
    return launch.block_m == MAX_ROWS and launch.block_k == LANES_COLUMNS * launch.num_warps


def x_steps(launch: Launch, width: int) -> int:
    """Return for how many of a tile's steps x is loaded at a time, where it is loaded for each tile: it is loaded once if for all."""
    steps, of_step = width // launch.block_k, launch.block_m // 2 * _chunks(launch)
    if of_step * steps <= X_REGISTERS:
        return steps
    # Sums of 32 rows are in 32 registers, where those of 16 are in 16.
    together = max(1, (X_REGISTERS if launch.block_m <= FEW_ROWS else X_REGISTERS // 2) // of_step)
    return max(each for each in range(1, together + 1) if steps % each == 0)


def column_shares(tiles: int, num_warps: int) -> int:
    """Return among how many warps of :mod:`many_rows` a tile's columns are shared: a power of two, and as few as leave all warps the same tiles."""
    return num_warps // min(num_warps, tiles & -tiles)


def blocks_ahead(tiles: int, num_warps: int, blocks: int) -> int:
    """Return how many blocks of x a program of :mod:`many_rows` requests ahead of the one that it multiplies.

    The fewer tiles it multiplies with a block, the sooner it needs the next one, and the more must be on their way. Where a warp has several tiles
    only one block is: the sums of its tiles take the registers that more blocks would need.
    """
    has_several = tiles * column_shares(tiles, num_warps) > num_warps
    return min(blocks, 1 if has_several else 4 if tiles <= 2 else 2)


def _chunks(launch: Launch) -> int:
    """Return how many times 32 columns a warp has of a step."""
    return launch.block_k // (LANES_COLUMNS * launch.num_warps)


def _is_x_held(launch: Launch, width: int) -> bool:
    return x_steps(launch, width) == width // launch.block_k


def _registers(launch: Launch, width: int, tiles: int) -> int:
    """Estimate how many registers a thread needs."""
    groups, chunks, of_warp = launch.block_m // 8, _chunks(launch), width // (LANES_COLUMNS * launch.num_warps)
    is_held = _is_x_held(launch, width)
    of_x = 4 * groups * (of_warp if is_held else 2 * chunks)
    if is_held and launch.block_m > FEW_ROWS:
        of_x += 20 * tiles  # found by compiling: spills begin with so many
    return 8 * chunks * launch.in_flight + of_x + 8 * groups + 24


def _launch(rows: int, width: int, matrices: int, num_warps: int, tiles: int, bytes_of_thread: int) -> Launch:
    of_warp = width // (LANES_COLUMNS * num_warps)
    chunks = 4 if of_warp % 4 == 0 and rows <= FEW_ROWS else 2  # so many columns of more rows of x take too many registers
    in_flight = min(bytes_of_thread // (32 * chunks), of_warp // chunks * tiles)
    return Launch(8 * next_power_of_2(cdiv(rows, 8)), tiles * TILE // matrices, LANES_COLUMNS * num_warps * chunks, num_warps, in_flight)


def _of_many_rows(width: int, matrices: int, num_warps: int, tiles: int, bytes_of_thread: int) -> Launch:
    block_k = LANES_COLUMNS * num_warps
    return Launch(MAX_ROWS, tiles * TILE // matrices, block_k, num_warps, min(bytes_of_thread // 32, width // block_k * tiles))
