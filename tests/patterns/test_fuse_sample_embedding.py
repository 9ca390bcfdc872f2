"""Draws and the embeddings of what is drawn: what becomes one launch, and what must not."""

import pytest
import torch
import torch.nn.functional as F
from rewriting import count, kernels, rewritten

from qtts_compile.kernels.sample import sample

V, H = 30, 8


def draw(rows=2, do_sample=1.0):
    """Return logits, controls, seeds and offset of a draw."""
    return torch.randn(rows, V), torch.tensor([do_sample, 0.9, 7, 1, 1]), torch.arange(rows), torch.tensor([3])


def look_up(logits, controls, seed, offset, table):
    token = sample(logits, controls, seed, offset)[:, None]
    return token, F.embedding(token, table)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draw_looks_up_its_tokens(rows, dtype):
    report, graphs = rewritten(look_up, *draw(rows), torch.randn(V + 1, H).to(dtype))
    assert kernels(report) == {"sample_embedding": 1}
    assert count(graphs.rewritten, "aten.embedding", "qtts.sample.default") == 0


def test_masks_are_passed_on_and_other_readers_of_the_token_keep_it():
    def function(logits, controls, seed, offset, seen, table):
        token = sample(logits, controls, seed, offset, seen)
        return token + 1, F.embedding(token, table), seen.scatter(1, token[:, None], True)

    report, _ = rewritten(function, *draw(), torch.rand(2, V) > 0.5, torch.randn(V, H))
    assert kernels(report) == {"sample_embedding": 1}


def test_the_first_of_two_tables_is_read_in_the_same_launch():
    def function(logits, controls, seed, offset, first, second):
        token = sample(logits, controls, seed, offset)
        return F.embedding(token, first), F.embedding(token, second)

    report, graphs = rewritten(function, *draw(), torch.randn(V, H), torch.randn(V, 2 * H))
    assert kernels(report) == {"sample_embedding": 1} and count(graphs.rewritten, "aten.embedding") == 1


def test_the_linear_layer_of_an_embedding_reads_the_table_itself():
    function = lambda logits, controls, seed, offset, table, w: F.linear(F.embedding(sample(logits, controls, seed, offset), table), w)  # noqa: E731
    report, graphs = rewritten(function, *draw(), torch.randn(V, H), torch.randn(5, H))
    assert kernels(report) == {"embedding_linear": 1} and count(graphs.rewritten, "qtts.sample.default") == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda logits, controls, seed, offset, table: F.embedding(sample(logits, controls, seed, offset) + 1, table),  # other tokens
        lambda logits, controls, seed, offset, table: F.embedding(logits.argmax(-1), table),  # another draw
        lambda logits, controls, seed, offset, table: F.embedding(sample(logits, controls, seed, offset), table * 2),  # a table that is computed
        lambda logits, controls, seed, offset, table: F.embedding(sample(logits, controls, seed, offset), table.double()),
    ],
)
def test_what_is_not_the_look_up_of_a_draw_stays(function):
    report, graphs = rewritten(function, *draw(do_sample=0.0), torch.randn(V + 1, H))
    assert kernels(report) == {} and count(graphs.rewritten, "aten.embedding") == 1


@pytest.mark.parametrize("table", [torch.randn(V - 1, H), torch.randn(H, V).T], ids=["too few rows", "rows that are not contiguous"])
def test_tables_that_the_kernel_would_refuse_stay(table):
    logits, *rest = draw(do_sample=0.0)
    logits[:, -1] = -9  # a token that the shorter table has not
    report, graphs = rewritten(look_up, logits, *rest, table)
    assert kernels(report) == {} and count(graphs.rewritten, "aten.embedding") == 1


def test_it_can_be_switched_off():
    report, _ = rewritten(look_up, *draw(), torch.randn(V, H), disable=["sample_embedding"])
    assert kernels(report) == {}
