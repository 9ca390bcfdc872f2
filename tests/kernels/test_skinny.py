"""Linear layers as they are launched on the tensor cores: that kernel on a GPU or on PTX (-p tests.ptx.plugin), and gemv's without either."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_accurate, poisoned_memory, random_tensor, rotations, seeds, with_other_scales

from qtts_compile.kernels.embedding_linear import embedding_linear_reference, embedding_linear_triton
from qtts_compile.kernels.launch_table import Launch
from qtts_compile.kernels.linear_add import linear_add_reference, linear_add_triton
from qtts_compile.kernels.norm_linears import norm_linears_reference, norm_linears_triton
from qtts_compile.kernels.norm_swiglu import norm_swiglu_reference, norm_swiglu_triton
from qtts_compile.kernels.sizes import next_power_of_2
from qtts_compile.kernels.skinny import launch as skinny
from qtts_compile.kernels.skinny.choice import WARPS_AND_TILES, candidates, choose_launch, column_shares, is_of_many_rows
from qtts_compile.kernels.skinny.launch import is_skinny, serves
from tests.ptx.machine import DeviceAssert

EPS = 1e-6
rows, row_sizes = st.one_of(st.integers(1, 16), st.sampled_from([17, 24, 31, 32])), st.integers(1, 40)


@st.composite
def launches(draw, count: int, width: int, matrices: int = 1) -> Launch:
    """Draw launch parameters for so many rows of x of a width, and up to three tiles or, where x may go through shared memory, more."""
    num_warps, in_flight = draw(st.sampled_from([4, 8])), draw(st.integers(0, 9))
    whole = width // (32 * num_warps)
    chunks = draw(st.sampled_from([chunks for chunks in (1, 2, 4) if whole % chunks == 0]))
    tiles = draw(st.sampled_from([1, 2, 3, 4, 6, 8] if count > 16 and chunks == 1 else [1, 2, 3]))
    return Launch(max(8, next_power_of_2(count)), tiles * 16 // matrices, 32 * num_warps * chunks, num_warps, in_flight)


def placed(x, launch):
    """Return the launch or, without tensor cores, None."""
    if not serves(x, None, []):
        assert not skinny.has_tensor_cores(x.device)
        return None
    return launch


@given(rows, st.sampled_from([512, 1536]), st.lists(row_sizes, min_size=1, max_size=3), st.booleans(), st.booleans(), seeds, st.data())
def test_norm_and_linears_are_as_accurate_as_eager(device, count, width, sizes, has_norm, has_bias, seed, data):
    x = random_tensor(seed, (count, width + 8), torch.bfloat16, device)[:, 8:]
    norm_weight = random_tensor(seed + 1, (width,), torch.bfloat16, device) if has_norm else None
    weights = [random_tensor(seed + 2 + i, (size, width), torch.bfloat16, device) * width**-0.5 for i, size in enumerate(sizes)]
    biases = [random_tensor(seed + 5 + i, (size,), torch.bfloat16, device) if has_bias and i != 1 else None for i, size in enumerate(sizes)]
    check_norm_linears(x, norm_weight, weights, biases, data.draw(launches(count, width)))


def check_norm_linears(x, norm_weight, weights, biases, launch):
    with poisoned_memory():
        ys = norm_linears_triton(x, norm_weight, weights, biases, EPS, placed(x, launch))
    x = x[None] if norm_weight is None else with_other_scales(x)
    wide = x.double()
    if norm_weight is not None:
        wide = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * norm_weight.double()
    for y, weight, bias in zip(ys, weights, biases, strict=True):
        more, bias = rotations(weight), None if bias is None else bias.repeat(-(-64 // len(weight)))
        oracle = wide @ more.double().T + (0 if bias is None else bias.double())
        assert_accurate(y[None], oracle, norm_linears_reference(x, norm_weight, [more], [bias], EPS)[0], leading=True)


@pytest.mark.parametrize(
    ("count", "launch"),
    [(9, Launch(16, 48, 512, 4, 3)), *((count, Launch(32, 48, 512, 8, 3)) for count in (17, 24, 32)), (32, Launch(32, 96, 256, 8, 9))],
)
def test_long_rows_that_registers_do_not_hold_are_loaded_piece_by_piece(device, count, launch):
    x, norm_weight, weight = (random_tensor(i, shape, torch.bfloat16, device) for i, shape in enumerate([(count, 2048), (2048,), (200, 2048)]))
    check_norm_linears(x, norm_weight, [weight * 2048**-0.5], [None], launch)


@pytest.mark.parametrize(("count", "in_flight"), [(17, 12), (32, 3)])
@pytest.mark.parametrize(("num_warps", "tiles"), WARPS_AND_TILES)
def test_programs_of_many_rows_and_several_tiles(device, num_warps, tiles, count, in_flight):
    """All tiles of two programs, and a few outputs of a third, which a bias or the gate tells from each other."""
    sizes = [32 * tiles + 5, 16 * tiles + 1]
    x, norm_weight = (random_tensor(i, shape, torch.bfloat16, device) for i, shape in enumerate([(count, 512), (512,)]))
    weights = [random_tensor(2 + i, (size, 512), torch.bfloat16, device) * 512**-0.5 for i, size in enumerate(sizes)]
    biases = [random_tensor(4 + i, (size,), torch.bfloat16, device) for i, size in enumerate(sizes)]
    check_norm_linears(x, norm_weight, weights, biases, Launch(32, 16 * tiles, 32 * num_warps, num_warps, in_flight))
    gate, up = (random_tensor(6 + i, (16 * tiles + 5, 512), torch.bfloat16, device) * 512**-0.5 for i in range(2))
    check_norm_swiglu(x, norm_weight, gate, up, Launch(32, 8 * tiles, 32 * num_warps, num_warps, in_flight))


@given(rows, st.sampled_from([512, 1536]), row_sizes, st.booleans(), seeds, st.data())
def test_norm_and_swiglu_are_as_accurate_as_eager(device, count, width, size, has_norm, seed, data):
    x = random_tensor(seed, (count, width), torch.bfloat16, device) * 30
    norm_weight = random_tensor(seed + 1, (width,), torch.bfloat16, device) if has_norm else None
    gate, up = (random_tensor(seed + 2 + i, (size, width), torch.bfloat16, device) * width**-0.5 for i in range(2))
    check_norm_swiglu(x, norm_weight, gate, up, data.draw(launches(count, width, 2)))


def check_norm_swiglu(x, norm_weight, gate, up, launch):
    with poisoned_memory():
        y = norm_swiglu_triton(x, norm_weight, gate, up, EPS, placed(x, launch))
    x = x[None] if norm_weight is None else with_other_scales(x)
    wide = x.double()
    if norm_weight is not None:
        wide = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * norm_weight.double()
    gate, up = rotations(gate), rotations(up)
    oracle = wide @ gate.double().T
    oracle = oracle * oracle.sigmoid() * (wide @ up.double().T)
    assert_accurate(y[None], oracle, norm_swiglu_reference(x, norm_weight, gate, up, EPS), leading=True)


@given(rows, st.sampled_from([512, 1536]), row_sizes, st.booleans(), st.sampled_from(["contiguous", "sliced"]), seeds, st.data())
def test_linear_and_addition_are_as_accurate_as_eager(device, count, width, size, has_bias, layout, seed, data):
    x = random_tensor(seed, (count, width), torch.bfloat16, device)
    weight = random_tensor(seed + 1, (size, width), torch.bfloat16, device) * width**-0.5
    bias = random_tensor(seed + 2, (size,), torch.bfloat16, device) if has_bias else None
    residual = random_tensor(seed + 3, (count, size), torch.bfloat16, device, layout)
    with poisoned_memory():
        y = linear_add_triton(x, weight, bias, residual, placed(x, data.draw(launches(count, width))))
    more, turns = rotations(weight), -(-64 // size)
    bias, residual = None if bias is None else bias.repeat(turns), residual.repeat(1, turns)
    oracle = residual.double() + x.double() @ more.double().T + (0 if bias is None else bias.double())
    assert_accurate(y, oracle, linear_add_reference(x, more, bias, residual), leading=True)


@given(rows, st.integers(1, 40), row_sizes, st.booleans(), st.booleans(), seeds, st.data())
def test_looked_up_rows_are_as_accurate_as_eager(device, count, entries, size, has_bias, is_strided, seed, data):
    table = random_tensor(seed, (entries, 512 + 8), torch.bfloat16, device)[:, 8:]
    weight = random_tensor(seed + 1, (size, 512), torch.bfloat16, device) * 512**-0.5
    bias = random_tensor(seed + 2, (size,), torch.bfloat16, device) if has_bias else None
    tokens = torch.randint(entries, (count, 2), generator=torch.Generator().manual_seed(seed)).to(device)
    tokens = tokens[:, 0] if is_strided else tokens[:, 0].contiguous()
    with poisoned_memory():
        y = embedding_linear_triton(tokens, table, weight, bias, placed(table[tokens], data.draw(launches(count, 512))))
    more, bias = rotations(weight), None if bias is None else bias.repeat(-(-64 // size))
    oracle = table[tokens].double() @ more.double().T + (0 if bias is None else bias.double())
    assert_accurate(y, oracle, embedding_linear_reference(tokens, table, more, bias), leading=True)


@pytest.mark.ptx
@pytest.mark.parametrize("token", [-1, 4, 2**40])
def test_a_token_outside_the_table_trips_an_assert_and_reads_nothing_outside(token):
    """Here alone: after an assert a process cannot use its GPU any more."""
    table, weight = torch.ones(4, 512).bfloat16(), torch.ones(16, 512).bfloat16()
    arguments = torch.tensor([token]), table, weight, None, Launch(8, 16, 256, 8)
    with pytest.raises(DeviceAssert):
        embedding_linear_triton(*arguments)
    run = triton.JITFunction.run
    with mock.patch.object(triton.JITFunction, "run", lambda *args, **options: run(*args, **(options | dict(debug=False)))):
        assert embedding_linear_triton(*arguments).eq(512).all()


@pytest.mark.parametrize("change", ["dtype", "width", "rows", "x", "weight", "stride", "norm"])
def test_what_it_does_not_serve_is_told(monkeypatch, change):
    monkeypatch.setattr(skinny, "has_tensor_cores", lambda device: True)
    new = lambda *shape: torch.zeros(*shape, dtype=torch.bfloat16)  # noqa: E731
    x, norm_weight, weight = new(32, 512), new(512), new(40, 512)
    assert serves(x, norm_weight, [weight])
    flat = new(16 * 520)
    if change == "dtype":
        x = x.half()
    elif change == "width":
        x, weight = new(8, 256), new(40, 256)
    elif change == "rows":
        x = new(33, 512)
    elif change == "x":
        x = flat[1 : 1 + 8 * 512].view(8, 512)
    elif change == "weight":
        weight = flat[4 : 4 + 8 * 512].view(8, 512)
    elif change == "stride":
        weight = flat[: 8 * 516].view(8, 516)[:, :512]
    elif change == "norm":
        norm_weight = flat[2:514]
    assert not serves(x, norm_weight, [weight])


def test_of_a_table_the_tokens_count(monkeypatch):
    monkeypatch.setattr(skinny, "has_tensor_cores", lambda device: True)
    table, weight = torch.zeros(3000, 512, dtype=torch.bfloat16), torch.zeros(40, 512, dtype=torch.bfloat16)
    assert serves(table, None, [weight], torch.zeros(4, 8)) and not serves(table, None, [weight], torch.zeros(33))
    assert not serves(table[:, :256], None, [weight[:, :256]], torch.zeros(4))


@pytest.mark.parametrize(
    "launch",
    [
        Launch(8, 16, 256, 8),
        Launch(16, 24, 256, 8),
        Launch(16, 16, 384, 4),
        Launch(16, 16, 256, 16),
        Launch(32, 8, 256, 8),
        Launch(32, 16, 128, 8),
    ],
)
def test_a_launch_that_does_not_fit_is_refused(launch):
    x, weight = torch.zeros(9, 512, dtype=torch.bfloat16), torch.zeros(40, 512, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"Launch\(.*\) does not fit 9 rows of 512 columns; delete the table"):
        skinny.launch_skinny(x, None, [weight], [None], None, [x.new_empty(9, 40)], 0.0, launch)


COMPILE = """
from bench.linears import CASES, compile_launch, tried_launches
for case in CASES:
    for rows in (2, 16, 32):
        if case.name in ("talker gate/up", "predictor o"):
            assert compile_launch(({capability}, case, rows, tried_launches(case, rows)[0])), (case, rows)
