"""What backend="qtts" makes of every model case: counts by structure, graphs without the original operators, outputs of eager."""

import copy
import functools
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from models import CASES, ModelCase, Session, case
from rewriting import Graphs, Run, cache_of, cosine, count, expected_kernels, expected_lifted, kernels, prefetched, side_by_side
from torch._dynamo.utils import counters

NAMES = [c.name for c in CASES]
TALKERS = [c.name for c in CASES if c.family == "talker"]
PADDED: dict[str, Any] = dict(batch=3, padding=[2, 0, 4])
SLOTS = 48


@dataclass(frozen=True)
class Setup:
    """One way to run a model case; ``layers`` shortens it where depth would only cost time."""

    name: str
    cache: str = "static"
    dtype: torch.dtype = torch.float32
    dynamic: bool | None = None
    executor: str = "eager"
    layers: int | None = None
    session: tuple[tuple[str, Any], ...] = field(default=())

    def __str__(self) -> str:
        parts = [self.name, self.cache, str(self.dtype).removeprefix("torch.")]
        parts += [f"dynamic={self.dynamic}"] if self.dynamic is not None else []
        parts += [self.executor] if self.executor != "eager" else []
        return "-".join(parts + ["padded" if k == "padding" else str(v) for k, v in self.session if k != "batch"])

    @property
    def case(self) -> ModelCase:
        whole = case(self.name)
        return replace(whole, layers=min(self.layers or whole.layers, whole.layers))


def setup(name: str, cache: str = "static", dtype: torch.dtype = torch.float32, **options: Any) -> Setup:
    own = {key: options.pop(key) for key in ("dynamic", "executor", "layers") if key in options}
    return Setup(name, cache, dtype, session=tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in options.items())), **own)


FULL_PRECISION = [
    setup("talker-1.7b"),
    *(setup(name, layers=2) for name in NAMES if name != "talker-1.7b"),
    *(setup(name, "dynamic", layers=2, **PADDED) for name in NAMES),
    *(setup(name, mask="4d-additive", layers=2, **PADDED) for name in ("talker-1.7b", "talker-concatenated", "llama")),
    *(setup(name, mask="2d", layers=2) for name in ("talker-0.6b", "qwen2")),
    setup("talker-0.6b", "dynamic", mask="none", axes="shared", layers=2),
    setup("talker-1.7b", dynamic=True, layers=2),
    setup("talker-1.7b", "dynamic", dynamic=True, layers=2),
    setup("llama", dynamic=True),
    setup("talker-0.6b", executor="inductor", layers=2),
    setup("predictor", "dynamic", executor="inductor", layers=2, **PADDED),
]
HALF_PRECISION = [
    setup("talker-1.7b", dtype=torch.bfloat16),
    *(setup(name, dtype=torch.bfloat16, layers=2) for name in TALKERS if name != "talker-1.7b"),
    setup("talker-1.7b", "dynamic", torch.bfloat16, layers=2),
    setup("talker-1.7b", dtype=torch.float16, layers=2),
    setup("talker-0.6b", dtype=torch.bfloat16, executor="inductor", layers=2),
]
SETUPS = [*FULL_PRECISION, *HALF_PRECISION]


@functools.cache
def run(setup: Setup) -> Run:
    """Compile and step a setup once for all the tests that look at it; in half precision with all hidden states and long enough to average."""
    half = setup.dtype != torch.float32
    counters["inductor"].pop("possibly_missed_reinplacing_opportunities", None)
    result = side_by_side(
        setup.case,
        setup.case.build(setup.dtype),
        options={"executor": setup.executor, "strict": True},
        dynamic=setup.dynamic,
        decode=12 if half else 3,
        hidden_states=half,
        cache=setup.cache,
        max_len=SLOTS,
        **{"batch": 3 if half else 1, **{k: list(v) if isinstance(v, tuple) else v for k, v in setup.session}},
    )
    assert not counters["inductor"]["possibly_missed_reinplacing_opportunities"]
    return result


each_setup = pytest.mark.parametrize("setup", SETUPS, ids=str)


