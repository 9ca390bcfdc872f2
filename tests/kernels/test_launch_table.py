import json
import re

import pytest
import torch
import triton

from bench.linears import CASES, ROWS, shape_of
from qtts_compile.kernels import launch_table
from qtts_compile.kernels.launch_table import SHIPPED, Launch, Shape, file_name, keep, lookup, remember
from qtts_compile.kernels.skinny.launch import is_skinny

GPU = torch.device("cuda:0")
SHAPE, FOUND = Shape("norm_linears", "16 bit", 4096, 2048, 1), Launch(1, 4, 1024, 4)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with a GPU and empty folders: that of what is shipped, and the user's."""
    monkeypatch.setenv("QTTS_COMPILE_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(launch_table, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    (tmp_path / "shipped").mkdir()
    forget()
    yield tmp_path
    forget()


def forget():
    """Do as a new process does."""
    launch_table._table.cache_clear()
    launch_table._gpu.cache_clear()


def ship(machine, text):
    (machine / "shipped" / "nvidia-geforce-rtx-4090.json").write_text(text)


def test_what_is_found_is_kept_for_later_processes(machine):
    assert lookup(SHAPE, GPU) is None
    keep(SHAPE, GPU, FOUND)
    assert lookup(SHAPE, GPU) == FOUND
    forget()
    assert lookup(SHAPE, GPU) == FOUND and isinstance(lookup(SHAPE, GPU), Launch)
    other = Launch(2, 4, 512, 2)
    keep(SHAPE._replace(rows=2), GPU, other)
    forget()
    assert (lookup(SHAPE, GPU), lookup(SHAPE._replace(rows=2), GPU)) == (FOUND, other)
    assert [path.name for path in (machine / "user" / "launches").glob("*/*")] == ["nvidia-geforce-rtx-4090.json"]


def test_what_another_triton_compiled_is_not_used(machine, monkeypatch):
    keep(SHAPE, GPU, FOUND)
    monkeypatch.setattr(triton, "__version__", "99.0")
    forget()
    assert lookup(SHAPE, GPU) is None


def test_what_is_remembered_ends_with_the_process(machine):
    remember(SHAPE, GPU, FOUND)
    assert lookup(SHAPE, GPU) == FOUND
    forget()
    assert lookup(SHAPE, GPU) is None


def test_what_is_found_here_comes_before_what_is_shipped(machine):
    ship(machine, json.dumps({str(SHAPE): [1, 2, 256, 1], str(SHAPE._replace(rows=8)): [8, 16, 1024, 8, 3]}))
    assert lookup(SHAPE, GPU) == Launch(1, 2, 256, 1)
    keep(SHAPE, GPU, FOUND)
    forget()
    assert lookup(SHAPE, GPU) == FOUND and lookup(SHAPE._replace(rows=8), GPU) == Launch(8, 16, 1024, 8, 3)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"a": 1}',
        '{"a": [1, 2]}',
        '{"a": [3, 5, 7, 4]}',
        '{"norm_linears 16 bit 64 x 512, 8": [8, 48, 256, 4]}',
        '{"norm_linears bfloat16 64 x 512, 1": [1, 48, 256, 4]}',
        '{"a": [1, 2, 4, 1.0]}',
        '{"a": [1, 2, 4, 1, -1]}',
        '{"a": [1, 2, 4, 1, 1.5]}',
        "{",
    ],
)
def test_a_broken_table_is_said_and_left_out(machine, text, caplog):
    ship(machine, text)
    assert lookup(SHAPE, GPU) is None
    assert "no table of launch parameters" in caplog.text


def test_a_folder_that_cannot_be_written_is_said_and_the_process_goes_on(machine, monkeypatch, caplog):
    (machine / "file").write_text("")
    monkeypatch.setenv("QTTS_COMPILE_CACHE", str(machine / "file"))
    keep(SHAPE, GPU, FOUND)
    assert lookup(SHAPE, GPU) == FOUND
    assert "set QTTS_COMPILE_CACHE" in caplog.text


def test_tensor_cores_serve_any_number_of_outputs(machine):
    shape = Shape("norm_linears", "bfloat16", 4096, 2048, 8)
    ship(machine, json.dumps({str(shape): [8, 48, 1024, 8, 2]}))
    assert lookup(shape, GPU) == Launch(8, 48, 1024, 8, 2)


def test_a_cpu_has_no_table(machine):
    assert lookup(SHAPE, torch.device("cpu")) is None


def test_shipped_tables_are_of_the_published_shapes():
    paths = list(SHIPPED.glob("*.json"))
    assert {file_name(name) for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3")} == {path.name for path in paths}
    for path in paths:
        table = json.loads(path.read_text())
        for name, launch in table.items():
            ((op, numbers, outputs, width, rows),) = re.findall(r"^(\w+) (16 bit|bfloat16) (\d+) x (\d+), (\d+)$", name)
            assert str(Shape(op, numbers, int(outputs), int(width), int(rows))) == name
            measured = Launch(*launch)
            if numbers == "bfloat16" and is_skinny(measured):
                assert int(width) % measured.block_k == 0 == measured.block_k % (32 * measured.num_warps)
                launch = measured._replace(block_n=1)
            assert all(value & (value - 1) == 0 for value in launch[:4]) and measured.block_m >= int(rows)
        of_texts = [case for case in CASES if case.rows == ROWS]
        published = [shape_of(case, 1) for case in of_texts]
        everywhere = {shape._replace(numbers="16 bit", rows=rows) for shape in published for rows in (1, 2, 4, 8, 16)}
        # On an H100 the tensor cores' launches were not measured, nor the audio decoder's.
        served = {shape_of(case, rows) for case in CASES for rows in case.rows} if "h200" in path.name else {shape_of(case, 1) for case in of_texts}
        assert set(table) == {str(shape) for shape in everywhere | served}
