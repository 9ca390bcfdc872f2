import threading

import pytest
import torch
import triton

from qtts_compile.kernels import launch_search, launch_table
from qtts_compile.kernels.launch_search import can_search, search
from qtts_compile.kernels.launch_table import Launch, Shape, lookup
from qtts_compile.kernels.linear_add import linear_add_reference, linear_add_triton

SHAPE = Shape("linear_add", "16 bit", 64, 128, 1)
LAUNCHES = [Launch(1, 2**i, 64, 1) for i in range(1, 5)]


@pytest.fixture
def kept(monkeypatch):
    """What is kept for later processes; what is remembered in this one is found again."""
    kept, remembered = {}, {}

    def keep(shape, device, launch):
        assert launch_search.graph_lock.locked()  # or a thread that waits would search again
        kept[shape] = launch

    monkeypatch.setattr(launch_search, "keep", keep)
    monkeypatch.setattr(launch_search, "remember", lambda shape, device, launch: remembered.update({shape: launch}))
    monkeypatch.setattr(launch_search, "lookup", lambda shape, device: remembered.get(shape))
    return kept


def test_the_fastest_launch_that_runs_is_kept(monkeypatch, kept):
    weights, runs = [torch.zeros(64, 128, dtype=torch.bfloat16)], []
    times = dict(zip(LAUNCHES, (5.0, 3.0, 4.0)))

    def run(copy, launch):
        runs.append((copy, launch))
        if launch == LAUNCHES[3]:
            raise triton.TritonError("out of resources")

    def microseconds(call, copies):
        for copy in copies:
            call(copy)
        return [times[runs[-1][1]] + noise for noise in (-0.5, 0.0, 9.0)]

    monkeypatch.setattr(launch_search, "microseconds", microseconds)
    monkeypatch.setattr(launch_search, "COLD_BYTES", 5 * 64 * 128 * 2)
    assert search(SHAPE, LAUNCHES, weights, run) == LAUNCHES[1] and kept == {SHAPE: LAUNCHES[1]}
    copies = [copy for copy, launch in runs if launch == LAUNCHES[0]]
    assert len(copies) == 6 and len({copy[0].data_ptr() for copy in copies[1:]}) == 5  # no launch that is timed finds its weights in the cache
    assert runs[0][0] is weights and all(torch.equal(copy[0], weights[0]) for copy in copies)


def test_nothing_that_runs_is_nothing_found(monkeypatch, kept):
    def run(copy, launch):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(launch_search, "microseconds", lambda call, copies: call(copies[0]))
    assert search(SHAPE, LAUNCHES, [torch.zeros(64, 128)], run) == LAUNCHES[0] and kept == {}


@pytest.mark.parametrize("error", [triton.TritonError, RuntimeError])
@pytest.mark.parametrize(("failing", "best"), [(LAUNCHES[:1], LAUNCHES[1]), (LAUNCHES[1:3], LAUNCHES[0]), (LAUNCHES, None)])
def test_a_launch_that_fails_while_it_is_timed_is_left_out(failing, best, error, monkeypatch, kept, caplog):
    runs = []

    def run(copy, launch):
        runs.append(launch)
        if launch in failing and runs.count(launch) == 2:
            raise error("captured in vain")

    def microseconds(call, copies):
        call(copies[0])
        return [float(LAUNCHES.index(runs[-1]))]

    caplog.set_level("DEBUG", launch_search.log.name)
    monkeypatch.setattr(launch_search, "microseconds", microseconds)
    assert search(SHAPE, LAUNCHES, [torch.zeros(64, 128)], run) == (best or LAUNCHES[0])
    assert kept == ({SHAPE: best} if best else {}) and all(runs.count(launch) == 2 for launch in LAUNCHES)
    assert [text for text in caplog.messages if "left out" in text] == [f"{SHAPE}: {launch} is left out: captured in vain" for launch in failing]


@pytest.mark.parametrize(("step", "least", "most"), [(9, 2, 4), (30, 1, 1)])
def test_a_search_ends_in_time_with_what_it_has_and_says_so(step, least, most, monkeypatch, kept, caplog):
    caplog.set_level("INFO", launch_search.log.name)
    clock = iter(range(0, 1000, step))
    monkeypatch.setattr(launch_search.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(launch_search, "microseconds", lambda call, copies: [1.0])
    launches, tried = [Launch(1, 2**i, 64, 1) for i in range(1, 12)], []
    search(SHAPE, launches, [torch.zeros(64, 128)], lambda copy, launch: tried.append(launch))
    assert least <= len(tried) <= most and kept[SHAPE] == launches[0]
    assert f"{SHAPE}: the search ran out of its 20 s, {11 - len(tried)} of 11 launches were not tried" in caplog.messages


def test_launches_are_compiled_side_by_side(monkeypatch, kept, caplog):
    caplog.set_level("INFO", launch_search.log.name)
    monkeypatch.setattr(launch_search.os, "cpu_count", lambda: len(LAUNCHES))
    monkeypatch.setattr(launch_search, "microseconds", lambda call, copies: [1.0])
    together = threading.Barrier(len(LAUNCHES), timeout=30)  # which breaks if one waits for another's end
    search(SHAPE, LAUNCHES, [torch.zeros(64, 128)], lambda copy, launch: together.wait())
    assert kept == {SHAPE: LAUNCHES[0]} and "not tried" not in caplog.text


def never(*_):
    pytest.fail("nothing was to be launched")


def test_a_thread_that_waited_for_a_search_takes_what_it_found(monkeypatch, kept):
    monkeypatch.setattr(launch_search, "lookup", lambda shape, device: LAUNCHES[2])
    assert search(SHAPE, LAUNCHES, [torch.zeros(64, 128)], never) == LAUNCHES[2]


def test_no_memory_is_said_and_no_fault(monkeypatch, kept, caplog):
    class Full:
        device = torch.device("cpu")
        attempts = 0

        def numel(self):
            return 1000

        def element_size(self):
            return 2

        def clone(self):
            Full.attempts += 1
            raise torch.cuda.OutOfMemoryError("full")

    for _ in range(3):
        assert search(SHAPE, LAUNCHES, [Full()], never) == LAUNCHES[0] and kept == {}  # pyright: ignore[reportArgumentType]
    assert caplog.text.count("no memory is free") == 1 and Full.attempts == 1  # the first is remembered


def test_where_a_search_is_possible(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setenv("QTTS_COMPILE_SEARCH", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert can_search(gpu) and not can_search(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not can_search(gpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for forbids in ("0", "false", "no", "off", ""):
        monkeypatch.setenv("QTTS_COMPILE_SEARCH", forbids)
        assert not can_search(gpu)


@pytest.mark.gpu
def test_a_search_on_the_gpu_finds_a_launch_that_is_right_and_the_next_process_has_it(monkeypatch, tmp_path):
    monkeypatch.setenv("QTTS_COMPILE_CACHE", str(tmp_path))
    monkeypatch.setenv("QTTS_COMPILE_SEARCH", "1")
    monkeypatch.setattr(launch_table, "SHIPPED", tmp_path / "nothing")
    launch_table._table.cache_clear()
    x, weight, residual = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in ((1, 1056), (1056, 1056), (1, 1056)))
    y = linear_add_triton(x, weight, None, residual)
    torch.testing.assert_close(y, linear_add_reference(x, weight, None, residual), rtol=0.02, atol=0.5)
    shape = Shape("linear_add", "16 bit", 1056, 1056, 1)
    found = lookup(shape, x.device)
    assert found is not None
    launch_table._table.cache_clear()
    assert lookup(shape, x.device) == found
    launch_table._table.cache_clear()
