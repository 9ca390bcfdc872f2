"""bench.quantized_attention: what it launches, checks, times and shows."""

import inspect
import json
from functools import partial

import pytest
from test_bench_quantized import machine  # noqa: F401

import bench.quantized_attention as attention
from bench import result_files, tables
from qtts_compile.options import KV_CACHES


def test_attention_is_checked_timed_and_shown(machine, capsys):  # noqa: F811
    file = machine("attention")
    assert attention.main(["--tiny", "--formats", "bf16", "int4", "int3", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["format"], row["position"]) for row in rows] == [("bf16", 200), ("int4", 200), ("int3", 200)]
    assert [row["bytes"] for row in rows] == [201 * 4096, 68 * 4096 + 133 * 1056, 68 * 4096 + 133 * 800]
    assert all(row["us"] > 0 and row["bf16_us"] == rows[0]["us"] for row in rows)
    assert "format batch position" in capsys.readouterr().out
    shown = tables.TABLES["quantized-attention"](result_files.Results("attention"))
    assert f"| 1 | 200 | {rows[0]['us']:.2f} | {rows[1]['us']:.2f} ({rows[0]['us'] / rows[1]['us']:.2f}x) |" in shown
    with pytest.raises(SystemExit, match="2"):
        attention.main(["--tiny", "--positions", "60"])


def test_attention_is_shown_by_parts(machine):  # noqa: F811
    search = [{"us": 9.2, "parts": 4}, {"us": 11.8, "parts": 8}, {"us": 16.2, "parts": 0}]
    rows = [{"format": "bf16", "batch": 8, "position": 512, "search": [*search, {"us": 14.1, "parts": 16}]}]
    rows += [{"format": "int4", "batch": 8, "position": 512, "search": search}]
    content = {"machine": attention.describe(), "command": "python -m bench.quantized_attention", "rows": rows}
    machine("parts").write_text(json.dumps(content))
    lines = tables.TABLES["attention-parts"](result_files.Results("parts")).splitlines()
    assert lines[2] == "| cache | texts | position | one thread block each, us | 4 parts, us | 8 parts, us | 16 parts, us |"
    assert lines[4:] == ["| `bf16` | 8 | 512 | 16.20 | 9.20 | 11.80 | 14.10 |", "| `int4` | 8 | 512 | 16.20 | 9.20 | 11.80 | |"]
    machine("parts").write_text(json.dumps(content | {"rows": [row | {"search": []} for row in rows]}))
    with pytest.raises(LookupError, match="parts.json has no parts; measure it with --parts"):
        tables.TABLES["attention-parts"](result_files.Results("parts"))


def wrong_result(kernel, *arguments):
    return kernel(*arguments) * 1.1


def wrong_codes(kernel, *arguments):
    result = kernel(*arguments)
    arguments[12][:, :, arguments[15]] ^= 1
    return result


@pytest.mark.parametrize("wrong", [wrong_result, wrong_codes])
def test_wrong_attention_gets_no_time(wrong, monkeypatch, machine, capsys):  # noqa: F811
    right = attention.kernel_of
    monkeypatch.setattr(attention, "kernel_of", lambda name, device: partial(wrong, right(name, device)) if name == "int4" else right(name, device))
    file = machine("attention")
    assert attention.main(["--tiny", "--formats", "bf16", "int4", "--json", str(file)]) == 1
    said = capsys.readouterr()
    assert "int4, batch 1, position 200, {}: WRONG RESULT" in said.err and "failed" in said.out.splitlines()[-1]
    with pytest.raises(LookupError, match="attention.json, int4: a failed check"):
        tables.TABLES["quantized-attention"](result_files.Results("attention"))


@pytest.mark.parametrize("name", KV_CACHES)
def test_every_launch_of_a_search_is_one_that_the_kernel_takes(name):
    case = attention.Case("talker", attention.SLOTS, 512, attention.SECTIONS)
    launches = list(attention.candidates(name, case, 32, 132))
    (arguments,) = attention.build_arguments(name, case, 1, "meta", copies=1)
    for launch in launches:
        inspect.signature(attention.kernel_of(name, "cuda")).bind(*arguments, **launch)
    assert {launch["block_m"] for launch in launches} == {1, 2} and {launch["num_warps"] for launch in launches} == {1, 2, 4}
    of_clusters = list(attention.parts(name, case.slots, 32))
    for launch in of_clusters:
        inspect.signature(attention.kernel_of(name, "cuda")).bind(*arguments, **launch)
    assert of_clusters == [{"parts": n} for n in (0, 1, 2, 4, 8, *([16] if name == "bf16" else []))]
    assert not list(attention.parts(name, case.slots, 1)) and len(list(attention.parts(name, 32, 2))) <= 3
