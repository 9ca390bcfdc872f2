"""What is made of results: README's tables, and where a frame's time goes."""

import json
import shutil

import pytest

from bench import readme, result_files, tables
from bench.breakdown import PARTS, Kernel, attribute, classify, parts
from bench.registry import MODES
from bench.timing import figure, kernel_table
from qtts_compile.kernels.clusters.kernel import norm_qkv_attention_kernel
from qtts_compile.kernels.clusters.long_kernel import norm_qkv_long_attention_kernel
from qtts_compile.kernels.clusters.quantized_kernel import norm_qkv_quantized_attention_kernel
from qtts_compile.kernels.combine import combine_kernel
from qtts_compile.kernels.decode_attention import _decode_attention_kernel
from qtts_compile.kernels.embedding_linear import _embedding_linear_kernel
from qtts_compile.kernels.linear_add import _linear_add_kernel
from qtts_compile.kernels.norm_linears import _norm_linears_kernel
from qtts_compile.kernels.norm_swiglu import _norm_swiglu_kernel
from qtts_compile.kernels.qk_norm_rope_attention import _qk_norm_rope_attention_kernel
from qtts_compile.kernels.qk_norm_rope_kv_write import _qk_norm_rope_kv_write_kernel
from qtts_compile.kernels.qk_norm_rope_quantized_attention import _qk_norm_rope_quantized_attention_kernel
from qtts_compile.kernels.sample import _sample_kernel
from qtts_compile.kernels.sample_embedding import _sample_embedding_kernel
from qtts_compile.kernels.skinny.kernel import skinny_kernel
from qtts_compile.kernels.skinny.many_rows import skinny_many_rows_kernel
from qtts_compile.kernels.turboquant.read import _quantized_kv_read_kernel
from qtts_compile.kernels.turboquant.write import _quantized_kv_write_kernel


def test_the_pages_agree_with_the_results(capsys):
    assert readme.main(["--check"]) == 0, "run `make readme`"
    assert "agree" in capsys.readouterr().out


def test_every_result_is_shown():
    text = "".join(page.read_text() for page in readme.PAGES)
    shown = {file for _, file in readme.BLOCK.findall(text)}
    assert {path.stem for path in result_files.RESULTS.glob("*.json")} == shown
    assert all(f"results/{path.name})" in text for path in result_files.RESULTS.glob("*.png"))


def test_the_measurements_name_every_mode():
    text = readme.MEASUREMENTS.read_text()
    assert all(f"`{name.removeprefix('qwen3-tts-triton:')}`" in text for name in MODES)


