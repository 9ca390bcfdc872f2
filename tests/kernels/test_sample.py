import functools
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import DTYPES, dtypes, layouts, random_tensor, seeds
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qtts_compile.kernels.philox import uniform_reference
from qtts_compile.kernels.sample import sample_reference, sample_triton

INF = float("inf")


def make_controls(device="cpu", do_sample=1.0, temperature=1.0, top_k=0.0, top_p=1.0, repetition_penalty=1.0) -> torch.Tensor:
    return torch.tensor([do_sample, temperature, top_k, top_p, repetition_penalty], dtype=torch.float32, device=device)


def draw(logits, controls, seed, offset=0, seen=None, blocked=None, launch=sample_triton):
    """Sample with Python numbers for seeds and the offset."""
    device = logits.device
    tokens = launch(
        logits, controls.to(device), torch.as_tensor(seed, device=device), torch.tensor([offset], device=device),
        None if seen is None else seen.to(device), None if blocked is None else blocked.to(device),
    )  # fmt: skip
    assert tokens.dtype == torch.int64 and tokens.device == device
    return tokens


def process(logits, controls, seen_tokens=None, blocked_tokens=()) -> torch.Tensor:
    """Return transformers' scores, on the CPU, for the tokens ``seen_tokens`` ``[B, n]``."""
    do_sample, temperature, top_k, top_p, penalty = controls.tolist()
    processors = LogitsProcessorList()
    if penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    processors.append(SuppressTokensLogitsProcessor(list(blocked_tokens)))
    if do_sample:
        processors.append(TemperatureLogitsWarper(temperature))
    if do_sample and top_k > 0:
        processors.append(TopKLogitsWarper(int(top_k)))
    if do_sample and top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    # Which of equal logits top-p drops is up to transformers' sort, which is not stable; ours drops the lower tokens first.
    with patch("torch.sort", functools.partial(torch.sort, stable=True)):
        return processors(seen_tokens, logits.cpu().float())  # pyright: ignore[reportArgumentType]


def race(scores, seed, offset) -> torch.Tensor:
    """Return what the draw maximises, in float64, for transformers' scores."""
    uniform = uniform_reference(torch.as_tensor(seed), torch.tensor([offset]), scores.shape[1]).double()
    return scores.double().softmax(-1) / -uniform.log()


def assert_drawn_from(tokens, scores, seed, offset=0):
    """Assert that each token wins the race over ``scores``, or loses it by a rounding error."""
    races = race(scores, seed, offset)
    won = races.gather(1, tokens.cpu()[:, None])[:, 0]
    best, expected = races.max(-1)
    assert (won >= best * (1 - 1e-5)).all(), f"drew {tokens.tolist()}, expected {expected.tolist()}"


@pytest.mark.parametrize("launch", [sample_triton, sample_reference])
@given(
    st.sampled_from([1, 5, 64, 100, 513, 2048]), dtypes, layouts, st.sampled_from([0.05, 0.9, 1.0, 3.0]), st.sampled_from([0, 1, 7, 50, 100, 5000]),
    st.sampled_from([1e-4, 0.3217, 0.8123, 0.9987, 1.0]), st.sampled_from([0.7, 1.0, 1.3]), st.booleans(), seeds,
)  # fmt: skip
def test_draws_what_transformers_keeps(device, launch, width, dtype, layout, temperature, top_k, top_p, penalty, has_blocked, seed):
    logits = 2 * random_tensor(seed, (2, width), dtype, "cpu", layout)
    controls = make_controls("cpu", 1, temperature, top_k, top_p, penalty)
    generator = torch.Generator().manual_seed(seed)
    seen_tokens = torch.randint(0, width, (2, 9), generator=generator)
    seen = torch.zeros(2, width, dtype=torch.bool).scatter_(1, seen_tokens, True) if penalty != 1 else None
    blocked = torch.rand(width, generator=generator) < 0.3
    blocked[-1] = False
    blocked = blocked if has_blocked else torch.zeros_like(blocked)
    row_seeds = torch.randint(-(2**63), 2**63 - 1, (2,), generator=generator)
    location = device if launch is sample_triton else "cpu"
    tokens = draw(logits.to(location), controls, row_seeds, seed, seen, blocked.expand(2, width) if has_blocked else None, launch)
    scores = process(logits, controls, seen_tokens, blocked.nonzero().flatten().tolist())
    assert_drawn_from(tokens, scores, row_seeds, seed)


