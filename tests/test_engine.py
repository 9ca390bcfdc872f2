"""The engine: codes equal to transformers' own generate, ends of speech, limits, batches, and the frame as one rewritten graph."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from models import GROUPS, build_talker, case, generate_codes, generation_inputs
from models.generation import CODES, END_OF_SPEECH
from rewriting import expected_kernels, kernels
from torch._inductor import metrics

from qtts_compile import collect
from qtts_compile.code_embeddings import CodeEmbeddings
from qtts_compile.engine import Engine, PromptInputs, padded_length
from qtts_compile.frame import Frame, SpeechState
from qtts_compile.kernels.sample import sample
from qtts_compile.launcher import Launcher
from qtts_compile.regions import Stack
from qtts_compile.sampling import Settings

CPU = torch.device("cpu")
FINAL_NORM = Counter(rms_norm=1)
SUPPRESSED = [token for token in range(CODES, 2 * CODES) if token != END_OF_SPEECH]


def settings(**changes) -> Settings:
    sampler = dict(do_sample=False, temperature=0.9, top_k=50, top_p=1.0)
    arguments = {**sampler, **{f"subtalker_{name}": value for name, value in sampler.items() if name != "do_sample"}, "subtalker_dosample": False}
    arguments |= dict(repetition_penalty=1.05, max_new_tokens=33, min_new_tokens=33, eos_token_id=END_OF_SPEECH, suppress_tokens=SUPPRESSED)
    return Settings.of(arguments | changes)


def prompt(talker, lengths, frames=32, **kwargs) -> PromptInputs:
    inputs = generation_inputs(talker, frames, lengths, **kwargs)
    return PromptInputs(inputs["inputs_embeds"], inputs["attention_mask"], inputs["trailing_text_hidden"], inputs["tts_pad_embed"])


def speak(engine, inputs, wanted, seeds=None):
    """Return the speech after its end."""
    speech = engine.start(inputs, wanted, seeds or [0] * len(inputs.embeds))
    for _ in speech:
        pass
    return speech


@pytest.fixture(scope="module", params=["1.7b", "0.6b"])
def talker(request):
    return build_talker(request.param)


@pytest.fixture(scope="module")
def engine(talker):
    return Engine(talker, max_seq_len=128)


@pytest.mark.parametrize("lengths", [[9], [16], [2], [17, 3], [5, 9, 7]], ids=str)
def test_greedy_codes_are_those_of_generate(talker, engine, lengths):
    # transformers 5 leaves generated tokens out of the repetition penalty when a prompt of embeddings is padded.
    penalty = 1.0 if len(lengths) > 1 else 1.05
    expected = generate_codes(talker, 64, lengths, repetition_penalty=penalty)
    speech = speak(engine, prompt(talker, lengths, 64), settings(max_new_tokens=65, min_new_tokens=65, repetition_penalty=penalty))
    assert torch.equal(speech.codes, expected)
    assert speech.lengths == [64] * len(lengths) and speech.end_reasons == ["max_new_tokens"] * len(lengths)


@pytest.mark.parametrize(("lengths", "near"), [([9], 24), ([29, 3], 24), ([4] * 5, 0)], ids=str)
def test_frames_reach_no_further_than_they_have_to(talker, engine, monkeypatch, lengths, near):
    reaches, forward = [], Frame.forward
    monkeypatch.setattr(Frame, "forward", lambda self, reach=None: reaches.append(reach) or forward(self, reach))
    monkeypatch.setattr("qtts_compile.engine.NEAR", 24)
    codes = speak(Engine(talker, max_seq_len=64), prompt(talker, lengths), settings()).codes
    assert torch.equal(codes, speak(engine, prompt(talker, lengths), settings()).codes)
    assert reaches[:32] == [24 if position < near else None for position in range(max(lengths), max(lengths) + 32)]


def test_rows_of_a_batch_are_what_they_are_alone(talker, engine):
    lengths, wanted = [4, 21, 9, 13, 9], settings(do_sample=True, subtalker_dosample=True, min_new_tokens=33)
    batch = prompt(talker, lengths)
    seeds = [5, 6, 7, 8, 7]
    together = speak(engine, batch, wanted, seeds).codes.clone()
    for row, length in enumerate(lengths):
        tokens = slice(batch.embeds.shape[1] - length, None)
        alone = PromptInputs(batch.embeds[row : row + 1, tokens], batch.mask[row : row + 1, tokens], batch.text[row : row + 1], batch.pad)
        assert torch.equal(speak(engine, alone, wanted, [seeds[row]]).codes[0], together[row])
    assert len({row.flatten().sum().item() for row in together}) == len(lengths)


def test_the_seed_decides(talker, engine):
    wanted = settings(do_sample=True, subtalker_dosample=True)
    runs = [speak(engine, prompt(talker, [9]), wanted, [seed]).codes.clone() for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0][:, :8], runs[2][:, :8])


@pytest.mark.parametrize("which", ["do_sample", "subtalker_dosample"])
def test_each_sampler_has_its_own_settings(talker, engine, which):
    batch = prompt(talker, [9] * 4)  # one of which may well draw what is likeliest
    greedy = speak(engine, batch, settings()).codes.clone()
    sampled = speak(engine, batch, settings(**{which: True, "temperature": 5.0, "subtalker_temperature": 5.0})).codes
    changed = (sampled != greedy)[:, 0]
    assert changed[:, 0].any().item() == (which == "do_sample") and changed[:, 1:].any()


def eager_to_end(talker, boost):
    """Raise the talker's liking for the end of speech: random weights alone hardly ever end."""
    talker.codec_head.weight[END_OF_SPEECH] *= boost


