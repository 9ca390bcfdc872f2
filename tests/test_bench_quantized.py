"""The benchmarks of quantised caches: that they measure what the caches do, refuse what is wrong, and run on the embedded model."""

import json
from dataclasses import replace

import pytest
import torch
from test_bench_speech import run, talker, written  # noqa: F401

import bench.quantized_attention as attention
import qtts_compile.turboquant_cache
from bench import free_running, models, quality, result_files, synthetic, tables, teacher
from bench.engines import engine
from bench.models import TINY_PROTECT
from bench.peers import generated, hand_in
from bench.reads import cache_bytes
from bench.registry import MODES, ROWS, Case, frame_job
from bench.task import CHECKED_FRAMES, Task, WrongCodes, check, generate
from bench.timing import figure
from qtts_compile.engine import Engine
from qtts_compile.kernels.turboquant.read import quantized_kv_read
from qtts_compile.turboquant_cache import Protect, TurboQuantKVCache

pytestmark = pytest.mark.filterwarnings("ignore:kv_cache=.* is experimental")  # which is what is measured here
FORMATS = ["int4", "k4v3", "int3", "fp8"]
PROMPT = 40


def packed(talker, name="int4", protect=TINY_PROTECT, slots=128):  # noqa: F811
    nowhere = torch.zeros(1, dtype=torch.long, device="meta")
    return TurboQuantKVCache(talker.config, 1, slots, torch.float32, nowhere.device, name, protect, nowhere)


@pytest.fixture(scope="module")
def trajectory(talker):  # noqa: F811
    return teacher.Trajectory.of(talker, 2, PROMPT, 12)


@pytest.fixture
def over(monkeypatch):
    """Return a function that lets a talker speak greedily over a quantised cache, and returns the task, the codes and the cache."""

    def speak(talker, name, lengths=(PROMPT, PROMPT - 7)):  # noqa: F811
        monkeypatch.setitem(talker.__dict__, "generate", talker.generate)  # put back afterwards
        cache = hand_in(talker, len(lengths), 128, name, "tiny")
        task = Task.of(talker, list(lengths), CHECKED_FRAMES, greedy=True)
        return task, generate(talker, task), cache

    return speak


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("protect", [TINY_PROTECT, quality.BARE], ids=["protected", "bare"])
def test_one_call_gives_what_a_real_cache_gives_token_after_token(trajectory, name, protect):
    like = packed(trajectory.talker, name, protect)
    seen = teacher.observe(trajectory, like)
    assert teacher.check(trajectory, like, seen) < 1e-9
    for more in ("first_layers", "sinks", "window"):
        assert teacher.check(trajectory, packed(trajectory.talker, name, protect._replace(**{more: getattr(protect, more) + 1})), seen) > 2e-8


def test_logits_over_another_cache_are_refused(trajectory, monkeypatch):
    monkeypatch.setattr(teacher, "MAX_APART", 1e-6)  # the tiny model's steps read few codes
    int3, fp8 = (packed(trajectory.talker, name, quality.BARE) for name in ("int3", "fp8"))
    with pytest.raises(teacher.WrongForcing, match="fp8, Protect.*a real cache gives logits .* away"):
        teacher.check(trajectory, fp8, teacher.observe(trajectory, int3))


def test_protecting_every_layer_changes_nothing_and_each_format_what_it_costs(trajectory):
    dense = packed(trajectory.talker, protect=Protect(first_layers=4))
    exact = teacher.observe(trajectory, dense)
    assert teacher.compare(trajectory.talker, exact, teacher.observe(trajectory, dense))["kl"] == 0
    figures = {name: teacher.compare(trajectory.talker, exact, teacher.observe(trajectory, packed(trajectory.talker, name))) for name in FORMATS}
    assert 0 < figures["fp8"]["kl"] < figures["int4"]["kl"] < figures["k4v3"]["kl"] < figures["int3"]["kl"]
    first, second, third, last = figures["int3"]["cosines"]  # the first layer is protected and sees nothing of the others
    assert first == pytest.approx(1) and second < 0.999 and figures["int3"]["worst_cosine"] == min(second, third, last)


def test_logits_that_are_not_finite_are_refused(trajectory):
    exact = teacher.observe(trajectory, packed(trajectory.talker))
    with pytest.raises(ValueError, match="not finite"):
        teacher.compare(trajectory.talker, exact, replace(exact, log_probs=exact.log_probs * float("nan")))


