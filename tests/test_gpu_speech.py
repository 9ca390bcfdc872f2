"""Speech on a CUDA device: greedy codes through recorded frames, threads, end of speech, and bfloat16 beside eager."""

import threading
from collections import Counter

import pytest
import torch
from models import build_talker, generate_codes
from test_engine import prompt, settings, speak

from qtts_compile import collect
from qtts_compile.engine import Engine, PromptInputs
from qtts_compile.launcher import Launcher
from qtts_compile.turboquant_cache import Protect

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("float32_products")]


def launcher(mode: str | None = "reduce-overhead", **options):
    return Launcher(torch.device("cuda"), mode, options=options)


@pytest.fixture(scope="module", params=["1.7b", "0.6b"])
def recorded(request):
    """A talker, its engine with CUDA graphs, and what was compiled so far."""
    torch.compiler.reset()
    talker = build_talker(request.param, device="cuda")
    engine = Engine(talker, max_seq_len=128, launcher=launcher(strict=True))
    with collect() as report:
        yield talker, engine, report
    assert report.graph_breaks == [] and report.refusals == []
    torch.compiler.reset()


@pytest.mark.parametrize("lengths", [[9], [40], [5, 9, 7]], ids=str)
def test_greedy_codes_are_those_of_generate(recorded, lengths):
    talker, engine, report = recorded
    expected = generate_codes(talker, 64, lengths)
    seen = []
    for _ in range(3):  # the prompt runs, is recorded, and is replayed
        speech = speak(engine, prompt(talker, lengths, 64), settings(max_new_tokens=65, min_new_tokens=65))
        assert torch.equal(speech.codes, expected)
        seen.append((len(report.graphs), engine.launcher.runs, engine.launcher.recordings))
    (graphs, runs, recordings), *later = seen
    assert later == [(graphs, runs, recordings + 1)] * 2  # nothing is compiled again, or launched without a CUDA graph


@pytest.mark.parametrize(
    ("lengths", "kv_cache"),
    [([9], "bf16"), ([5, 9, 7], "bf16"), ([9], "int4"), ([5, 9, 7], "int4"), ([5, 9, 7], "int3"), ([9], "k4v3"), ([5, 9, 7], "fp8")],
    ids=str,
)
def test_frames_of_both_reaches_give_the_same_codes(monkeypatch, lengths, kv_cache):
    monkeypatch.setattr("qtts_compile.engine.NEAR", 32)
    torch.compiler.reset()
    talker = build_talker("1.7b", device="cuda")
    protect = Protect(first_layers=1, last_layers=0, sinks=2, window=8) if kv_cache != "bf16" else None
    engine, eager = (Engine(talker, max_seq_len=128, launcher=each, kv_cache=kv_cache, protect=protect) for each in (launcher(strict=True), None))
    expected = speak(eager, prompt(talker, lengths, 64), settings(max_new_tokens=65, min_new_tokens=65)).codes.clone()
    for _ in range(3):
        speech = speak(engine, prompt(talker, lengths, 64), settings(max_new_tokens=65, min_new_tokens=65))
        assert torch.equal(speech.codes, expected)
    assert engine.launcher.recordings == 3  # the prompt, and a frame of each reach


def test_another_thread_replays_the_same_graphs(recorded):
    talker, engine, report = recorded
    inputs, wanted = prompt(talker, [9]), settings(do_sample=True, subtalker_dosample=True)
    here = speak(engine, inputs, wanted, [7]).codes.clone()
    compiled, there = len(report.graphs), []
    thread = threading.Thread(target=lambda: there.append(speak(engine, inputs, wanted, [7]).codes.clone()))
    thread.start()
    thread.join()
    assert torch.equal(there[0], here) and len(report.graphs) == compiled
    assert torch.equal(speak(engine, inputs, wanted, [7]).codes, here)


def test_sampled_codes_are_eager_s(recorded):
    """The same draws from the same logits, up to what float32 products leave open."""
    talker, engine, _ = recorded
    inputs, wanted = prompt(talker, [9]), settings(do_sample=True, subtalker_dosample=True)
    eager = speak(Engine(talker, max_seq_len=128), inputs, wanted, [3]).codes.clone()
    assert torch.equal(speak(engine, inputs, wanted, [3]).codes, eager)
    assert len(set(Counter(eager.flatten().tolist()))) > 20


def test_bfloat16_prompts_are_as_exact_as_eager_s():
    """The state that a prompt leaves, against float32 on the same weights: the error is at most 1.1 x that of the model run eagerly."""
    torch.compiler.reset()
    talker = build_talker("0.6b", device="cuda", dtype=torch.bfloat16)
    exact_talker = build_talker("0.6b", device="cuda").float()
    exact_talker.load_state_dict(talker.state_dict())
    inputs = prompt(talker, [12, 57, 30])
    states = {}
    for name, model, mode in (("exact", exact_talker, None), ("eager", talker, None), ("recorded", talker, "reduce-overhead")):
        engine = Engine(model, max_seq_len=128, launcher=launcher(mode))
        given = PromptInputs(*(x.to(model.dtype) if x.is_floating_point() else x for x in (inputs.embeds, inputs.mask, inputs.text, inputs.pad)))
        speech = engine.start(given, settings(), [0, 0, 0])
        states[name] = speech._state.hidden[:3].double().clone()
    errors = {name: (states[name] - states["exact"]).square().mean().sqrt() for name in ("eager", "recorded")}
    assert 0 < errors["recorded"] <= 1.1 * errors["eager"]