"""


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (12, 0)], ids=str)
def test_it_compiles_for_other_gpus_than_hopper(capability, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    script, root = COMPILE.format(capability=capability), Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(list(tmp_path.rglob("skinny_kernel.cubin"))) == 5 and len(list(tmp_path.rglob("skinny_many_rows_kernel.cubin"))) == 1


@given(rows, st.integers(1, 20000), st.sampled_from([512, 1024, 1536, 2048, 3072, 6144]), st.sampled_from([1, 2]))
def test_a_search_tries_what_fits(count, outputs, width, matrices):
    launches = candidates(count, outputs, width, matrices)
    # 3 numbers of warps at most, 4 of tiles, and 3 of bytes in flight; 8 of warps and tiles where x may go through shared memory
    assert launches[0] == choose_launch(count, outputs, width, matrices) and len(set(launches)) == len(launches) <= (36 if count <= 16 else 42)
    for launch in launches:
        tiles, uneven = divmod(launch.block_n * matrices, 16)
        steps, odd = divmod(width, launch.block_k)
        assert launch.block_m in (8, 16, 32) and launch.block_m >= count and is_skinny(launch)
        assert uneven == odd == 0 == launch.block_k % (32 * launch.num_warps) and 0 < launch.in_flight <= steps * tiles
        if is_of_many_rows(launch):
            assert 2 <= tiles <= 8 and launch.num_warps * (2 * 4 * 512 + 4 * 32) <= 40 * 1024  # two blocks of x, and squares
        else:
            assert tiles <= 6 and launch.block_m // 8 * launch.num_warps * 512 * min(tiles, 2) <= 40 * 1024


@pytest.mark.parametrize(("outputs", "width", "block_k"), [(4096, 2048, 256), (4096, 1024, 512), (2048, 2048, 512)])
def test_x_goes_through_shared_memory_for_several_tiles_if_registers_do_not_hold_it(outputs, width, block_k):
    assert choose_launch(32, outputs, width, 1).block_k == block_k and choose_launch(16, outputs, width, 1).block_k > 256


@given(st.integers(1, 12), st.sampled_from([4, 8]))
def test_shares_of_columns_leave_all_warps_the_same_tiles(tiles, num_warps):
    shares = column_shares(tiles, num_warps)
    side_by_side = num_warps // shares
    assert num_warps % shares == 0 == tiles % side_by_side
    assert side_by_side == num_warps or tiles % (2 * side_by_side)
