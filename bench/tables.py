"""README's tables, each made of one file of bench/results."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.registry import MODES

RESULTS = Path(__file__).parent / "results"
# How a run was kept in bounds and where it wrote does not change what it measured.
UNSHOWN = ("--json", "--table", "--folder", "--profile", "--budget", "--time-limit")
EARLY, LATE = "frames at positions 64 to 164", "frames at positions 1884 to 1984"


class Results:
    """One file of bench/results."""

    def __init__(self, name: str) -> None:
        self.name = name
        file = RESULTS / f"{name}.json"
        if not file.is_file():
            raise LookupError(
                f"README names results {name!r} and there is no {file}; there are {', '.join(sorted(path.stem for path in RESULTS.glob('*.json')))}"
            )
        content = json.loads(file.read_text())
        self.machine, self.rows = content["machine"], content["rows"]
        self.command = shown_command(content["command"])

    @property
    def source(self) -> str:
        """A sentence on where, when and how."""
        versions = ", ".join(f"{name} {self.machine[name]}" for name in ("torch", "triton", "transformers"))
        return f"{self.machine['gpu']}, {versions}, {self.machine['date']}: `{self.command}` (`bench/results/{self.name}.json`)."

    def row(self, **wanted: str) -> dict[str, Any]:
        """Return the row that has these values.

        Raises LookupError unless there is exactly one, and where it failed.
        """
        found = [row for row in self.rows if all(row.get(key) == value for key, value in wanted.items())]
        if len(found) != 1 or "error" in found[0] or found[0].get("ms", 0) is None:
            what = found[0].get("error", "a failed check") if len(found) == 1 else f"{len(found)} rows"
            raise LookupError(f"bench/results/{self.name}.json, {wanted}: {what}; measure it again, or take it out of README")
        return found[0]

    def figure(self, job: str, row: str, label: str, end: str = "median") -> float:
        """Return a figure of a row."""
        return self.row(job=job, row=row)["figures"][label][end]

    def told(self, level: str) -> list[dict[str, Any]]:
        """Return the rows of a level of ``qtts bench`` that have a figure of speed.

        Raises LookupError if there are none.
        """
        speed = {"kernels": "kernel", "frame": "frame", "e2e": "x real time"}[level]
        found = [row for row in self.rows if row["job"].split()[0] == level and speed in row.get("figures", {})]
        if not found:
            raise LookupError(f"bench/results/{self.name}.json has no rows of `qtts bench {level}`")
        return found

    def package(self, name: str) -> str:
        """Return a package with the version it had."""
        return f"{name} {self.machine[name]}"


def shown_command(command: str) -> str:
    """Return a command without the options that do not change what it measures."""
    words, shown = iter(shlex.split(command)), []
    for word in words:
        if word in UNSHOWN:
            next(words, None)
        else:
            shown.append(word)
    return shlex.join(shown)


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows)).replace("|  |", "| |")


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
        cells("... of the 0.6B model", "0.6b"),
    ]
    frame = results.row(job="eager", row=EARLY)["figures"]["frame"]
    audio = {job: results.figure(job, "memory", "allocated, with 1984 frames of audio") for job in ("eager", "qtts")}
    first = results.figure("qtts", "first audio after a prompt of 60 tokens", "call to first chunk")
    return f"""{results.source}

{markdown(["", "ms/frame", "audio seconds per second", "floor, ms", "GiB allocated"], rows)}

