"""The command line, on the embedded model."""

import json
import os
import re
from pathlib import Path

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


def speak(*options: str) -> int:
    return cli.main(["speak", "Good morning.", "--no-compile", "--device", "cpu", "--max-new-tokens", "4", *options])


def refused(capsys, status: int) -> str:
    """Return the one line in which the command says why it did nothing."""
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2 and error.startswith("qtts: error: ") and not os.listdir()
    return error


def test_speak_writes_80_ms_a_frame(capsys):
    assert speak() == 0
    samples, sample_rate = soundfile.read("speech.wav")
    assert (len(samples), sample_rate) == (3 * 1920, 24000)
    output = capsys.readouterr().out
    assert "noise, not speech" in output and "Wrote speech.wav: 0.24 s at 24000 Hz" in output


def test_the_seed_decides_what_is_sampled():
    for name, seed in {"a.wav": "1", "b.wav": "1", "c.wav": "2"}.items():
        assert speak("--seed", seed, "-o", name) == 0
    a, b, c = (Path(name).read_bytes() for name in ("a.wav", "b.wav", "c.wav"))
    assert a == b != c


def test_a_model_given_by_its_directory_is_not_called_noise(checkpoints, capsys):
    assert speak("--model", checkpoints["custom_voice"], "--speaker", "Ryan", "--language", "German", "--instruct", "slowly") == 0
    assert "noise" not in capsys.readouterr().out


def test_a_described_voice_speaks(checkpoints):
    assert speak("--model", checkpoints["voice_design"], "--instruct", "an old man", "-o", "voice.flac") == 0
    assert soundfile.info("voice.flac").frames == 3 * 1920


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--speaker", "bob"], f"--speaker bob: .*{', '.join(sorted(SPEAKERS))}"),
        (["--language", "klingon"], "--language klingon: .*auto, chinese, english"),
        (["--model", "./nowhere"], r"--model \./nowhere: no such directory"),
        (["--model", "."], r"--model \.: cannot be loaded: "),
        (["--mode", "default"], "--mode.*--no-compile"),
        (["-o", "speech.xyz"], "-o speech.xyz: .*wav"),
        (["-o", "missing/speech.wav"], "missing does not exist"),
    ],
)
def test_wrong_usage_is_one_line_with_the_way_out(options, message, capsys):
    assert re.search(message, refused(capsys, speak(*options)))


def test_empty_text_is_refused(capsys):
    assert "the text is empty" in refused(capsys, cli.main(["speak", " ", "--no-compile", "--device", "cpu"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_refused(capsys):
    assert "--device cuda: torch sees no GPU" in refused(capsys, cli.main(["speak", "Hello", "--device", "cuda"]))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("voice_design", [], "needs --instruct"),
        ("voice_design", ["--speaker", "vivian", "--instruct", "calm"], "--speaker vivian: .*--instruct"),
        ("base", [], "generate_voice_clone"),
    ],
)
def test_each_kind_of_model_asks_for_what_it_needs(kind, options, message, checkpoints, capsys):
    assert re.search(message, refused(capsys, speak("--model", checkpoints[kind], *options)))


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
