"""README's tables of quantised caches."""

from __future__ import annotations

from typing import Any

from bench.registry import MODES
from bench.result_files import Results, markdown
from bench.timing import PROMPTED


def caches(results: Results, least_texts: int = 1) -> str:
    """Frames over each kind of cache, what they read of it and what it takes, of at least so many texts together."""
    rows = []
    for row in (row for row in results.rows if "ms_per_frame" in row and "cache" in row["figures"] and row["batch"] >= least_texts):
        figures = {label: figure["median"] for label, figure in row["figures"].items()}
        place = [str(row["batch"]), str(row["slots"]), row["row"].split()[3]]
        numbers = [f"{figures['frame']:.2f}", f"{figures['floor']:.2f}", f"{figures['keys and values read']:.0f}", f"{figures['cache']:.0f}"]
        # Runs up to 2026-11-28 measured it once, at the first position.
        allocated = figures.get(f"allocated, {PROMPTED}") or results.figure(row["job"], "memory", "allocated, frames")
        kv_cache = row.get("kv_cache") or MODES[row["mode"]].arguments.get("kv_cache", "bf16")
        rows.append([row["size"].upper(), f"`{kv_cache}`", *place, *numbers, f"{allocated:.2f}"])
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


def attention_parts(results: Results) -> str:
    """The same by the number of parts into which each key head of each text is divided."""
    tried = [{entry["parts"]: entry["us"] for entry in row["search"] if "parts" in entry} for row in results.rows]
    parts = sorted({number for times in tried for number in times})
    if not parts:
        raise LookupError(f"bench/results/{results.name}.json has no parts; measure it with --parts")
    rows = [
        [f"`{row['format']}`", str(row["batch"]), str(row["position"]), *(f"{times[number]:.2f}" if number in times else "" for number in parts)]
        for row, times in zip(results.rows, tried)
    ]
    titles = ["cache", "texts", "position", *(f"{number} parts, us" if number else "one thread block each, us" for number in parts)]
    return f"{results.source}\n\n{markdown(titles, rows)}\n"


def layers(results: Results) -> str:
    """A talker's layer as it stands in a frame, by texts, kind of cache, slots and position, and how many times as fast as over bfloat16."""
    talkers = [row for row in results.rows if row["stack"] == "talker"]
    places: dict[tuple[int, int, int], dict[str, float]] = {}
    for row in talkers:
        places.setdefault((row.get("texts", 1), row["slots"], row["position"]), {})[row["kv_cache"]] = row["us"][-1]
    formats = list(dict.fromkeys(row["kv_cache"] for row in talkers))

    def cell(us: dict[str, float], name: str) -> str:
        if name not in us:
            return ""
        ratio = "" if name == "bf16" or "bf16" not in us else f" ({us['bf16'] / us[name]:.2f}x)"
        return f"{us[name]:.2f}{ratio}"

    rows = [[*map(str, place), *(cell(us, name) for name in formats)] for place, us in places.items()]
    table = markdown(["texts", "slots", "position", *(f"{name}, us a layer" for name in formats)], rows)
    return f"{results.source}\n\n{table}\n\nA layer's weights can be read in {talkers[0]['floor_us']:.2f} us.\n"


def quality(results: Results) -> str:
    """What each quantised cache does to a model that hears an unquantised trajectory."""
    rows = [
        [f"`{row['format']}`", row["protected"], f"{row['of_dense']:.0%}", f"{row['cosine']:.4f} ({row['worst_cosine']:.4f})", f"{row['kl']:.5f}"]
        + [f"{row['kl_p99']:.5f}", f"{row['top1']:.2%}", f"{row['eos_drift']:+.4f}", row["verdict"]]
        for row in _of_part(results, "model")
    ]
    titles = ["cache", "protected", "bytes of bf16's", "attention cosine (worst layer)", "mean KL", "p99 KL", "top-1", "end of speech", "limits"]
    return f"{results.source}\n\n{markdown(titles, rows)}\n"


def random_keys(results: Results) -> str:
    """What each quantised cache does to attention over random keys."""
    rows = [
        [f"`{row['format']}`", row["protected"], row["keys"], f"{row['cosine']:.4f}", f"{row['kl']:.4f}"]
        + [f"{row['top1']:.2%} ({row['top1_clear']:.2%})", row["verdict"]]
        for row in _of_part(results, "synthetic")
        if row["protected"] in ("default", "nothing")
    ]
    titles = ["cache", "protected", "keys", "attention cosine", "mean KL", "top-1 (without near ties)", "limits"]
    return f"{results.source}\n\n{markdown(titles, rows)}\n"


def protection(results: Results) -> str:
    """What each protection alone does to a model that hears an unquantised trajectory, by its size."""
    rows = [
        [f"`{row['format']}`", row["protected"], f"{row['bytes_more'] / row['bytes']:.1%}", f"{row['cosine']:.4f} ({row['worst_cosine']:.4f})"]
        + [f"{row['kl']:.5f}", f"{row['kl_p99']:.5f}", f"{row['top1']:.2%}", f"{row['eos_drift']:+.4f}"]
        for row in _of_part(results, "protect")
    ]
    titles = ["cache", "protected", "of its bytes", "attention cosine (worst layer)", "mean KL", "p99 KL", "top-1", "end of speech"]
    return f"{results.source}\n\n{markdown(titles, rows)}\n"


def free_running(results: Results) -> str:
    """How long speech is that goes its own way over each cache."""
    rows = [
        [" ".join((f"`{row['format']}`", row["protected"])).strip(), f"{sum(row['lengths']) / len(row['lengths']):.1f}"]
        + [f"{row['duration_ratio']:.2f} ± {row['ratio_error']:.2f}", f"{row['at_cap']:.0%}", f"{row['frames_until_parted']:.1f}"]
        for row in _of_part(results, "free")
    ]
    titles = ["cache", "frames on average", "of bf16's (± standard error)", "never ended", "frames until the first other code"]
    return f"{results.source}\n\n{markdown(titles, rows)}\n"


def _of_part(results: Results, part: str) -> list[dict[str, Any]]:
    if rows := [row for row in results.rows if row["part"] == part]:
        return rows
    raise LookupError(f"bench/results/{results.name}.json has no rows of the part {part}")
