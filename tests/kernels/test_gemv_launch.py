import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import DTYPES

from qtts_compile.kernels import gemv_launch
from qtts_compile.kernels.gemv_launch import BYTES_IN_FLIGHT, MEASURED, Launch, choose_launch, launch_options

rows = st.integers(1, 16)
sizes = st.one_of(st.integers(1, 20), st.integers(1, 20000))


def is_power_of_2(value):
    return value > 0 and value & (value - 1) == 0


@given(rows, sizes, sizes, st.sampled_from(DTYPES), st.sampled_from([1, 2]))
def test_every_shape_has_a_valid_launch(rows, outputs, width, dtype, matrices):
    launch = choose_launch("op", rows, outputs, width, dtype, matrices)
    assert all(is_power_of_2(value) for value in launch)
    assert launch.block_m >= rows and launch.num_warps <= 8
    assert launch.block_n * launch.block_k * matrices * dtype.itemsize <= 64 * 1024
    if launch.block_m >= 8 and dtype != torch.float32:
        assert launch.block_k >= 16


@pytest.mark.parametrize("outputs", [1024, 2048, 3072, 4096])
@pytest.mark.parametrize("width", [1024, 2048, 3072, 6144])
def test_one_row_fills_an_h200(outputs, width):
    launch = choose_launch("op", 1, outputs, width, torch.bfloat16)
    assert outputs / launch.block_n >= 3 * 132
    assert launch.block_n * width * 2 >= 4096


@given(rows, st.integers(1, 64), sizes, st.sampled_from(DTYPES), st.sampled_from([1, 2, 8]), st.sampled_from([16, 512, 4096]))
def test_tiles_in_flight_fit_the_registers_and_the_row(rows, outputs, width, dtype, num_warps, block_k):
    x, weight = torch.empty(rows, width, dtype=dtype), torch.empty(outputs, width, dtype=dtype)
    options = launch_options("op", len(x), [weight], outputs, block_n=2, block_k=block_k, num_warps=num_warps, block_m=None)
    assert (options["BLOCK_N"], options["BLOCK_K"], options["num_warps"]) == (2, block_k, num_warps)
    in_flight = options["IN_FLIGHT"]
    assert in_flight >= 1 and (in_flight - 1) * block_k < width
    assert in_flight == 1 or in_flight * 2 * block_k * dtype.itemsize <= BYTES_IN_FLIGHT * 32 * num_warps
    assert block_k // options["SPLITS"] >= 16


def test_measured_launches_come_first(monkeypatch):
    measured = Launch(8, 32, 512, 2)
    monkeypatch.setitem(gemv_launch.MEASURED, ("op", 64, 128, 4), measured)
    assert choose_launch("op", 3, 64, 128, torch.bfloat16) == choose_launch("op", 4, 64, 128, torch.float16) == measured
    for other in (("op", 2, 64, 128, torch.bfloat16), ("op", 4, 64, 128, torch.float32), ("another", 4, 64, 128, torch.bfloat16)):
        assert choose_launch(*other) != measured


def test_measured_launches_are_valid():
    for (_, _, _, rows), launch in MEASURED.items():
        assert is_power_of_2(rows) and all(is_power_of_2(value) for value in launch) and launch.block_m >= rows
