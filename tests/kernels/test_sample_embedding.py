import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import DTYPES, LAYOUTS, dtypes, layouts, poisoned_memory, random_tensor, seeds

from qtts_compile.kernels.sample import sample_triton
from qtts_compile.kernels.sample_embedding import sample_embedding, sample_embedding_reference, sample_embedding_triton

Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def make_arguments(
    seed, rows, vocabulary, device, dtype=torch.bfloat16, layout="contiguous", has_masks=False, controls=(1, 0.9, 50, 1, 1)
) -> Arguments:
    logits = 2 * random_tensor(seed, (rows, vocabulary), dtype, device, layout)
    seen, blocked = (random_tensor(seed + i, (rows, vocabulary), torch.float32, device) > 1 for i in (1, 2))
    blocked[:, -1] = False
    row_seeds = torch.arange(seed, seed + rows, device=device)
    rest = torch.tensor(controls, dtype=torch.float32, device=device), row_seeds, torch.tensor([seed], device=device)
    return (logits, *rest, seen, blocked) if has_masks else (logits, *rest, None, None)


@given(
    st.integers(1, 4), st.sampled_from([1, 5, 100, 513]), st.integers(0, 3), st.sampled_from([1, 2, 33, 257, 1024]), dtypes, dtypes, layouts,
    st.sampled_from(["contiguous", "sliced"]), st.booleans(), st.sampled_from([0, 1]), seeds,
)  # fmt: skip
def test_tokens_are_those_of_sample_and_rows_those_of_the_table(
    device, rows, vocabulary, more, width, dtype, table_dtype, layout, table_layout, has_masks, do_sample, seed
):  # fmt: skip
    arguments = make_arguments(seed % 2**31, rows, vocabulary, device, dtype, layout, has_masks, (do_sample, 0.9, 7, 1, 1.2))
    table = random_tensor(seed, (vocabulary + more, width), table_dtype, device, table_layout)
    with poisoned_memory():
        tokens, embeddings = sample_embedding_triton(*arguments, table)
    assert torch.equal(tokens, sample_triton(*arguments)) and tokens.dtype == torch.int64
    assert torch.equal(embeddings, table[tokens]) and embeddings.is_contiguous() and embeddings.dtype == table_dtype


@pytest.mark.parametrize("rows", [1, 32])
def test_published_shape(device, rows):
    arguments = make_arguments(3, rows, 2048, device)
    table = random_tensor(0, (2048, 1024), torch.bfloat16, device)
    with poisoned_memory():
        tokens, embeddings = sample_embedding_triton(*arguments, table)
    assert torch.equal(tokens, sample_triton(*arguments)) and torch.equal(embeddings, table[tokens])


def test_nothing_else_of_the_table_is_read(device):
    arguments, table = make_arguments(0, 3, 90, device), random_tensor(0, (90, 40), torch.float32, device)
    tokens, embeddings = sample_embedding_triton(*arguments, table)
    kept = table[tokens].clone()
    table.fill_(float("nan"))
    table[tokens] = kept
    assert torch.equal(sample_embedding_triton(*arguments, table)[1], embeddings)


def test_no_rows(device):
    tokens, embeddings = sample_embedding_triton(*make_arguments(0, 0, 10, device), torch.ones(10, 7, device=device))
    assert tokens.shape == (0,) and embeddings.shape == (0, 7)


@pytest.mark.parametrize("num_warps", [1, 4])
def test_num_warps_do_not_change_the_result(device, num_warps):
    arguments, table = make_arguments(5, 2, 1000, device), random_tensor(0, (1000, 100), torch.bfloat16, device)
    for actual, expected in zip(sample_embedding_triton(*arguments, table, num_warps=num_warps), sample_embedding_triton(*arguments, table)):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("has_masks", [False, True])
def test_opcheck(device, dtype, layout, has_masks):
    arguments = make_arguments(0, 3, 40, device, dtype, layout, has_masks)
    table = random_tensor(1, (44, 24), dtype, device, "sliced" if layout == "sliced" else "contiguous")
    torch.library.opcheck(torch.ops.qtts.sample_embedding.default, (*arguments, table))


def test_the_reference_agrees():
    arguments, table = make_arguments(0, 9, 100, "cpu"), random_tensor(0, (100, 8), torch.float32, "cpu")
    for actual, expected in zip(sample_embedding(*arguments, table), sample_embedding_reference(*arguments, table)):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        (torch.ones(10, 4).double(), TypeError, "table must be .*float64"),
        (torch.ones(9, 4), ValueError, r"table must have a row for each of the 10 tokens, got \(9, 4\)"),
        (torch.ones(10), ValueError, r"table must have the shape \[N, D\], got \(10,\)"),
        (torch.ones(10, 0), ValueError, r"0 < D <= 16384 and contiguous rows, got \(10, 0\)"),
        (torch.ones(10, 16385), ValueError, r"got \(10, 16385\)"),
        (torch.ones(4, 10).T, ValueError, r"contiguous rows, got \(10, 4\) with strides \(1, 10\)"),
        (torch.ones(10, 4, device="meta"), ValueError, "table must be on the device of logits, cpu, got meta"),
    ],
)
def test_bad_input(table, error, message):
    with pytest.raises(error, match=message):
        sample_embedding(*make_arguments(0, 2, 10, "cpu"), table)
    logits, controls, seed, offset, seen, blocked = make_arguments(0, 2, 10, "cpu")
    with pytest.raises(TypeError, match="seed must be int64"):
        sample_embedding(logits, controls, seed.int(), offset, seen, blocked, torch.ones(10, 4))
