"""``qtts bench``: its registry, that it tells no speed of what is wrong, and each of its levels on the embedded model."""

import inspect
import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from test_bench_speech import run, written  # noqa: F401

import bench.registry
import bench.speech
import bench.start
import bench.whole
import qtts_compile
from bench.command import arguments_of, jobs_of, main
from bench.kernel_cases import KERNEL_CASES, KernelCase
from bench.kernels import kernels
from bench.reads import cache_bytes, weight_bytes
from bench.registry import GROUPS, MODES, ROWS, Case, Mode, checkpoint_job, frame_job, modes_named, whole_job
from bench.run import FailedParity
from bench.task import enter_speed
from bench.timing import figure
from qtts_compile import cli
from qtts_compile.patterns.catalogue import OPS

USERS_KNOW = ["base", "base+tq", "triton", "triton+tq", "faster", "hybrid", "hybrid+tq"]


def test_the_modes_that_users_know_are_ours_and_the_peers_bear_their_names():
    assert GROUPS["ours"] == USERS_KNOW
    assert all(name.startswith(("faster-qwen3-tts", "qwen3-tts-triton:")) for name in GROUPS["peers"])
    assert modes_named(["peers", "hybrid", "peers"]) == [*GROUPS["peers"], "hybrid"]
    with pytest.raises(ValueError, match="no mode is called 'hybird'; there are base, "):
        modes_named(["hybird"])


@pytest.mark.parametrize("name", MODES)
def test_every_mode_has_runners_that_take_its_arguments(name):
    for job in (frame_job(name, Case(positions=(64, 8000), slots=0)), whole_job(name, "0.6b")):
        module, _, function = job.function.partition(":")
        inspect.signature(getattr(import_module(module), function)).bind(None, **job.arguments)
        assert job.labels["mode"] == name
    assert frame_job(name, Case(positions=(64, 8000), slots=0)).arguments["slots"] == 8192


@pytest.mark.parametrize("job", [*ROWS.values(), checkpoint_job("0.6b")], ids=lambda job: job.function)
def test_every_row_of_bench_speech_can_be_called(job):
    module, _, function = job.function.partition(":")
    inspect.signature(getattr(import_module(module), function)).bind(None, **job.arguments)


def test_what_is_absent_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(bench.registry, "find_spec", lambda module: None if module == "qwen3_tts_triton" else True)
    absent = "qwen3_tts_triton not installed: pip install qwen3-tts-triton==0.3.0"
    assert MODES["qwen3-tts-triton:hybrid+tq"].absent == absent == frame_job("qwen3-tts-triton:triton", Case()).skip
    assert MODES["faster-qwen3-tts"].absent == ""
    assert frame_job("faster-qwen3-tts", Case(batch=8)).skip == "speaks 1 text at a time"


