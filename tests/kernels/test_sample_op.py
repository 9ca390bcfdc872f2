"""The op ``sample``: how it is compiled and recorded, and what it refuses."""

import pytest
import torch
from device_assert import assert_trips
from numerics import DTYPES, LAYOUTS, random_tensor
from test_sample import INF, assert_drawn_from, make_controls, process

from qtts_compile.kernels.library import register_lowerings
from qtts_compile.kernels.sample import sample


@pytest.mark.parametrize("backend", ["qtts", "inductor"])
def test_compiles_in_one_graph(device, backend):
    blocked = (torch.arange(60) > 50).to(device)

    def step(hidden, controls, seed, offset, seen):
        logits = (hidden * 2).bfloat16()
        token = sample(logits, controls, seed, offset, seen, blocked.expand(logits.shape))
        return token + 1, sample(logits, controls, seed, offset + 1)

    register_lowerings()
    torch._dynamo.reset()
    hidden, seed, seen = (
        torch.randn(3, 60, device=device),
        torch.tensor([1, 2, 3], device=device),
        torch.zeros(3, 60, dtype=torch.bool, device=device),
    )
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    with torch.inference_mode():
        for offset, controls in enumerate([make_controls(device, top_k=5), make_controls(device, 0)]):
            arguments = (hidden, controls, seed, torch.tensor([offset], device=device), seen)
            for actual, expected in zip(compiled(*arguments), step(*arguments), strict=True):
                assert torch.equal(actual, expected)


def test_inductor_calls_the_op_without_an_implicit_fallback():
    from torch._inductor.lowering import lowerings

    register_lowerings()
    assert torch.ops.qtts.sample.default in lowerings


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("has_masks", [False, True])
def test_opcheck(device, dtype, layout, has_masks):
    logits = random_tensor(0, (3, 40), dtype, device, layout)
    mask = random_tensor(1, (3, 40), torch.float32, device) > 1 if has_masks else None
    blocked = mask[0].expand(3, 40) if mask is not None else None
    seed, offset = torch.tensor([1, 2, 3], device=device), torch.tensor([4], device=device)
    torch.library.opcheck(torch.ops.qtts.sample.default, (logits, make_controls(device, 1, 0.9, 10, 0.9, 1.1), seed, offset, mask, blocked))


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_other_settings():
    logits, seed, offset = torch.randn(4, 2048, device="cuda").bfloat16(), torch.arange(4, device="cuda"), torch.tensor([0], device="cuda")
    controls = make_controls("cuda")
    sample(logits, controls, seed, offset)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample(logits, controls, seed, offset)
    for number, settings in enumerate([{"top_k": 50}, {"do_sample": 0}, {"top_p": 0.8}, {"temperature": 0.3, "top_k": 100, "top_p": 0.9}]):
        controls.copy_(make_controls("cuda", **settings))
        offset.fill_(number)
        logits.normal_()
        expected = sample(logits, controls, seed, offset)
        captured.fill_(-1)
        graph.replay()
        assert torch.equal(captured, expected)
        assert_drawn_from(captured, process(logits, controls.cpu()), seed.cpu(), number) if settings.get("do_sample", 1) else None


@pytest.mark.gpu
@pytest.mark.parametrize("logits", ["float('nan')", "float('-inf')"])
@pytest.mark.parametrize("do_sample", [0, 1])
def test_a_row_without_a_finite_largest_logit_trips_the_device_side_assert(logits, do_sample):
    setup = f"""
from qtts_compile.kernels.sample import sample
logits, ones = torch.linspace(-1, 1, 99, device="cuda")[None], torch.ones(2, 1, dtype=torch.int64, device="cuda")
controls = torch.tensor([{do_sample}, 1.0, 50, 0.9, 1], device="cuda")
"""
    assert_trips(setup, "sample(logits, controls, *ones)", f"logits.fill_({logits})", "largest logit is not finite")


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", ["float('nan')", "0.0", "-1.0"])
def test_a_temperature_that_is_not_positive_trips_the_device_side_assert(temperature):
    setup = """
from qtts_compile.kernels.sample import sample
logits, ones = torch.linspace(-1, 1, 99, device="cuda")[None], torch.ones(2, 1, dtype=torch.int64, device="cuda")
controls = torch.tensor([1, 1.0, 5, 0.9, 1], device="cuda")
"""
    assert_trips(setup, "sample(logits, controls, *ones)", f"controls[1] = {temperature}", "temperature is not positive")


