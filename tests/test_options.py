"""What torch.compile(..., backend="qtts", mode=..., options=...) accepts, and how it refuses the rest."""

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from qtts_compile.options import KV_CACHES, MODES, Options
from qtts_compile.patterns.catalogue import OPS


def test_defaults():
    assert Options.parse() == Options.parse(None, None) == Options.parse("default", {}) == Options()
    assert Options().config_patches() == {}


@pytest.mark.parametrize("mode", MODES)
def test_mode_is_taken_from_either_place(mode):
    assert Options.parse(mode).mode == Options.parse(None, {"mode": mode}).mode == Options.parse(mode, {"mode": mode}).mode == mode
    assert Options.parse(mode).config_patches() == ({} if mode == "default" else torch._inductor.list_mode_options(mode))


def test_reduce_overhead_means_cuda_graphs():
    assert Options.parse("reduce-overhead").config_patches()["triton.cudagraphs"] is True


def test_inductor_s_options_pass_through_and_win_over_the_mode():
    options = Options.parse(None, {"mode": "reduce-overhead", "triton.cudagraphs": False, "max-autotune": True, "strict": True})
    assert options.strict and options.inductor == {"triton.cudagraphs": False, "max-autotune": True}
    assert options.config_patches()["triton.cudagraphs"] is False
    assert options.config_patches()["max_autotune"] is True


def test_own_options_are_read():
    given = {"layers": [0, 24], "disable": ["swiglu", "attention"], "strict": True, "executor": "eager", "kv_cache": "int4"}
    assert Options.parse(None, given) == Options(
        layers=(0, 24), disable=frozenset({"swiglu", "attention"}), strict=True, executor="eager", kv_cache="int4"
    )
    assert [Options.parse(None, {"kv_cache": name}).kv_cache for name in (None, *KV_CACHES)] == [None, *KV_CACHES]
    assert Options.parse(None, {"disable": OPS}).disable == frozenset(OPS)


def test_the_caller_s_dictionary_is_not_changed():
    given = {"mode": "max-autotune", "strict": True, "triton.cudagraphs": True}
    Options.parse(None, given)
    assert given == {"mode": "max-autotune", "strict": True, "triton.cudagraphs": True}


REFUSED = [
    ({"stict": True}, "stict", "strict"),
    ({"mode": "fast"}, "'fast'", "reduce-overhead"),
    ({"mode": ""}, "''", "reduce-overhead"),
    ({"mode": 3}, "3", "reduce-overhead"),
    ({"layers": (3, 3)}, r"\(3, 3\)", "start < stop"),
    ({"layers": (4, 2)}, r"\(4, 2\)", "start < stop"),
    ({"layers": (-1, 2)}, r"\(-1, 2\)", "0 <= start"),
    ({"layers": 5}, "5", "half-open range"),
    ({"layers": (0, 1, 2)}, r"\(0, 1, 2\)", "half-open range"),
    ({"layers": (0, 1.5)}, r"1\.5", "ints"),
    ({"layers": (False, True)}, "False", "ints"),
    ({"layers": "03"}, "'03'", "half-open range"),
    ({"disable": ["swigle"]}, "'swigle'", "swiglu"),
    ({"disable": "swiglu"}, "'swiglu'", "collection"),
    ({"disable": [1]}, "1", "swiglu"),
    ({"disable": 7}, "7", "swiglu"),
    ({"strict": "yes"}, "'yes'", "bool"),
    ({"strict": 1}, "1", "bool"),
    ({"executor": "cpp"}, "'cpp'", "inductor, eager"),
    ({"kv_cache": "int2"}, "kv_cache='int2'", "bf16, int4, int3, k4v3, fp8"),
    ({"kv_cache": 4}, "kv_cache=4", "bf16, int4"),
    ({"kv_cache": ["int4"]}, "'int4'", "bf16, int4"),
    *[({"triton.enable_pdl": True}, "triton.enable_pdl=True", "leave it out")] * ("triton.enable_pdl" in torch._inductor.list_options()),
]


@pytest.mark.parametrize(("options", "value", "valid"), REFUSED, ids=[str(options) for options, *_ in REFUSED])
def test_wrong_options_are_refused_by_name_with_the_valid_ones(options, value, valid):
    with pytest.raises(ValueError, match=f"(?s){value}.*{valid}"):
        Options.parse(None, options)


def test_the_refusal_of_an_unknown_option_lists_all_of_ours():
    with pytest.raises(ValueError, match="'layer'.*mode, layers, disable, strict, executor, kv_cache.*list_options"):
        Options.parse(None, {"layer": (0, 1)})


def test_contradicting_modes_are_refused():
    with pytest.raises(ValueError, match="'max-autotune'.*'reduce-overhead'.*contradict"):
        Options.parse("max-autotune", {"mode": "reduce-overhead"})


@pytest.mark.parametrize(
    ("options", "message"), [({"stict": True}, "unknown option 'stict'"), ({"layers": (2, 1)}, r"\(2, 1\) is an impossible range")]
)
def test_torch_compile_shows_the_refusal(options, message):
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match=f"ValueError: .*{message}") as caught:
        torch.compile(torch.nn.Identity(), backend="qtts", options=options, fullgraph=True)(torch.ones(2) + 1)
    assert isinstance(caught.value.inner_exception, ValueError)


def test_torch_compile_refuses_an_unknown_mode():
    torch._dynamo.reset()
    with pytest.raises((BackendCompilerFailed, RuntimeError), match="fast"):
        torch.compile(torch.cos, backend="qtts", mode="fast")(torch.ones(2))


@pytest.mark.parametrize("more", [{"mode": "reduce-overhead"}, {"max_autotune": True}], ids=str)
def test_an_executor_that_generates_no_code_takes_no_options_of_code_generation(more):
    with pytest.raises(ValueError, match=f"executor='eager' generates no code.*{next(reversed(more.items()))[0]}"):
        Options.parse(None, {"executor": "eager", **more})
    assert Options.parse("default", {"executor": "eager"}).executor == "eager"
