"""The speech tokenizer's decoder, compiled: how few graphs and launches serve codes of any length."""

import functools

import pytest
import torch
from test_codec import build, close, codes_of, push, whole
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx

from qtts_compile import collect
from qtts_compile.codec import Codec
from qtts_compile.launcher import Launcher
from qtts_compile.streaming_decoder import Stateful, StreamingDecoder

CPU = torch.device("cpu")


def launched_sizes(codec, call):
    sizes, run = [], codec._run
    codec._run = lambda chunk: sizes.append(chunk.shape[-1]) or run(chunk)
    call()
    codec._run = run
    return sizes


def test_few_launches():
    model = build("smallest")
    torch._dynamo.reset()
    compiled, plain = Codec(model, launcher=Launcher(CPU, "default", "eager")), Codec(model)
    codes = codes_of(model, 150)[0].T

    def sizes(codec, frames, how):
        return launched_sizes(codec, lambda: getattr(codec, how)(codes[:frames]))

    assert sizes(compiled, 62, "decode") == [64]
    assert sizes(compiled, 150, "decode") == [64, 64, 32]
    assert sizes(compiled, 128, "decode") == [64, 64]
    assert sizes(compiled, 62, "push") == [32, 16, 8, 4, 2]
    assert sizes(compiled, 129, "push") == [64, 64, 1]
    assert sizes(plain, 62, "decode") == sizes(plain, 62, "push") == [62]
    assert sizes(plain, 129, "push") == [64, 64, 1]
    warmed = launched_sizes(compiled, compiled.warmup)
    assert warmed == [size for size in (64, 32, 16, 8, 4, 2, 1) for _ in range(2)]


def test_two_graphs_serve_every_size_and_gradient_mode():
    model = build("smallest")
    codes = codes_of(model, 40)
    expected, rows = whole(model, codes)[0], codes[0].T
    torch._dynamo.reset()
    counters.clear()
    with collect() as report:
        codec = Codec(model, launcher=Launcher(CPU, "default", options={"executor": "eager"}))
        with torch.inference_mode():
            close(push(codec, rows, [1, 2, 3, 9, 1, 16]), expected)
        close(codec.decode(rows[5:], context=rows[:5]), expected[5 * codec.samples_per_frame :])
    assert counters["stats"]["unique_graphs"] == 2 and report.graph_breaks == []
    assert report.kernels["swiglu"] and report.kernels["rms_norm"]


@pytest.mark.parametrize("backend", ["qtts", "inductor"])
def test_generated_code_computes_the_same(backend):
    model = build("smallest")
    codes = codes_of(model, 28)
    expected = whole(model, codes)[0]
    torch._dynamo.reset()
    codec = Codec(model, launcher=Launcher(CPU, "default", backend), sizes=(1, 2, 8))
    close(push(codec, codes[0].T, [2, 12, 4, 10]), expected)
    close(codec.decode(codes[0].T), expected)


def test_what_a_graph_writes_lies_in_fixed_memory():
    """CUDA graphs are skipped for a graph that writes to an input whose address may change."""
    model, seen = build("smallest"), []

    def look(gm, example_inputs, static_input_idxs=(), **kwargs):
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        written = [node.args[0] for node in gm.graph.nodes if node.target is torch.ops.aten.copy_.default]
        seen.append(([placeholders.index(node) for node in written], list(static_input_idxs)))
        return gm.forward

    torch._dynamo.reset()
    decoder = StreamingDecoder(model.decoder)
    run = torch.compile(decoder, backend=functools.partial(compile_fx, inner_compile=look), fullgraph=True)
    with torch.no_grad():
        run(codes_of(model, 4))
    ((written, static),) = seen
    states = [buffer for module in decoder.modules() if isinstance(module, Stateful) for buffer in module.buffers(recurse=False)]
    assert len(written) == len(states) and set(written) <= set(static)
