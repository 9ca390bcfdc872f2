"""Prompts read from calls of the installed qwen_tts: equal to what its talker would generate from, and nothing dropped without a word."""

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from models.voices import GREEDY, TEXTS, TONE, load

from qtts_compile.engine import PromptInputs
from qtts_compile.prompts import check_texts, read_call
from qtts_compile.sampling import Sampling

SPEAKER = {"speaker": "vivian"}
IN_CONTEXT = {"ref_audio": TONE, "ref_text": "Evening."}
CALLS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "custom voice": ("custom_voice", "generate_custom_voice", {**SPEAKER, "language": "German", "instruct": "slowly"}),
    "voice design": ("voice_design", "generate_voice_design", {"instruct": "a calm, low voice"}),
    "x-vector": ("base", "generate_voice_clone", {"ref_audio": TONE, "x_vector_only_mode": True}),
    "in context": ("base", "generate_voice_clone", IN_CONTEXT),
}


@pytest.fixture(scope="module")
def models():
    return {kind: load(kind) for kind in ("custom_voice", "voice_design", "base")}


def what_the_talker_hears(tts: Any, method: str, **arguments: Any) -> dict[str, Any]:
    """Return the arguments of the talker's ``generate`` in a real call, which speaks two frames."""
    talker, heard = tts.model.talker, {}
    generate = talker.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(talker, "generate", lambda **kwargs: heard.update(kwargs) or generate(**kwargs))
        getattr(tts, method)(**arguments, max_new_tokens=3)
    return heard


@pytest.mark.parametrize("non_streaming_mode", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_the_prompt_is_what_the_talker_would_hear(models, call, non_streaming_mode):
    kind, method, arguments = CALLS[call]
    arguments = {**arguments, "text": TEXTS, "non_streaming_mode": non_streaming_mode}
    heard = what_the_talker_hears(models[kind], method, **arguments)
    inputs = read_call(models[kind], method, arguments).inputs
    assert torch.equal(inputs.embeds, heard["inputs_embeds"]) and torch.equal(inputs.mask, heard["attention_mask"])
    assert torch.equal(inputs.text, heard["trailing_text_hidden"]) and torch.equal(inputs.pad, heard["tts_pad_embed"])
    assert len(inputs.embeds) == len(TEXTS) and inputs.mask.all() == (not non_streaming_mode)  # else text is heard with the frames


def test_a_prepared_recording_is_the_recording(models):
    tts, (_, method, arguments) = models["base"], CALLS["in context"]
    prepared = tts.create_voice_clone_prompt(**arguments)
    given = read_call(tts, method, {"text": TEXTS[0], **arguments})
    reused = read_call(tts, method, {"text": TEXTS[0], "voice_clone_prompt": prepared})
    assert torch.equal(given.inputs.embeds, reused.inputs.embeds)
    assert given.references[0] is not None and torch.equal(given.references[0], prepared[0].ref_code)


@pytest.mark.parametrize(("call", "frames"), [("custom voice", None), ("voice design", None), ("x-vector", None), ("in context", 13)])
def test_only_in_context_clones_go_on_from_a_recording(models, call, frames):
    kind, method, arguments = CALLS[call]
    references = read_call(models[kind], method, {**arguments, "text": TEXTS}).references
    assert [None if codes is None else (codes.shape, codes.dtype) for codes in references] == [frames and ((frames, 16), torch.int64)] * 3


def test_recordings_differ_by_row(models):
    _, method, _ = CALLS["in context"]
    longer = (np.tile(TONE[0], 2), TONE[1])
    arguments = {"text": TEXTS, "ref_audio": [TONE, TONE, longer], "ref_text": ["one", None, "two"], "x_vector_only_mode": [False, True, False]}
    references = read_call(models["base"], method, arguments).references
    assert [None if codes is None else len(codes) for codes in references] == [13, None, 25]


def settings(models, **sampling):
    return read_call(models["custom_voice"], "generate_custom_voice", {"text": "Hello", **SPEAKER, **sampling}).settings


def test_settings_are_the_model_s_own_unless_given(models):
    read = settings(models, temperature=0.5, subtalker_top_k=7)
    assert read.talker == Sampling(True, 0.5, 50, 1.0, 1.05) and read.subtalker == Sampling(True, 0.9, 7, 1.0, 1.0)
    config = models["custom_voice"].model.config.talker_config
    assert (read.max_new_tokens, read.min_new_tokens, read.eos_token_id) == (256, 2, config.codec_eos_token_id)
    assert set(read.suppress_tokens) == set(range(2048, 3072)) - {config.codec_eos_token_id}


@pytest.mark.parametrize(("given", "greedy"), [({}, True), ({"subtalker_dosample": None}, True), ({"subtalker_dosample": True}, False)])
def test_greedy_is_greedy_for_all_codebooks_unless_told(models, given, greedy):
    read = settings(models, do_sample=False, **given)
    assert not read.talker.do_sample and read.subtalker.do_sample is not greedy


def test_nothing_of_the_user_s_is_changed(models):
    tts = models["custom_voice"]
    holders = [tts, tts.model, tts.model.talker]
    before = [copy.copy(vars(holder)) for holder in holders], dict(tts.model._modules), copy.deepcopy(tts.model.config.to_dict())
    settings(models)
    assert ([vars(holder) for holder in holders], tts.model._modules, tts.model.config.to_dict()) == before
    assert tts.generate_custom_voice("Hello", **SPEAKER, **GREEDY, max_new_tokens=3)[0][0].shape == (2 * 1920,)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("unknown", [{"temprature": 0.5}, {"min_new_tokens": 5, "num_beams": 4}, {"foo": None}], ids=str)
def test_what_qwen_tts_would_drop_is_refused_by_name(models, call, unknown):
    kind, method, arguments = CALLS[call]
    with pytest.raises(TypeError, match=", ".join(sorted(unknown))):
        read_call(models[kind], method, {**arguments, "text": "Hello", **unknown})


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("generate_custom_voice", {"speaker": "bob"}, "Unsupported speakers: .*bob"),
        ("generate_custom_voice", {**SPEAKER, "language": "Klingon"}, "Unsupported languages: .*Klingon"),
        ("generate_custom_voice", {"speaker": ["vivian", "ryan"]}, "Batch size mismatch"),
        ("generate_voice_design", {"instruct": "calm"}, "does not support generate_voice_design"),
        ("generate_custom_voice", {**SPEAKER, "temperature": 0.0}, "temperature=0.0: .*do_sample=False"),
        ("generate_custom_voice", {**SPEAKER, "max_new_tokens": 1}, "max_new_tokens=1: .*2 or more"),
    ],
)
def test_refusals_come_through(models, method, arguments, message):
    with pytest.raises(ValueError, match=message):
        read_call(models["custom_voice"], method, {"text": "Hello", **arguments})