@pytest.mark.parametrize(
    ("name", "change", "shown"),
    [
        ("batches-h200", None, None),
        ("starts-h200", lambda rows: next(row for row in rows if row["job"] == "cold-start")["figures"]["load"], "| 98.8 |"),
        ("decoder-h200", lambda rows: next(row for row in rows if row["row"].startswith("whole"))["figures"]["Codec.decode"], "| 98.77 ms |"),
    ],
)
def test_a_changed_figure_changes_the_tables(name, change, shown, tmp_path, monkeypatch, capsys):
    shutil.copytree(result_files.RESULTS, tmp_path / "results")
    pages = [tmp_path / f"page{i}.md" for i, _ in enumerate(readme.PAGES)]
    for page, copy in zip(readme.PAGES, pages, strict=True):
        shutil.copy(page, copy)
    monkeypatch.setattr(result_files, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(readme, "PAGES", pages)
    assert readme.main(["--check"]) == 0
    file = tmp_path / "results" / f"{name}.json"
    content = json.loads(file.read_text())
    if shown is None:
        content["machine"]["gpu"], shown = "ACME 9000", "ACME 9000, torch"
    else:
        change(content["rows"])["median"] = 98.765
    file.write_text(json.dumps(content))
    assert readme.main(["--check"]) == 1 and "run `make readme`" in capsys.readouterr().err
    assert readme.main([]) == 0 and any(shown in page.read_text() for page in pages)
    assert readme.main(["--check"]) == 0


def test_a_row_that_failed_makes_no_table(tmp_path, monkeypatch):
    shutil.copytree(result_files.RESULTS, tmp_path / "results")
    monkeypatch.setattr(result_files, "RESULTS", tmp_path / "results")
    file = tmp_path / "results" / "decode_step-1.7b-h200.json"
    content = json.loads(file.read_text())
    content["rows"][0]["ms"] = None  # as bench.decode_step writes where the cosine is too low
    file.write_text(json.dumps(content))
    with pytest.raises(LookupError, match="decode_step-1.7b-h200.json.*'eager'.*a failed check; measure it again"):
        tables.TABLES["decode-step"](result_files.Results("decode_step-1.7b-h200"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("<!-- bench: decoding decoder-h200 -->", "names a table 'decoding'; there are speech, "),
        ("<!-- bench: decoder decoder-h300 -->", "names results 'decoder-h300' and there is no .*decoder-h300.json; there are .*decoder-h200"),
        ("<!-- bench: decoder -->", "has a marker that is not"),
        ("<!-- bench: decoder decoder-h200 --> <!-- bench: kernels x -->", "has a marker that is not"),
    ],
)
def test_a_marker_that_makes_no_table_is_an_error(wrong, message):
    text = readme.MEASUREMENTS.read_text().replace("<!-- bench: decoder decoder-h200 -->", wrong)
    with pytest.raises(LookupError, match=message):
        readme.generated(text)


def test_the_levels_of_qtts_bench_have_tables(tmp_path, monkeypatch):
    def of(**medians):
        return {label.replace("_", " "): figure(value, "") for label, value in medians.items()}

    moved = {"of the floor": figure(81.4, "%"), "PyTorch's own": figure(7.25, "us")}
    named = {"mode": "hybrid", "size": "1.7b", "batch": 8}
    others = {"of it torch.compile": figure(25.0, "s"), "allocated, text to waveform": figure(4.3, "GiB")}
    figures = of(load=4.0, first_call=30.0, call_to_first_audio=10.0, x_real_time=27.5)
    rows = [
        {"job": "kernels rows 1", "row": "talker head, 0.6B, rows: 1", "figures": of(kernel=5.5, achieved=3.05) | moved},
        {"job": "frame hybrid 1.7b batch 8", "row": "compile", **named, "figures": of(compile=3.0)},
        {"job": "frame hybrid 1.7b batch 8", "row": "frames at positions 512 to 612", **named,
         "figures": of(frame=4.0, audio=160.0, floor=1.35, keys_and_values_read=520.0)},
        {"job": "frame base 1.7b batch 8", "row": "frames at positions 512 to 612", **named, "mode": "base", "error": "parity: WrongCodes"},
        {"job": "e2e hybrid 1.7b", "row": "text to waveform", **named, "figures": figures | others},
        {"job": "e2e base 1.7b", "row": "text to waveform, 50 frames", **named, "mode": "base", "error": "parity: WrongCodes"},
        {"job": "e2e triton 1.7b", "row": "the rest", **named, "mode": "triton", "error": "stopped after 3 s"},
    ]  # fmt: skip
    machine = {"gpu": "G", "torch": "2", "triton": "3", "transformers": "4", "date": "2026-11-24"}
    (tmp_path / "suite.json").write_text(json.dumps({"machine": machine, "command": "qtts bench --json x", "rows": rows}))
    monkeypatch.setattr(result_files, "RESULTS", tmp_path)
    lines = {name: tables.TABLES[name](result_files.Results("suite")).splitlines() for name in ("kernels", "frame", "e2e")}
    assert {line[0] for line in lines.values()} == {"G, torch 2, triton 3, transformers 4, 2026-11-24: `qtts bench` (`bench/results/suite.json`)."}
    assert lines["kernels"][4:] == ["| talker head, 0.6B | 1 | 5.50 | 3.05 | 81% | 7.25 | |"]
    failed = "| `base` | 1.7b | 8 | 512 | fails its check | | | |"
    assert lines["frame"][4:] == ["| `hybrid` | 1.7b | 8 | 512 | 4.00 | 160.00 | 1.35 | 520 |", failed]
    failed = "| `base` | 1.7b | fails its check | | | | | |"
    assert lines["e2e"][4:] == ["| `hybrid` | 1.7b | 4.0 | 30.0 | 25.0 | 10.0 | 27.5 | 4.3 |", failed]
    (tmp_path / "suite.json").write_text(json.dumps({"machine": machine, "command": "", "rows": rows[:1]}))
    with pytest.raises(LookupError, match="suite.json has no rows of `qtts bench frame`"):
        tables.TABLES["frame"](result_files.Results("suite"))


def test_frames_name_their_own_cache_or_their_mode_s(tmp_path, monkeypatch):
    figures = {name: figure(1.0, "") for name in ("frame", "floor", "keys and values read", "cache")}
    place = {"size": "1.7b", "batch": 1, "slots": 2048, "row": "frames at positions 64 to 164", "ms_per_frame": {}, "figures": figures}
    memory = {"row": "memory", "figures": {"allocated, frames": figure(4.0, "GiB")}}
    named = {"job": "a", "mode": "hybrid"}, {"job": "b", "mode": "hybrid+tq"}, {"job": "c", "mode": "hybrid+tq", "kv_cache": "int3"}
    machine = {"gpu": "G", "torch": "2", "triton": "3", "transformers": "4", "date": "2026-11-24"}
    content = {"machine": machine, "command": "", "rows": [{**name, **row} for name in named for row in (place, memory)]}
    (tmp_path / "caches.json").write_text(json.dumps(content))
    monkeypatch.setattr(result_files, "RESULTS", tmp_path)
    lines = tables.TABLES["caches"](result_files.Results("caches")).splitlines()[4:]
    assert [line.split(" | ")[1] for line in lines] == ["`bf16`", "`int4`", "`int3`"]
    content["rows"][2]["batch"] = 32
    (tmp_path / "caches.json").write_text(json.dumps(content))
    lines = tables.TABLES["caches-of-batches"](result_files.Results("caches")).splitlines()[4:]
    assert [line.split(" | ")[1:3] for line in lines] == [["`int4`", "32"]]


def test_layers_are_shown_by_place_and_cache(tmp_path, monkeypatch):
    timed = {("bf16", 256, 64): [9.0, 8.0], ("bf16", 512, 64): [9.0], ("bf16", 512, 500): [11.0]}
    timed |= {("int4", 256, 64): [10.0], ("int4", 512, 64): [7.5], ("int4", 512, 500): [10.0]}
    rows = [
        {"stack": "talker", "kv_cache": name, "slots": slots, "position": at, "us": us, "floor_us": 6.789} for (name, slots, at), us in timed.items()
    ]
    rows.insert(0, {"stack": "predictor", "kv_cache": "bf16", "slots": 16, "position": 8, "us": [3.0], "floor_us": 2.0})
    rows.append(rows[1] | {"texts": 8, "us": [20.0]})
    machine = {"gpu": "G", "torch": "2", "triton": "3", "transformers": "4", "date": "2026-11-24"}
    (tmp_path / "layers.json").write_text(json.dumps({"machine": machine, "command": "", "rows": rows}))
    monkeypatch.setattr(result_files, "RESULTS", tmp_path)
    lines = tables.TABLES["layers"](result_files.Results("layers")).splitlines()
    shown = ["| 1 | 256 | 64 | 8.00 | 10.00 (0.80x) |", "| 1 | 512 | 64 | 9.00 | 7.50 (1.20x) |", "| 1 | 512 | 500 | 11.00 | 10.00 (1.10x) |"]
    shown.append("| 8 | 256 | 64 | 20.00 | |")
    assert lines[4:] == [*shown, "", "A layer's weights can be read in 6.79 us."]


def test_free_speech_is_shown_with_its_error(tmp_path, monkeypatch):
    figures = {"lengths": [4, 5], "duration_ratio": 1.125, "ratio_error": 0.25, "at_cap": 0.5, "frames_until_parted": 2.5}
    rows = [
        {"part": "free", "format": "bf16", "protected": "", **figures, "duration_ratio": 1.0, "ratio_error": 0.0},
        {"part": "free", "format": "fp8", "protected": "default", **figures},
    ]
    machine = {"gpu": "G", "torch": "2", "triton": "3", "transformers": "4", "date": "2026-11-24"}
    (tmp_path / "free.json").write_text(json.dumps({"machine": machine, "command": "", "rows": rows}))
    monkeypatch.setattr(result_files, "RESULTS", tmp_path)
    lines = tables.TABLES["free-running"](result_files.Results("free")).splitlines()
    assert lines[4:] == ["| `bf16` | 4.5 | 1.00 ± 0.00 | 50% | 2.5 |", "| `fp8` default | 4.5 | 1.12 ± 0.25 | 50% | 2.5 |"]


def test_commands_are_shown_without_where_they_wrote():
    assert result_files.shown_command("python -m bench.speech --budget 5 --rows 'qtts' eager --json /root/x.json --repeats 3") == (
        "python -m bench.speech --rows qtts eager --repeats 3"
    )
    command = result_files.command_of("linears", ["--cases", "decoder o, down", "--json", "x"])
    assert result_files.shown_command(command) == "python -m bench.linears --cases 'decoder o, down'"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (_norm_linears_kernel.__name__, "gemv"),
        (norm_qkv_attention_kernel.__name__, "gemv"),
        (norm_qkv_long_attention_kernel.__name__, "gemv"),
        (norm_qkv_quantized_attention_kernel.__name__, "gemv"),
        (_norm_swiglu_kernel.__name__, "gemv"),
        (_linear_add_kernel.__name__, "gemv"),
        (_embedding_linear_kernel.__name__, "gemv"),
        (skinny_kernel.__name__, "gemv"),
        (skinny_many_rows_kernel.__name__, "gemv"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "gemv"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, float, 128>", "gemv"),
        ("void cublasLt::splitKreduce_kernel<32, 16>", "gemv"),
        ("triton_red_fused_add_mm_t_3", "gemv"),
        ("triton_tem_fused_addmm_12", "gemv"),
        (_decode_attention_kernel.__name__, "attention"),
        (combine_kernel.__name__, "attention"),
        (_qk_norm_rope_kv_write_kernel.__name__, "attention"),
        (_qk_norm_rope_attention_kernel.__name__, "attention"),
        (_qk_norm_rope_quantized_attention_kernel.__name__, "attention"),
        (_quantized_kv_read_kernel.__name__, "attention"),
        (_quantized_kv_write_kernel.__name__, "attention"),
        ("void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
        ("triton_per_fused__softmax_bmm_clone_9", "attention"),
        (_sample_kernel.__name__, "sampling"),
        (_sample_embedding_kernel.__name__, "sampling"),
        ("void at::native::sbtopk::gatherTopK<float, unsigned int, 2>", "sampling"),
        ("void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel", "sampling"),
        ("void (anonymous namespace)::softmax_warp_forward<float, float, float, 11>", "sampling"),
        ("_rms_norm_kernel", "rest"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>", "rest"),
        ("triton_poi_fused_cat_embedding_1", "rest"),
        ("Memcpy DtoD (Device -> Device)", "rest"),
    ],
)
def test_kernels_have_classes(name, kind):
    assert classify(name) == kind


@pytest.mark.parametrize(
    ("kernels", "shares"),
    [
        ([("a", 0, 4), ("b", 6, 9)], {"a": 4, "b": 3}),  # apart: the gap is nobody's
        ([("a", 0, 4), ("b", 1, 9)], {"a": 4, "b": 5}),  # b starts early and waits for a
        ([("a", 0, 9), ("b", 2, 4)], {"a": 7, "b": 2}),  # b within a
        ([("a", 0, 2), ("b", 4, 6), ("c", 1, 9)], {"a": 2, "b": 2, "c": 5}),  # c runs through the gap
        ([("a", 0, 2), ("a", 2, 4), ("b", 1, 5)], {"a": 4, "b": 1}),
    ],
)
def test_an_instant_belongs_to_the_kernel_that_ends_first(kernels, shares):
    assert attribute(Kernel(*kernel) for kernel in kernels) == shares
    assert attribute(Kernel(*kernel) for kernel in reversed(kernels)) == shares


def test_parts_add_up_to_the_frame():
    shares = {"_norm_linears_kernel": 1500.0, "_decode_attention_kernel": 300.0, "_sample_kernel": 100.0, "_rms_norm_kernel": 100.0}
    expected = {"weights floor": 1200, "GEMV overhead": 300, "attention": 300, "sampling": 100, "rest": 100, "idle": 500}
    assert parts(shares, 2500, 1200) == expected and list(expected) == list(PARTS)
    slowed = parts(shares, 1000, 1200)  # the trace says 2000
    assert slowed == {"weights floor": 750, "GEMV overhead": 0, "attention": 150, "sampling": 50, "rest": 50, "idle": 0}
    assert parts({}, 100, 1200)["idle"] == 100


def test_kernels_are_listed_longest_first():
    names = ("_sample_kernel", "_norm_linears_kernel")
    text = kernel_table({"_sample_kernel": 10.0, "_norm_linears_kernel": 90.0}, dict.fromkeys(names, 16.0), {name: classify(name) for name in names})
    head, _, _, first, second = text.splitlines()
    assert head == "GPU time per frame: 0.100 ms in 32 kernels"
    assert first.split() == ["90.0", "90.00", "16.0", "gemv", "_norm_linears_kernel"] and "_sample_kernel" in second