@pytest.fixture(scope="module")
def ending(request):
    talker = build_talker("0.6b")
    with torch.no_grad():
        eager_to_end(talker, 6)
    return talker


def test_rows_end_where_generate_ends_them(ending):
    lengths, frames = [5, 9, 7, 8], 40
    expected = generate_codes(ending, frames, lengths, min_new_tokens=2, repetition_penalty=1.0)
    stops = [next((i for i, code in enumerate(row[:, 0].tolist()) if code == END_OF_SPEECH), frames) for row in expected]
    assert len(set(stops)) > 1 and min(stops) < frames
    engine = Engine(ending, max_seq_len=128)
    speech = speak(engine, prompt(ending, lengths, frames), settings(max_new_tokens=frames + 1, min_new_tokens=2, repetition_penalty=1.0))
    assert speech.lengths == [min(stop, speech.frames) for stop in stops]
    for row, stop in enumerate(stops):
        assert torch.equal(speech.codes[row, :stop], expected[row, :stop])
        assert speech.end_reasons[row] in ({"end of speech"} if stop < frames else {"end of speech", "max_new_tokens"})  # the token after may end it


def test_speech_ends_without_a_frame_more(ending):
    engine = Engine(ending, max_seq_len=128)
    alone = speak(engine, prompt(ending, [5]), settings(repetition_penalty=1.0, max_new_tokens=100, min_new_tokens=2))
    assert alone.end_reasons == ["end of speech"] and 2 <= alone.frames < 99
    assert END_OF_SPEECH not in alone.codes[0, :, 0]
    assert list(alone) == []


def test_min_new_tokens_holds_the_end_back(ending):
    engine = Engine(ending, max_seq_len=128)
    wanted = dict(repetition_penalty=1.0, max_new_tokens=60)
    free = speak(engine, prompt(ending, [5]), settings(**wanted, min_new_tokens=2)).frames
    held = speak(engine, prompt(ending, [5]), settings(**wanted, min_new_tokens=free + 5)).frames
    assert held >= free + 5


def test_speech_stops_where_the_cache_is_full(talker):
    engine = Engine(talker, max_seq_len=32)
    speech = speak(engine, prompt(talker, [9, 20]), settings(max_new_tokens=1000, min_new_tokens=1000))
    assert speech.frames == 12 and speech.end_reasons == ["max_seq_len"] * 2
    expected = generate_codes(talker, 12, [9, 20], repetition_penalty=1.0)
    shorter = speak(engine, prompt(talker, [9, 20], 12), settings(max_new_tokens=1000, min_new_tokens=1000, repetition_penalty=1.0))
    assert torch.equal(shorter.codes, expected)


def test_a_prompt_that_fills_the_cache_is_refused(talker):
    engine = Engine(talker, max_seq_len=32)
    with pytest.raises(ValueError, match="32 tokens.*fits 31"):
        engine.start(prompt(talker, [32]), settings(), [0])
    assert speak(engine, prompt(talker, [31]), settings()).frames == 1


