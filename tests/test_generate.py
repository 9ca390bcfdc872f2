"""Greedy codes of the talker's own generate loop, eager and compiled in place."""

import pytest
import torch
from models import GROUPS, build_talker, generate_codes

import qtts_compile

FRAMES = 32


@pytest.mark.parametrize(
    ("size", "lengths", "executor"),
    [("1.7b", [9], "eager"), ("0.6b", [5, 9, 7], "eager"), ("0.6b", [6], "inductor")],
    ids=["1.7b", "0.6b-padded", "0.6b-inductor"],
)
def test_greedy_codes_equal_eager_s(size, lengths, executor):
    talker = build_talker(size)
    expected = generate_codes(talker, FRAMES, lengths)
    torch._dynamo.reset()
    stacks = qtts_compile.compile(talker, options={"executor": executor, "strict": True})
    assert [stack.name for stack in stacks] == ["model", "code_predictor.model"]
    with qtts_compile.collect() as report:
        codes = generate_codes(talker, FRAMES, lengths)
    assert codes.shape == (len(lengths), FRAMES, GROUPS)
    assert torch.equal(codes, expected)
    layers = sum(stack.layers for stack in stacks)
    assert report.kernels["attention"] >= layers and report.kernels["swiglu"] + report.kernels["norm_swiglu"] >= 2 * layers
    assert report.refusals == [] and report.graph_breaks == []
