"""Warm starts: AOTAutograd's cache of rewritten graphs and their reports."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.utils import fresh_cache

from qtts_compile import autograd_cache, backend, collect
from qtts_compile.options import MODES, Options

HIT, MISS, NOT_STORED = ({f"autograd_cache_{name}": 1 for name in names} for names in (("hit",), ("miss", "saved"), ("miss", "bypass")))


@pytest.fixture(autouse=True)
def cold():
    with fresh_cache():
        yield


def norm(x, weight):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def normed(x, weight):
    return norm(x.cos(), weight).sin()


def refused(x, weight):
    """A norm that sums, beside one that is rewritten."""
    return norm(x.cos(), weight) + weight * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6))


class Layers(torch.nn.Module):
    def __init__(self, *names):
        super().__init__()
        for name in names:
            self.add_module(name, Norm())

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


class Norm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(24))

    def forward(self, x):
        return norm(x.cos(), self.weight)


def tensors(tokens=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((2, tokens, 24), (24,))]


def started(function: Any, *inputs: Any, dynamic: Any = None, mode: Any = None, **options: Any):
    """Compile and run as a new process would, and return what the cache did, and the report but for its time."""
    torch._dynamo.reset()
    counters.clear()
    with collect() as collected, torch.no_grad():
        result = torch.compile(function, backend="qtts", dynamic=dynamic, mode=mode, options=options or None)(*inputs)
        torch.testing.assert_close(result, function(*inputs))
    report = collected.to_dict()
    for graph in report["graphs"]:
        graph.pop("seconds")
    return {name: count for name, count in counters["aot_autograd"].items() if name.startswith("autograd_cache")}, report


def test_a_warm_start_traces_and_rewrites_nothing_and_reports_the_same():
    did, cold = started(refused, *tensors())
    assert did == MISS and cold["kernels"] == {"rms_norm": 1}
    assert len(cold["graphs"]) == 1 and cold["graphs"][0]["refusals"]
    with mock.patch.object(backend, "rewrite", side_effect=AssertionError("rewritten again")), collect() as report:
        assert started(refused, *tensors()) == (HIT, cold)
    assert [graph.seconds for graph in report.graphs] == [0.0]


IN_A_PROCESS = """
    import json, torch
    from torch._dynamo.utils import counters
    from qtts_compile import collect
    def norm(x, weight):
        return weight * (x.cos() * torch.rsqrt(x.cos().pow(2).mean(-1, keepdim=True) + 1e-6))
    with torch.inference_mode(), collect() as report:
        result = torch.compile(norm, backend="qtts")(torch.arange(48.0).view(2, 24), torch.ones(24))
    print(json.dumps([counters["aot_autograd"]["autograd_cache_hit"], result.sum().item(), report.to_dict()]))