def test_speech_left_in_the_middle_goes_on(talker, engine):
    whole = speak(engine, prompt(talker, [9]), settings()).codes.clone()
    speech = engine.start(prompt(talker, [9]), settings(), [0])
    for frame in speech:
        if frame == 4:
            break
    assert speech.frames == 5 and speech.end_reasons == ["closed"]
    assert list(speech) == list(range(5, 32))
    assert torch.equal(speech.codes, whole)


def test_a_new_speech_starts_afresh(talker, engine):
    first = speak(engine, prompt(talker, [9]), settings()).codes.clone()
    next(iter(engine.start(prompt(talker, [30], seed=1), settings(), [3])))
    assert torch.equal(speak(engine, prompt(talker, [9]), settings()).codes, first)


def test_no_number_is_drawn_by_twice(monkeypatch):
    talker, numbers = build_talker("0.6b"), []

    def recorded(logits, controls, seed, offset, *masks):
        numbers.append(offset.item())
        return sample(logits, controls, seed, offset, *masks)

    monkeypatch.setattr("qtts_compile.frame.sample", recorded)
    speech = speak(Engine(talker, max_seq_len=64), prompt(talker, [9]), settings(do_sample=True, subtalker_dosample=True))
    assert numbers == list(range(speech.frames * GROUPS + 1))


@pytest.mark.parametrize("size", ["1.7b", "0.6b"])
@pytest.mark.parametrize("is_hooked", [False, True])
def test_weights_that_change_between_speeches_are_read_anew(size, is_hooked):
    talker = build_talker(size)
    if is_hooked:  # no plain projection
        talker.code_predictor.small_to_mtp_projection.register_forward_hook(lambda module, arguments, result: result + 0.5)
    engine = Engine(talker, max_seq_len=64)
    before = speak(engine, prompt(talker, [9]), settings()).codes.clone()
    with torch.no_grad():
        for parameter in talker.code_predictor.parameters():
            parameter.mul_(-1.5)
    after = speak(engine, prompt(talker, [9]), settings()).codes
    assert not torch.equal(after, before)
    assert torch.equal(after, speak(Engine(talker, max_seq_len=64), prompt(talker, [9]), settings()).codes)


def test_embeddings_that_are_no_plain_table_are_called():
    talker = build_talker("0.6b")
    scaled = copy.deepcopy(talker)
    for embedding in talker.code_predictor.get_input_embeddings():
        embedding.register_forward_hook(lambda module, arguments, result: 0.5 * result)
    for embedding in scaled.code_predictor.get_input_embeddings():
        embedding.weight.data.mul_(0.5)
    codes = speak(Engine(talker, max_seq_len=64), prompt(talker, [9]), settings()).codes
    assert torch.equal(codes, speak(Engine(scaled, max_seq_len=64), prompt(talker, [9]), settings()).codes)


def test_wrong_calls_are_refused(talker, engine):
    with pytest.raises(ValueError, match="33 utterances.*at most 32"):
        engine.start(prompt(talker, [2] * 33), settings(), [0] * 33)
    with pytest.raises(ValueError, match="2 seeds for 1"):
        engine.start(prompt(talker, [9]), settings(), [0, 1])
    with pytest.raises(ValueError, match="max_seq_len=8: give 32 to .*, the positions this model knows"):
        Engine(talker, max_seq_len=8)


def test_padded_lengths():
    assert [padded_length(n) for n in (1, 16, 17, 60, 64, 65, 128, 129, 300, 2000)] == [16, 16, 32, 64, 64, 80, 128, 160, 320, 2048]
    for n in range(1, 4000):
        assert n <= padded_length(n) <= max(n + 15, 1.25 * n)


