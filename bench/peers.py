"""Rows of the peers: qwen-tts as it is, faster-qwen3-tts, and what qwen3-tts-triton makes of both."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from transformers import DynamicCache

from bench import models
from bench.breakdown import trace
from bench.reads import cache_figures, read_figures
from bench.run import Run
from bench.task import CHECKED_FRAMES, PROMPT, SAMPLED, Task, check, enter_speed, generate, staggered
from bench.timing import COMPILE, figure, forget_memory_peak, memory, milliseconds
from qtts_compile.transformers_cache import TurboQuantCache
from qtts_compile.turboquant_cache import TurboQuantKVCache

SLOTS = 2048


def generated(
    run: Run,
    size: models.Size = "1.7b",
    batch: int = 1,
    slots: int = SLOTS,
    positions: Sequence[int] = (),
    peer: str | None = None,
    kv_cache: str = "bf16",
) -> None:
    """Time ``talker.generate`` of the model as it is, with a quantised cache, or as a ``peer``'s mode leaves it, and take a cache's memory."""
    size = "tiny" if run.tiny else size
    tts = models.build(size, run.device, run.dtype)
    talker = tts.model.talker
    cache = None if peer is None else patch_generate(tts, peer)
    judge = talker if peer is None else models.build(size, run.device, run.dtype).model.talker
    packed = hand_in(talker, batch, slots, kv_cache, size)
    for position in positions or (PROMPT,):
        lengths = staggered(position, batch)
        with run.row(f"frames at positions {position} to {position + run.frames}") as row:
            greedy = Task.of(talker, lengths, CHECKED_FRAMES, greedy=True)
            row["check"] = check(judge, greedy, generate(talker, greedy), packed)
            if cache is not None:
                row["note"] = told_by(cache)
            task = Task.of(talker, lengths, run.frames)
            prompt = Task(task.arguments | dict(max_new_tokens=1, min_new_tokens=1))

            def frame(task: Task, prompt: Task) -> float:
                # What generate takes for the prompt and the first code is taken off.
                took = milliseconds(lambda: talker.generate(**task.arguments)) - milliseconds(lambda: talker.generate(**prompt.arguments))
                return took / task.frames

            with torch.inference_mode():
                enter_speed(row, [frame(task, prompt) for _ in range(3)], batch)
            row["figures"] |= read_figures(talker, position, run.frames, batch, packed) | (cache_figures(packed) if packed else {})
    if packed:
        with run.row("memory") as row:
            forget_memory_peak()
            generate(talker, Task.of(talker, staggered(PROMPT, batch), run.frames))
            row |= {"figures": memory("frames"), "note": f"{slots} slots"}
    elif peer is None and batch == 1:
        enter_memory(run, tts, slots)
    if run.profile and not run.tiny:
        lengths = staggered((positions or (PROMPT,))[0], batch)
        trace(run, lambda frames: generate(talker, Task.of(talker, lengths, frames)), talker, lengths[0], batch)


def enter_memory(run: Run, tts: Any, slots: int) -> None:
    """Take the memory of a cache grown to ``slots`` positions, and of the audio to it."""
    with run.row("memory") as row:
        forget_memory_peak()
        with torch.inference_mode():
            _grow(tts.model.talker, slots)
            row["figures"] = memory("frames")
            tts.model.speech_tokenizer.decode({"audio_codes": torch.zeros(slots - PROMPT, 16, dtype=torch.long, device=run.device)})
            row["figures"] |= memory(f"with {slots - PROMPT} frames of audio")
        row["note"] = f"cache grown to {slots} positions, without the hidden states that generate() keeps"


def hand_in(talker: Any, batch: int, slots: int, kv_cache: str, size: models.Size) -> TurboQuantKVCache | None:
    """Let ``talker.generate`` use a quantised cache of this format, which is returned; the whole model's ``generate`` would not hand one on."""
    if kv_cache == "bf16":
        return None
    parameter, generate = next(talker.parameters()), talker.generate
    protect = models.protection(size, kv_cache)
    cache = TurboQuantCache(talker.config, batch, slots, kv_cache, protect, dtype=parameter.dtype, device=parameter.device)

    def with_cache(**arguments: Any) -> Any:
        cache.reset()
        cache.start = arguments["attention_mask"].argmax(1)
        return generate(**arguments, past_key_values=cache)

    talker.generate = with_cache
    return cache.packed


def patch_generate(tts: Any, mode: str) -> Any:
    """Do to a loaded model what qwen3-tts-triton's runner of this mode does after loading, and return its TurboQuant cache, if it has one."""
    from qwen3_tts_triton.models import create_runner  # pyright: ignore[reportMissingImports]
    from qwen3_tts_triton.models.patching import apply_triton_kernels  # pyright: ignore[reportMissingImports]

    runner = create_runner(mode, device=str(tts.model.device))
    runner._tts = tts
    if runner.enable_turboquant:
        runner._init_turboquant_cache()
    if mode.startswith("triton"):
        apply_triton_kernels(tts.model, patch_range=runner.patch_range)
    return runner._tq_cache


def patch_graphs(tts: Any, turboquant: bool) -> Any:
    """Do to the model inside faster-qwen3-tts what qwen3-tts-triton's hybrid runner does, and return its TurboQuant cache, if it has one."""
    from qwen3_tts_triton.models.patching import apply_triton_kernels  # pyright: ignore[reportMissingImports]
    from qwen3_tts_triton.models.triton_faster_runner import TritonFasterRunner  # pyright: ignore[reportMissingImports]

    runner = TritonFasterRunner(enable_turboquant=turboquant)
    apply_triton_kernels(tts.model, patch_range=runner.patch_range)
    if not turboquant:
        return None
    runner.model = SimpleNamespace(model=tts)
    runner._init_turboquant_hybrid()
    return runner._tq_cache


