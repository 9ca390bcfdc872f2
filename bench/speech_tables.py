"""README's tables of frames and of whole speech."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from bench.result_files import Results, markdown

EARLY, LATE = "frames at positions 64 to 164", "frames at positions 1884 to 1984"
FAILS = "fails its check"


def speech(results: Results) -> str:
    """Frames of each way of running the model."""

    def cells(label: str, job: str, row: str = EARLY, memory: str = "memory", bold: bool = False) -> list[str]:
        numbers = [f"{results.figure(job, row, name):.{digits}f}" for name, digits in (("frame", 1 if job == "eager" else 2), ("audio", 2))]
        allocated = results.figure(job, memory, "allocated, frames")
        floor = results.figure(job, row, "floor")
        return [label, *(f"**{number}**" if bold else number for number in numbers), f"{floor:.2f}", f"{allocated:.2f}"]

    rows = [
        cells(f"`base`: {results.package('qwen-tts')}, eager", "eager"),
        cells(results.package("faster-qwen3-tts"), "faster", memory=EARLY),
        cells(f"{results.package('qwen3-tts-triton')}, hybrid", "hybrid", memory=EARLY),
        cells('`faster`: `TTS(backend="inductor")`, reduce-overhead', "inductor"),
        cells('`hybrid`: `TTS`, `backend="qtts"`, reduce-overhead', "qtts", bold=True),
        cells("... at positions 1884 to 1984", "qtts", LATE),
    ]
    if "0.6b" in {row["job"] for row in results.rows}:
        rows.append(cells("... of the 0.6B model", "0.6b"))
    frame = results.row(job="eager", row=EARLY)["figures"]["frame"]
    audio = {job: results.figure(job, "memory", "allocated, with 1984 frames of audio") for job in ("eager", "qtts")}
    compiled = [f"{results.figure('qtts', row, 'compile and capture'):.1f}" for row in ("compile ahead", "compile")]
    first = results.figure("qtts", "first audio after a prompt of 60 tokens", "call to first chunk")
    return f"""{results.source}

{markdown(["", "ms/frame", "audio seconds per second", "floor, ms", "GiB allocated"], rows)}

The eager row is bound by the host and varied from {frame["min"]:.1f} to {frame["max"]:.1f}. With the audio of 1984 frames decoded, eager reaches
{audio["eager"]:.2f} GiB and `TTS` {audio["qtts"]:.2f}. From the call to the first 80 ms of audio, after a prompt of 60 tokens: {first:.1f} ms.
To compile and record our frame takes {compiled[0]} s, and {compiled[1]} s where the compile cache has it: that of the first 256 slots.
What `TTS.warmup()` compiles besides, a frame further on, prompts and the audio's decoder, is in the times of whole starts.
"""


def batches(results: Results) -> str:
    """Texts spoken together."""
    rows = []
    for batch in sorted({int(row["job"].removeprefix("batch-")) for row in results.rows if re.fullmatch(r"batch-\d+", row["job"])}):
        job = f"batch-{batch}"
        memory = results.figure(job, "memory", "allocated, frames")
        rows.append([str(batch), f"{results.figure(job, EARLY, 'frame'):.2f}", f"{results.figure(job, EARLY, 'audio'):.0f}", f"{memory:.2f}"])
    return f"{results.source}\n\n{markdown(['texts together', 'ms/frame', 'audio seconds per second', 'GiB allocated'], rows)}\n"


def starts(results: Results) -> str:
    """From a checkpoint to the first audio, in the process that compiles and, if that was measured, in the next."""
    rows, later = [], []
    for label, job in {"first process": "cold-start", "the next, which finds the compile cache full": "warm-start"}.items():
        if job not in {row["job"] for row in results.rows}:
            continue
        figures = {
            name: results.figure(job, "load to first audio", name) for name in ("sum", "load", "compile", "capture and run", "imports, before")
        }
        numbers = [f"{figures['sum']:.0f}", f"{figures['load']:.1f}", f"{figures['compile']:.0f}", f"{figures['capture and run']:.0f}"]
        rows.append([label, *numbers, f"{figures['imports, before']:.0f}"])
        later.append(f"{results.figure(job, 'first audio to warm', 'sum'):.0f} s")
    titles = ["from a checkpoint in the page cache to the first audio", "seconds", "load", "`torch.compile`", "record and run", "imports, before"]
    after = f"From the first audio until nothing is left to compile, the first process takes another {', the next '.join(later)}."
    return f"{results.source}\n\n{markdown(titles, rows)}\n\n{after}\n"


def decoder(results: Results) -> str:
    """The speech tokenizer's decoder."""
    whole, chunks = "whole decode of 62 frames", "chunks of a stream"

    def ms(row: str, label: str) -> str:
        return f"{results.figure('decoder', row, label):.2f} ms"

    original = f"{ms(chunks, 'original decoder, 1 and 25 before')} (with 25 frames of context)"
    rows = [
        ["5 s of audio (62 frames), whole", ms(whole, "Codec.decode"), ms(whole, "original decoder")],
        ["next frame of a stream", ms(chunks, "frames: 1"), original],
        ["next 8 frames", ms(chunks, "frames: 8"), ""],
    ]
    return f"{results.source}\n\n{markdown(['', '`Codec`', 'original decoder'], rows)}\n"


def _checked(results: Results, level: str, name: str) -> Iterator[tuple[dict[str, Any], dict[str, float]]]:
    """Yield a level's rows with their medians, and with no medians those that begin with ``name`` and chose other codes than the model."""
    timed = results.told(level)
    for row in results.rows:
        if row in timed:
            yield row, {label: figure["median"] for label, figure in row["figures"].items()}
        elif row["row"].startswith(name) and row.get("error", "").startswith("parity: "):
            yield row, {}


def frame(results: Results) -> str:
    """Every mode, batch and position of ``qtts bench frame``, those too that chose other codes than the model."""
    rows = []
    for row, figures in _checked(results, "frame", "frames at"):
        numbers = [FAILS, "", "", ""]
        if figures:
            numbers = [*(f"{figures[label]:.2f}" for label in ("frame", "audio", "floor")), f"{figures['keys and values read']:.0f}"]
        rows.append([f"`{row['mode']}`", row["size"], str(row["batch"]), row["row"].split()[3], *numbers])
    titles = ["mode", "size", "texts", "position", "ms/frame", "audio seconds per second", "floor, ms", "keys and values, MB"]
    return f"{results.source}\n\n{markdown(titles, rows)}\n"


def e2e(results: Results) -> str:
    """Every mode of ``qtts bench e2e``, those too that chose other codes than the model."""
    labels = ("load", "first call", "of it torch.compile", "call to first audio", "x real time", "allocated, text to waveform")
    rows = []
    for row, figures in _checked(results, "e2e", "text to waveform"):
        numbers = [f"{figures[label]:.1f}" if label in figures else "" for label in labels] if figures else [FAILS, *[""] * (len(labels) - 1)]
        rows.append([f"`{row['mode']}`", row["size"], *numbers])
    titles = ["mode", "size", "load, s", "first call, s", "of it `torch.compile`", "first audio, ms", "x real time", "GiB allocated"]
    return f"{results.source}\n\n{markdown(titles, rows)}\n"
