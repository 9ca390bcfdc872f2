"""A talker's layers over each quantised cache, compiled and eager, in bfloat16: at the published size on a CUDA device, and tiny on the CPU."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
from models import Session, case, published
from rewriting import cosine, expected_kernels, kernels

from qtts_compile import Protect, collect
from qtts_compile.kernels import norm_qkv_quantized_attention, qk_norm_rope_quantized_attention
from qtts_compile.kernels.clusters import device as clusters
from qtts_compile.kernels.gemv import most_rows
from qtts_compile.options import KV_CACHES

pytestmark = pytest.mark.usefixtures("float32_products")

SLOTS, PROMPT, STEPS = 256, 40, 24  # kernels of clusters are chosen from 256 slots on
PROTECT = Protect(first_layers=0, last_layers=0, sinks=2, window=16)  # which they take, too; 46 tokens are read from codes in the end
TINY, FULL = replace(case("talker-0.6b"), layers=2), replace(published("1.7b"), layers=4)
ON_CPU = [(TINY, "cpu", "int4", 1), (TINY, "cpu", "k4v3", 8)]
ON_GPU = [pytest.param(FULL, "cuda", kv_cache, texts, marks=pytest.mark.gpu) for kv_cache in KV_CACHES[1:] for texts in (1, 8, 32)]


@contextlib.contextmanager
def launches() -> Iterator[list[bool]]:
    """Collect of every launch of attention over codes whether it is of clusters."""
    found: list[bool] = []

    def seen(module, name):
        launch = getattr(module, name)

        def call(*arguments, **options):
            result = launch(*arguments, **options)
            found.append(result is not None and result is not False)
            return result

        return mock.patch.object(module, name, call)

    with seen(norm_qkv_quantized_attention, "launch"), seen(qk_norm_rope_quantized_attention, "launch_coded_heads"):
        yield found


def decoded(model, session) -> torch.Tensor:
    """Return the hidden states ``[B, STEPS, hidden]`` of the steps after a prompt."""
    with torch.inference_mode():
        model(**session.prefill_inputs(PROMPT))
        return torch.cat([model(**session.decode_inputs()).last_hidden_state.double() for _ in range(STEPS)], 1)


@pytest.mark.parametrize(("c", "device", "kv_cache", "texts"), [*ON_CPU, *ON_GPU], ids=lambda value: getattr(value, "name", str(value)))
def test_layers_over_codes_are_as_exact_as_eager(c, device, kv_cache, texts):
    """Codes near a boundary may differ: the error against float32 over its own keys and values is that of the codes for both."""
    torch.compiler.reset()
    model = c.build(torch.bfloat16, device)
    padding = [row % 4 for row in range(texts)]
    over_codes = Session(model, c, cache=kv_cache, protect=PROTECT, batch=texts, max_len=SLOTS, padding=padding)
    exact_model = copy.deepcopy(model).float()
    exact = Session(exact_model, c, batch=texts, max_len=SLOTS, padding=padding)
    over_codes.tokens = exact.tokens = exact.tokens.bfloat16().float()
    expected, eager = decoded(exact_model, exact), decoded(model, over_codes)
    compiled = torch.compile(model, backend="qtts", options={"strict": True, "executor": "inductor" if device == "cuda" else "eager"})
    with collect() as report, launches() as are_clusters:
        result = decoded(compiled, over_codes.clone())
    _, step = report.graphs  # one for the prompt and one for all steps
    assert kernels(step) == expected_kernels(c, "decode", "quantized", texts, most_rows(torch.bfloat16, c.hidden, torch.device(device)))
    assert report.refusals == [] and report.graph_breaks == []
    packed = over_codes.cache.packed
    assert packed.quantized_layers == tuple(range(c.layers)) and packed.quantized_tokens(PROMPT + STEPS) == 46
    if device == "cuda":
        assert are_clusters == [texts <= 16 and clusters.has_clusters(torch.device("cuda", torch.cuda.current_device()))] * (c.layers * STEPS)
    errors = [(states - expected).square().mean().sqrt() for states in (eager, result)]
    assert 0 < errors[1] <= 1.1 * errors[0]
    assert cosine(result, eager) > 0.999
