"""The embedded checkpoint: loaded by the real classes of the installed stack, and spoken with."""

import hashlib
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qtts_compile import demo_model
from qtts_compile.demo_config import KINDS
from qtts_compile.demo_model import build_checkpoint, cached_checkpoint
from qtts_compile.environment import import_qwen_tts
from qtts_compile.parity import record

SAMPLES_PER_FRAME = 1920
GREEDY = {"do_sample": False, "subtalker_dosample": False}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: build_checkpoint(root / kind, kind=kind) for kind in KINDS}


@pytest.fixture(scope="module")
def models(checkpoints):
    qwen_tts = import_qwen_tts()
    return {kind: qwen_tts.Qwen3TTSModel.from_pretrained(str(path), device_map="cpu") for kind, path in checkpoints.items()}


def digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def speak(tts, **sampling):
    kind = tts.model.tts_model_type
    if kind == "custom_voice":
        return tts.generate_custom_voice("Good morning.", speaker="Vivian", language="English", **sampling)
    if kind == "voice_design":
        return tts.generate_voice_design("Good morning.", instruct="a calm, low voice", **sampling)
    tone = np.sin(np.arange(24000) * 0.05).astype(np.float32) / 2
    return tts.generate_voice_clone("Good morning.", ref_audio=(tone, 24000), ref_text="Evening.", **sampling)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_the_files_is_loaded(kind, checkpoints, models):
    model = models[kind].model
    for folder, module in {checkpoints[kind]: model, checkpoints[kind] / "speech_tokenizer": model.speech_tokenizer.model}.items():
        stored, loaded = load_file(folder / "model.safetensors"), module.state_dict()
        assert stored.keys() == loaded.keys()
        assert [name for name in stored if not torch.equal(stored[name], loaded[name])] == []


@pytest.mark.parametrize("kind", KINDS)
def test_speech_has_1920_samples_a_frame_at_24_khz(kind, models):
    spoken = []
    choices = record(models[kind], lambda: spoken.append(speak(models[kind], max_new_tokens=5, **GREEDY)))
    (waveform,), sample_rate = spoken[0]
    assert choices.frames == 4
    assert (waveform.dtype, waveform.shape, sample_rate) == (np.float32, (4 * SAMPLES_PER_FRAME,), 24000)
    assert 0.01 < waveform.std() < 0.5 and np.abs(waveform).max() <= 1  # neither silence nor clipped


def test_greedy_choices_vary_and_are_not_close(models):
    tts = models["custom_voice"]
    choices = record(tts, lambda: speak(tts, max_new_tokens=17, **GREEDY))
    frames = choices.codes.view(choices.frames, 16)
    assert len(frames[:, 0].unique()) > 12
    assert all(len(frames[:, codebook].unique()) > 6 for codebook in range(16))
    margins = [float(values[0] - values[1]) for values in (logits.topk(2).values for logits in choices.logits)]
    assert min(margins) > 1e-4


def test_the_structure_is_the_published_one(models):
    talker = models["custom_voice"].model.talker
    assert isinstance(talker.code_predictor.small_to_mtp_projection, torch.nn.Linear)
    assert len(talker.code_predictor.lm_head) == len(talker.code_predictor.model.codec_embedding) == 15
    assert talker.codec_head.out_features == 3072
    section = talker.config.rope_scaling["mrope_section"]
    assert talker.config.rope_scaling["interleaved"] and sum(section) * 2 == talker.config.head_dim


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_bytes(kind, checkpoints, tmp_path):
    assert digests(build_checkpoint(tmp_path / "again", kind=kind)) == digests(checkpoints[kind])


def test_another_seed_other_weights_same_files(checkpoints, tmp_path):
    first, other = digests(checkpoints["custom_voice"]), digests(build_checkpoint(tmp_path / "other", seed=1))
    weights = {name for name in first if name.endswith(".safetensors")}
    assert {name for name in first.keys() | other.keys() if first.get(name) != other.get(name)} == weights
    assert len(weights) == 2


def test_the_prompt_has_the_token_counts_that_qwen_tts_cuts_by(checkpoints, models):
    config = json.loads((checkpoints["custom_voice"] / "config.json").read_text())
    tokenizer = models["custom_voice"].processor.tokenizer
    (ids,) = models["custom_voice"]._tokenize_texts([models["custom_voice"]._build_assistant_text("hi")])
    newline = tokenizer.encode("\n")
    head = [config["im_start_token_id"], config["assistant_token_id"], *newline]
    assert ids[0].tolist() == [*head, *tokenizer.encode("hi"), config["im_end_token_id"], *newline, *head]
    names = tokenizer.convert_ids_to_tokens([config[f"tts_{name}_token_id"] for name in ("pad", "bos", "eos")])
    assert names == ["<tts_pad>", "<tts_text_bos>", "<tts_text_eod>"]


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_survives_the_tokenizer(text, models):
    tokenizer = models["custom_voice"].processor.tokenizer
    ids = tokenizer.encode(text)
    assert all(0 <= index < len(tokenizer) for index in ids)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == unicodedata.normalize("NFC", text)


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'singing'.*custom_voice, voice_design, base"):
        build_checkpoint(tmp_path / "model", kind="singing")  # pyright: ignore[reportArgumentType]


def test_a_used_directory_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="not empty"):
        build_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(demo_model, "_write_weights", fail)
    with pytest.raises(OSError, match="disk full"):
        build_checkpoint(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_comes_second_keeps_the_first(tmp_path, monkeypatch):
    write_files = demo_model._write_files

    def overtaken(directory, kind, seed):
        (tmp_path / "model").mkdir()
        write_files(tmp_path / "model", kind, seed + 1)
        write_files(directory, kind, seed)

    monkeypatch.setattr(demo_model, "_write_files", overtaken)
    path = build_checkpoint(tmp_path / "model")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    monkeypatch.undo()
    assert digests(path) == digests(build_checkpoint(tmp_path / "reference", seed=1))


def test_the_cache_is_built_once(tmp_path, monkeypatch):
    monkeypatch.setenv("QTTS_COMPILE_CACHE", str(tmp_path))
    first = cached_checkpoint()
    assert first.parent == tmp_path

    def rebuild(*_, **__):
        raise AssertionError("built twice")

    monkeypatch.setattr(demo_model, "build_checkpoint", rebuild)
    assert cached_checkpoint() == first
