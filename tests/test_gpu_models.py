"""The rewritten models on a CUDA device: counts, parity, CUDA graphs, the published shape."""

import copy
from dataclasses import replace

import pytest
import torch
from models import Session, build_talker, case, generate_codes, published
from rewriting import cache_of, cosine, expected_kernels, expected_lifted, kernels, side_by_side
from torch._dynamo.utils import counters

import qtts_compile
from qtts_compile import collect

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("float32_products")]

SLOTS = 96
CUDA_GRAPHS = {"mode": "reduce-overhead", "triton.cudagraph_or_error": True}


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    torch.cuda.empty_cache()


def compiled(model, **options):
    """Compile with every shape static, as decoding with a static cache is."""
    return torch.compile(model, backend="qtts", dynamic=False, options={"strict": True, **options})


def assert_follows(result, eager, similarity):
    """float32: within 1e-5 of the largest value; half precision: by the cosine of all values."""
    assert eager.isfinite().all() and result.dtype == eager.dtype
    if eager.dtype == torch.float32:
        assert (eager - result).abs().max() < 1e-5 * eager.abs().max()
    else:
        assert cosine(result.flatten(), eager.flatten()) > similarity


TINY = [
    *((name, "static", torch.float32) for name in ("talker-1.7b", "talker-odd", "talker-concatenated", "predictor", "llama")),
    *((name, "static", torch.bfloat16) for name in ("talker-1.7b", "talker-bias", "predictor")),
    ("talker-0.6b", "static", torch.float16),
    ("talker-1.7b", "dynamic", torch.float32),
    ("talker-0.6b", "dynamic", torch.bfloat16),
]


@pytest.mark.parametrize(("name", "cache", "dtype"), TINY, ids=lambda value: str(value).removeprefix("torch."))
def test_tiny_models_are_rewritten_and_equal_eager(name, cache, dtype):
    """Op by op, so that every difference is our kernels'; a padded batch, so that masks count."""
    c = replace(case(name), layers=2)
    model = c.build(dtype, "cuda")
    run = side_by_side(c, model, options={"strict": True}, cache=cache, max_len=SLOTS, batch=3, padding=[2, 0, 4])
    for phase, report, _ in run.compiled_graphs():
        assert kernels(report) == expected_kernels(c, phase, cache, run.rows(phase))
        assert report.lifted == expected_lifted(c, phase, cache)
        assert report.refusals == []
    valid = run.session.valid
    start = 0
    for step in run.steps:
        end = start + step.eager[0].shape[1]
        here = valid[:, start:end]
        assert_follows(step.compiled[0][here], step.eager[0][here], 0.9999)
        start = end
    for eager, result in zip(run.eager_cache, run.compiled_cache, strict=True):
        here = valid[:, None, :, None].expand(-1, eager.shape[1], -1, eager.shape[3])
        end = run.session.position
        assert_follows(result[:, :, :end][here], eager[:, :, :end][here], 0.9999)


@pytest.mark.parametrize("lengths", [[9], [5, 9, 7]], ids=str)
def test_greedy_codes_equal_eager_s(lengths):
    talker = build_talker("1.7b", device="cuda")
    expected = generate_codes(talker, 32, lengths)
    qtts_compile.compile(talker, options={"executor": "eager", "strict": True})
    with collect() as report:
        codes = generate_codes(talker, 32, lengths)
    assert torch.equal(codes, expected)
    assert report.kernels["attention"] >= 7 and report.refusals == []


def published_states(c, batch=1, slots=SLOTS, prompt=16, steps=24):
    """Return the hidden states of every layer over a prompt and some steps in bfloat16, by name of three computations: two of them, and float32's."""
    model = c.build(torch.bfloat16, "cuda")
    session = Session(model, c, max_len=slots, batch=batch)
    exact_model = copy.deepcopy(model).float()
    exact = Session(exact_model, c, max_len=slots, batch=batch)
    exact.tokens = session.tokens.bfloat16().float()
    torch.compiler.reset()
    runs = {"eager": (model, session), "qtts": (compiled(model), session.clone()), "exact": (exact_model, exact)}
    states = {}
    for name, (function, s) in runs.items():
        outputs = []
        with torch.inference_mode():
            for step in range(1 + steps):
                inputs = s.decode_inputs() if step else s.prefill_inputs(prompt)
                outputs.append([h.float().clone() for h in function(**inputs, output_hidden_states=True).hidden_states])
        states[name] = [torch.cat(layer, 1) for layer in zip(*outputs, strict=True)]
    torch.compiler.reset()
    torch.cuda.empty_cache()
    return states