@pytest.mark.parametrize("name", ["int4", "fp8"])
def test_codes_over_a_quantised_cache_are_judged_over_the_same_and_over_none(talker, over, name):  # noqa: F811
    task, codes, cache = over(talker, name)
    same, _, others = check(talker, task, codes, cache).partition("; ")
    assert same.startswith(f"512 greedy choices in 16 frames against eager logits given the same codes, over {name} keys and values of up to 45 ")
    assert "in 2 layers: 100.0% equal" in same and "against eager logits over float32 ones: " in others and "quantisation moves logits" in others
    wrong = codes.clone()
    wrong[1, 7, 3] = (wrong[1, 7, 3] + 1) % 512
    with pytest.raises(WrongCodes, match="allowed are 0.25 and 0.01"):
        check(talker, task, wrong, cache)


def test_codes_over_a_cache_that_decodes_wrongly_fail(talker, over, monkeypatch):  # noqa: F811
    def negated(*arguments):
        keys, values = quantized_kv_read(*arguments)
        return -keys, values

    monkeypatch.setattr(qtts_compile.turboquant_cache, "quantized_kv_read", negated)
    task, codes, cache = over(talker, "int4")
    with pytest.raises(WrongCodes, match="over int4 keys"):
        check(talker, task, codes, cache)


def test_a_cache_that_quantises_nothing_fails(talker, over):  # noqa: F811
    task, codes, _ = over(talker, "int4")
    for protect in (Protect(first_layers=4), Protect(0, 0, 0, 100)):
        with pytest.raises(WrongCodes, match="none of 55 tokens was read from int4 codes: Protect.* keeps all; measure later"):
            check(talker, task, codes, packed(talker, protect=protect))


@pytest.mark.parametrize("runner", [generated, engine])
def test_rows_tell_what_the_cache_takes(run, runner):  # noqa: F811
    runner(run, kv_cache="int3", slots=128)
    rows = [row for row in written(run) if "ms_per_frame" in row]
    assert rows and not any("error" in row for row in written(run))
    for row in rows:
        figures = {label: figure["median"] for label, figure in row["figures"].items()}
        assert "over int3 keys and values" in row["check"] and figures["quantised layers"] == 2
        assert figures["cache, a token"] * 1024 == 2 * 2 * (2 * 12 + 4) + 2 * 2 * 2 * 32 * 4  # two layers of codes, two of float32, two heads
        assert figures["cache"] * 2**20 > 128 * 1024 * figures["cache, a token"]


def test_modes_and_rows_hand_their_format_to_the_runner():
    assert {name: MODES[f"{name}+tq"].arguments["kv_cache"] for name in ("base", "triton", "hybrid")} == dict.fromkeys(
        ("base", "triton", "hybrid"), "int4"
    )
    assert {name: ROWS[name].arguments["kv_cache"] for name in FORMATS} == {name: name for name in FORMATS}
    large = ROWS["batch-32-8192-int4"]
    assert (large.arguments["batch"], large.arguments["slots"], large.arguments["positions"]) == (32, 8192, [512, 2048, 8000])
    assert "kv_cache" not in frame_job("faster-qwen3-tts", Case()).arguments
    assert frame_job("hybrid+tq", Case(kv_cache="fp8")).labels["kv_cache"] == "fp8"


def test_a_frame_reads_packed_bytes():
    model = models._construct(*models._parts("1.7b")[1], torch.bfloat16, "meta").talker
    nowhere = torch.zeros(1, dtype=torch.long, device="meta")
    cache = TurboQuantKVCache(model.config, 1, 8192, torch.bfloat16, nowhere.device, "int4", Protect(), nowhere)
    of_predictor = 5 * 4096 * sum(range(2, 17))
    assert cache_bytes(model, 7999, 8, cache) == 8 * (28 * 68 * 4096 + 7932 * (2 * 4096 + 26 * 1056) + of_predictor)
    assert cache_bytes(model, 50, 1, cache) == cache_bytes(model, 50)  # all of it in the window


