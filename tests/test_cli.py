"""The command line, on the embedded model."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import qtts_compile
from qtts_compile import cli
from qtts_compile.demo_config import KINDS, SPEAKERS
from qtts_compile.demo_model import build_checkpoint


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QTTS_COMPILE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: str(build_checkpoint(root / kind, kind=kind)) for kind in KINDS}


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str, *options: str) -> int:
    return cli.main([command, "Good morning.", "--no-compile", "--device", "cpu", "--max-new-tokens", "4", *options])


def speak(*options: str) -> int:
    return run("speak", *options)


def refused(capsys, status: int) -> str:
    """Return the one line in which the command says why it did nothing."""
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2 and error.startswith("qtts: error: ") and not [name for name in os.listdir() if name != "voice.wav"]
    return error


@pytest.fixture
def recording(directory):
    tone = np.sin(np.arange(16000) * 0.05).astype(np.float32) / 2
    soundfile.write("voice.wav", np.stack([tone, tone], 1), 16000)
    return "voice.wav"


def test_speak_writes_80_ms_a_frame(capsys):
    assert speak() == 0
    samples, sample_rate = soundfile.read("speech.wav")
    assert (len(samples), sample_rate) == (3 * 1920, 24000)
    captured = capsys.readouterr()
    assert "noise, not speech" in captured.out
    assert re.search(
        r"^Wrote speech.wav at 24000 Hz: 3 frames, 0.24 s of audio in .*ms a frame.*; ended by max_new_tokens; seed 0$", captured.out, re.MULTILINE
    )
    assert "qtts: warning: the speech was cut off by max_new_tokens=4" in captured.err and "Speaking" not in captured.err


def test_a_stream_writes_the_same_file():
    assert speak("-o", "whole.wav") == speak("--stream", "-o", "stream.wav") == 0
    assert Path("whole.wav").read_bytes() == Path("stream.wav").read_bytes()


def test_a_terminal_shows_progress(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert speak() == 0
    assert re.search(r"Speaking: 3 frames", capsys.readouterr().err)


def test_the_seed_decides_what_is_sampled():
    for name, options in {"a.wav": ["--seed", "1"], "b.wav": ["--seed", "1"], "c.wav": ["--seed", "2"]}.items():
        assert speak(*options, "-o", name) == 0
    a, b, c = (Path(name).read_bytes() for name in ("a.wav", "b.wav", "c.wav"))
    assert a == b != c


def test_speech_from_a_quantised_cache_says_so(capsys):
    assert speak("--kv-cache", "int4", "--protect", "first_layers=4") == 0  # of the embedded model's 4
    captured = capsys.readouterr()
    assert "qtts: warning: kv_cache='int4' quantises nothing" in captured.err
    assert speak("--kv-cache", "k4v3") == 0
    captured = capsys.readouterr()
    assert "quantises nothing" not in captured.err and re.search(
        r"; k4v3 cache of [\d.]+ MiB, .* 0 tokens quantised in layers 2 to 3$", captured.out, re.M
    )


def test_what_a_quantised_cache_keeps_is_chosen(capsys):
    assert speak("--kv-cache", "int4", "--protect", "first_layers=1,last_layers=2,window=8") == 0
    captured = capsys.readouterr()
    found = re.search(r" (\d+) tokens quantised in layer 1$", captured.out, re.M)
    assert found and int(found[1]) > 0 and "quantises nothing" not in captured.err


@pytest.mark.parametrize(
    ("protect", "message"),
    [
        ("layers=2", "'layers=2' is not NAME=N.* first_layers, last_layers, sinks, window"),
        ("sinks=4,window=many", "'window=many' is not"),
        ("window", "'window' is not"),
        ("", "'' is not"),
        ("sinks=4,sinks=5", "'sinks=5' is not.*at most once"),
        ("window=0", "window=0: give 1 or more"),
    ],
)
def test_what_a_quantised_cache_cannot_keep_is_refused(protect, message, capsys):
    assert re.search(message, refused(capsys, speak("--kv-cache", "int4", "--protect", protect)))


@pytest.mark.parametrize("format", ["int2", "turbo"])
def test_an_unknown_cache_format_is_refused(format, capsys):
    with pytest.raises(SystemExit, match="2"):
        speak("--kv-cache", format)
    assert f"--kv-cache: invalid choice: '{format}'" in capsys.readouterr().err


def test_greedy_needs_no_seed():
    for seed in "12":
        assert speak("--greedy", "--seed", seed, "-o", f"{seed}.wav") == 0
    assert Path("1.wav").read_bytes() == Path("2.wav").read_bytes()


def test_a_model_given_by_its_directory_is_not_called_noise(checkpoints, capsys):
    assert speak("--model", checkpoints["custom_voice"], "--speaker", "Ryan", "--language", "German", "--instruct", "slowly") == 0
    assert "noise" not in capsys.readouterr().out


def test_a_model_of_one_voice_speaks_with_it(checkpoints, tmp_path_factory):
    directory = tmp_path_factory.mktemp("fine-tuned") / "model"
    shutil.copytree(checkpoints["custom_voice"], directory)
    config = json.loads((directory / "config.json").read_text())
    config["talker_config"] |= {"spk_id": {"anna": 3000}, "spk_is_dialect": {"anna": False}}
    (directory / "config.json").write_text(json.dumps(config))
    assert speak("--model", str(directory)) == 0


def test_a_described_voice_speaks(checkpoints):
    assert run("design", "--model", checkpoints["voice_design"], "--instruct", "an old man", "-o", "voice.flac") == 0
    assert run("design", "--instruct", "an old man", "-o", "voice.flac") == 0
    assert soundfile.info("voice.flac").frames == 3 * 1920


@pytest.mark.parametrize("options", [["--ref-text", "Evening."], ["--x-vector-only", "--stream"]])
def test_a_recorded_voice_speaks(options, recording):
    assert run("clone", "--ref-audio", recording, *options) == 0
    assert soundfile.info("speech.wav").frames == 3 * 1920


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--ref-text.*--x-vector-only.*one of them"),
        (["--ref-text", "Evening.", "--x-vector-only"], "one of them"),
        (["--x-vector-only", "--ref-audio", "missing.wav"], "--ref-audio missing.wav: cannot be read"),
        (["--x-vector-only", "--ref-audio", __file__], "--ref-audio .*test_cli.py: cannot be read"),
    ],
)
def test_a_recording_that_does_not_serve_is_refused(options, message, recording, capsys):
    assert re.search(message, refused(capsys, run("clone", "--ref-audio", recording, *options)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--speaker", "bob"], f"--speaker bob: .*{', '.join(sorted(SPEAKERS))}"),
        (["--language", "klingon"], "--language klingon: .*auto, chinese, english"),
        (["--model", "./nowhere"], r"--model \./nowhere: no such directory"),
        (["--model", "."], r"--model \.: cannot be loaded: "),
        (["--mode", "default"], "--mode.*--no-compile"),
        (["-o", "speech.xyz"], "-o speech.xyz: .*wav"),
        (["-o", "speech.raw"], "-o speech.raw: .*wav"),
        (["-o", "missing/speech.wav"], "missing does not exist"),
        (["--protect", "sinks=4"], "protect=.*kv_cache='bf16' quantises nothing: leave it out"),
        (["--max-seq-len", "16"], "max_seq_len=16: give 32 to 32768"),
        (["--max-seq-len", "32", "--instruct", "as slowly as you can"], "the prompt has .* tokens.*max_seq_len"),
    ],
)
def test_wrong_usage_is_one_line_with_the_way_out(options, message, capsys):
    assert re.search(message, refused(capsys, speak(*options)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the default device is the GPU")
def test_cuda_graphs_on_a_cpu_are_refused(capsys):
    status = cli.main(["speak", "Hello", "--device", "cpu", "--mode", "reduce-overhead"])
    assert "mode='reduce-overhead' records CUDA graphs and the model is on the cpu" in refused(capsys, status)


def test_empty_text_is_refused(capsys):
    assert "the text is empty" in refused(capsys, cli.main(["speak", " ", "--no-compile", "--device", "cpu"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_refused(capsys):
    assert "--device cuda: torch sees no GPU" in refused(capsys, cli.main(["speak", "Hello", "--device", "cuda"]))


@pytest.mark.parametrize(
    ("kind", "command"), [("voice_design", "speak"), ("base", "speak"), ("custom_voice", "design"), ("voice_design", "clone"), ("base", "design")]
)
def test_each_kind_of_model_has_its_command(kind, command, checkpoints, recording, capsys):
    needed = {"speak": [], "design": ["--instruct", "calm"], "clone": ["--ref-audio", recording, "--x-vector-only"]}[command]
    own = {"custom_voice": "speak", "voice_design": "design", "base": "clone"}[kind]
    assert f"`qtts {own}`" in refused(capsys, run(command, "--model", checkpoints[kind], *needed))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("voice_design", [], "needs --instruct"),
        ("voice_design", ["--speaker", "vivian", "--instruct", "calm"], "--speaker vivian: .*--instruct"),
        ("base", [], "clones a recorded voice"),
    ],
)
def test_explain_asks_for_what_a_model_needs(kind, options, message, checkpoints, capsys):
    assert re.search(message, refused(capsys, cli.main(["explain", "--device", "cpu", "--model", checkpoints[kind], *options])))


@pytest.mark.parametrize("count", ["1", "-3", "many"])
def test_too_few_tokens_are_refused(count, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo", "--max-new-tokens", count])
    assert f"'{count}': give a whole number of 2 or more" in capsys.readouterr().err


def test_env_says_whether_it_fits(capsys):
    status = cli.main(["env"])
    output = capsys.readouterr().out
    assert re.search(r"^torch +2\.", output, re.MULTILINE)
    assert re.search(r"^fits together +" + ("yes" if status == 0 else "no"), output, re.MULTILINE)


def test_demo_compiles_and_agrees_with_eager(capsys):
    torch.compiler.reset()
    assert cli.main(["demo", "--device", "cpu", "--max-new-tokens", "4"]) == 0
    output = capsys.readouterr().out
    assert "noise, not speech" in output
    assert re.search(r"talker\.model .*4 layers.*code_predictor\.model .*3 layers", output)
    assert re.search(r"^rms_norm +\d+", output, re.MULTILINE) and "refused" in output
    assert "3 frames of 16 codes" in output and re.search(r"codes +identical", output)
    talker, predictor = map(float, re.findall(r"([\d.e+-]+) \((?:talker|code predictor)\)", output))
    assert talker < 1e-4 and predictor < 1e-4
    seconds = re.search(r"eager +([\d.]+) s.*\n +compiled +([\d.]+) s.*\n +compiling +([\d.]+) s once", output)
    assert seconds and all(float(value) > 0 for value in seconds.groups())
    assert soundfile.info("demo.wav").frames == 3 * 1920


def test_demo_fails_when_the_codes_differ(capsys, monkeypatch):
    def sabotage(tts, **_):
        tts.model.talker.model.layers[1].mlp.down_proj.weight.data.neg_()
        return "sabotaged"

    monkeypatch.setattr(qtts_compile, "compile", sabotage)
    assert cli.main(["demo", "--device", "cpu", "--max-new-tokens", "4"]) == 1
    assert re.search(r"codes +DIFFER from frame 0, codebook 0 on", capsys.readouterr().out)


def test_explain_reports_for_machines(capsys):
    torch.compiler.reset()
    assert cli.main(["explain", "--json", "--device", "cpu", "--max-new-tokens", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["graphs"] and sum(report["kernels"].values()) > 0