@pytest.mark.parametrize("do_sample", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
def test_a_row_without_a_finite_largest_logit_is_an_error_on_the_cpu(do_sample, value):
    logits = torch.zeros(2, 5)
    logits[1] = value
    with pytest.raises(ValueError, match=f"got {value} in row 1"):
        sample(logits, make_controls("cpu", do_sample), torch.tensor([1, 2]), torch.tensor([0]))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_an_error_on_the_cpu(temperature):
    with pytest.raises(ValueError, match=f"temperature must be positive while sampling, got {temperature}"):
        sample(torch.zeros(1, 5), make_controls("cpu", temperature=temperature), torch.tensor([1]), torch.tensor([0]))


LOGITS = torch.ones(2, 8)
CONTROLS = make_controls()
SEED = torch.tensor([1, 2])
OFFSET = torch.tensor([0])
MASK = torch.zeros(2, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("logits", "controls", "seed", "offset", "seen", "blocked", "error", "message"),
    [
        (LOGITS.double(), CONTROLS, SEED, OFFSET, None, None, TypeError, "logits must be .*float64"),
        (LOGITS, CONTROLS.double(), SEED, OFFSET, None, None, TypeError, "controls must be float32, got torch.float64"),
        (LOGITS, CONTROLS, SEED.int(), OFFSET, None, None, TypeError, "seed must be int64, got torch.int32"),
        (LOGITS, CONTROLS, SEED, OFFSET.float(), None, None, TypeError, "offset must be int64, got torch.float32"),
        (LOGITS, CONTROLS, SEED, OFFSET, MASK.char(), None, TypeError, "seen must be bool, got torch.int8"),
        (LOGITS, CONTROLS, SEED, OFFSET, None, MASK.float(), TypeError, "blocked must be bool, got torch.float32"),
        (LOGITS[0], CONTROLS, SEED, OFFSET, None, None, ValueError, r"logits must have the shape \[B, V\], got \(8,\)"),
        (LOGITS[:, :0], CONTROLS, SEED, OFFSET, None, None, ValueError, r"0 < V <= 16384, got \(2, 0\)"),
        (torch.ones(2, 16385), CONTROLS, SEED, OFFSET, None, None, ValueError, r"0 < V <= 16384, got \(2, 16385\)"),
        (LOGITS, CONTROLS[:4], SEED, OFFSET, None, None, ValueError, r"controls must have the shape \(5,\), got \(4,\)"),
        (LOGITS, CONTROLS, SEED[:1], OFFSET, None, None, ValueError, r"seed must have the shape \(2,\), got \(1,\)"),
        (LOGITS, CONTROLS, SEED, SEED, None, None, ValueError, r"offset must have the shape \(1,\), got \(2,\)"),
        (LOGITS, CONTROLS, SEED, OFFSET, MASK[0], None, ValueError, r"seen must have the shape \(2, 8\), got \(8,\)"),
        (LOGITS, CONTROLS, SEED, OFFSET, None, MASK[:, :5], ValueError, r"blocked must have the shape \(2, 8\), got \(2, 5\)"),
        (LOGITS, CONTROLS.to("meta"), SEED, OFFSET, None, None, ValueError, "controls must be on the device of logits, cpu, got meta"),
        (LOGITS, CONTROLS, SEED, OFFSET, MASK.to("meta"), None, ValueError, "seen must be on the device of logits, cpu, got meta"),
    ],
)  # fmt: skip
def test_bad_input(logits, controls, seed, offset, seen, blocked, error, message):
    with pytest.raises(error, match=message):
        sample(logits, controls, seed, offset, seen, blocked)
