"""The benchmark of whole speech: its check of codes, its models, its table, and that a job which fails costs no other."""

import json
import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import bench.speech
from bench import engines
from bench.decoder import check_audio, decoder
from bench.hearing import WrongAudio
from bench.models import build, parameters
from bench.registry import ROWS, chosen
from bench.run import Run
from bench.speech import arguments_of, main, table
from bench.task import CHECKED_FRAMES, Task, WrongCodes, agreement, check, generate
from bench.timing import SKIPS, figure


@pytest.fixture(scope="module")
def talker():
    return build("tiny", "cpu", torch.float32).model.talker


@pytest.fixture(scope="module")
def greedy(talker):
    task = Task.of(talker, [9, 5], CHECKED_FRAMES, greedy=True)
    return task, generate(talker, task)


def test_greedy_codes_of_generate_pass_the_check(talker, greedy):
    task, codes = greedy
    assert codes.shape == (2, CHECKED_FRAMES, 16)
    assert check(talker, task, codes).startswith("512 greedy choices in 16 frames against eager logits given the same codes: 100.0% equal")


@pytest.mark.parametrize("row, frame, group", [(0, 0, 0), (0, 0, 1), (1, 7, 8), (0, CHECKED_FRAMES - 1, 0), (1, CHECKED_FRAMES - 1, 15)])
def test_one_wrong_choice_fails_the_check(talker, greedy, row, frame, group):
    task, codes = greedy
    wrong = codes.clone()
    wrong[row, frame, group] = (wrong[row, frame, group] + 1) % 512
    with pytest.raises(WrongCodes, match="sigma at most"):
        check(talker, task, wrong)


def test_codes_for_another_prompt_fail_the_check(talker, greedy):
    task, codes = greedy
    with pytest.raises(WrongCodes):
        check(talker, task, codes.flip(0))


def test_agreement_counts_the_frames_up_to_the_first_difference(greedy):
    codes = greedy[1][0]
    other = codes.clone()
    other[3, 2] += 1
    assert agreement(codes, codes) == "16 of 16 frames equal generate's in a run of its own"
    assert agreement(other, codes).startswith("3 of 16")


@pytest.mark.parametrize("size, of_model", [("1.7b", 1_916_676_352), ("0.6b", 905_788_672)])
def test_models_have_as_many_parameters_as_the_published_ones(size, of_model):
    assert parameters(size) == {"speech tokenizer": 153_714_657, "model": of_model}


def test_jobs_come_in_order_with_what_they_need():
    assert list(chosen(["warm-start", "eager", "qtts"])) == ["qtts", "eager", "checkpoint", "cold-start", "warm-start"]
    with pytest.raises(ValueError, match="no rows are called 'qqts'; there are qtts, eager"):
        chosen(["qqts"])


def test_the_command_line_refuses_what_measures_nothing(capsys):
    assert arguments_of([]).rows == list(ROWS) and arguments_of(["--tiny"]).mode == "none"
    for wrong in (["--rows", "qqts"], ["--mode", "fast"], ["--repeats", "2"], ["--frames", "0"]):
        with pytest.raises(SystemExit):
            arguments_of(wrong)
    assert "at least 1 frame and 3 repeats" in capsys.readouterr().err


def test_table_joins_the_figures_of_a_job():
    frames = {
        "launches without a CUDA graph": figure(0, ""),
        "frame": figure([5.0, 6.0, 5.5], "ms"),
        "audio": figure([16.0, 13.3, 14.5], "s a second"),
    }
    rows = [
        {"job": "qtts", "row": "compile", "figures": {"compile and capture": figure(91.2, "s")}},
        {"job": "qtts", "row": "frames at positions 64 to 164", "ms_per_frame": frames["frame"], "figures": frames},
        {"job": "qtts", "row": "memory", "figures": {"allocated, frames": figure(4.25, "GiB")}},
        {"job": "qtts", "row": "kernels", "error": "RuntimeError: no CUPTI"},
    ]
    speed, memory, error = table(rows).splitlines()[1:]
    assert speed.split() == ["qtts", "positions", "64", "to", "164", "5.50", "5.00", "6.00", "14.50", "91.20", "0", "4.25", "-", "-", "-", "-"]
    assert memory == "qtts, memory: allocated, frames 4.25 GiB"
    assert error == "qtts, kernels: FAILED RuntimeError: no CUPTI"


@pytest.fixture
def run(tmp_path):
    """A job in this process."""
    return Run(
        job="tried",
        rows=str(tmp_path / "rows.jsonl"),
        folder=str(tmp_path),
        profile=None,
        mode=None,
        frames=2,
        repeats=3,
        tiny=True,
        compile_only=False,
        started=0.0,
    )


def written(run):
    return [json.loads(line) for line in Path(run.rows).read_text().splitlines()]


def test_an_exception_ends_its_row_alone(run, capsys):
    with run.row("first"):
        raise ValueError("of two\nlines")
    with run.row("second") as row:
        row["figures"] = {"time": figure([1.0, 3.0, 2.0], "ms")}
    first, second = written(run)
    assert first["error"] == "ValueError: of two lines" and "raise ValueError" in first["traceback"]
    assert second["figures"]["time"] == {"unit": "ms", "median": 2.0, "min": 1.0, "max": 3.0, "repeats": 3}
    printed = capsys.readouterr().out
    assert "tried, first: FAILED ValueError: of two lines" in printed and "tried, second: time 2.00 (1.00 to 3.00) ms" in printed


