"""compile() in place: which decoder stacks it finds, and what it refuses."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models import Session, build_talker, case
from rewriting import expected_kernels
from torch import nn

import qtts_compile
from qtts_compile import collect, find_stacks

EAGER = {"executor": "eager"}


@pytest.fixture(scope="module")
def talker():
    return build_talker("0.6b")


def names(obj):
    return [(stack.name, stack.layers) for stack in find_stacks(obj)]


def test_a_talker_holds_two_stacks(talker):
    assert names(talker) == [("model", 3), ("code_predictor.model", 2)]


@pytest.mark.parametrize(("name", "layers"), [("talker-0.6b", 3), ("predictor", 2), ("qwen3", 2), ("llama", 2), ("qwen2", 2)])
def test_a_bare_stack_is_one(name, layers):
    model = case(name).build(torch.float32)
    assert names(model) == [(type(model).__name__, layers)]


@pytest.mark.parametrize("family", ["Qwen3", "Llama", "Qwen2"])
def test_plain_transformers_models_hold_one(family):
    import transformers

    config = case(family.lower()).config()
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    assert names(model) == [("model", 2)]


class Wrapper:
    """As Qwen3TTSModel holds its model, and FasterQwen3TTS that wrapper."""

    def __init__(self, model):
        self.model = model
        self.device = "cpu"
        self.sample_rate = 24000


def test_wrappers_of_one_and_two_levels_are_looked_through(talker):
    root = nn.Module()
    root.talker = talker
    inside = [("talker.model", 3), ("talker.code_predictor.model", 2)]
    assert names(root) == inside
    assert names(Wrapper(root)) == [(f"model.{name}", layers) for name, layers in inside]
    assert names(Wrapper(Wrapper(root))) == [(f"model.model.{name}", layers) for name, layers in inside]


def test_a_stack_that_is_held_twice_is_found_once(talker):
    assert len(names(SimpleNamespace(a=talker, b=talker, c=talker.model))) == 2


class Encoder(nn.Module):
    """Attention layers without a key-value cache."""

    def __init__(self):
        super().__init__()
        layer = nn.Module()
        layer.q_proj, layer.k_proj, layer.v_proj = (nn.Linear(4, 4) for _ in range(3))
        self.layers = nn.ModuleList([layer])

    def forward(self, x):
        return x


@pytest.mark.parametrize("obj", [nn.Linear(2, 2), Encoder(), SimpleNamespace(model="path"), "Qwen3-TTS", None, 3], ids=lambda o: type(o).__name__)
def test_nothing_found_is_an_error_that_says_what_was_looked_for(obj):
    with pytest.raises(TypeError, match=f"no decoder stack found in {type(obj).__name__}.*q_proj.*past_key_values"):
        qtts_compile.compile(obj)


def test_compile_works_in_place_and_says_what_it_compiled():
    talker = build_talker("0.6b")
    before = [type(talker.model).forward, talker.model.forward.__func__]
    stacks = qtts_compile.compile(talker, options=EAGER)
    assert [stack.module for stack in stacks] == [talker.model, talker.code_predictor.model]
    text = str(stacks)
    assert text.startswith("compiled with backend='qtts': model (") and "code_predictor.model (" in text and "3 layers" in text
    assert all(stack.module._compiled_call_impl is not None for stack in stacks)
    assert [type(talker.model).forward, talker.model.forward.__func__] == before, "a forward method was patched"


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_compiled_model_is_rewritten_when_it_runs(mode):
    c = replace(case("qwen3"), layers=2)
    model = c.build(torch.float32)
    eager = Session(model, c)
    session = eager.clone()
    with torch.inference_mode():
        expected = model(**eager.prefill_inputs(5)).last_hidden_state
        torch._dynamo.reset()
        qtts_compile.compile(model, mode=mode, options={**({} if mode else EAGER), "strict": True}, dynamic=False)
        with collect() as report:
            result = model(**session.prefill_inputs(5)).last_hidden_state
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert report.kernels == expected_kernels(c, "prefill", "static", rows=5)


def test_wrong_options_are_refused_before_anything_is_compiled():
    talker = build_talker("0.6b")
    with pytest.raises(ValueError, match="unknown option 'layer'"):
        qtts_compile.compile(talker, options={"layer": (0, 1)})
    with pytest.raises(ValueError, match=r"layers=\(0, 4\) reaches beyond the 3 layers of model.*one by one"):
        qtts_compile.compile(talker, options={"layers": (0, 4)})
    with pytest.raises(ValueError, match="'fast'"):
        qtts_compile.compile(talker, mode="fast")
    assert talker.model._compiled_call_impl is None and talker.code_predictor.model._compiled_call_impl is None


def test_stacks_can_be_compiled_one_by_one_with_their_own_ranges(talker):
    for (stack, expected), layers in zip(zip(find_stacks(talker), (3, 2), strict=True), ((0, 3), (1, 2)), strict=True):
        (one,) = qtts_compile.compile(stack.module, options={"layers": layers})
        assert (one.module, one.layers) == (stack.module, expected)
    for stack in find_stacks(talker):
        stack.module._compiled_call_impl = None
