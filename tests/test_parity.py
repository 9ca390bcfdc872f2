"""Recording a model's choices and comparing two runs."""

import dataclasses

import pytest
import torch

from qtts_compile.parity import Choices, compare

GROUPS = 4


@pytest.fixture
def reference():
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(9 if step % GROUPS == 0 else 5, generator=generator) for step in range(3 * GROUPS + 1)]
    return Choices(GROUPS, torch.stack([step.argmax() for step in logits[:-1]]), logits)


def changed(choices: Choices, step: int, by: float) -> Choices:
    """Add ``by`` to the logit that won at ``step``, and choose again there."""
    logits = [step_logits.clone() for step_logits in choices.logits]
    logits[step][choices.logits[step].argmax()] += by
    return dataclasses.replace(choices, codes=torch.stack([step_logits.argmax() for step_logits in logits[:-1]]), logits=logits)


def test_equal_runs(reference):
    parity = compare(reference, reference)
    assert (parity.first_difference, parity.talker, parity.code_predictor, parity.steps) == (None, 0, 0, 13)
    assert parity.scale == max(step.abs().max().item() for step in reference.logits)


@pytest.mark.parametrize(("step", "talker", "code_predictor"), [(8, 0.5, 0), (12, 0.5, 0), (5, 0, 0.5), (11, 0, 0.5)])
def test_a_difference_counts_for_the_model_that_made_it(reference, step, talker, code_predictor):
    parity = compare(reference, changed(reference, step, 0.5))
    assert parity.first_difference is None
    assert (parity.talker, parity.code_predictor) == (pytest.approx(talker), pytest.approx(code_predictor))


def test_nothing_after_the_first_differing_code_is_compared(reference):
    other = changed(changed(reference, 6, -10), 9, 0.5)
    parity = compare(reference, other)
    assert (parity.first_difference, parity.steps) == (6, 7)
    assert (parity.talker, parity.code_predictor) == (0, pytest.approx(10))


def test_a_run_that_stops_early_differs_where_it_stops(reference):
    shorter = Choices(GROUPS, reference.codes[: 2 * GROUPS], reference.logits[: 2 * GROUPS + 1])
    assert compare(reference, shorter).first_difference == compare(shorter, reference).first_difference == 2 * GROUPS
