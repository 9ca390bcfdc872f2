"""The entry: torch.compile(model, backend="qtts") as a user calls it."""

import importlib.metadata
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from unittest import mock

import pytest
import torch
from models import Session, case
from rewriting import captured, kernels, rewritten
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache

from qtts_compile import backend, collect
from qtts_compile.options import MODES

SMALL = replace(case("predictor"), layers=2)


@pytest.fixture(scope="module")
def model():
    return SMALL.build(torch.float32)


def norm(x, weight):
    return weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def tensors(requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_(requires_grad) for shape in ((2, 3, 24), (24,))]


def compiled(function, *inputs, **options):
    torch._dynamo.reset()
    with collect() as report:
        result = torch.compile(function, backend="qtts", **options)(*inputs)
    return result, report


def subprocess_output(code, **environment):
    """Run Python code outside the checkout, with nothing of ours imported."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TORCH_LOGS")} | environment
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd="/", env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


NORM_IN_A_SCRIPT = """
    import sys, torch
    def norm(x, weight):
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
    x, weight = torch.randn(2, 24), torch.randn(24)
    before = [name for name in sys.modules if name.startswith("qtts")]
    with torch.inference_mode():
        result = torch.compile(norm, backend="qtts", fullgraph=True, options={"executor": "eager"})(x, weight)
    torch.testing.assert_close(result, norm(x, weight))
    print(before, "qtts_compile.backend" in sys.modules, "qtts" in torch._dynamo.list_backends())