@pytest.mark.parametrize("text", ["", " \n", [], ["Hello", ""]], ids=repr)
def test_an_empty_text_is_refused(text):
    with pytest.raises(ValueError, match="nothing to speak"):
        check_texts(text)


@pytest.mark.parametrize("text", [None, 5, ("Hello", "there"), ["Hello", b"there"]], ids=repr)
def test_a_text_is_a_string(text):
    with pytest.raises(TypeError, match="give a string, or a list of strings"):
        check_texts(text)


@pytest.mark.parametrize(
    ("size", "instruct", "warned"), [("0b6", "slowly", True), ("0b6", ["", "slowly"], True), ("0b6", "", False), ("1b7", "slowly", False)]
)
def test_an_instruction_that_a_model_cannot_take_is_warned_of(size, instruct, warned):
    tts = load("custom_voice", size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call = read_call(tts, "generate_custom_voice", {"text": TEXTS[:2], **SPEAKER, "instruct": instruct})
    assert isinstance(call.inputs, PromptInputs)
    assert [issubclass(warning.category, UserWarning) and "'0b6'" in str(warning.message) for warning in caught] == [True] * warned


def test_a_release_that_generates_otherwise_is_named():
    class Other:
        def __init__(self, model):
            self.model = model

        def generate_custom_voice(self, text):
            return [text]

    with pytest.raises(RuntimeError, match="Other.generate_custom_voice never called talker.generate"):
        read_call(Other(load("custom_voice").model), "generate_custom_voice", {"text": "Hello"})
