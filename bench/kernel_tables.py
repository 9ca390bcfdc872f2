"""README's tables of kernels and of what is made of them."""

from __future__ import annotations

from bench.result_files import Results, markdown


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
    """The linear kernels by rows of x: the fastest launch of each, beside the floor and the library."""
    counts = sorted({row["rows"] for row in results.rows})
    library = (counts[0], counts[-1])
    rows = []
    for name in dict.fromkeys(row["case"] for row in results.rows):
        by_count = {row["rows"]: row for row in results.rows if row["case"] == name}
        first = next(iter(by_count.values()))
        kernels = [f"{by_count[count]['launches'][0]['us']:.2f}" if count in by_count else "" for count in counts]
        others = [f"{by_count[count]['library_us']:.2f}" if count in by_count else "" for count in library]
        rows.append([first["case"], f"{first['outputs']} x {first['width']}", f"{first['floor_us']:.2f}", *kernels, *others])
    titles = ["kernel, us", "outputs x width", "floor", *map(_of_rows, counts), *(f"cuBLAS, {_of_rows(count)}" for count in library)]
    return f"{results.source}\n\n{markdown(titles, rows)}\n"


def _of_rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


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
        numbers = [figures.get(label, "") for label in ("kernel", "achieved", "PyTorch's own", "Inductor")]
        rows.append([*row["row"].split(", rows: "), *numbers[:2], share, *numbers[2:]])
    titles = ["kernel and shape", "rows", "us", "TB/s", "of the floor", "PyTorch's own, us", "Inductor, us"]
    return f"{results.source}\n\n{markdown(titles, rows)}\n"
