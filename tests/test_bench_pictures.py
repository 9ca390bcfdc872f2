"""Pictures of results: what they show, and that those of the pages agree with the results."""

import json
from pathlib import Path

import pytest
from PIL import Image

from bench import result_files
from bench.breakdown import PARTS
from bench.plots import content_of, rows_of
from bench.plots import main as plot
from bench.timing import figure


def described(picture: Path) -> str:
    with Image.open(picture) as image:
        return image.info["Description"]


@pytest.mark.parametrize("picture", sorted(result_files.RESULTS.glob("*.png")), ids=lambda path: path.name)
def test_pictures_agree_with_the_results(picture, tmp_path):
    source = json.loads(described(picture))
    files = [result_files.RESULTS / name for name in source["files"]]
    again = f"python -m bench.plots {' '.join(map(str, files))} --jobs {' '.join(source['jobs'])} -o DIR"
    assert content_of(picture.name, files, source["jobs"]).description == described(picture), f"draw it again by `{again}`"
    content = json.loads(files[-1].read_text())
    next(row for row in content["rows"] if row.get("job") == source["jobs"][-1] and "breakdown" in row)["breakdown"]["idle"] += 0.001
    (tmp_path / files[-1].name).write_text(json.dumps(content))
    assert content_of(picture.name, [*files[:-1], tmp_path / files[-1].name], source["jobs"]).description != described(picture)


@pytest.fixture
def results(tmp_path):
    """Write results with these rows."""

    def write(name, *rows):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"machine": {"gpu": "G", "torch": "2", "date": "2026-11-24"}, "command": "", "rows": list(rows)}))
        return str(path)

    return write


def test_pictures_are_drawn_from_results(results, tmp_path, capsys):
    speed = {"job": "qtts", "row": "frames at positions 64 to 164", "ms_per_frame": figure([3.0, 2.9, 3.2], "ms")}
    traced = {"job": "qtts", "row": "where a frame's time goes, from position 64 on", "breakdown": dict.fromkeys(PARTS, 500.0)}
    before, after = results("before", speed, traced), results("after", speed, {"job": "eager", "row": "all", "error": "no"})
    assert plot([before, after, "-o", str(tmp_path / "pictures")]) == 0
    pictures = {path.name: described(path) for path in (tmp_path / "pictures").iterdir()}
    assert pictures == {name: content_of(name, [Path(before), Path(after)]).description for name in ("frame.png", "breakdown.png")}
    assert plot([after]) == 0 and (tmp_path / "frame.png").is_file() and not (tmp_path / "breakdown.png").exists()
    assert "Wrote" in capsys.readouterr().out


def test_a_picture_shows_the_jobs_that_are_asked_for(results, capsys):
    speed = {"row": "frames at positions 64 to 164", "ms_per_frame": figure([3.0], "ms")}
    file = Path(results("after", {"job": "eager", "mode": "base", **speed}, {"job": "qtts", "mode": "hybrid", **speed}))
    assert [label for label, _ in rows_of([file])] == ["eager (base), positions 64 to 164", "qtts (hybrid), positions 64 to 164"]
    assert [label for label, _ in rows_of([file], ["qtts"])] == ["qtts (hybrid), positions 64 to 164"]
    assert [row["job"] for _, row in rows_of([file], ["qtts", "eager"])] == ["qtts", "eager"]
    with pytest.raises(SystemExit, match="2"):
        plot([str(file), "--jobs", "qtts", "quick"])
    assert "no rows of quick in " in capsys.readouterr().err


def test_nothing_to_draw_is_said(results, capsys):
    assert plot([results("empty")]) == 1 and "nothing to draw" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        plot(["missing.json"])
    assert "missing.json: no such file" in capsys.readouterr().err