The eager row is bound by the host and varied from {frame["min"]:.1f} to {frame["max"]:.1f}. With the audio of 1984 frames decoded, eager reaches
{audio["eager"]:.2f} GiB and `TTS` {audio["qtts"]:.2f}. From the call to the first 80 ms of audio, after a prompt of 60 tokens: {first:.1f} ms.
"""


def batches(results: Results) -> str:
    """Texts spoken together."""
    rows = []
    for batch in sorted({int(row["job"].removeprefix("batch-")) for row in results.rows if re.fullmatch(r"batch-\d+", row["job"])}):
        job = f"batch-{batch}"
        memory = results.figure(job, "memory", "allocated, frames")
        rows.append([str(batch), f"{results.figure(job, EARLY, 'frame'):.2f}", f"{results.figure(job, EARLY, 'audio'):.0f}", f"{memory:.2f}"])
    return f"{results.source}\n\n{markdown(['texts together', 'ms/frame', 'audio seconds per second', 'GiB allocated'], rows)}\n"


def context(results: Results) -> str:
    """Frames late in a long cache, and the bytes of keys and values that they read."""
    rows = []
    for row in (row for row in results.rows if row["job"] == "8192-slots" and "ms_per_frame" in row):
        frame, kept, floor = (results.figure(row["job"], row["row"], label) for label in ("frame", "keys and values read", "floor"))
        rows.append([row["row"].removeprefix("frames at positions "), f"{frame:.2f}", f"{kept:.0f}", f"{floor:.2f}"])
    return f"{results.source}\n\n{markdown(['positions', 'ms/frame', 'keys and values read, MB', 'floor, ms'], rows)}\n"


def starts(results: Results) -> str:
    """From a checkpoint to the first audio, in the process that compiles and, if that was measured, in the next."""
    rows, later = [], ""
    for label, job in {"first process": "cold-start", "the next, which finds the compile cache full": "warm-start"}.items():
        if job not in {row["job"] for row in results.rows}:
            continue
        figures = {
            name: results.figure(job, "load to first audio", name) for name in ("sum", "load", "compile", "capture and run", "imports, before")
        }
        numbers = [f"{figures['sum']:.0f}", f"{figures['load']:.1f}", f"{figures['compile']:.0f}", f"{figures['capture and run']:.0f}"]
        rows.append([label, *numbers, f"{figures['imports, before']:.0f}"])
        later = later or f"{results.figure(job, 'first audio to warm', 'sum'):.0f}"
    titles = ["from a checkpoint in the page cache to the first audio", "seconds", "load", "`torch.compile`", "record and run", "imports, before"]
    after = f"From the first audio until nothing is left to compile, the first process takes another {later} s."
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


def decode_step(results: Results) -> str:
    """A stack's step, and what each rewrite is worth in it; a rewrite that does not stand in the step is left out."""

    def cells(label: str, variant: str, bold: bool = False) -> list[str]:
        ms = [results.row(part=part, variant=variant)["ms"] for part in ("talker", "predictor")]
        numbers = [f"{ms[0]:.{2 if ms[0] > 10 else 3}f}", f"{ms[1]:.3f}"]
        return [label, *(f"**{number}**" if bold else number for number in numbers)]

    best = "qtts reduce-overhead"
    rows = [
        cells("eager", "eager"),
        cells('`backend="qtts"`', "qtts default"),
        cells('`backend="inductor"`, reduce-overhead', "inductor reduce-overhead"),
        cells('`backend="qtts"`, reduce-overhead', best, bold=True),
    ]
    whole = results.row(part="talker", variant=best)["kernels"]
    for row in sorted((row for row in results.rows if row["part"] == "talker"), key=lambda row: -(row["ms"] or 0)):
        if row["variant"].startswith(f"{best}, ") and row["kernels"] != whole:
            rows.append(cells(f"... {row['variant'].removeprefix(f'{best}, ')}", row["variant"]))
    return f"{results.source}\n\n{markdown(['ms', 'talker step', 'code predictor step'], rows)}\n"


def linears(results: Results) -> str:
    """The linear kernels of one row, as the package launches them on this GPU."""
    rows = []
    for row in (row for row in results.rows if row["rows"] == 1):
        us = row["launches"][0]["us"]
        achieved, share = f"{row['weight_bytes'] / us / 1e6:.2f}", f"{100 * row['floor_us'] / us:.0f}%"
        rows.append([row["case"], f"{row['outputs']} x {row['width']}", f"{us:.2f}", achieved, share, f"{row['library_us']:.2f}"])
    titles = ["kernel", "outputs x width", "us", "TB/s", "of the floor", "cuBLAS and a kernel for each other step, us"]
    return f"{results.source}\n\n{markdown(titles, rows)}\n"


def boundaries(results: Results) -> str:
    """What a step costs that waits for all of the last, as a kernel and as a round of a persistent one."""
    rows = [
        [f"{row['programs']} of {row['warps']} warps", *(f"{row[name]:.2f}" for name in ("kernels_us", "pdl_us", "persistent_us"))]
        for row in results.rows
    ]
    titles = ["programs", "a kernel each, us", "... launched early (PDL)", "a round of one persistent kernel"]
    return f"{results.source}\n\n{markdown(titles, rows)}\n"


def kernels(results: Results) -> str:
    """Every kernel of ``qtts bench kernels``."""
    rows = []
    for row in results.told("kernels"):
        figures = {label: f"{figure['median']:.2f}" for label, figure in row["figures"].items()}
        share = f"{row['figures']['of the floor']['median']:.0f}%" if "of the floor" in figures else ""
        rows.append(
            [
                row["row"],
                *(figures.get(label, "") for label in ("kernel", "achieved")),
                share,
                *(figures.get(label, "") for label in ("PyTorch's own", "Inductor")),
            ]
        )
    titles = ["shape", "us", "TB/s", "of the floor", "PyTorch's own, us", "Inductor, us"]
    return f"{results.source}\n\n{markdown(titles, rows)}\n"


def frame(results: Results) -> str:
    """Every mode, batch and position of ``qtts bench frame``."""
    rows = []
    for row in results.told("frame"):
        figures = {label: figure["median"] for label, figure in row["figures"].items()}
        place = row["row"].split()[3]
        numbers = [f"{figures[label]:.2f}" for label in ("frame", "audio", "floor")]
        rows.append([f"`{row['mode']}`", row["size"], str(row["batch"]), place, *numbers, f"{figures['keys and values read']:.0f}"])
    titles = ["mode", "size", "texts", "position", "ms/frame", "audio seconds per second", "floor, ms", "keys and values, MB"]
    return f"{results.source}\n\n{markdown(titles, rows)}\n"