def told_by(cache: Any) -> str:
    """Say whether the peer's TurboQuant cache was used at all, and what it holds."""
    if not cache.is_initialized:
        return "TurboQuant never ran: its cache holds nothing after these frames"
    stats = cache.get_memory_stats()
    unpacked = sum(tensor.nbytes for tensor in (*cache._deq_keys, *cache._deq_values) if tensor is not None) / 2**20
    return f"TurboQuant's cache holds {stats['compressed_mb']:.1f} MiB packed and {unpacked:.1f} MiB unpacked beside it"


class Graphs:
    """The two CUDA graphs of faster-qwen3-tts around a loaded model."""

    def __init__(self, talker: Any, slots: int) -> None:
        from faster_qwen3_tts.talker_graph import TalkerGraph  # pyright: ignore[reportMissingImports]

        self.talker = talker
        self.step = self._captured(TalkerGraph(talker.model, talker.config, max_seq_len=slots))
        self.sampled = self.predictor(True)

    @functools.cached_property
    def greedy(self) -> Any:
        """The graph of the code predictor that chooses greedily."""
        return self.predictor(False)

    def predictor(self, do_sample: bool) -> Any:
        """Return a graph of the code predictor that samples or chooses greedily."""
        from faster_qwen3_tts.predictor_graph import PredictorGraph  # pyright: ignore[reportMissingImports]

        config = self.talker.config
        graph = PredictorGraph(self.talker.code_predictor, config.code_predictor_config, config.hidden_size, do_sample=do_sample)
        return self._captured(graph)

    def speak(self, task: Task, predictor: Any = None) -> tuple[torch.Tensor, float]:
        """Return a task's codes ``[F, groups]`` and the milliseconds of a frame."""
        from faster_qwen3_tts.generate import fast_generate  # pyright: ignore[reportMissingImports]

        inputs, names = task.inputs, ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
        settings: dict[str, Any] = {name: task.arguments[name] for name in names} | dict(max_new_tokens=task.frames, min_new_tokens=task.frames)
        given = (inputs.embeds, inputs.mask, inputs.text, inputs.pad, self.talker.config, predictor or self.sampled, self.step)
        codes, timing = fast_generate(self.talker, *given, **settings)
        if codes is None or len(codes) != task.frames:
            raise RuntimeError(f"{0 if codes is None else len(codes)} frames were made instead of {task.frames}")
        return codes, timing["ms_per_step"]

    def _captured(self, graph: Any) -> Any:
        with contextlib.redirect_stdout(sys.stderr):  # it tells of each step
            graph.capture()
        return graph


def graphs(
    run: Run,
    size: models.Size = "1.7b",
    batch: int = 1,
    slots: int = SLOTS,
    positions: Sequence[int] = (),
    patched: bool = False,
    turboquant: bool = False,
) -> None:
    """Time faster-qwen3-tts's two CUDA graphs, with the model ``patched`` by qwen3-tts-triton or as it is."""
    tts = models.build(size, run.device, run.dtype)
    talker: Any = tts.model.talker
    cache = patch_graphs(tts, turboquant) if patched else None
    forget_memory_peak()
    with run.row("capture") as row:
        started = time.perf_counter()
        graphs = Graphs(talker, slots)
        row["figures"] = {COMPILE: figure(time.perf_counter() - started, "s")}
    judge: Any = None
    for position in positions or (PROMPT,):
        with run.row(f"frames at positions {position} to {position + run.frames}") as row:
            task = Task.of(talker, [position], run.frames)
            graphs.speak(task)
            times = [graphs.speak(task)[1] for _ in range(run.repeats)]
            used = memory("frames") if judge is None else {}  # which takes memory of its own
            # The patches stand in the model itself, so a model of its own judges.
            judge = judge or (models.build(size, run.device, run.dtype).model.talker if patched else talker)
            greedy = Task.of(talker, [position], CHECKED_FRAMES, greedy=True)
            row["check"] = check(judge, greedy, graphs.speak(greedy, graphs.greedy)[0][None])
            if cache is not None:
                row["note"] = told_by(cache)
            enter_speed(row, times)
            row["figures"] |= used | read_figures(talker, position, run.frames, batch)
    if run.profile:
        first = (positions or (PROMPT,))[0]
        trace(run, lambda frames: graphs.speak(Task.of(talker, [first], frames)), talker, first)


def _grow(talker: Any, positions: int) -> None:
    """Fill the cache up to ``positions``, in pieces of the prompt's size, which takes the least memory, and by the model's own frames at the end."""
    inputs = Task.of(talker, [PROMPT], 1).inputs
    cache, end = DynamicCache(config=talker.config), positions - CHECKED_FRAMES
    hidden = inputs.embeds
    for start in [*range(0, end, PROMPT), *range(end, positions)]:
        length = min(PROMPT, end - start) if start < end else 1
        places = torch.arange(start, start + length, device=hidden.device)
        arguments: dict[str, Any] = dict(position_ids=places.expand(3, 1, -1), cache_position=places, past_key_values=cache, use_cache=True)
        if start < end:
            hidden = talker.model(inputs_embeds=inputs.embeds[:, :length], **arguments).last_hidden_state[:, -1:]
            continue
        token = talker.codec_head(hidden).argmax(-1)
        arguments |= dict(past_hidden=hidden, trailing_text_hidden=inputs.text, tts_pad_embed=inputs.pad, generation_step=0)
        arguments |= {name: value for name, value in SAMPLED.items() if name.startswith("subtalker")}
        hidden = talker(input_ids=token, **arguments).past_hidden
