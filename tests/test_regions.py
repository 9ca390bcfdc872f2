"""A stack taken apart: one compiled layer serves all, the results are those of its forward(), and what cannot be taken apart stays whole."""

import copy
from typing import Any

import pytest
import torch
from models import CASES
from torch import nn

from qtts_compile.cache import StaticKVCache
from qtts_compile.regions import Stack

SLOTS = 32


class Compiler:
    """Stands for torch.compile: counts what it is given, and what is called of it."""

    def __init__(self):
        self.given, self.calls = [], 0

    def __call__(self, function):
        self.given.append(function.__name__)

        def compiled(*args, **kwargs):
            self.calls += 1
            return function(*args, **kwargs)

        return compiled


def inputs(case, tokens=3, batch=2):
    embeds = torch.randn(batch, tokens, case.hidden, generator=torch.Generator().manual_seed(1))
    slots = torch.arange(tokens)
    mask = (slots <= slots[:, None])[None, None] & (slots >= torch.tensor([0, 1])[:, None])[:, None, None] | torch.eye(tokens, dtype=torch.bool)
    return embeds, mask, (slots - torch.tensor([[0], [1]])).clamp(min=0), slots


def run(stack, case, model):
    """Return what a stack makes of a prompt and of the token after it, and the cache that it leaves."""
    embeds, mask, positions, slots = inputs(case)
    cache = StaticKVCache(model.config, 2, SLOTS, torch.float32, torch.device("cpu"))
    prompt = stack.norm(stack(embeds, mask, positions, stack.angles(positions), cache.prompt(slots)))
    step, place = torch.tensor([3]), torch.tensor([[3], [2]])
    mask = (torch.arange(SLOTS) <= step).expand(2, -1) & (torch.arange(SLOTS) >= torch.tensor([[0], [1]]))
    after = stack.norm(stack(embeds[:, :1].contiguous(), mask[:, None, None], place, stack.angles(place), cache.step(step)))
    return [prompt, after, *cache.buffers()]


def traced_stack(case, model):
    """Return a stack that runs what Dynamo traces, and the list of its graphs."""
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    return Stack(model, case.rope_axes, SLOTS, lambda part: torch.compile(part, backend=backend, fullgraph=True, dynamic=False)), graphs


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layers_one_by_one_give_what_the_stack_gives(case):
    model, compiler = case.build(torch.float32, "cpu"), Compiler()
    before = copy.deepcopy(list(model.named_modules()))
    with torch.inference_mode():
        whole, split = Stack(model, case.rope_axes, SLOTS), Stack(model, case.rope_axes, SLOTS, compiler)
        expected, results = run(whole, case, model), run(split, case, model)
    assert all(map(torch.equal, expected, results))
    assert "call_layer" in compiler.given and compiler.calls == 2 * case.layers  # a prompt and a step
    assert whole.norm is not model.norm and split.norm is model.norm
    assert [name for name, _ in model.named_modules()] == [name for name, _ in before] and "forward" not in vars(model.layers[0])


def test_one_graph_serves_all_layers():
    case = CASES[0]
    model = case.build(torch.float32, "cpu")
    stack, graphs = traced_stack(case, model)
    with torch.inference_mode():
        expected = run(Stack(model, case.rope_axes, SLOTS), case, model)
        for actual, wanted in zip(run(stack, case, model), expected):
            torch.testing.assert_close(actual, wanted)
    assert len(graphs) == 2 and case.layers > 1  # a prompt and a step


def test_one_graph_serves_prompts_of_all_lengths():
    case = CASES[0]
    model = case.build(torch.float32, "cpu")
    stack, graphs = traced_stack(case, model)
    whole = Stack(model, case.rope_axes, SLOTS)
    for tokens in (5, 9, 20):
        with torch.inference_mode():
            embeds, mask, positions, slots = inputs(case, tokens)
            results = []
            for each in (stack, whole):
                cache = StaticKVCache(model.config, 2, SLOTS, torch.float32, torch.device("cpu"))
                results.append(each.norm(each(embeds, mask, positions, each.angles(positions), cache.prompt(slots), varying=True)))
            torch.testing.assert_close(*results)
    assert len(graphs) == 1


class Scaled(nn.Module):
    """A norm whose result the stack scales: leaving the norm to the caller would come out differently."""

    def __init__(self, model):
        super().__init__()
        self.config, self.layers, self.norm, self.rotary_emb, self.model = model.config, model.layers, model.norm, model.rotary_emb, model

    def forward(self, past_key_values=None, **kwargs):
        result = self.model(past_key_values=past_key_values, **kwargs)
        result.last_hidden_state = result.last_hidden_state * 2
        return result


class GrowingAngles(nn.Module):
    """Angles that depend on how far the positions go, as those of dynamic RoPE."""

    def __init__(self, rotary):
        super().__init__()
        self.rotary = rotary

    def forward(self, x, position_ids, *args):
        return self.rotary(x, position_ids * (1 + position_ids.max()), *args)


class OddLayers(nn.Module):
    """A stack that wants more of its layers than that they can be called."""

    def __init__(self, model):
        super().__init__()
        self.config, self.layers, self.norm, self.rotary_emb = model.config, model.layers, model.norm, model.rotary_emb
        self.model, self.kinds = model, {id(layer): index for index, layer in enumerate(model.layers)}

    def forward(self, past_key_values=None, **kwargs):
        [self.kinds[id(layer)] for layer in self.layers]
        return self.model(past_key_values=past_key_values, **kwargs)


def no_norm(model):
    del model.norm
    model.norm = lambda hidden: hidden
    return model


def growing_angles(model):
    model.rotary_emb = GrowingAngles(model.rotary_emb)
    return model


@pytest.mark.parametrize(
    ("change", "reason"), [(Scaled, "one by one"), (no_norm, "no norm"), (growing_angles, "one by one")], ids=["scaled", "no norm", "growing angles"]
)
def test_what_cannot_be_taken_apart_is_compiled_whole_and_said(change, reason, caplog):
    case, compiler = CASES[0], Compiler()
    model = change(case.build(torch.float32, "cpu"))
    with torch.inference_mode():
        stack = Stack(model, case.rope_axes, SLOTS, compiler)
        expected, results = run(Stack(model, case.rope_axes, SLOTS), case, model), run(stack, case, model)
    assert all(map(torch.equal, expected, results))
    assert compiler.given == ["call_whole"] and compiler.calls == 2
    assert reason in caplog.text and "compiled as a whole" in caplog.text


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_of_the_user_runs_once(when):
    """Hooks on a layer steer it, whether they were there when the stack was taken apart or came later."""
    case, compiler = CASES[0], Compiler()
    model: Any = case.build(torch.float32, "cpu")

    def steer(module, args, output):
        return (output[0] + 1, *output[1:]) if isinstance(output, tuple) else output + 1

    if when == "before":
        model.layers[1].register_forward_hook(steer)
    with torch.inference_mode():
        split = Stack(model, case.rope_axes, SLOTS, compiler)
        if when == "after":
            model.layers[1].register_forward_hook(steer)
        expected, results = run(Stack(model, case.rope_axes, SLOTS), case, model), run(split, case, model)
    assert all(map(torch.equal, expected, results)) and compiler.given == ["call_layer"]


def test_layers_that_are_told_apart_are_not_taken_apart():
    case, compiler = CASES[0], Compiler()
    model = case.build(torch.float32, "cpu")
    with torch.inference_mode():
        run(Stack(model, case.rope_axes, SLOTS, compiler, split=False), case, model)
    assert compiler.given == ["call_whole"]