def e2e(results: Results) -> str:
    """Every mode of ``qtts bench e2e``."""
    rows = []
    for row in results.told("e2e"):
        figures = {label: figure["median"] for label, figure in row["figures"].items()}
        labels = ("load", "first call", "of it torch.compile", "first audio", "x real time", "allocated, text to waveform")
        rows.append([f"`{row['mode']}`", row["size"], *(f"{figures[label]:.1f}" for label in labels)])
    titles = ["mode", "size", "load, s", "first call, s", "of it `torch.compile`", "first audio, ms", "x real time", "GiB allocated"]
    return f"{results.source}\n\n{markdown(titles, rows)}\n"


def caches(results: Results) -> str:
    """Frames over each kind of cache, what they read of it and what it takes."""
    rows = []
    for row in (row for row in results.rows if "ms_per_frame" in row and "cache" in row["figures"]):
        figures = {label: figure["median"] for label, figure in row["figures"].items()}
        place = [str(row["batch"]), str(row["slots"]), row["row"].split()[3]]
        numbers = [f"{figures['frame']:.2f}", f"{figures['floor']:.2f}", f"{figures['keys and values read']:.0f}", f"{figures['cache']:.0f}"]
        memory = f"{results.figure(row['job'], 'memory', 'allocated, frames'):.2f}"
        kv_cache = row.get("kv_cache") or MODES[row["mode"]].arguments.get("kv_cache", "bf16")
        rows.append([row["size"].upper(), f"`{kv_cache}`", *place, *numbers, memory])
    titles = ["model", "cache", "texts", "slots", "position", "ms/frame", "floor, ms", "keys and values read, MB", "cache, MiB", "GiB allocated"]
    return f"{results.source}\n\n{markdown(titles, rows)}\n"


def quantized_attention(results: Results) -> str:
    """Attention of a decode step over each kind of cache, and how many times as fast as over bfloat16."""
    if failed := [row for row in results.rows if not row["us"]]:
        raise LookupError(f"bench/results/{results.name}.json, {failed[0]['format']}: a failed check; measure it again, or take it out of README")
    formats = list(dict.fromkeys(row["format"] for row in results.rows))
    places: dict[tuple[int, int], dict[str, str]] = {}
    for row in results.rows:
        ratio = f" ({row['bf16_us'] / row['us']:.2f}x)" if row["bf16_us"] and row["format"] != "bf16" else ""
        places.setdefault((row["batch"], row["position"]), {})[row["format"]] = f"{row['us']:.2f}{ratio}"
    rows = [[str(batch), str(position), *(cells.get(name, "") for name in formats)] for (batch, position), cells in places.items()]
    return f"{results.source}\n\n{markdown(['texts', 'position', *(f'{name}, us' for name in formats)], rows)}\n"


def quality(results: Results) -> str:
    """What each quantised cache does to a model that hears an unquantised trajectory, to random keys, and to speech that goes its own way."""
    parts = {part: [row for row in results.rows if row["part"] == part] for part in ("model", "synthetic", "free")}
    if missing := [part for part in ("model", "synthetic") if not parts[part]]:
        raise LookupError(f"bench/results/{results.name}.json has no rows of the part {missing[0]}")
    model = [
        [f"`{row['format']}`", row["protected"], f"{row['of_dense']:.0%}", f"{row['cosine']:.4f} ({row['worst_cosine']:.4f})", f"{row['kl']:.5f}"]
        + [f"{row['kl_p99']:.5f}", f"{row['top1']:.1%}", f"{row['eos_drift']:+.4f}", row["verdict"]]
        for row in parts["model"]
    ]
    keys = [
        [
            f"`{row['format']}`",
            row["keys"],
            f"{row['cosine']:.4f}",
            f"{row['kl']:.4f}",
            f"{row['top1']:.1%} ({row['top1_clear']:.1%})",
            row["verdict"],
        ]
        for row in parts["synthetic"]
        if row["protected"] == "default"
    ]
    free = [
        [" ".join((f"`{row['format']}`", row["protected"])).strip(), f"{row['duration_ratio']:.2f}", f"{row['at_cap']:.0%}"]
        + [f"{row['frames_until_parted']:.1f}"]
        for row in parts["free"]
    ]
    of_model = ["cache", "protected", "bytes of bf16's", "attention cosine (worst layer)", "mean KL", "p99 KL", "top-1", "end of speech", "limits"]
    tables = [
        markdown(of_model, model),
        markdown(["cache", "keys", "attention cosine", "mean KL", "top-1 (without near ties)", "limits"], keys),
    ]
    if free:
        tables.append(markdown(["cache", "frames of bf16's", "never ended", "frames until the first other code"], free))
    return "\n\n".join([results.source, *tables]) + "\n"


TABLES: dict[str, Callable[[Results], str]] = {
    "speech": speech,
    "batches": batches,
    "context": context,
    "starts": starts,
    "decoder": decoder,
    "decode-step": decode_step,
    "linears": linears,
    "boundaries": boundaries,
    "kernels": kernels,
    "frame": frame,
    "e2e": e2e,
    "caches": caches,
    "quantized-attention": quantized_attention,
    "quality": quality,
}