def test_random_keys_lose_what_theory_says():
    states = synthetic.draw("gaussian", 2, 512, "cpu")
    rows = {name: synthetic.measure(states, name, quality.BARE) for name in FORMATS}
    assert rows["int4"]["kl"] == pytest.approx(0.0093 / 2, rel=0.1)  # half the variance that the distortion of 4 bits adds to a score
    assert rows["int3"]["kl"] == pytest.approx(0.0339 / 2, rel=0.1)
    assert rows["fp8"]["cosine"] > rows["int4"]["cosine"] > rows["k4v3"]["cosine"] > rows["int3"]["cosine"]
    assert rows["int4"]["top1_clear"] > rows["int4"]["top1"]
    assert synthetic.measure(states, "int3", Protect(window=512))["kl"] == 0
    hard = synthetic.measure(synthetic.draw("outlier", 2, 512, "cpu"), "int4", quality.BARE)
    assert hard["kl"] > 3 * rows["int4"]["kl"]
    peaked = synthetic.measure(synthetic.draw("outlier, queries too", 2, 512, "cpu"), "int4", quality.BARE)
    assert peaked["top1"] > hard["top1"] + 0.1 and peaked["kl_p99"] > 1.5 * hard["kl_p99"]  # a key has nearly all the weight, or another


def test_queries_are_like_keys_only_where_the_kind_says_so():
    for kind in synthetic.KINDS:
        (q, k, _), mean = synthetic.draw(kind, 2, 4096, "cpu"), synthetic.MEAN if "shifted" in kind else 0
        wide = synthetic.OUTLIER if "outlier" in kind else 1
        for x, is_hard in ((q, kind.endswith("queries too")), (k, True)):
            assert x[..., 5].mean().item() == pytest.approx(mean * is_hard, abs=0.06)
            assert x[..., synthetic.OUTLIERS].std().item() == pytest.approx(wide if is_hard else 1, rel=0.05)


@pytest.mark.parametrize(
    ("kl", "top1", "told"), [(0.02, 0.95, "passes"), (0.021, 1, "FAILS KL"), (0, 0.94, "FAILS top-1"), (1, 0, "FAILS KL and top-1")]
)
def test_the_verdict_says_which_limit_is_not_kept(kl, top1, told):
    assert quality.verdict({"kl": kl, "top1": top1}) == told


def test_speeches_are_compared_up_to_where_they_part():
    first, second = torch.arange(2 * 5 * 3).reshape(2, 5, 3)
    other = first[:4].clone()
    other[2:] += 1
    compared = free_running.compare([first, second[:3]], [other, second], cap=5)
    assert compared.pop("ratio_error") == pytest.approx(((4 - 45 / 8) ** 2 + (5 - 27 / 8) ** 2) ** 0.5 / 2**0.5 / 4)
    assert compared == {"lengths": [4, 5], "duration_ratio": 9 / 8, "at_cap": 0.5, "frames_until_parted": 2.5}


def test_the_error_of_a_ratio_is_that_of_its_pairs():
    assert free_running.ratio_error([1, 2, 3], [2, 4, 6]) == 0
    assert free_running.ratio_error([4, 8], [6, 6]) == pytest.approx(2 / 6)  # of a mean of 6 with a standard error of 2
    apart = torch.empty(2, 200).geometric_(1 / 64, generator=torch.Generator().manual_seed(0)).tolist()
    assert free_running.ratio_error(*apart) == pytest.approx((2 / 200) ** 0.5, rel=0.15)  # of independent lengths, each as spread as long
    assert free_running.ratio_error([*apart[0][:100], *apart[1][100:]], apart[1]) < free_running.ratio_error(*apart)


def test_seeds_speak_in_batches_of_which_the_last_may_be_smaller(talker, monkeypatch):  # noqa: F811
    monkeypatch.setattr(free_running, "TOGETHER", 2)
    engine_of_talker = Engine(talker, max_seq_len=128)
    codes = free_running.speak(engine_of_talker, range(5, 8), cap=6)
    apart = [each for seeds in ([5, 6], [7]) for each in free_running.speak(engine_of_talker, seeds, cap=6)]
    assert len(codes) == 3 and all(map(torch.equal, codes, apart)) and 0 < max(map(len, codes)) <= 6


