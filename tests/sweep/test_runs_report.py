"""``dive-fast report``: any run folders in one table, never two data sets in one column."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from run_folders import row, write_run

from dive_fast.commands import report
from dive_fast.errors import ConfigError
from dive_fast.sweep import tradeoff_chart
from dive_fast.sweep.choice import Spread
from dive_fast.sweep.html_page import page
from dive_fast.sweep.run_results import read_folder, read_runs
from dive_fast.sweep.runs_table import as_cells, compare_runs, find_axes, kept_of, table_text
from dive_fast.sweep.tradeoff_chart import Dot

PROBE = [
    row("probe/image_to_text_r1", 0.3, "probe", "image_to_text_r1"),
    row("probe/rsa", 0.9, "probe", "rsa", before=1.0),
]


def measured(label: str, name: str, value: float, **fields: object) -> str:
    line = {
        "label": label,
        "set": name,
        "title": name,
        "role": "ood",
        "metric": "top1",
        "value": value,
        "samples": 10,
    }
    return json.dumps(line | fields) + "\n"


def test_runs_are_compared_by_id_and_mean_of_what_is_kept(tmp_path: Path) -> None:
    rows = [
        row("val", 0.8),
        row("ood", 0.6, "ood"),
        row("zs", 0.7, "zero_shot"),
        row("more", 0.1, "other"),
        *PROBE,
    ]
    write_run(tmp_path / "a", rows)
    write_run(tmp_path / "b", [row("val", 0.9), *rows[1:]])
    table = compare_runs(read_runs([tmp_path]))
    axes = find_axes(table)
    assert axes is not None
    assert table.columns[axes.id].name == "val"
    assert kept_of(table, axes, 0) == pytest.approx((0.6 + 0.7 + 0.3 + 0.9) / 4)
    header, first, _ = as_cells(table, axes)
    assert header == [
        *("run", "val", "ood", "zs", "more", "probe (image to text R@1)", "probe (RSA)"),
        *("kept", "weight", "step", "method"),
    ]
    assert first == ["a", "80.0 (+30.0)", "60.0 (+10.0)", "70.0 (+20.0)", "10.0 (-40.0)", "30.0 (-20.0)", "0.900",
                     "62.5", "1000", "90", "DiVE"]  # fmt: skip
    assert find_axes(table, "ood", ["zs", "probe"])._asdict() | {"remarks": ()} == {  # type: ignore[union-attr]
        "id": 1, "kept": (2, 4, 5), "runs": (0, 1), "remarks": ()
    }  # fmt: skip
    with pytest.raises(ConfigError, match="--kept oodd: no run has measured it; did you mean ood"):
        find_axes(table, None, ["oodd"])


@pytest.mark.parametrize("change", [{"samples": 999}, {"data": "other"}, {"metric": "top5"}])
def test_different_data_of_one_name_have_columns_of_their_own(tmp_path: Path, change: dict[str, object]) -> None:
    write_run(tmp_path / "a", [row("val", 0.8, data="content")])
    write_run(tmp_path / "b", [row("val", 0.9, data="content") | change])
    table = compare_runs(read_runs([tmp_path / "a", tmp_path / "b"]))
    assert len(table.columns) == 2
    text = table_text("Runs", table, find_axes(table))
    assert "val: measured in 1 of 2 runs." in text
    if "metric" not in change:
        assert "val [2]: other data than val of the same name" in text


def test_other_path_is_other_data_unless_contents_are_equal(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [row("val", 0.8)], path="here")
    write_run(tmp_path / "b", [row("val", 0.9)], path="there")
    assert "val [2]: other data than val of the same name (path there, not here)." in table_text(
        "Runs", compare_runs(read_runs([tmp_path])), None
    )
    for name in "ab":
        path = tmp_path / name / "report.json"
        content = json.loads(path.read_text())
        content["rows"][0]["data"] = "same"
        path.write_text(json.dumps(content))
    assert len(compare_runs(read_runs([tmp_path])).columns) == 1


def test_runs_of_other_training_data_are_named(tmp_path: Path) -> None:
    for name, content in {"a": "first", "b": "first", "c": "changed"}.items():
        path = write_run(tmp_path / name, [row("val", 0.8)]) / "config.json"
        target = {"identity": {"model": {"weights": "same"}, "data": {"target": {"content": content}}}}
        path.write_text(json.dumps(json.loads(path.read_text()) | target))
    assert compare_runs(read_runs([tmp_path])).remarks == ("Not the same data.target: a, b | c.",)


def test_runs_without_results_are_listed_with_the_reason(tmp_path: Path) -> None:
    write_run(tmp_path / "good", [row("val", 0.8), row("ood", None, "ood")])
    (write_run(tmp_path / "half", None) / "metrics.jsonl").write_text('{"step": 40, "loss": 1}\n{"ste')
    (write_run(tmp_path / "done", None) / "model.safetensors").write_bytes(b"")
    (write_run(tmp_path / "broken", []) / "report.json").write_text('{"rows": [{"name": 1}], "method": "x"}')
    (write_run(tmp_path / "cut", []) / "report.json").write_text('{"rows": [')
    write_run(tmp_path / "empty", [])
    (tmp_path / "notes").mkdir()
    names = ("good", "half", "done", "broken", "cut", "empty", "notes", "nowhere")
    table = compare_runs(read_runs([tmp_path / name for name in names]))
    assert [run.problem for run in table.runs] == [
        "",
        "unfinished: step 40 of 100",
        "no report.json: restart its command to measure it, or measure its weights by dive-fast evaluate",
        "report.json is not a run's report: no 'metric'",
        "report.json cannot be read: Expecting value: line 1 column 11 (char 10)",
        "nothing was measured: evaluate.sets is empty",
        "no config.json: not a finished run",
        "no such folder",
    ]
    text = table_text("Runs", table, find_axes(table))
    assert "Without results, 7 of 8:" in text
    assert "- half: unfinished: step 40 of 100" in text


def test_evaluated_rows_join_the_run_unless_the_weights_are_newer(tmp_path: Path) -> None:
    import os

    folder = write_run(tmp_path / "run", [row("val", 0.8)])
    (folder / "model.safetensors").write_bytes(b"")
    rows = measured("run", "imagenet-r", 0.4) + measured("run", "val", 0.1) + measured("pretrained", "val", 0.2)
    (folder / "results.jsonl").write_text(rows)
    os.utime(folder / "model.safetensors", (1, 1))
    run, other = read_folder(folder)
    assert {measure.name: measure.after for measure in run.measures} == {"val": 0.8, "imagenet-r": 0.4}
    assert (other.name, other.measures[0].after) == ("run: pretrained", 0.2)
    os.utime(folder / "results.jsonl", (0, 0))
    run, _ = read_folder(folder)
    assert [measure.name for measure in run.measures] == ["val"]
    assert "older than model.safetensors" in run.remarks[0]
    (folder / "report.json").unlink()
    os.utime(folder / "results.jsonl", (2, 2))
    run, _ = read_folder(folder)
    assert run.problem == ""
    assert [measure.name for measure in run.measures] == ["imagenet-r", "val"]


def test_runs_of_one_name_are_named_by_their_paths(tmp_path: Path) -> None:
    for parent in "ab":
        write_run(tmp_path / parent / "run", [row("val", 0.8)])
    names = [run.name for run in read_runs([tmp_path / "a", tmp_path / "b"])]
    assert names == [str(tmp_path / "a/run"), str(tmp_path / "b/run")]


def test_kept_is_of_the_sets_that_all_runs_have(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [row("val", 0.8), row("x", 0.6, "ood"), row("y", 0.2, "ood")])
    write_run(tmp_path / "b", [row("val", 0.8), row("x", 0.7, "ood")])
    table = compare_runs(read_runs([tmp_path]))
    axes = find_axes(table)
    assert axes is not None
    assert kept_of(table, axes, 0) == 0.6
    assert axes.remarks == ("Not part of what is kept, since only some runs have it: y.",)
    write_run(tmp_path / "c", [row("val", 0.9), row("z", 0.7, "ood")])
    axes = find_axes(compare_runs(read_runs([tmp_path])))
    assert axes is not None
    assert axes.runs == (0, 1)
    assert axes.remarks[0] == "Without x, and so not in the chart: c."


def test_report_writes_table_chart_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("$x^ & <b>", "b", "c")
    for index, name in enumerate(names):
        rows = [row("val", 0.8 + index / 100), row("<script>", 0.6 - index / 50, "ood")]
        write_run(tmp_path / "runs" / name, rows, method=("dive", "mine", "flyp")[index])
    write_run(tmp_path / "runs" / "d", None)
    write_run(tmp_path / "runs" / "\x1b[2Jnew\nline", None)
    output = tmp_path / "out"
    assert report.main([str(tmp_path / "runs"), "--output", str(output), "--html"]) == 0
    shown = capsys.readouterr().out
    assert f"{output}/report.md, report.json, report.png, report.html" in shown
    with Image.open(output / "report.png") as image:
        assert image.width >= 830
    html = (output / "report.html").read_text()
    assert "<script" not in html
    assert "<b>" not in html
    assert "&lt;script&gt;" in html
    assert "$x^ &amp; &lt;b&gt;" in html
    assert 'src="data:image/png;base64,' in html
    assert "http" not in html.replace("http-equiv", "")
    content = json.loads((output / "report.json").read_text())
    assert [run["problem"] for run in content["runs"]] == [
        *("unfinished: step 0 of 100", None, None, None, "unfinished: step 0 of 100")
    ]
    assert "\x1b" not in shown
    assert "- \\x1b[2Jnew line: unfinished" in shown
    assert report.main([str(tmp_path / "runs"), "--output", str(tmp_path / "runs" / "b")]) == 2
    assert "a run folder, whose own report would be replaced" in capsys.readouterr().err
    assert report.main([str(tmp_path / "nowhere"), "--output", str(output)]) == 2
    assert "- nowhere: no such folder" in capsys.readouterr().out


def test_page_escapes_attributes_and_text() -> None:
    hostile = "\"><img src=x onerror=alert(1)>'"
    html = page(hostile, [[hostile], [hostile]], [hostile], b"png", hostile)
    assert "<img src=x" not in html
    assert html.count("<img ") == 1


def test_report_imports_no_torch(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [row("pets", 0.6), row("cars", 0.4, "zero_shot")])
    arguments = [str(tmp_path / "run"), "--output", str(tmp_path / "report")]
    code = (
        "import sys; from dive_fast.commands import report; assert report.main(sys.argv[1:]) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    completed = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr


def test_charts_of_many_runs_name_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[list[str]] = []
    monkeypatch.setattr(
        tradeoff_chart, "place_labels", lambda axis, labels, *_: named.append([label.text for label in labels])
    )
    shares = [number / 100 for number in range(50)]
    dots = [Dot(f"run{number}", Spread(share, 0, 1), Spread(0.3, 0, 1)) for number, share in enumerate(shares)]
    dots[3] = dots[3]._replace(is_chosen=True)
    dots[5] = dots[5]._replace(kept=Spread(0.31, 0, 1))  # nothing beats it in both
    tradeoff_chart.draw_tradeoff(dots, tmp_path / "a.png", "val", "title")
    tradeoff_chart.draw_tradeoff(dots[:20], tmp_path / "b.png", "val", "title")
    assert named[0] == ["run3", "run5", *(f"run{number}" for number in range(32, 50))]
    assert named[1] == [f"run{number}" for number in range(20)]