"""


def test_a_second_process_starts_warm(tmp_path):
    outputs = []
    for _ in range(2):
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_VEC_ISA_OK": "0"}  # finding vector instructions takes seconds
        out = subprocess.run([sys.executable, "-c", textwrap.dedent(IN_A_PROCESS)], env=env, capture_output=True, text=True, timeout=300)
        assert out.returncode == 0, out.stderr
        outputs.append(json.loads(out.stdout))
    (hits, result, report), (warm_hits, warm_result, warm_report) = outputs
    assert (hits, warm_hits) == (0, 1) and result == warm_result
    assert report["graphs"][0].pop("seconds") > warm_report["graphs"][0].pop("seconds") == 0
    assert report == warm_report and report["kernels"] == {"rms_norm": 1}


@pytest.mark.parametrize(
    "change", [{"disable": ["swiglu"]}, {"layers": (0, 1)}, {"strict": True}, {"kv_cache": "int4"}, {"max_autotune": True}], ids=str
)
def test_options_are_part_of_the_key(change):
    started(normed, *tensors())
    assert started(normed, *tensors(), **change)[0] == MISS
    assert started(normed, *tensors(), **change)[0] == HIT


def test_the_package_s_code_is_part_of_the_key_and_inductor_s_cache_goes_by_the_rewritten_graph(monkeypatch):
    started(normed, *tensors())
    monkeypatch.setattr(autograd_cache, "source_digest", lambda: "changed")
    assert started(normed, *tensors())[0] == MISS
    assert counters["inductor"]["fxgraph_cache_hit"] == 1


def test_the_digest_is_of_every_source_file(monkeypatch):
    digests, read = set(), Path.read_bytes
    for changed in (None, "rewriter.py", "decode_attention.py", "matching.py", "swiglu.py"):
        monkeypatch.setattr(Path, "read_bytes", lambda path, changed=changed: b"changed" if path.name == changed else read(path))
        digests.add(autograd_cache.source_digest.__wrapped__())
    assert len(digests) == 5


def test_the_same_code_in_other_modules_is_another_graph():
    x, _ = tensors()
    assert started(Layers("0", "1"), x)[1]["graphs"][0]["kernels"] == {"rms_norm": ["0", "1"]}
    did, report = started(Layers("first", "second"), x)
    assert did == MISS and report["graphs"][0]["kernels"] == {"rms_norm": ["first", "second"]}
    did, report = started(Layers("0", "1"), x, layers=(1, 2))
    assert did == MISS and report["graphs"][0]["kernels"] == {"rms_norm": ["1"]}


def test_a_symbolic_size_is_guarded_and_its_value_when_compiling_is_part_of_the_key():
    for expected in (MISS, HIT):
        did, report = started(normed, *tensors(5), dynamic=True)
        assert did == expected and report["kernels"] == {"rms_norm": 1}
    torch._dynamo.reset()
    function = torch.compile(normed, backend="qtts", dynamic=True)
    with torch.no_grad(), collect() as report:
        for tokens in (5, 6, 9):
            torch.testing.assert_close(function(*tensors(tokens)), normed(*tensors(tokens)))
    assert len(report.graphs) == 1
    assert started(normed, *tensors(7), dynamic=True)[0] == MISS


def test_which_inputs_keep_their_address_is_part_of_the_key():
    """CUDA graphs copy the others."""
    x, weight = tensors()
    started(normed, x, weight)
    torch._dynamo.mark_static_address(x)
    assert [started(normed, x, weight)[0] for _ in range(2)] == [MISS, HIT]


@pytest.mark.parametrize("mode", MODES[1:])
def test_modes_start_warm(mode):
    (first, report), (second, warm) = (started(normed, *tensors(), mode=mode) for _ in range(2))
    assert (first, second) == (MISS, HIT) and report == warm


def test_a_graph_that_runs_op_by_op_is_not_stored():
    for _ in range(2):
        did, report = started(normed, *tensors(), executor="eager")
        assert did == NOT_STORED and report["kernels"] == {"rms_norm": 1}


def test_a_missing_compiler_is_told_again_beside_a_warm_cache(monkeypatch):
    started(normed, *tensors())
    monkeypatch.setattr(backend, "missing_compiler", lambda: "no C++ compiler is installed")
    for _ in range(2):
        with pytest.warns(UserWarning, match="op by op"):
            assert started(normed, *tensors())[0] == NOT_STORED


def test_a_graph_whose_operators_all_vanish_runs():
    for _ in range(2):
        assert started(lambda x, weight: (x.contiguous(), weight.view(-1)), *tensors())[0] == NOT_STORED


def test_strict_raises_on_a_warm_cache_too():
    assert started(refused, *tensors())[0] == MISS
    for _ in range(2):
        with pytest.raises(BackendCompilerFailed, match="NotRewritten: strict"):
            started(refused, *tensors(), strict=True)


@pytest.mark.parametrize("damage", [b"", b"not a pickle", None], ids=["empty", "noise", "cut"])
def test_a_damaged_entry_is_compiled_again(damage):
    _, cold = started(normed, *tensors())
    (entry,) = (path for path in (Path(cache_dir()) / "aotautograd").rglob("*") if path.is_file())
    entry.write_bytes(entry.read_bytes()[:-100] if damage is None else damage)
    did, report = started(normed, *tensors())
    assert did == MISS and report == cold


def test_weights_that_could_have_gradients_do_not_keep_an_inference_graph_from_the_cache():
    for expected in (MISS, HIT):
        assert started(Norm(), tensors()[0])[0] == expected


@pytest.mark.parametrize("inside", [False, True], ids=["enabled", "enabled inside"])
def test_graphs_that_need_gradients_are_neither_stored_nor_looked_up(inside):
    def function(x, weight):
        with torch.set_grad_enabled(True):
            return normed(x, weight)

    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        x, weight = tensors()
        weight.requires_grad_()
        with collect() as report, torch.set_grad_enabled(not inside):
            result = torch.compile(function if inside else normed, backend="qtts")(x, weight)
        result.sum().backward()
        expected = torch.autograd.grad(normed(x, weight).sum(), weight)
        torch.testing.assert_close((weight.grad,), expected)
        assert "inference_mode" in report.graphs[0].notes[0]
        assert not any(name.startswith("autograd_cache") for name in counters["aot_autograd"])


def test_a_torch_without_the_settings_compiles_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(autograd_cache, "KEYS", "absent_setting")
    with mock.patch.object(autograd_cache.log.parent, "propagate", True):
        did, report = started(normed, *tensors())
    assert did == {} and report["kernels"] == {"rms_norm": 1} and "traces them anew" in caplog.text


def test_the_user_s_own_keys_are_kept():
    seen = {}
    inner = backend.compile_fx_inner

    def look(*args, **kwargs):
        seen.update(config.unsafe_marked_cacheable_functions)
        return inner(*args, **kwargs)

    with mock.patch.object(backend, "compile_fx_inner", look):
        started(normed, *tensors(), unsafe_marked_cacheable_functions={"a.function": "1"})
    assert seen == {"a.function": "1"}
    graph = torch.fx.symbolic_trace(normed)
    _, patches = autograd_cache.settings(graph, tensors(), Options.parse(None, {"unsafe_marked_cacheable_functions": {"a.function": "1"}}), None)
    assert set(patches["unsafe_marked_cacheable_functions"]) == {"a.function", autograd_cache.NAME}
