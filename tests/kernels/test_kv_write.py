import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import DTYPES, dtypes, layouts, random_tensor, seeds

from qtts_compile.kernels.kv_write import kv_write, kv_write_triton


@st.composite
def positions(draw, n_slots: int) -> list[int]:
    """Draw up to 5 distinct cache rows, permuted, some of them counted from the end."""
    rows = draw(st.lists(st.integers(0, n_slots - 1), max_size=5, unique=True))
    return [row - n_slots if draw(st.booleans()) else row for row in rows]


@given(
    st.integers(1, 3), st.sampled_from([1, 2, 8]), st.sampled_from([40, 80, 96, 128]), positions(9), dtypes,
    st.sampled_from(["contiguous", "transposed", "sliced"]), layouts, st.booleans(), seeds,
)  # fmt: skip
def test_kernel_equals_index_put(device, batch, heads, width, rows, dtype, cache_layout, src_layout, is_strided, seed):
    cache = random_tensor(seed, (batch, heads, 9, width), dtype, device, cache_layout)
    src = random_tensor(seed + 1, (batch, heads, len(rows), width), dtype, device, src_layout)
    position = torch.tensor(rows, dtype=torch.int64, device=device)
    if is_strided:
        position = position.repeat_interleave(2)[::2]
    expected = cache.clone()
    expected[:, :, position] = src
    kv_write_triton(cache, src, position)
    assert torch.equal(cache, expected)


def test_writes_nothing_around_the_cache(device):
    memory = random_tensor(0, (1, 2, 12, 40), torch.float32, device)
    before = memory.clone()
    kv_write_triton(memory[:, :, 2:10], torch.zeros(1, 2, 2, 40, device=device), torch.tensor([0, -1], device=device))
    assert (memory[:, :, [2, 9]] == 0).all()
    memory[:, :, [2, 9]] = before[:, :, [2, 9]]
    assert torch.equal(memory, before)


@pytest.mark.parametrize("row", [8, -9, 2**40])
def test_out_of_range_writes_nothing(row):
    # On the CPU only: on a GPU the device-side assert would end the CUDA context of the whole test run.
    memory = random_tensor(0, (1, 2, 24, 40), torch.float32, "cpu")
    before = memory.clone()
    kv_write_triton(memory[:, :, 8:16], torch.zeros(1, 2, 1, 40), torch.tensor([row]))
    assert torch.equal(memory, before)


@pytest.mark.parametrize("shape", [(1, 2, 0, 40), (0, 2, 1, 40)])
def test_nothing_to_write(device, shape):
    cache = torch.ones(shape[0], 2, 5, 40, device=device)
    kv_write_triton(cache, torch.zeros(shape, device=device), torch.zeros(shape[2], dtype=torch.int64, device=device))
    assert (cache == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_opcheck(device, dtype, layout):
    cache = random_tensor(0, (2, 3, 7, 40), dtype, device, layout)
    src = random_tensor(1, (2, 3, 2, 40), dtype, device, layout)
    torch.library.opcheck(torch.ops.qtts.kv_write.default, (cache, src, torch.tensor([3, -1], device=device)))


def test_out_of_range_is_an_error_on_the_cpu():
    with pytest.raises(IndexError):
        kv_write(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 1, 8), torch.tensor([4]))


CACHE = torch.ones(1, 1, 4, 8)
SRC = torch.ones(1, 1, 1, 8)
ZERO = torch.tensor([0])


@pytest.mark.parametrize(
    ("cache", "src", "position", "error", "message"),
    [
        (CACHE.char(), SRC, ZERO, TypeError, "cache must be .*int8"),
        (CACHE, SRC.half(), ZERO, TypeError, "src must have the dtype of cache"),
        (CACHE, SRC, ZERO.int(), TypeError, "position must be int64, got torch.int32"),
        (CACHE, SRC, torch.tensor(0), ValueError, r"position must have the shape \[T\], got \(\)"),
        (CACHE, torch.ones(1, 1, 2, 8), ZERO, ValueError, r"src must have the shape \(1, 1, 1, 8\), got \(1, 1, 2, 8\)"),
        (torch.ones(1, 4, 8), torch.ones(1, 1, 8), ZERO, ValueError, r"cache must have the shape \[B, H, S, D\]"),
        (torch.ones(1, 1, 4, 16)[..., ::2], SRC, ZERO, ValueError, "last stride of 1"),
        (CACHE, SRC, ZERO.to("meta"), ValueError, "position must be on"),
    ],
)  # fmt: skip
def test_bad_input(cache, src, position, error, message):
    with pytest.raises(error, match=message):
        kv_write(cache, src, position)
