"""The benchmark of layers in a chain: what its command line asks for, and the attention that stands in a layer."""

import re
from typing import Any, cast
from unittest import mock

import pytest
import torch

from bench import layers
from bench.readme import MEASUREMENTS
from qtts_compile.kernels.gemv_launch import options_of
from qtts_compile.kernels.launch_table import Launch


def test_each_cache_is_timed_at_each_position(capsys):
    arguments = layers.arguments_of("--slots 8192 --kv-cache bf16 int4 --positions 64 8000".split())
    timed = {key: [(stack.slots, stack.position, kv_cache) for stack, kv_cache in variants] for key, variants in arguments.variants.items()}
    talkers = [(8192, position, kv_cache) for kv_cache in ("bf16", "int4") for position in (64, 8000)]
    assert timed == {("predictor", 1): [(16, 8, "bf16")], ("talker", 1): talkers}
    with pytest.raises(SystemExit, match="2"):
        layers.arguments_of(["--positions", "64", "2048"])
    assert "--positions 2048: give 1 to 2047, or --slots for more" in capsys.readouterr().err


def test_a_position_is_timed_in_every_cache_that_reaches_so_far():
    arguments = layers.arguments_of("--stacks talker --slots 256 8192 --positions 64 512".split())
    assert [(stack.slots, stack.position) for stack, _ in arguments.variants["talker", 1]] == [(256, 64), (8192, 64), (8192, 512)]


def test_several_texts_are_timed_together(capsys):
    arguments = layers.arguments_of("--texts 1 8 32 --positions 64".split())
    assert {key: [stack.texts for stack, _ in variants] for key, variants in arguments.variants.items()} == {
        (name, texts): [texts] for name in ("predictor", "talker") for texts in (1, 8, 32)
    }
    with pytest.raises(SystemExit, match="2"):
        layers.arguments_of(["--texts", "33"])
    assert "choose from 1, 2" in capsys.readouterr().err


def test_launches_with_other_numbers_of_tiles_in_flight_are_tried(monkeypatch):
    case = layers.case_of("talker", "down")
    now = Launch(1, 8, 2048, 8)
    monkeypatch.setattr(layers, "chosen_launch", lambda case, rows: now)
    launches = layers.launches_of(case)
    assert launches[0] == now and len(set(launches)) == len(launches)
    assert {launch.in_flight for launch in launches if launch[:4] == now[:4]} == {0, 1, 3}  # 2 by the rule, 3 in the row
    assert {launch.in_flight for launch in launches if launch[:4] == (1, 2, 1024, 4)} == {0, 4}  # all 6 of the row by the rule
    assert all(launch.in_flight * launch.block_k <= case.width for launch in launches)
    weights = [torch.empty(2048, 6144, dtype=torch.bfloat16)]
    compiled = [tuple(options_of(launch, weights, 2048).items()) for launch in launches]
    assert len(set(compiled)) == len(compiled)


def search(times, monkeypatch):
    """Search the launches of a part, which take the ``times`` of a layer over two caches, by what is in flight; return what is found and measured."""
    launches = [Launch(1, 2, 256, 1, in_flight) for in_flight in range(len(times))]
    table, measured = {}, []

    def measure(place, x, rounds=layers.ROUNDS):
        measured.append((table.get("launch", launches[0]).in_flight, place))
        return times[measured[-1][0]][place]

    monkeypatch.setattr(layers, "measure", measure)
    monkeypatch.setattr(layers, "chosen_launch", lambda case, rows: table.get("launch", launches[0]))
    monkeypatch.setattr(layers, "launches_of", lambda case, texts: launches)
    monkeypatch.setattr(layers, "remember", lambda shape, device, launch: table.update(launch=launch))
    case, places = layers.case_of("talker", "down"), cast(Any, [0, 1])
    found = layers.search("talker", ["down"], places, torch.empty(1), {(case, launch) for launch in launches})
    assert list(found.values()) == [table["launch"]]
    return table["launch"].in_flight, set(measured)


def test_a_search_takes_what_is_fastest_over_all_caches(monkeypatch):
    found, measured = search([(30.0, 30.0), (29.0, 31.5), (30.1, 29.0), (31.0, 20.0), (29.99, 30.0)], monkeypatch)
    assert found == 2
    assert {(1, 1), (2, 1)} <= measured and (3, 1) not in measured  # given up over the first


def test_a_search_keeps_what_it_cannot_tell_apart(monkeypatch):
    assert search([(30.0, 30.0), (29.98, 29.98)], monkeypatch)[0] == 0


def test_each_number_of_parts_is_tried_once_and_forgotten(monkeypatch):
    launch, seen = {}, []
    monkeypatch.setattr(layers, "measure", lambda place, x: seen.append(dict(launch)) or 30.0 - len(seen))
    tried = list(layers.parts("bf16", 64, 2))
    assert layers.try_parts([], torch.empty(1), launch, tried) == {"0": 28.0, "1": 26.0, "2": 24.0, "4": 22.0}
    assert seen[::2] == seen[1::2] == tried and not launch


def test_the_commands_of_the_measurements_are_understood():
    commands = re.findall(r"^ +python -m bench\.layers ([^#\n]*)", MEASUREMENTS.read_text(), re.MULTILINE)
    assert len(commands) == 4 and all(layers.arguments_of(command.split()).variants for command in commands)


@pytest.mark.parametrize("kv_cache", ["bf16", "int4", "k4v3", "fp8"])
@pytest.mark.parametrize(("slots", "texts"), [(128, 1), (8208, 1), (128, 3)])
def test_attention_of_a_layer_reads_its_prompt(kv_cache, slots, texts, monkeypatch):
    """Also where two operators compute it, as there are too many slots or texts for one."""
    stack = layers.STACKS["talker"]._replace(hidden=64, slots=slots, position=100, texts=texts)
    torch.manual_seed(0)
    name = "norm_qkv_attention" if kv_cache == "bf16" else "norm_qkv_quantized_attention"
    joined = mock.Mock(wraps=getattr(layers, name))
    monkeypatch.setattr(layers, name, joined)
    attend = layers.build_attention(stack, kv_cache, "cpu")
    norm, projections = torch.ones(64).bfloat16(), [torch.randn(heads * layers.WIDTH, 64).bfloat16() / 8 for heads in (16, 8, 8)]
    x = torch.randn(texts, 64).bfloat16()
    first, other = attend(x, norm, projections), attend(torch.randn_like(x), norm, projections)
    assert joined.called == (slots == 128 and texts == 1)
    assert first.shape == (texts, 16, 1, layers.WIDTH) and first.isfinite().all() and not torch.equal(first, other)
    new = (x.float() / x.float().square().mean(1, keepdim=True).sqrt() @ projections[2].float().T).view(texts, 8, 1, layers.WIDTH)
    assert not torch.allclose(first.float(), new.repeat_interleave(2, dim=1), atol=0.1)  # as it would be if the new token were alone


def test_the_code_predictor_s_attention_takes_its_cache():
    stack = layers.STACKS["predictor"]
    projections = [torch.randn(heads * layers.WIDTH, 1024).bfloat16() / 32 for heads in (16, 8, 8)]
    attend = layers.build_attention(stack, "bf16", "cpu")
    assert attend(torch.randn(1, 1024).bfloat16(), torch.ones(1024).bfloat16(), projections).shape == (1, 16, 1, layers.WIDTH)