def test_every_kernel_has_a_published_shape():
    elsewhere = {"rotary", "rotary_qk", "kv_write", "qk_norm_rope_quantized_attention"}  # within others; the last by bench.quantized_attention
    assert {case.op for case in KERNEL_CASES.values()} == (set(OPS.values()) | {"sample"}) - elsewhere


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command on the tiny model; return its status, what it printed and the rows it wrote."""
    monkeypatch.setattr(bench.speech, "machine", lambda: {"gpu": "no GPU"})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def command(*arguments):
        results = tmp_path / "results.json"
        status = main([*arguments, "--tiny", "--frames", "2", "--repeats", "3", "--folder", str(tmp_path), "--json", str(results)])
        return status, capsys.readouterr().out, json.loads(results.read_text())["rows"]

    return command


def test_a_mode_whose_codes_are_wrong_gets_no_speed(command, monkeypatch):
    monkeypatch.setitem(MODES, "wrong", Mode("fast and wrong", "tests.wrong_runner:frames", "", torch_mode="default"))
    status, printed, rows = command("frame", "--modes", "wrong", "hybrid", "faster-qwen3-tts", "--positions", "64", "80")
    of = {mode: [row for row in rows if row["mode"] == mode] for mode in ("wrong", "hybrid")}
    assert status == 1 and {row["size"] for row in rows} == {"tiny"}
    wrong = [row for row in of["wrong"] if row["row"].startswith("frames")]
    assert len(wrong) == 2 and all(row["error"].startswith("parity: WrongCodes: 256 greedy choices") for row in wrong)
    assert not any(row.keys() & {"figures", "ms_per_frame", "breakdown"} for row in wrong)
    assert "frame wrong tiny batch 1, frames at positions 64 to 66: FAILED parity: WrongCodes" in printed
    assert [row["ms_per_frame"]["repeats"] for row in of["hybrid"] if "ms_per_frame" in row] == [3, 3]
    table = [line for line in printed.splitlines() if line.startswith("frame ")]
    assert sum("positions 64 to 66 " in line for line in table) == 1  # hybrid's
    assert "faster-qwen3-tts tiny batch 1, all: SKIPPED: " in printed


def test_no_figure_is_told_after_a_failed_check(run, capsys):  # noqa: F811
    with run.row("compile") as row:
        row["figures"] = {"compile": figure(1.0, "s")}
    with run.row("frames") as row:
        row |= {"ms_per_frame": figure(7.77, "ms"), "figures": {"frame": figure(7.77, "ms")}}
        raise FailedParity("wrong")
    with run.row("first audio") as row:
        row["figures"] = {"call to first chunk": figure(7.77, "ms")}
    compiled, *refused = written(run)
    assert "figures" in compiled
    assert [row["error"] for row in refused] == ["parity: FailedParity: wrong", "parity: FailedParity: that of 'frames' failed"]
    assert "7.77" not in capsys.readouterr().out + Path(run.rows).read_text().replace("traceback", "")


def test_no_speed_without_a_check():
    with pytest.raises(FailedParity, match="nothing was checked"):
        enter_speed({}, [1.0])


@pytest.mark.parametrize("size, talker, predictor", [("1.7b", 2.83e9, 2.43e9), ("0.6b", 0.89e9, 2.42e9)])
def test_a_frame_reads_the_published_weights_and_its_cache(size, talker, predictor):
    from bench.models import _construct, _parts

    model = _construct(*_parts(size)[1], torch.bfloat16, "meta").talker
    assert weight_bytes(model) == pytest.approx(talker + predictor, rel=0.02)
    of_predictor = 5 * 4096 * sum(range(2, 17))
    assert cache_bytes(model, 7999, batch=8) == 8 * (28 * 4096 * 8000 + of_predictor)


def test_kernels_are_checked_and_timed(run):  # noqa: F811
    names = [
        "predictor o",
        "predictor attention",
        "predictor qk-norm, rotary, kv-write",
        "predictor sampler, embedding",
        "talker sampler",
        "predictor norm",
        "predictor norm, qkv, attention",
        "talker norm, qkv, int4 attention, position 64",
    ]
    for count in (1, 2):
        kernels(run, count, names)
    rows = written(run)
    assert [row["row"] for row in rows] == [f"{name}, rows: {count}" for count in (1, 2) for name in names]
    timed, skipped = rows[:-2], rows[-2:]
    assert all("error" not in row and row["check"] and row["figures"]["kernel"]["median"] > 0 for row in timed)
    assert all(row["skipped"] == "takes 1 at a time" and "figures" not in row for row in skipped)


def test_kernels_of_the_audio_decoder_are_timed_with_the_rows_that_it_has(run):  # noqa: F811
    def rows_of(*argv):
        return {name: job.arguments for name, job in jobs_of(arguments_of(["kernels", *argv])).items()}

    whole = rows_of()
    assert {name: given.get("rows") for name, given in whole.items()} == {"kernels rows 1": 1, "kernels rows 8": 8, "kernels own rows": None}
    assert all(name.startswith("decoder ") for name in whole["kernels own rows"]["cases"]) and len(whole["kernels own rows"]["cases"]) == 5
    assert whole["kernels rows 8"]["cases"] == [name for name in KERNEL_CASES if not name.startswith("decoder ")]
    names = ["decoder output", "decoder pointwise"]
    assert rows_of("--cases", "talker o", "--batch", "2") == {"kernels rows 2": {"rows": 2, "cases": ["talker o"]}}
    assert rows_of("--cases", *names, "--batch", "8") == {"kernels own rows": {"cases": names}}
    kernels(run, 8, names)
    rows = written(run)
    assert [row["row"] for row in rows] == ["decoder output, rows: 1", "decoder pointwise, rows: 2", "decoder pointwise, rows: 4"]
    assert all("error" not in row and row["check"] for row in rows)


def test_a_wrong_kernel_gets_no_time(run, monkeypatch):  # noqa: F811
    reference = KERNEL_CASES["predictor norm"].reference
    monkeypatch.setattr(KernelCase, "kernel", property(lambda case: lambda *given: reference(*given) * 1.01))
    kernels(run, 1, ["predictor norm"])
    (row,) = written(run)
    assert row["error"].startswith("parity: WrongResult: rms_norm") and "figures" not in row


def test_from_a_checkpoint_and_a_text_to_a_waveform(run, monkeypatch):  # noqa: F811
    bench.start.checkpoint(run)
    bench.whole.ours(run)
    _, row = written(run)
    assert "error" not in row and row["check"].startswith("256 greedy choices")
    assert all(row["figures"][name]["median"] > 0 for name in ("load", "first call", "x real time", "call to first audio"))
    begin = bench.whole.begin
    monkeypatch.setattr(bench.whole, "begin", lambda engine, task: begin(engine, replace(task, arguments=other(task))))

    def other(task):
        return task.arguments | {"inputs_embeds": -task.arguments["inputs_embeds"]}

    bench.whole.ours(run)
    assert written(run)[-1]["error"].startswith("parity: WrongCodes") and "figures" not in written(run)[-1]


def test_the_levels_make_a_job_for_each_case(command):
    def jobs(*argv):
        return jobs_of(arguments_of(argv))

    assert list(jobs("e2e", "--modes", "hybrid", "--sizes", "0.6b")) == ["checkpoint-0.6b", "e2e hybrid 0.6b"]
    frames = jobs("frame", "--modes", "triton", "--batch", "1", "32")
    assert [(job.torch_mode, job.arguments["batch"], job.arguments["positions"]) for job in frames.values()] == [
        ("default", 1, [64, 512, 2048, 8000]),
        ("default", 32, [64, 512, 2048, 8000]),
    ]
    assert {name.split()[0] for name in jobs()} == {"kernels", "frame", "checkpoint-1.7b", "e2e"}


def test_help_names_every_mode(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["bench", "--help"])
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in MODES) and "call to first audio" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--modes", "hybird"], "no mode is called 'hybird'"),
        (["frames"], "'frames' is no level; there are kernels, frame, e2e"),
        (["kernels", "--cases", "talker"], "'talker': no such shape; there are talker qkv"),
        (["--batch", "64"], "--batch 64: give 1 to 32"),
        (["--positions", "3"], "--positions 3: give 25 to 32000"),
        (["e2e", "--batch", "8"], "--batch is for kernels and frame, and e2e would ignore it"),
        (["e2e", "--positions", "64"], "--positions is for frame, and e2e would ignore it"),
        (["kernels", "e2e", "--positions", "64"], "--positions is for frame, and kernels and e2e would ignore it"),
        (["kernels", "--modes", "all"], "--modes is for frame and e2e, and kernels would ignore it"),
        (["kernels", "--sizes", "1.7b"], "--sizes is for frame and e2e, and kernels would ignore it"),
        (["frame", "e2e", "--cases", "talker o"], "--cases is for kernels, and frame and e2e would ignore it"),
    ],
)
def test_wrong_usage_names_the_way_out(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", *options])
    assert message in capsys.readouterr().err


def test_options_are_taken_where_a_level_reads_them():
    given = ["--modes", "hybrid", "--sizes", "0.6b", "--batch", "2", "--positions", "64", "--cases", "talker o"]
    assert list(jobs_of(arguments_of(given))) == ["kernels rows 2", "frame hybrid 0.6b batch 2", "checkpoint-0.6b", "e2e hybrid 0.6b"]
    (frame,) = jobs_of(arguments_of(["frame", "--modes", "hybrid", "--batch", "1"])).values()
    assert frame.labels["size"] == "1.7b"


def test_a_machine_without_a_gpu_is_told_so(monkeypatch):
    monkeypatch.setattr(bench.speech, "machine", lambda: {"gpu": "no GPU"})
    with pytest.raises(SystemExit, match="qtts bench frame needs a CUDA GPU and torch sees none; --tiny tries"):
        cli.main(["bench", "frame", "--modes", "hybrid"])


def test_an_installed_package_sends_to_a_checkout(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(qtts_compile, "__file__", str(tmp_path / "qtts_compile" / "__init__.py"))
    assert cli.main(["bench"]) == 2
    assert "the benchmarks are not installed with the package" in capsys.readouterr().err