"""


def test_the_entry_point_is_installed():
    (entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="qtts")
    assert entry.load() is backend.qtts


def test_the_backend_is_found_with_no_import_of_ours():
    out, err = subprocess_output(NORM_IN_A_SCRIPT)
    assert out.split() == ["[]", "True", "True"]
    assert "qtts_compile" not in err


def test_torch_logs_shows_each_match():
    _, err = subprocess_output(NORM_IN_A_SCRIPT, TORCH_LOGS="+qtts_compile")
    assert "rms_norm at (top)" in err and "nodes ->" in err


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_accepted_as_mode_and_as_option(mode):
    with torch.inference_mode():
        for how in (dict(mode=mode), dict(options={"mode": mode})):
            result, report = compiled(norm, *tensors(), **how)
            torch.testing.assert_close(result, norm(*tensors()))
            assert report.kernels == {"rms_norm": 1}


def test_modes_and_options_reach_inductor():
    seen = {}

    class Look(CustomGraphPass):
        def __call__(self, graph):
            seen.update(cudagraphs=config.triton.cudagraphs, autotune=config.max_autotune, seed=config.fallback_random, padding=config.shape_padding)

        def uuid(self):
            return "look"

    options = {"mode": "reduce-overhead", "max_autotune": True, "fallback_random": True, "post_grad_custom_pre_pass": Look()}
    with fresh_cache(), torch.inference_mode():
        compiled(norm, *tensors(), options=options)
    assert seen == {"cudagraphs": True, "autotune": True, "seed": True, "padding": False}
    with fresh_cache(), torch.inference_mode():
        compiled(norm, *tensors(), options=options | {"shape_padding": True})
    assert seen["padding"] is True


@pytest.mark.parametrize("executor", ["eager", "inductor"])
def test_a_pass_of_the_user_s_own_still_runs_and_sees_the_kernels(executor):
    seen = []

    class Look(CustomGraphPass):
        def __call__(self, graph):
            seen.append([str(node.target) for node in graph.nodes if node.op == "call_function"])

        def uuid(self):
            return f"look {executor}"

    with fresh_cache(), torch.inference_mode(), config.patch(post_grad_custom_pre_pass=Look()):
        compiled(norm, *tensors(), options={"executor": executor})
    assert seen == [["qtts.rms_norm.default"]]


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_dynamic_is_accepted_and_lengths_may_change(dynamic):
    torch._dynamo.reset()
    function = torch.compile(norm, backend="qtts", dynamic=dynamic, options={"executor": "eager"})
    _, weight = tensors()
    with torch.inference_mode(), collect() as report:
        for length in (5, 6, 7, 8):
            x = torch.randn(2, length, 24)
            torch.testing.assert_close(function(x, weight), norm(x, weight))
    assert len(report.graphs) == {None: 2, True: 1, False: 4}[dynamic]
    assert all(kernels(graph) == {"rms_norm": 1} for graph in report.graphs)


def test_no_grad_is_enough():
    with torch.no_grad():
        assert compiled(norm, *tensors(), options={"executor": "eager"})[1].kernels == {"rms_norm": 1}


def test_training_is_left_to_inductor_with_a_note_and_right_gradients():
    x, weight = tensors(requires_grad=True)
    result, report = compiled(norm, x, weight, options={"executor": "eager", "strict": True})
    result.square().sum().backward()
    gradients = x.grad, weight.grad
    x, weight = tensors(requires_grad=True)
    norm(x, weight).square().sum().backward()
    torch.testing.assert_close(gradients, (x.grad, weight.grad))
    assert report.graphs and report.kernels == report.lifted == {}
    assert all("inference_mode" in note for graph in report.graphs for note in graph.notes) and report.graphs[0].notes


def test_compiler_reset_recompiles_and_calls_ours():
    torch._dynamo.reset()
    function = torch.compile(norm, backend="qtts", options={"executor": "eager"})
    with torch.inference_mode():
        for expected in (1, 0):
            with collect() as report:
                function(*tensors())
            assert len(report.graphs) == expected
        with mock.patch.object(backend.qtts, "reset") as reset:
            torch.compiler.reset()
        assert reset.called
        with collect() as report:
            function(*tensors())
        assert report.kernels == {"rms_norm": 1}


def test_without_a_compiler_the_graph_runs_op_by_op_and_says_so():
    with (
        mock.patch.object(backend, "missing_compiler", lambda: "no C++ compiler (g++) is installed"),
        mock.patch.object(backend, "compile_fx_inner", side_effect=AssertionError("Inductor was called")),
        torch.inference_mode(),
        pytest.warns(UserWarning, match=r"no C\+\+ compiler \(g\+\+\) is installed; .* op by op"),
    ):
        result, report = compiled(lambda x, weight: norm(x.cos(), weight).sin(), *tensors())
    x, weight = tensors()
    torch.testing.assert_close(result, norm(x.cos(), weight).sin())
    assert report.kernels == {"rms_norm": 1}
    assert report.graphs[0].notes == ["no C++ compiler (g++) is installed: the graph runs op by op"]


@pytest.fixture
def missing_compiler():
    backend.missing_compiler.cache_clear()
    yield backend.missing_compiler
    backend.missing_compiler.cache_clear()


def test_a_missing_compiler_is_noticed(missing_compiler, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert missing_compiler().startswith("no C++ compiler (") and "is installed" in missing_compiler()


def test_missing_python_headers_are_noticed(missing_compiler, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda name: str(tmp_path))
    assert missing_compiler() == "the Python headers (Python.h) are not installed"
    (tmp_path / "Python.h").touch()
    missing_compiler.cache_clear()
    assert missing_compiler() is None


def test_graphs_of_other_models_pass_through():
    convolution = torch.nn.Sequential(torch.nn.Conv1d(3, 4, 3), torch.nn.GELU(), torch.nn.LayerNorm(6)).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        result, report = compiled(convolution, x, options={"executor": "eager"})
        torch.testing.assert_close(result, convolution(x))
    assert report.kernels == {}


def test_matches_are_logged(caplog):
    logger = logging.getLogger("qtts_compile")
    with caplog.at_level(logging.DEBUG, "qtts_compile"), mock.patch.object(logger, "propagate", True):
        rewritten(norm, *tensors())
    assert "rms_norm at (top)" in caplog.messages


def test_the_graph_runs_on_whatever_cache_a_call_brings(model):
    """The compiled code holds no reference to the first call's cache."""
    torch._dynamo.reset()
    function = torch.compile(model, backend="qtts", options={"executor": "eager"})
    sessions = [Session(model, SMALL, seed=seed) for seed in (1, 2)]
    with torch.inference_mode(), captured() as graphs:
        for session in sessions:
            function(**session.prefill_inputs(4))
    assert len(graphs) == 1
    assert not torch.equal(sessions[0].cache.layers[0].keys, sessions[1].cache.layers[0].keys)


def test_inductor_s_early_launches_are_refused(monkeypatch):
    """Its kernels wait for the kernel before them alone, which here may itself have started early."""
    torch._dynamo.reset()
    with pytest.raises(Exception, match="triton.enable_pdl=True.*leave it out"):
        torch.compile(torch.nn.Linear(4, 4), backend="qtts", options={"triton.enable_pdl": True})(torch.ones(1, 4))