@pytest.mark.parametrize("seeds", ["0", "1", "-20"])
def test_too_few_seeds_are_refused(seeds, capsys):
    with pytest.raises(SystemExit, match="2"):
        quality.main(["--tiny", "--seeds", seeds])
    assert f"--seeds {seeds}: give at least 2" in capsys.readouterr().err


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Results stand in a folder of their own and name a machine; return the file of a name."""
    named = {"gpu": "G", "torch": "2", "triton": "3", "transformers": "4", "date": "2026-11-25"}
    for module in (attention, quality):
        monkeypatch.setattr(module, "describe", lambda: named)
    monkeypatch.setattr(result_files, "RESULTS", tmp_path)
    return lambda name: tmp_path / f"{name}.json"


def test_quality_is_measured_on_the_embedded_model_and_shown(machine, capsys):
    file = machine("quality")
    assert quality.main(["--tiny", "--formats", "int4", "--frames", "6", "--seeds", "3", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["protected"] for row in rows if row["part"] == "model"] == ["default", "nothing", "layers", "sinks", "window"]
    assert {row["keys"] for row in rows if row["part"] == "synthetic"} == set(synthetic.KINDS)
    assert [row["format"] for row in rows if row["part"] == "free"] == ["bf16", "bf16", "int4", "int4"] and rows[-1]["lengths"]
    assert [row["protected"] for row in rows if row["part"] == "free"] == ["", "other seeds", "default", "nothing"]
    of = {row["protected"]: row for row in rows if row["part"] == "model"}
    assert of["nothing"]["bytes_more"] == 0 < of["sinks"]["bytes_more"] < of["window"]["bytes_more"] < of["layers"]["bytes_more"]
    assert of["default"]["kl"] < of["nothing"]["kl"] and of["default"]["apart"] < 1e-6
    assert "int4, limits KL 0.02 and top-1 95%: keys gaussian " in capsys.readouterr().out
    shown = tables.TABLES["quality"](result_files.Results("quality"))
    assert f"| `int4` | default | {of['default']['of_dense']:.0%} | {of['default']['cosine']:.4f} " in shown
    protect = {row["protected"]: row for row in rows if row["part"] == "protect"}
    assert list(protect) == list(quality.variations()) and protect["nothing"]["kl"] == of["nothing"]["kl"]
    for name, sizes in quality.SIZES.items():
        bytes_more = [protect[f"{name}={size}"]["bytes_more"] for size in sizes]
        assert bytes_more == sorted(set(bytes_more)) and bytes_more[0] > 0
    assert protect["first_layers=4"]["kl"] < 1e-12  # of four
    shown_protection = tables.TABLES["protection"](result_files.Results("quality"))
    assert f"| `int4` | window=8 | {protect['window=8']['bytes_more'] / protect['window=8']['bytes']:.1%} |" in shown_protection
    assert "| `int4` | nothing | shifted, queries too |" in tables.TABLES["random-keys"](result_files.Results("quality"))
    free = tables.TABLES["free-running"](result_files.Results("quality"))
    assert "| `int4` nothing |" in free and "never ended" in free and "never ended" not in shown
    file.write_text(file.read_text().replace('"part": "free"', '"part": "other"'))
    with pytest.raises(LookupError, match="quality.json has no rows of the part free"):
        tables.TABLES["free-running"](result_files.Results("quality"))
    file.write_text(file.read_text().replace('"part": "protect"', '"part": "other"'))
    with pytest.raises(LookupError, match="quality.json has no rows of the part protect"):
        tables.TABLES["protection"](result_files.Results("quality"))
    file.write_text(file.read_text().replace('"part": "model"', '"part": "other"'))
    with pytest.raises(LookupError, match="quality.json has no rows of the part model"):
        tables.TABLES["quality"](result_files.Results("quality"))


def test_a_part_that_fails_does_not_end_the_others(monkeypatch, machine, capsys):
    monkeypatch.setattr(synthetic, "draw", lambda *_: 1 / 0)
    assert quality.main(["--tiny", "--parts", "synthetic", "free", "--formats", "fp8", "--frames", "3", "--seeds", "2"]) == 1
    printed = capsys.readouterr().out
    assert "synthetic: FAILED ZeroDivisionError" in printed and "free      fp8" in printed


def test_frames_over_each_cache_are_shown(machine):
    def of(**medians):
        return {label.replace("_", " "): figure(value, "") for label, value in medians.items()}

    frames = of(frame=2.31, floor=1.8, keys_and_values_read=64.4, cache=231.2)
    named = {"job": "int4", "size": "1.7b", "batch": 1, "slots": 8192, "kv_cache": "int4"}
    rows = [
        {**named, "row": "memory", "figures": {"allocated, frames": figure(4.04, "GiB")}},
        {**named, "row": "frames at positions 512 to 612", "ms_per_frame": frames["frame"], "figures": frames},
        {"job": "eager", "row": "frames at positions 64 to 164", "ms_per_frame": frames["frame"], "figures": of(frame=157)},
    ]
    content = {"machine": quality.describe(), "command": "python -m bench.speech", "rows": rows}
    machine("caches").write_text(json.dumps(content))
    lines = tables.TABLES["caches"](result_files.Results("caches")).splitlines()
    assert lines[4:] == ["| 1.7B | `int4` | 1 | 8192 | 512 | 2.31 | 1.80 | 64 | 231 | 4.04 |"]