def assert_as_exact_as_eager(states):
    eager, result = ((states[name][-1] - states["exact"][-1]).square().mean().sqrt() for name in ("eager", "qtts"))
    assert 0 < result <= 1.1 * eager


@pytest.fixture(scope="module")
def full_size():
    return published_states(published("1.7b"))


@pytest.mark.parametrize("layer", [0, 7, 14, 21, 27])
def test_published_shape_follows_eager(full_size, layer):
    """hidden_states[i + 1] leaves layer i, the last after the final norm."""
    eager, result = full_size["eager"][layer + 1], full_size["qtts"][layer + 1]
    assert len(full_size["eager"]) == 29
    assert cosine(eager, result) > 0.999


def test_published_shape_is_as_exact_as_eager(full_size):
    assert_as_exact_as_eager(full_size)


@pytest.mark.parametrize(
    ("size", "batch", "slots"), [("0.6b", 1, SLOTS), ("1.7b", 1, 512), ("1.7b", 3, SLOTS), ("1.7b", 8, 512), ("1.7b", 16, SLOTS), ("1.7b", 32, SLOTS)]
)
def test_other_sizes_slots_and_batches_are_as_exact_as_eager(size, batch, slots):
    assert_as_exact_as_eager(published_states(published(size), batch, slots))


@pytest.mark.parametrize("batch", [1, 2, 8, 16])
def test_the_code_predictor_is_as_exact_as_eager(batch):
    assert_as_exact_as_eager(published_states(published("1.7b", "predictor"), batch, slots=16, prompt=2, steps=14))


@pytest.mark.parametrize(
    ("c", "dtype"),
    [
        (case("talker-1.7b"), torch.float32),
        (published("1.7b"), torch.bfloat16),
        (published("1.7b", "predictor"), torch.bfloat16),
    ],
    ids=["tiny", "1.7b", "predictor"],
)
def test_cuda_graphs_replay_at_moving_positions(c, dtype):
    """64 steps of a recorded graph, without a skip: hidden states and cache are eager's."""
    model = c.build(dtype, "cuda")
    eager = Session(model, c, max_len=SLOTS)
    graphed = eager.clone()
    counters.clear()
    step = compiled(model, **CUDA_GRAPHS)
    with torch.inference_mode(), collect() as report:
        for session in (eager, graphed):
            model(**session.prefill_inputs(8))
        for _ in range(64):
            expected = model(**eager.decode_inputs()).last_hidden_state
            torch.compiler.cudagraph_mark_step_begin()
            assert_follows(step(**graphed.decode_inputs()).last_hidden_state.clone(), expected, 0.999)
    (graph,) = report.graphs
    assert kernels(graph) == expected_kernels(c, "decode", "static", rows=1)
    assert report.cudagraph_skips == counters["inductor"]["cudagraph_skips"] == 0
    for a, b in zip(cache_of(graphed), cache_of(eager), strict=True):
        assert_follows(a[:, :, : eager.position], b[:, :, : eager.position], 0.999)


def test_cuda_graphs_record_and_replay():
    """A graph is recorded, and its replays move on."""
    from torch._inductor.cudagraph_trees import get_manager

    c = case("talker-0.6b")
    model = c.build(torch.bfloat16, "cuda")
    session = Session(model, c, max_len=SLOTS)
    step = compiled(model, **CUDA_GRAPHS)
    with torch.inference_mode():
        model(**session.prefill_inputs(8))
        states = []
        for _ in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            states.append(step(**session.decode_inputs()).last_hidden_state.clone())
    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    assert manager is not None and manager.new_graph_id().id >= 1
    assert len({state.sum().item() for state in states}) == 6


@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs"])
def test_modes_without_cuda_graphs_equal_eager(mode):
    c = case("talker-0.6b")
    result = side_by_side(
        c,
        c.build(torch.float32, "cuda"),
        options={"executor": "inductor", "strict": True, "mode": mode},
        dynamic=False,
        max_len=SLOTS,
        decode=8,
    )
    for step in result.steps:
        assert_follows(step.compiled[0], step.eager[0], 1)
