import pytest
import torch
from device_assert import assert_trips
from hypothesis import given
from hypothesis import strategies as st
from numerics import DTYPES, LAYOUTS, assert_accurate, dtypes, layouts, poisoned_memory, random_tensor, rotations, seeds

from qtts_compile.kernels.embedding_linear import embedding_linear, embedding_linear_reference, embedding_linear_triton
from qtts_compile.kernels.launch_table import Launch

shapes = st.sampled_from([(), (1,), (1, 1), (2,), (3, 1), (1, 5), (2, 3, 2), (16,), (17,), (2, 16)])


def random_tokens(seed, shape, entries, device, strided=False):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(entries, (*shape, 2) if strided else shape, generator=generator).to(device)
    return tokens[..., 0] if strided else tokens


def check(tokens, table, weight, bias, launch=None):
    with poisoned_memory():
        y = embedding_linear_triton(tokens, table, weight, bias, launch)
    many = rotations(weight)
    bias = bias if bias is None else bias.repeat(len(many) // len(bias))
    oracle = table[tokens].double() @ many.double().T + (0.0 if bias is None else bias.double())
    assert_accurate(y, oracle, embedding_linear_reference(tokens, table, many, bias), leading=True)
    assert y.is_contiguous()
    return y


@given(
    shapes, st.sampled_from([1, 40, 64, 100, 513]), st.integers(1, 20), st.integers(1, 30), st.booleans(), dtypes, layouts,
    st.sampled_from(["contiguous", "sliced"]), seeds,
)  # fmt: skip
def test_kernel_is_as_accurate_as_eager(device, shape, width, size, entries, has_bias, dtype, table_layout, weight_layout, seed):
    table = random_tensor(seed, (entries, width), dtype, device, table_layout if table_layout == "sliced" else "contiguous")
    weight = random_tensor(seed + 1, (size, width), dtype, device, weight_layout)
    bias = random_tensor(seed + 2, (size,), dtype, device) if has_bias else None
    check(random_tokens(seed, shape, entries, device, table_layout == "strided"), table, weight, bias)


@given(
    st.integers(1, 16), st.sampled_from([30, 256]), st.sampled_from([1, 2, 8, 16]), st.sampled_from([2, 4, 16]),
    st.sampled_from([16, 64, 256]), st.sampled_from([1, 2, 4]), st.integers(0, 3), dtypes, seeds,
)  # fmt: skip
def test_launch_parameters_do_not_change_results(device, rows, width, block_m, block_n, block_k, num_warps, in_flight, dtype, seed):
    block_m = max(block_m, 1 << (rows - 1).bit_length())
    table, weight = random_tensor(seed, (50, width), dtype, device), random_tensor(seed + 1, (9, width), dtype, device)
    tokens = random_tokens(seed, (rows,), 50, device)
    check(tokens, table, weight, None, Launch(block_m, block_n, block_k, num_warps, in_flight))


@pytest.mark.parametrize("rows", [1, 2, 7, 24])
def test_published_width(device, rows):
    table, weight = random_tensor(0, (300, 2048), torch.bfloat16, device), random_tensor(1, (12, 2048), torch.bfloat16, device)
    check(random_tokens(0, (rows, 1), 300, device), table, weight, random_tensor(2, (12,), torch.bfloat16, device))


@pytest.mark.parametrize("rows", [1, 8])
def test_rows_that_are_not_looked_up_have_no_effect(device, rows):
    table, weight = random_tensor(0, (40, 64), torch.bfloat16, device), random_tensor(1, (8, 64), torch.bfloat16, device)
    tokens = random_tokens(0, (rows,), 40, device)
    clean, read = check(tokens, table, weight, None), table[tokens].clone()
    table.fill_(float("nan"))
    table[tokens] = read
    assert torch.equal(check(tokens, table, weight, None), clean)


def test_no_tokens(device):
    tokens = torch.empty(2, 0, dtype=torch.int64, device=device)
    assert embedding_linear_triton(tokens, torch.ones(4, 8, device=device), torch.ones(3, 8, device=device), None).shape == (2, 0, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(device, dtype, layout):
    table = random_tensor(0, (20, 40), dtype, device, "sliced" if layout == "sliced" else "contiguous")
    weight, bias = random_tensor(1, (8, 40), dtype, device), random_tensor(2, (8,), dtype, device)
    tokens = random_tokens(0, (2, 3), 20, device, layout == "strided")
    tokens = tokens.T if layout == "transposed" else tokens
    torch.library.opcheck(torch.ops.qtts.embedding_linear.default, (tokens, table, weight, bias))
    torch.library.opcheck(torch.ops.qtts.embedding_linear.default, (tokens, table, weight, None))


def test_a_token_outside_the_table_is_refused():
    with pytest.raises(IndexError, match="out of range"):
        embedding_linear(torch.tensor([4]), torch.ones(4, 8), torch.ones(3, 8), None)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "width"), [([4], 512), ([0, -1], 512), ([0] * 31 + [4], 512), ([0, 4], 40)])
def test_a_token_outside_the_table_trips_the_device_side_assert(tokens, width):
    setup = f"""
from qtts_compile.kernels.embedding_linear import embedding_linear
table, weight = (torch.ones(rows, {width}, dtype=torch.bfloat16, device="cuda") for rows in (4, 16))
tokens = torch.full(({len(tokens)},), 3, device="cuda")
"""
    spoil = f"tokens.copy_(torch.tensor({tokens}))"
    assert_trips(setup, "embedding_linear(tokens, table, weight, None)", spoil, "a token lies outside the table")


T = torch.tensor([1, 2])
TABLE, W = torch.ones(5, 8), torch.ones(4, 8)


@pytest.mark.parametrize(
    ("tokens", "table", "weight", "bias", "error", "message"),
    [
        (T.int(), TABLE, W, None, TypeError, r"tokens must be int64, got torch.int32; convert them with .long\(\)"),
        (T, TABLE.double(), W, None, TypeError, "table must be .*float64"),
        (T, TABLE.half(), W, None, TypeError, "weight must have the dtype of x"),
        (T.to("meta"), TABLE, W, None, ValueError, "tokens must be on the device of table"),
        (torch.zeros(33, dtype=torch.int64), TABLE, W, None, ValueError, "at most 32 tokens, got 33"),
        (T, TABLE[0], W, None, ValueError, r"table must have the shape \[V, K\], got \(8,\)"),
        (T, TABLE[:0], W, None, ValueError, r"V, K > 0 and contiguous rows, got \(0, 8\)"),
        (T, torch.ones(8, 5).T, W, None, ValueError, r"contiguous rows, got \(5, 8\) with strides \(1, 5\)"),
        (T, TABLE, W[:, :4], None, ValueError, r"weight must have the shape \(4, 8\), got \(4, 4\)"),
        (T, TABLE, W, torch.ones(5), ValueError, r"bias must have the shape \(4,\), got \(5,\)"),
    ],
)  # fmt: skip
def test_bad_input(tokens, table, weight, bias, error, message):
    with pytest.raises(error, match=message):
        embedding_linear(tokens, table, weight, bias)
