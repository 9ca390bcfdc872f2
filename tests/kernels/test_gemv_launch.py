import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import DTYPES

from qtts_compile.kernels import gemv_launch
from qtts_compile.kernels.gemv_launch import BYTES_IN_FLIGHT, candidates, choose_launch, launch_of, options_of
from qtts_compile.kernels.launch_table import Launch, Shape
from qtts_compile.kernels.skinny import choice as skinny
from qtts_compile.kernels.skinny.launch import is_skinny

rows = st.integers(1, 16)
sizes = st.one_of(st.integers(1, 20), st.integers(1, 20000))


def is_power_of_2(value):
    return value > 0 and value & (value - 1) == 0


@given(rows, sizes, sizes, st.sampled_from(DTYPES), st.sampled_from([1, 2]))
def test_every_shape_has_a_valid_launch(rows, outputs, width, dtype, matrices):
    launch = choose_launch(rows, outputs, width, dtype, matrices)
    assert all(is_power_of_2(value) for value in launch[:4]) and launch.in_flight == 0
    assert launch.block_m >= rows and launch.num_warps <= 8
    assert launch.block_n * launch.block_k * matrices * dtype.itemsize <= 64 * 1024
    if launch.block_m >= 8 and dtype != torch.float32:
        assert launch.block_k >= 16


@pytest.mark.parametrize("outputs", [1024, 2048, 3072, 4096])
@pytest.mark.parametrize("width", [1024, 2048, 3072, 6144])
def test_one_row_fills_an_h200(outputs, width):
    launch = choose_launch(1, outputs, width, torch.bfloat16)
    assert outputs / launch.block_n >= 3 * 132
    assert launch.block_n * width * 2 >= 4096


@given(st.integers(1, 64), sizes, st.sampled_from(DTYPES), st.sampled_from([1, 2, 8]), st.sampled_from([16, 512, 4096]))
def test_tiles_in_flight_fit_the_registers_and_the_row(outputs, width, dtype, num_warps, block_k):
    weight = torch.empty(outputs, width, dtype=dtype)
    options = options_of(Launch(16, 2, block_k, num_warps), [weight], outputs)
    assert (options["BLOCK_N"], options["BLOCK_K"], options["num_warps"]) == (2, block_k, num_warps)
    in_flight = options["IN_FLIGHT"]
    assert in_flight >= 1 and (in_flight - 1) * block_k < width
    assert in_flight == 1 or in_flight * 2 * block_k * dtype.itemsize <= BYTES_IN_FLIGHT * 32 * num_warps
    assert block_k // options["SPLITS"] >= 16
    asked = options_of(Launch(16, 2, block_k, num_warps, 3), [weight], outputs)
    assert asked == options | dict(IN_FLIGHT=min(3, -(-width // block_k)))


@given(st.integers(1, 32), sizes, st.integers(1, 8).map(lambda count: 512 * count), st.sampled_from([1, 2]))
def test_what_the_tensor_cores_serve_has_launches_of_theirs(rows, outputs, width, matrices):
    """One or two rows may be faster without them."""
    arguments = rows, outputs, width, torch.bfloat16, matrices
    launches = candidates(*arguments, is_served=True)
    assert launches[0] == choose_launch(*arguments, is_served=True) and len(set(launches)) == len(launches)
    assert is_skinny(launches[0]) == (rows > 1)
    theirs, others = (set(filter(is_skinny, launches)), set(itertools.filterfalse(is_skinny, launches)))
    assert theirs == set(skinny.candidates(rows, outputs, width, matrices)) and (rows <= 2 or not others)


@given(rows, sizes, sizes, st.sampled_from(DTYPES), st.sampled_from([1, 2]))
def test_a_search_tries_the_rule_s_choice_and_nothing_twice(rows, outputs, width, dtype, matrices):
    launches = candidates(rows, outputs, width, dtype, matrices)
    assert launches[0] == choose_launch(rows, outputs, width, dtype, matrices) and len(set(launches)) == len(launches)
    assert all(is_power_of_2(value) for launch in launches for value in launch[:4]) and all(launch.block_m >= rows for launch in launches)


def chosen(weights, outputs, rows=3, run: Any = pytest.fail, is_served=False):
    return launch_of("op", rows, weights, outputs, run, is_served)


def test_measured_launches_come_first(monkeypatch):
    weights, measured = [torch.empty(64, 128, dtype=torch.bfloat16)], Launch(8, 32, 64, 2)
    shape, served = Shape("op", "16 bit", 64, 128, 4), Launch(8, 48, 128, 4)
    table = {shape: measured, shape._replace(numbers="bfloat16"): served}
    monkeypatch.setattr(gemv_launch, "lookup", lambda shape, device: table.get(shape))
    by_rule = choose_launch(3, 64, 128, torch.bfloat16)
    assert chosen(weights, 64) == chosen([weights[0].half()], 64, rows=4) == measured != by_rule
    assert chosen(weights, 64, is_served=True) == served
    assert chosen(weights, 64, rows=2) != measured and chosen([weights[0].float()], 64) != measured


def test_what_was_not_measured_is_searched_once_where_that_is_possible_and_pays(monkeypatch):
    large, small, run, found = (
        torch.empty(1024, 1024, dtype=torch.bfloat16),
        torch.empty(64, 64, dtype=torch.bfloat16),
        object(),
        Launch(1, 4, 512, 2),
    )
    searches = []

    def search(*args):
        searches.append(args)
        return found

    monkeypatch.setattr(gemv_launch, "search", search)
    assert chosen([large], 1024, 1, run) == choose_launch(1, 1024, 1024, torch.bfloat16) and not searches  # on a CPU
    monkeypatch.setattr(gemv_launch, "can_search", lambda device: True)
    assert chosen([small], 64, 1, run) == choose_launch(1, 64, 64, torch.bfloat16) and not searches
    assert chosen([large], 1024, 1, run) == found
    ((shape, launches, weights, given_run),) = searches
    assert shape == Shape("op", "16 bit", 1024, 1024, 1) and len(launches) > 1 and weights == [large] and given_run is run