def test_launches_without_a_cuda_graph_are_entered_where_graphs_are_recorded():
    rows = [{"figures": {}}, {"figures": {}}]
    for row, records in zip(rows, (True, False)):
        engines.enter_launches(row, cast(Any, SimpleNamespace(records=records, runs=5)), 3)
    assert [row["figures"] for row in rows] == [{SKIPS: figure(2, "")}, {}]


def test_the_peak_of_memory_is_that_of_frames_and_not_of_what_is_measured_after(run, monkeypatch):
    memory_in_use = 1.0

    def read_figures(*_):  # as the measurement of bandwidth does
        nonlocal memory_in_use
        memory_in_use += 2.0
        return {}

    monkeypatch.setattr(engines, "read_figures", read_figures)
    monkeypatch.setattr(engines, "memory", lambda what: {f"allocated, {what}": figure(memory_in_use, "GiB")})
    engines.engine(run, slots=128)
    first = next(row for row in written(run) if "ms_per_frame" in row)
    assert first["figures"]["allocated, with its prompt"]["median"] == 1.0


def test_decoder_rows_are_checked_and_timed(run):
    decoder(run)
    compiled, whole, chunks = written(run)
    assert compiled["figures"]["compile and capture"]["median"] > 0
    assert all(row["check"].startswith("relative error against float64") and "error" not in row for row in (whole, chunks))
    assert whole["figures"]["Codec.decode"]["median"] > 0 and "frames: 8" in chunks["figures"]


def test_compiling_ahead_times_nothing(run):
    decoder(replace(run, compile_only=True))
    assert [row["row"] for row in written(run)] == ["compile ahead"]


def test_a_wrong_waveform_fails_the_check(run):
    original = build("tiny", "cpu", torch.float32).model.speech_tokenizer.model.decoder
    codes = torch.arange(48).reshape(3, 16)
    waveform = original(codes.T[None]).flatten()
    check_audio(original, codes, waveform)
    with pytest.raises(WrongAudio, match="relative error"):
        check_audio(original, codes, waveform.roll(1))


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command on the tiny model; return the number of failures, what it printed and the rows it wrote."""
    monkeypatch.setattr(bench.speech, "machine", lambda: {"gpu": "no GPU"})

    def run(*arguments):
        results = tmp_path / "results.json"
        failures = main(["--tiny", "--frames", "2", "--repeats", "3", "--folder", str(tmp_path), "--json", str(results), *arguments])
        return failures, capsys.readouterr().out, json.loads(results.read_text())["rows"]

    return run


def test_jobs_run_in_processes_of_their_own(command):
    failures, printed, rows = command("--rows", "faster", "checkpoint")
    assert failures == 0 and [row["job"] for row in rows] == ["faster", "checkpoint"]
    assert "faster, all: SKIPPED: needs a GPU" in printed and "checkpoint, written: weights 0.01 GB" in printed


def test_a_failing_job_costs_no_other(command, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho Traceback >&2\necho ValueError: no luck >&2\necho >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    failures, printed, rows = command("--rows", "decoder", "eager")
    assert failures == 2 and [row["job"] for row in rows] == ["eager", "decoder"]
    assert {row["error"] for row in rows} == {"exit status 3: ValueError: no luck"}
    assert "decoder, the rest: FAILED exit status 3: ValueError: no luck" in printed.splitlines()[-1]


def test_jobs_are_stopped_at_their_limit(command):
    failures, _, rows = command("--rows", "decoder", "eager", "--time-limit", "0.3")
    assert failures == 2 and {row["error"] for row in rows} == {"stopped after the 0.3 s that its process had"}


def test_a_job_tells_where_it_was_stopped(command):
    """Which may be anywhere, also where it imports something."""
    _, _, rows = command("--rows", "eager", "--frames", "1000000", "--time-limit", "8")
    assert re.fullmatch(r"stopped after the 8 s that its process had in \S+ \(.+:\d+\)", rows[-1]["error"])


@pytest.mark.parametrize("seconds", [0, 1])  # without and with time for this process to see that the job has begun
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("rows", [("eager", "checkpoint"), ("qtts", "decoder", "--compile-first")])
def test_a_stopped_benchmark_keeps_its_rows_and_leaves_no_process(command, tmp_path, monkeypatch, rows, number, seconds):
    python = tmp_path / "python"
    row = json.dumps({"job": rows[0], "row": "load", "seconds": 1.0})
    place = tmp_path / f"{rows[0]}{'-compile' if '--compile-first' in rows else ''}.jsonl"
    first = f"echo '{row}' > {place}; sleep {seconds}; kill -{number:d} $PPID"
    python.write_text(f'#!/bin/sh\necho $$ >> {tmp_path}/processes\ncase "$*" in *\'"job": "{rows[0]}"\'*) {first};; esac\nsleep 60\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        command("--rows", *rows)
    assert stop.value.code == 128 + number and signal.getsignal(number) == before
    kept = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["row"] for row in kept if row["job"] == rows[0]] == ["load", "the rest"]
    assert {row["error"] for row in kept if row["row"] == "the rest"} == {f"stopped by {number.name}"}
    for process in (tmp_path / "processes").read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(process), 0)


def test_what_the_budget_does_not_hold_is_not_begun(command):
    failures, _, rows = command("--rows", "decoder", "eager", "--budget", "5")
    assert failures == 2 and all("of the budget are left" in row["error"] for row in rows)
