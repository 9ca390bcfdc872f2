"""Rows of the peers: qwen-tts as it is, faster-qwen3-tts, and qwen3-tts-triton's hybrid of its kernels with the former's CUDA graphs."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

import torch
from transformers import DynamicCache

from bench import models
from bench.task import CHECKED_FRAMES, PROMPT, SAMPLED, Task, check, enter_speed, generate
from bench.timing import COMPILE, figure, forget_memory_peak, memory, milliseconds
from bench.worker import Run

SLOTS = 2048
HYBRID_LAYERS = (0, 24)  # the layers that qwen3-tts-triton's hybrid runner patches by default


def eager(run: Run, size: models.Size = "1.7b") -> None:
    """Time ``talker.generate``, and take the memory of a cache grown to ``SLOTS`` positions and of the audio to it."""
    tts = models.build("tiny" if run.tiny else size, run.device, run.dtype)
    talker = tts.model.talker
    with run.row(f"frames at positions {PROMPT} to {PROMPT + run.frames}") as row:
        greedy = Task.of(talker, [PROMPT], CHECKED_FRAMES, greedy=True)
        row["check"] = check(talker, greedy, generate(talker, greedy))
        task = Task.of(talker, [PROMPT], run.frames)
        prompt = Task(task.arguments | dict(max_new_tokens=1, min_new_tokens=1))

        def frame() -> float:
            # What generate takes for the prompt and the first code is taken off.
            return (milliseconds(lambda: talker.generate(**task.arguments)) - milliseconds(lambda: talker.generate(**prompt.arguments))) / task.frames

        with torch.inference_mode():
            enter_speed(row, [frame() for _ in range(3)])
    with run.row("memory") as row:
        forget_memory_peak()
        with torch.inference_mode():
            _grow(talker, SLOTS)
            row["figures"] = memory("frames")
            tts.model.speech_tokenizer.decode({"audio_codes": torch.zeros(SLOTS - PROMPT, 16, dtype=torch.long, device=run.device)})
            row["figures"] |= memory(f"with {SLOTS - PROMPT} frames of audio")
        row["note"] = f"cache grown to {SLOTS} positions, without the hidden states that generate() keeps"


def graphs(run: Run, patched: bool, size: models.Size = "1.7b") -> None:
    """Time faster-qwen3-tts's two CUDA graphs, with the model ``patched`` by qwen3-tts-triton or as it is."""
    from faster_qwen3_tts.generate import fast_generate  # pyright: ignore[reportMissingImports]
    from faster_qwen3_tts.predictor_graph import PredictorGraph  # pyright: ignore[reportMissingImports]
    from faster_qwen3_tts.talker_graph import TalkerGraph  # pyright: ignore[reportMissingImports]

    tts = models.build(size, run.device, run.dtype)
    talker: Any = tts.model.talker
    if patched:
        from qwen3_tts_triton.models.patching import apply_triton_kernels  # pyright: ignore[reportMissingImports]

        apply_triton_kernels(tts.model, patch_range=HYBRID_LAYERS)
    forget_memory_peak()

    def captured(graph: Any) -> Any:
        with contextlib.redirect_stdout(sys.stderr):  # it tells of each step
            graph.capture()
        return graph

    def predictor(do_sample: bool) -> Any:
        config = talker.config
        return captured(PredictorGraph(talker.code_predictor, config.code_predictor_config, config.hidden_size, do_sample=do_sample))

    with run.row("capture") as row:
        started = time.perf_counter()
        sampled, step = predictor(True), captured(TalkerGraph(talker.model, talker.config, max_seq_len=SLOTS))
        row["figures"] = {COMPILE: figure(time.perf_counter() - started, "s")}

    def speak(task: Task, graph: Any) -> tuple[torch.Tensor, float]:
        inputs, names = task.inputs, ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
        settings: dict[str, Any] = {name: task.arguments[name] for name in names} | dict(max_new_tokens=task.frames, min_new_tokens=task.frames)
        codes, timing = fast_generate(talker, inputs.embeds, inputs.mask, inputs.text, inputs.pad, talker.config, graph, step, **settings)
        if codes is None or len(codes) != task.frames:
            raise RuntimeError(f"{0 if codes is None else len(codes)} frames were made instead of {task.frames}")
        return codes, timing["ms_per_step"]

    with run.row(f"frames at positions {PROMPT} to {PROMPT + run.frames}") as row:
        task = Task.of(talker, [PROMPT], run.frames)
        speak(task, sampled)
        times = [speak(task, sampled)[1] for _ in range(run.repeats)]
        used = memory("frames")
        greedy = Task.of(talker, [PROMPT], CHECKED_FRAMES, greedy=True)
        codes = speak(greedy, predictor(False))[0]
        # The patches stand in the model itself, so a model of its own judges.
        judge = models.build(size, run.device, run.dtype).model.talker if patched else talker
        row["check"] = check(judge, greedy, codes[None])
        enter_speed(row, times)
        row["figures"] |= used


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
