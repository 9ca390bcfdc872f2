"""The benchmark of layers in a chain: what its command line asks for, and the attention that stands in a layer."""

import re
from unittest import mock

import pytest
import torch

from bench import layers
from bench.readme import README


def test_each_cache_is_timed_at_each_position(capsys):
    arguments = layers.arguments_of("--slots 8192 --kv-cache bf16 int4 --positions 64 8000".split())
    timed = [(name, stack.slots, stack.position, kv_cache) for name, stack, kv_cache in arguments.variants]
    talkers = [("talker", 8192, position, kv_cache) for kv_cache in ("bf16", "int4") for position in (64, 8000)]
    assert timed == [("predictor", 16, 8, "bf16"), *talkers]
    with pytest.raises(SystemExit, match="2"):
        layers.arguments_of(["--positions", "64", "2048"])
    assert "--positions 2048: give 1 to 2047, or --slots for more" in capsys.readouterr().err


def test_readme_s_commands_are_understood():
    commands = re.findall(r"^ +python -m bench\.layers ([^#\n]*)", README.read_text(), re.MULTILINE)
    assert len(commands) == 2 and all(layers.arguments_of(command.split()).variants for command in commands)


@pytest.mark.parametrize("kv_cache", ["bf16", "int4", "k4v3", "fp8"])
@pytest.mark.parametrize("slots", [128, 8208])
def test_attention_of_a_layer_reads_its_prompt(kv_cache, slots, monkeypatch):
    """Also where two operators compute it, as there are too many slots for one."""
    stack = layers.STACKS["talker"]._replace(hidden=64, slots=slots, position=100)
    torch.manual_seed(0)
    name = "norm_qkv_attention" if kv_cache == "bf16" else "norm_qkv_quantized_attention"
    joined = mock.Mock(wraps=getattr(layers, name))
    monkeypatch.setattr(layers, name, joined)
    attend = layers.build_attention(stack, kv_cache, "cpu")
    norm, projections = torch.ones(64).bfloat16(), [torch.randn(heads * layers.WIDTH, 64).bfloat16() / 8 for heads in (16, 8, 8)]
    x = torch.randn(1, 64).bfloat16()
    first, other = attend(x, norm, projections), attend(torch.randn_like(x), norm, projections)
    assert joined.called == (slots == 128)
    assert first.shape == (1, 16, 1, layers.WIDTH) and first.isfinite().all() and not torch.equal(first, other)
    new = (x.float() / x.float().square().mean().sqrt() @ projections[2].float().T).view(1, 8, 1, layers.WIDTH)
    assert not torch.allclose(first.float(), new.repeat_interleave(2, dim=1), atol=0.1)  # as it would be if the new token were alone


def test_the_code_predictor_s_attention_takes_its_cache():
    stack = layers.STACKS["predictor"]
    projections = [torch.randn(heads * layers.WIDTH, 1024).bfloat16() / 32 for heads in (16, 8, 8)]
    attend = layers.build_attention(stack, "bf16", "cpu")
    assert attend(torch.randn(1, 1024).bfloat16(), torch.ones(1024).bfloat16(), projections).shape == (1, 16, 1, layers.WIDTH)