@each_setup
def test_every_block_is_rewritten_as_the_structure_says(setup):
    """Also under strict=True, which run() sets."""
    phases = Counter()
    for phase, report, _ in run(setup).compiled_graphs():
        phases[phase] += 1
        assert kernels(report) == expected_kernels(setup.case, phase, setup.cache, run(setup).rows(phase))
        assert report.lifted == expected_lifted(setup.case, phase, setup.cache)
        assert report.layers == setup.case.layers
        assert report.refusals == [] and report.notes == []
    # A growing cache costs one compilation with the first length and one with the length as a symbol.
    assert phases == {"prefill": 1, "decode": 1 if setup.cache == "static" else 2}


@each_setup
def test_kernels_stand_in_the_modules_that_they_replace(setup):
    layers = range(setup.case.layers)
    norms = [f"layers.{i}.{name}" for i in layers for name in ("input_layernorm", "post_attention_layernorm")] + ["norm"]
    for phase, report, _ in run(setup).compiled_graphs():
        expected = expected_kernels(setup.case, phase, setup.cache, run(setup).rows(phase))
        if "norm_swiglu" in report.kernels:
            assert report.kernels["norm_swiglu"] == [f"layers.{i}.mlp" for i in layers]
            if "norm_qkv_attention" not in expected:
                assert report.kernels["norm_linears"] == [f"layers.{i}.self_attn.q_proj" for i in layers]
            assert report.kernels["linear_add"] == [f"layers.{i}" for i in layers for _ in range(2)]
            assert report.kernels["rms_norm"][-1] == "norm"
        else:
            assert report.kernels["swiglu"] == [f"layers.{i}.mlp" for i in layers]
            assert report.kernels["add_rms_norm"] == norms[1:]
            assert report.kernels["rms_norm"][0] == norms[0]
        (name,) = expected.keys() & {"norm_qkv_attention", "qk_norm_rope_attention", "rotary_qk"}
        assert report.kernels[name] == [f"layers.{i}.self_attn" for i in layers]


@each_setup
def test_attention_prefetches_weights_of_its_layer(setup):
    for _, report, graphs in run(setup).compiled_graphs():
        if "norm_qkv_attention" in report.kernels:
            assert prefetched(graphs.rewritten) == [True] * setup.case.layers


@each_setup
def test_no_original_operator_is_left(setup):
    for phase, report, graphs in run(setup).compiled_graphs():
        gone = ["aten.rsqrt", "aten.exp.", "aten.neg.", "aten.index_put"] + (["scaled_dot_product"] if phase == "decode" else [])
        for name in gone:
            there = name != "aten.index_put" or setup.cache == "static"
            assert bool(count(graphs.before, name)) == there, f"{name} before the rewrite"
            assert count(graphs.rewritten, name) == 0, f"{name} after the rewrite"
        products = "aten.mm.", "aten.addmm."
        assert count(graphs.before, *products) > 0
        assert (count(graphs.rewritten, *products) == 0) == ("norm_swiglu" in report.kernels)


@each_setup
def test_cos_and_sin_are_built_once_per_graph(setup):
    for _, _, graphs in run(setup).compiled_graphs():
        assert count(graphs.rewritten, "aten.cos.") == count(graphs.rewritten, "aten.sin.") == 1
        merges = "slice_scatter", "split_with_sizes", "aten.select"
        assert bool(count(graphs.before, *merges)) == (setup.case.rope_axes == 3)
        assert count(graphs.rewritten, *merges) == 0, "the axes are merged outside the kernel"


def cache_sized(graphs: Graphs, run: Run, *names: str) -> list[str]:
    size = math.prod(run.eager_cache[0].shape)
    return [op.name for op in graphs.final if op.shape is not None and math.prod(op.shape) == size and any(name in op.name for name in names)]


@pytest.mark.parametrize("setup", [s for s in SETUPS if s.executor == "eager" and s.cache == "static"], ids=str)
def test_no_copy_of_a_cache_is_left(setup):
    for phase, _, graphs in run(setup).compiled_graphs():
        assert graphs.final
        assert cache_sized(graphs, run(setup), "clone", "copy_", "as_strided", "index_put", "slice_scatter") == []
        if phase == "decode":
            repeated = [op for op in graphs.final if op.shape is not None and op.shape[-2:] == (SLOTS, setup.case.head_dim)]
            assert repeated == [], "repeat_kv is still there"


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / a.abs().max()).item()


