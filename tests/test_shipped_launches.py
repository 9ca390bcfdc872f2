"""Every linear layer of a frame of the published models that becomes a kernel has its launch in the H200's table."""

import json
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch._functorch import config as functorch_config

from bench import models
from bench.linears import CASES
from qtts_compile import TTS, backend
from qtts_compile.kernels.launch_table import SHIPPED, Shape
from qtts_compile.kernels.skinny import launch as skinny

TABLE = json.loads((SHIPPED / "nvidia-h200.json").read_text())


def shapes(graph: torch.fx.Graph) -> Iterator[Shape]:
    """Yield under which shapes the linear layers of a rewritten graph look up their launches."""
    for node in graph.nodes:
        op = str(node.target).removeprefix("qtts.").split(".")[0]
        if op not in ("norm_linears", "norm_swiglu", "linear_add", "embedding_linear"):
            continue
        rows = math.prod(node.args[0].meta["val"].shape[: None if op == "embedding_linear" else -1])
        place = {"norm_linears": 2, "norm_swiglu": 2, "linear_add": 1, "embedding_linear": 2}[op]
        weights = [weight.meta["val"] for weight in (node.args[2] if op == "norm_linears" else [node.args[place]])]
        yield Shape(op, "bfloat16", sum(len(weight) for weight in weights), weights[0].shape[1], 2 ** (rows - 1).bit_length())


@pytest.mark.parametrize("size", ["1.7b", "0.6b"])
def test_every_linear_layer_of_a_frame_has_a_launch(size, monkeypatch):
    for config in (models._TALKER, models._PREDICTOR):
        monkeypatch.setitem(config, "num_hidden_layers", 1)  # all are alike
    monkeypatch.setitem(models._PREDICTOR, "layer_types", ["full_attention"])
    monkeypatch.setattr(skinny, "has_tensor_cores", lambda device: True)  # as where launches are looked up
    found, rewrite = set(), backend.rewrite

    def seen(gm, options):
        report = rewrite(gm, options)
        found.update(shapes(gm.graph))
        return report

    monkeypatch.setattr(models, "randomise", lambda module, seed: [parameter.data.fill_(0.01) for parameter in module.parameters()])  # in little time
    torch._dynamo.reset()
    tts = TTS(models.build(size, "cpu", torch.bfloat16), mode="default", options={"executor": "eager"}, max_seq_len=256)
    call: dict[str, Any] = dict(speaker=models.SPEAKER, language=models.LANGUAGE, max_new_tokens=3)
    with functorch_config.patch(enable_autograd_cache=False), mock.patch.object(backend, "rewrite", seen):
        with pytest.warns(UserWarning, match="cut off by max_new_tokens=3"):
            next(tts.stream_custom_voice("Hello!", **call))
            if size == "1.7b":
                tts.generate_custom_voice(["Hello!"] * 2, **call)
    assert not {str(shape) for shape in found} - TABLE.keys()
    unseen = {"talker head, 0.6B", "embedding, projection"}  # the second is looked up in a table that was projected before
    cases = {(case.op, case.outputs, case.width) for case in CASES if case.name not in unseen}
    of_one_size = {(shape.op, shape.outputs, shape.width) for shape in found}
    assert of_one_size == cases if size == "1.7b" else ("norm_linears", 3072, 1024) in of_one_size