def test_published_shapes(device):
    for width, penalty in ((2048, 1.0), (3072, 1.05)):
        logits = 3 * random_tensor(width, (3, width), torch.bfloat16, device)
        seen_tokens = torch.arange(60).reshape(3, 20) * 7
        seen = torch.zeros(3, width, dtype=torch.bool).scatter_(1, seen_tokens, True) if penalty != 1 else None
        blocked = torch.arange(width) >= 2048
        blocked[2150:2151] = False
        controls = make_controls(device, 1, 0.9, 50, 1.0, penalty)
        tokens = draw(logits, controls, [5, 6, 7], 3, seen, blocked.expand(3, width))
        assert_drawn_from(tokens, process(logits, controls.cpu(), seen_tokens, blocked.nonzero().flatten().tolist()), [5, 6, 7], 3)


@pytest.mark.parametrize("width", [8192, 16384])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_wide_rows(device, width, top_p):
    logits = random_tensor(0, (1, width), torch.float32, device)
    controls = make_controls(device, top_k=200, top_p=top_p)
    assert_drawn_from(draw(logits, controls, [1]), process(logits, controls.cpu()), [1])


def seeds_won_by(logits, tokens, temperature=1.0) -> torch.Tensor:
    """Return for each of ``tokens`` a seed with which it wins the race of all of ``logits`` ``[V]``."""
    candidates = torch.arange(5000)
    winners = race(logits.cpu().float().expand(5000, -1) / temperature, candidates, 0).argmax(-1)
    return torch.stack([candidates[winners == token][0] for token in tokens])


@pytest.mark.parametrize("launch", [sample_triton, sample_reference])
@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (4, 1.0), (5, 1.0), (0, 0.5071), (0, 0.9573), (5, 0.8831)])
@pytest.mark.parametrize("kind", ["distinct", "ties", "all equal", "signed zeros"])
def test_the_kept_set_is_that_of_transformers(device, launch, top_k, top_p, kind):
    logits = {
        "distinct": torch.linspace(-1, 1, 10),
        "ties": torch.tensor([0.5, 1.0, -0.5, 0.5, 1.0] * 2),
        "all equal": torch.full((10,), 3.0),
        "signed zeros": torch.tensor([0.0, -0.0, 1.0, -1.0, 0.0] * 2),
    }[kind][torch.randperm(10, generator=torch.Generator().manual_seed(0))]
    controls = make_controls(device, top_k=top_k, top_p=top_p)
    scores = process(logits[None], controls.cpu())
    won_by = seeds_won_by(logits, range(10))
    location = device if launch is sample_triton else "cpu"
    tokens = draw(logits.to(location).expand(10, -1), controls, won_by, launch=launch).cpu()
    kept = scores[0] > -INF
    assert torch.equal(tokens == torch.arange(10), kept)
    assert kept[tokens].all()
    assert_drawn_from(tokens, scores.expand(10, -1), won_by)


@pytest.mark.parametrize("top_k", [1, 63, 64, 65, 100, 255])
def test_the_last_kept_and_the_first_dropped(device, top_k):
    logits = torch.linspace(-0.1, 0.1, 256)
    last = 256 - top_k
    won_by = seeds_won_by(logits, [last, last - 1])
    tokens = draw(logits.to(device).expand(2, -1), make_controls(device, top_k=top_k), won_by).tolist()
    assert tokens[0] == last and tokens[1] >= last


def test_quotients_may_tie_where_logits_differ(device):
    # In float32 two neighbours divided by 1.5 may round to one number, of which transformers' top-k keeps both.
    neighbours = torch.tensor([1.75 + 2 * 2**-23, 1.75 + 3 * 2**-23])
    logits = torch.cat([neighbours, torch.tensor([0.0])])
    assert logits[0] != logits[1] and logits[0] / 1.5 == logits[1] / 1.5
    controls = make_controls(device, temperature=1.5, top_k=1)
    won_by = seeds_won_by(logits, [0, 1], 1.5)
    assert draw(logits.to(device).expand(2, -1), controls, won_by).tolist() == [0, 1]