@pytest.mark.parametrize("setup", FULL_PRECISION, ids=str)
def test_fp32_outputs_and_caches_equal_eager(setup):
    result = run(setup)
    for step in result.steps:
        for eager, compiled in zip(step.eager, step.compiled, strict=True):
            assert eager.isfinite().all() and relative(eager, compiled) < 1e-5
    for eager, compiled in zip(result.eager_cache, result.compiled_cache, strict=True):
        assert eager.abs().max() > 0.1 and eager.shape == compiled.shape
        assert relative(eager, compiled) < 1e-5


def layers_of(result: Run, side: str) -> list[torch.Tensor]:
    """Hidden states of all tokens ``[B, T, H]`` after the embedding and every layer."""
    return [torch.cat(states, dim=1) for states in zip(*(getattr(step, side) for step in result.steps), strict=True)]


@pytest.mark.parametrize("setup", HALF_PRECISION, ids=str)
def test_half_precision_hidden_states_follow_eager_at_every_layer(setup):
    eager, compiled = layers_of(run(setup), "eager"), layers_of(run(setup), "compiled")
    assert len(eager) == setup.case.layers + 1
    for layer, (a, b) in enumerate(zip(eager, compiled, strict=True)):
        assert a.dtype == b.dtype == setup.dtype
        assert cosine(a.flatten(), b.flatten()) > 0.9999, f"layer {layer}"
    for a, b in zip(run(setup).eager_cache, run(setup).compiled_cache, strict=True):
        assert cosine(a.flatten(), b.flatten()) > 0.9999


@functools.cache
def exact(setup: Setup) -> torch.Tensor:
    """Last hidden states of the same weights and inputs computed in float32."""
    model = copy.deepcopy(run(setup).session.model).float()
    session = Session(model, setup.case, cache=run(setup).session.cache_kind, max_len=SLOTS, batch=3)
    session.tokens = run(setup).session.tokens.to(setup.dtype).float()
    with torch.inference_mode():
        outputs = [model(**session.prefill_inputs(6)), *(model(**session.decode_inputs()) for _ in range(12))]
    return torch.cat([output.last_hidden_state for output in outputs], dim=1)


@pytest.mark.parametrize("setup", HALF_PRECISION, ids=str)
def test_half_precision_error_is_no_larger_than_eager_s(setup):
    """The root mean square over 3 rows of 18 tokens, against float32."""
    eager, compiled = ((layers_of(run(setup), side)[-1].float() - exact(setup)).square().mean().sqrt() for side in ("eager", "compiled"))
    assert 0 < compiled <= 1.1 * eager


def test_prompts_of_changing_length_compile_once_more_with_dynamic_none():
    c = replace(case("talker-0.6b"), layers=2)
    model = c.build(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="qtts", options={"executor": "eager"})
    lengths, graphs = [5, 6, 9, 12], []
    for length in lengths:
        result = side_by_side(c, model, prefill=length, decode=1, compiled=compiled, max_len=SLOTS)
        graphs.append([phase for phase, _, _ in result.compiled_graphs()])
        for phase, report, _ in result.compiled_graphs():
            # The first prompt's length is a number, and that of the graph for all others a symbol.
            rows = result.rows(phase) if phase == "decode" or length == lengths[0] else None
            assert kernels(report) == expected_kernels(c, phase, "static", rows)
        for step in result.steps:
            assert relative(step.eager[0], step.compiled[0]) < 1e-5
    assert graphs == [["prefill", "decode"], ["prefill"], [], []]


def test_caches_of_two_sessions_do_not_mix():
    """One compiled graph writes into whichever cache a call brings."""
    c = replace(case("talker-1.7b"), layers=2)
    model = c.build(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="qtts", options={"executor": "eager"})
    first, second = Session(model, c, seed=1), Session(model, c, seed=2)
    alone = [side_by_side(c, model, decode=3, compiled=compiled, seed=seed) for seed in (1, 2)]
    with torch.inference_mode():
        for step in range(4):
            for session, expected in zip((first, second), alone, strict=True):
                inputs = session.decode_inputs() if step else session.prefill_inputs(6)
                torch.testing.assert_close(compiled(**inputs).last_hidden_state, expected.steps[step].eager[0], rtol=1e-5, atol=1e-5)
    for session, expected in zip((first, second), alone, strict=True):
        for a, b in zip(cache_of(session), expected.eager_cache, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