@pytest.mark.parametrize(("lengths", "size"), [([9], "1.7b"), ([9, 5], "0.6b")], ids=str)
def test_the_layers_of_a_frame_are_rewritten_once(lengths, size):
    talker = build_talker(size)
    engine = Engine(talker, max_seq_len=64, launcher=Launcher(CPU, "default", options={"executor": "eager", "strict": True}))
    torch.compiler.reset()
    with collect() as report:
        compiled = speak(engine, prompt(talker, lengths), settings(repetition_penalty=1.0)).codes.clone()
        other = speak(engine, prompt(talker, [length + 9 for length in lengths]), settings()).codes.clone()
    assert torch.equal(compiled, generate_codes(talker, 32, lengths, repetition_penalty=1.0))
    assert torch.equal(other, speak(Engine(talker, max_seq_len=64), prompt(talker, [n + 9 for n in lengths]), settings()).codes)
    # What surrounds the layers, and one layer for all, in prompts of any length, the predictor's pass over two tokens, those over one, and the step.
    _, read, chosen, opened, first, first_code, later, code, _, step, closed = report.graphs
    assert report.graph_breaks == [] and report.refusals == []
    predictor, stack = layer(case("predictor")), layer(case(f"talker-{size}"))
    rows, projects = len(lengths), int(size == "1.7b")  # the talker's width to the predictor's
    assert kernels(read) == expected_kernels(stack, "prefill", "static", rows=None) - Counter(add_rms_norm=1)  # that after the layer
    assert kernels(first) == expected_kernels(predictor, "decode", "static", 2 * rows) - FINAL_NORM
    assert kernels(later) == expected_kernels(predictor, "decode", "static", rows) - FINAL_NORM
    assert kernels(step) == expected_kernels(stack, "decode", "static", rows) - FINAL_NORM
    assert kernels(opened) == Counter(norm_linears=projects)
    # The final norm goes into the predictor's heads, which alone read it; the talker's is part of the next frame as well.
    assert kernels(first_code) == kernels(code) == Counter(norm_linears=1, sample_embedding=1)
    assert kernels(chosen) == kernels(closed) == FINAL_NORM + Counter(norm_linears=1)


def layer(whole):
    """Return the structure of one layer of a stack."""
    return replace(whole, layers=1)


def test_a_range_of_layers_is_rewritten_in_stacks_compiled_whole():
    talker = build_talker("0.6b")
    options = {"executor": "eager", "layers": (0, 1)}
    engine = Engine(talker, max_seq_len=64, launcher=Launcher(CPU, "default", options=options))
    torch.compiler.reset()
    with collect() as report:
        codes = speak(engine, prompt(talker, [9]), settings()).codes
    assert torch.equal(codes, generate_codes(talker, 32, [9]))
    steps = [kernels(graph)["qk_norm_rope_attention"] + kernels(graph)["norm_qkv_attention"] for graph in report.graphs]
    assert [count for count in steps if count] == [1, 1, 1]


def test_a_range_of_layers_beyond_a_stack_is_refused_at_once():
    with pytest.raises(ValueError, match=r"layers=\(0, 3\) reaches beyond the 2 layers of code_predictor.model; end it there, or "):
        Engine(build_talker("0.6b"), launcher=Launcher(CPU, "default", options={"layers": [0, 3]}))


def build_frame() -> Frame:
    talker = build_talker("0.6b")
    torch.compiler.reset()
    stacks = Stack(talker.model, 3, 32), Stack(talker.code_predictor.model, 1, 16)
    return Frame(talker, SpeechState(talker, 1, 32), *stacks, CodeEmbeddings(talker.code_predictor))


def test_a_frame_can_be_compiled_as_one_function():
    frame = build_frame()
    with collect() as report, torch.inference_mode():
        torch.compile(frame, backend="qtts", fullgraph=True, options={"executor": "eager", "strict": True})()
    assert len(report.graphs) == 1 and report.lifted["attention"] == (GROUPS - 1) * case("predictor").layers + case("talker-0.6b").layers


def test_all_look_ups_of_a_frame_are_added_up_by_one_kernel():
    frame = build_frame()
    codes = [torch.tensor([[group]]) for group in range(1, GROUPS)]
    metrics.reset()
    with torch.inference_mode():
        torch.compile(frame.hear, fullgraph=True)(codes, frame.slots)
    # The codes and their write, what is heard, mask and positions: a look-up, or a sum, that had a kernel of its own would be one more.
    assert 0 < metrics.ir_nodes_pre_fusion <= 5


def test_wrong_settings_are_named():
    for change in ({"temperature": 0.0}, {"top_k": -1}, {"subtalker_top_p": 0.0}, {"repetition_penalty": 0}, {"max_new_tokens": 1}, {"do_sample": 1}):
        (name, value), *_ = change.items()
        with pytest.raises(ValueError, match=f"{name.removeprefix('subtalker_')}={value}"):
            settings(**change)
    with pytest.raises(TypeError, match="num_beams"):
        settings(num_beams=4)
    assert settings(suppress_tokens=[]).suppress_tokens == ()
    assert Counter(settings().suppress_tokens) == Counter(SUPPRESSED)