def assert_follows(counts, probabilities):
    """Assert by a chi-square test that ``counts`` are draws with ``probabilities``; only tokens expected 5 times or more are their own bin."""
    n = counts.sum()
    expected = probabilities.double() * n
    assert (counts[expected == 0] == 0).all()
    is_common = expected >= 5
    observed = torch.cat([counts[is_common], counts[~is_common].sum()[None]]).double()
    expected = torch.cat([expected[is_common], expected[~is_common].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected).square() / expected).sum()
    p_value = torch.special.gammaincc(torch.tensor((len(observed) - 1) / 2).double(), statistic / 2)
    assert p_value > 1e-3, f"chi-square {statistic:.1f} of {len(observed)} bins, p = {p_value:.1e}"


@pytest.mark.parametrize("launch", [sample_triton, sample_reference])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (12, 1.0), (0, 0.8123), (20, 0.9123)])
def test_distribution_over_seeds(device, launch, top_k, top_p):
    location = device if launch is sample_triton else "cpu"
    n = 40 if launch is sample_triton and device == "cpu" else 100_000
    logits = 1.5 * random_tensor(0, (1, 40), torch.bfloat16, "cpu")
    controls = make_controls(location, 1, 0.9, top_k, top_p)
    tokens = draw(logits.to(location).expand(n, -1), controls, torch.arange(n), launch=launch)
    assert_follows(tokens.cpu().bincount(minlength=40), process(logits, controls.cpu())[0].double().softmax(-1))


@pytest.mark.parametrize("launch", [sample_triton, sample_reference])
def test_distribution_over_offsets(device, launch):
    location = device if launch is sample_triton else "cpu"
    n = 40 if launch is sample_triton and device == "cpu" else 3000
    logits = 1.5 * random_tensor(0, (1, 40), torch.bfloat16, location)
    tokens = torch.cat([draw(logits, make_controls(location, top_k=12), [7], offset, launch=launch) for offset in range(n)])
    assert_follows(tokens.cpu().bincount(minlength=40), process(logits, make_controls(top_k=12))[0].double().softmax(-1))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_rows_do_not_depend_on_their_batch(device, top_p):
    logits = random_tensor(0, (5, 300), torch.bfloat16, device)
    row_seeds = torch.tensor([3, -4, 5, 6, 3], device=device)
    controls = make_controls(device, 1, 1.2, 40, top_p)
    tokens = draw(logits, controls, row_seeds, 11)
    assert torch.equal(tokens, draw(logits, controls, row_seeds, 11))
    for rows in ([2], [4, 0], [1, 3, 2]):
        assert torch.equal(draw(logits[rows], controls, row_seeds[rows], 11), tokens[rows])


def test_seed_and_offset_change_the_draw(device):
    logits = torch.zeros(4, 500, device=device)
    first = draw(logits, make_controls(device), [1, 2, 3, 1])
    assert first[0] == first[3] and first.unique().numel() == 3
    assert (draw(logits, make_controls(device), [1, 2, 3, 1], 1) != first).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy(device, dtype):
    logits = torch.tensor([[1, 5, 5, 2, 5], [-3, -1, -2, -1, -9], [-0.0, 0.0, -1, 0, -0.0]], device=device, dtype=dtype)
    ignored = make_controls(device, 0, 0.0, 1, 0.0)
    assert draw(logits, ignored, [1, 2, 3]).tolist() == [1, 1, 0]
    blocked = torch.tensor([0, 1, 0, 0, 0], dtype=torch.bool).expand(3, 5)
    assert draw(logits, ignored, [1, 2, 3], blocked=blocked).tolist() == [2, 3, 0]
    seen = torch.tensor([[0, 1, 0, 0, 1], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    assert draw(logits, make_controls(device, 0, repetition_penalty=1.5), [1, 2, 3], seen=seen).tolist() == [2, 3, 0]


@given(st.sampled_from([1, 77, 2048]), dtypes, layouts, st.booleans(), seeds)
def test_greedy_is_argmax(device, width, dtype, layout, has_seen, seed):
    logits = random_tensor(seed, (2, width), dtype, device, layout)
    seen_tokens = torch.arange(0, width, 3).expand(2, -1)
    seen = torch.zeros(2, width, dtype=torch.bool).scatter_(1, seen_tokens, True) if has_seen else None
    controls = make_controls("cpu", 0, repetition_penalty=1.7 if has_seen else 1.0)
    assert torch.equal(draw(logits, controls, [1, 2], seen=seen).cpu(), process(logits, controls, seen_tokens).argmax(-1))


@pytest.mark.parametrize("launch", [sample_triton, sample_reference])
@pytest.mark.parametrize(
    "limits",
    [{"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6}, {"top_p": 0.0}, {"top_k": 5, "top_p": 0.0}, {"top_k": 1, "top_p": 0.5}],
)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_limits_that_leave_the_largest(device, launch, limits, scale):
    location = device if launch is sample_triton else "cpu"
    logits = scale * torch.linspace(-1, 1, 99).roll(30).expand(3, -1).to(location)
    assert draw(logits, make_controls(location, **limits), [1, 2, 3], launch=launch).tolist() == [29] * 3


def test_top_p_of_0_keeps_the_last_of_equals(device):
    logits = torch.zeros(2, 9, device=device)
    controls = make_controls(device, top_p=0.0)
    assert (process(logits, controls.cpu()) > -INF).nonzero().tolist() == [[0, 8], [1, 8]]
    assert draw(logits, controls, [1, 2]).tolist() == [8, 8]


@pytest.mark.parametrize("top_k", [99, 100, 1e6])
def test_top_k_of_v_and_more_is_off(device, top_k):
    logits = random_tensor(0, (4, 99), torch.float32, device)
    seed = [1, 2, 3, 4]
    assert torch.equal(draw(logits, make_controls(device, top_k=top_k), seed), draw(logits, make_controls(device), seed))


@pytest.mark.parametrize("launch", [sample_triton, sample_reference])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.5), (5, 0.999)])
def test_all_but_one_blocked(device, launch, top_k, top_p):
    location = device if launch is sample_triton else "cpu"
    logits = torch.zeros(2, 70, device=location)
    logits[0, 3] = -1e4
    blocked = torch.ones(2, 70, dtype=torch.bool)
    blocked[0, 3] = blocked[1, 69] = False
    for do_sample in (0, 1):
        controls = make_controls(location, do_sample, top_k=top_k, top_p=top_p)
        assert draw(logits, controls, [1, 2], blocked=blocked, launch=launch).tolist() == [3, 69]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.9), (3, 0.9)])
def test_extreme_logits(device, dtype, top_k, top_p):
    logits = torch.tensor([[1e4, -1e4, 9999, 0, -1e4], [-1e4, -1e4, -1e4, -6e4, -6e4], [6e4, -6e4, -INF, 6e4, 1e-7]]).to(device, dtype)
    controls = make_controls(device, 1, 0.9, top_k, top_p)
    for offset in range(4):
        assert_drawn_from(draw(logits, controls, [1, 2, 3], offset), process(logits, controls.cpu()), [1, 2, 3], offset)


def test_strided_arguments(device):
    logits = random_tensor(0, (3, 80), torch.bfloat16, device)
    controls, seed = make_controls(device, 1, 0.8, 20, 0.9, 1.3), torch.tensor([4, 5, 6], device=device)
    offset = torch.tensor([9], device=device)
    seen, blocked = (random_tensor(number, (3, 80), torch.float32, device) > 0.5 for number in (1, 2))
    expected = sample_triton(logits, controls, seed, offset, seen, blocked)
    strided = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in (logits, controls, seed, offset, seen, blocked)]
    assert torch.equal(sample_triton(*strided, num_warps=None), expected)
    transposed = [tensor.T.contiguous().T for tensor in (logits, seen, blocked)]
    assert torch.equal(sample_triton(transposed[0], controls, seed, offset, *transposed[1:], num_warps=None), expected)
    expanded = sample_triton(logits[:1].expand(3, -1), controls, seed[:1].expand(3), offset, seen[:1].expand(3, -1), blocked[0].expand(3, -1))
    assert torch.equal(expanded, expected[:1].expand(3))


def test_no_rows(device):
    tokens = draw(torch.empty(0, 10, device=device), make_controls(device), torch.empty(0, dtype=torch.int64))
    assert tokens.shape == (0,)
    assert sample_reference(torch.empty(0, 10), make_controls(), torch.empty(0, dtype=torch.int64), torch.tensor([0]), None, None).shape == (0,)


@pytest.mark.parametrize("num_warps", [1, 4])
def test_num_warps_do_not_change_the_draw(device, num_warps):
    logits = random_tensor(0, (2, 1000), torch.bfloat16, device)
    arguments = (logits, make_controls(device, 1, 0.9, 50, 0.95), torch.tensor([1, 2], device=device), torch.tensor([3], device=device), None, None)
    assert torch.equal(sample_triton(*arguments, num_warps=num_warps), sample_triton(*arguments))
