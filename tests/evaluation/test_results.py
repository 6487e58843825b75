"""Results: rows that are reused, tables as in the paper, and files that several processes write."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distributed import context

from dive_fast.config.schema import EvaluateConfig, ModelConfig
from dive_fast.data.prompt_files import read_templates
from dive_fast.distributed import Ranks
from dive_fast.errors import DataError
from dive_fast.evaluation import calibration
from dive_fast.evaluation import results as results_module
from dive_fast.evaluation.classifier import cached_classifier
from dive_fast.evaluation.datasets.catalog import IMAGENET_OOD, SUITES, ZERO_SHOT_10, find_dataset
from dive_fast.evaluation.evaluator import Options, measure_all, open_all
from dive_fast.evaluation.results import Results
from dive_fast.evaluation.tables import as_markdown
from dive_fast.model.head import Head
from dive_fast.model.towers import Towers, create, tokenizer_of

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig(name=tiny.write_model(tmp_path_factory.mktemp("model")))


class Counted:
    """A tokenizer and a model that counts the images it encodes."""

    def __init__(self, model: ModelConfig) -> None:
        self.towers: Towers = create(model).eval()
        self.tokenizer = tokenizer_of(model)
        self.images = 0
        self.towers.visual.register_forward_hook(self._count)

    def _count(self, tower: Any, arguments: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
        self.images += len(arguments[0])


def measured(
    counted: Counted, tree: dict[str, Any], folder: Path, head: Head | None = None, **changed: Any
) -> tuple[list[dict[str, Any]], int]:
    """The rows of an evaluation, and the number of images that were encoded for them."""
    config = EvaluateConfig.model_validate_json(json.dumps({"sets": tree}))
    options = Options(**({"label": "mine", "precision": "fp32", "batch_size": 5, "workers": 0} | changed))
    before = counted.images
    opened = open_all(config.sets, ALONE)
    results = Results(folder)
    with results.writing_tables():
        rows = measure_all(
            counted.towers,
            counted.tokenizer,
            config.sets,
            opened,
            ALONE,
            results,
            options,
            {},
            head,
        )
    return rows, counted.images - before


def test_measure_all_reuses_unchanged_results(model: ModelConfig, tmp_path: Path) -> None:
    counted = Counted(model)
    target = tiny.write_target(tmp_path / "set")
    tree = {"seen": {key: target[key] for key in tiny.EVALUATION}}
    out = tmp_path / "out"
    first, images = measured(counted, tree, out)
    assert images == 24
    second, images = measured(counted, tree, out)
    assert (images, second) == (0, first)
    # Another metric, label, name or batch size is the same measurement.
    tree["more"] = tree["seen"] | {"metric": "macro_f1", "role": "ood"}
    rows, images = measured(counted, tree, out, label="other", batch_size=7)
    assert images == 0
    assert [(row["label"], row["set"], row["value"]) for row in rows] == [
        ("other", "seen", first[0]["top1"]),
        ("other", "more", first[0]["macro_f1"]),
    ]
    assert measured(counted, tree, out, force=True)[1] == 48
    del tree["more"]
    for changed in ({"templates": "simple"}, {"class_names": str(tmp_path / "set/others.txt")}):
        (tmp_path / "set/others.txt").write_text("".join(f"other {i}\n" for i in range(5)))
        assert measured(counted, {"seen": tree["seen"] | changed}, out)[1] == 24
    assert measured(counted, tree, out, precision="bf16")[1] == 24
    head = Head(torch.randn(5, 24), torch.zeros(5), tuple(f"class number {i}" for i in range(5)))
    rows, images = measured(counted, tree, out, head)
    assert (rows[0]["classifier"], images) == ("head", 24)
    assert measured(counted, tree, out, head)[1] == 0
    assert measured(counted, tree, out, head._replace(bias=torch.ones(5)))[1] == 24
    with torch.no_grad():
        counted.towers.logit_scale.add_(1)
    assert measured(counted, tree, out)[1] == 24
    tiny.write_target(tmp_path / "set", count=23)
    assert measured(counted, tree, out)[1] == 23
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    # Each measurement is there once, whatever was measured later under its label.
    assert len({(row["label"], row["set"], row["key"]) for row in rows}) == len(rows)
    assert {row["precision"] for row in rows if row["label"] == "mine"} == {"fp32", "bf16"}
    with (out / "results.csv").open(newline="") as lines:
        table = list(csv.DictReader(lines))
    assert [float(row["value"]) for row in table] == [row["value"] for row in rows]
    assert (out / "results.md").read_text() == as_markdown(rows)
    (out / "results.jsonl").write_text('{"label": "x"}\n')
    with pytest.raises(DataError, match=r"results.jsonl: line 1 is not a result: a row needs label, set"):
        Results(out)


def row(label: str, name: str, value: float, **more: Any) -> dict[str, Any]:
    known = find_dataset(name)
    fields = {"label": label, "set": name, "dataset": name, "title": known.title, "role": known.role}
    return fields | {"metric": known.metric, "value": value, "weights_digest": label} | more


def test_tables_equal_the_papers_and_mark_partial_averages() -> None:
    # DiVE in tables 2 and 3, with the averages printed there.
    ood = dict(zip(IMAGENET_OOD, (0.738, 0.773, 0.549, 0.529, 0.569), strict=True))
    zero_shot = dict(
        zip(ZERO_SHOT_10, (0.884, 0.66, 0.843, 0.647, 0.47, 0.221, 0.555, 0.884, 0.514, 0.689), strict=True)
    )
    wilds = dict(zip(SUITES["wilds"], (0.531, 0.372, 0.699, 0.423), strict=True))
    rows = [row("DiVE", name, value) for name, value in ({"imagenet1k": 0.825} | ood | zero_shot | wilds).items()]
    rows += [row("half", name, 0.5) for name in ("imagenet-r", "imagenet-a")]
    text = as_markdown(rows)
    assert (
        "| Method | ImageNet (ID) | ImageNet-V2 | ImageNet-R | ImageNet-A | ImageNet-Sketch | ObjectNet "
        "| OOD-4 avg. | OOD-5 avg. |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| DiVE | 82.5 | 73.8 | 77.3 | 54.9 | 52.9 | 56.9 | 64.7 | 63.2 |\n"
        "| half |  |  | 50.0 | 50.0 |  |  | 50.0 (2 of 4) | 50.0 (2 of 5) |\n"
        "\nOOD-4 avg. of half is without ImageNet-V2, ImageNet-Sketch.\n"
        "\nOOD-5 avg. of half is without ImageNet-V2, ImageNet-Sketch, ObjectNet.\n"
    ) in text
    assert "DiVE is without" not in text
    assert (
        "| Method | Caltech | Flowers | Food | SUN | DTD | Aircraft | Cars | Pets | EuroSAT | UCF | ZS avg. |"
    ) in text
    assert "| DiVE | 88.4 | 66.0 | 84.3 | 64.7 | 47.0 | 22.1 | 55.5 | 88.4 | 51.4 | 68.9 | 63.7 |" in text
    assert "| Method | iWildCam ID | iWildCam OOD | FMoW ID | FMoW OOD | ZS avg. |" in text
    assert "| DiVE | 53.1 | 37.2 | 69.9 | 42.3 | 63.7 |" in text


def test_tables_of_calibration_have_both_averages() -> None:
    # TRACER's published errors in batches of 512.
    errors = dict(zip(("imagenet1k", *IMAGENET_OOD), (0.045, 0.039, 0.041, 0.104, 0.078, 0.103), strict=True))
    rows = [
        row("TRACER", name, 0.5, top1=0.5, ece_batched=error, ece=error / 2, confidence=0.25, nll=1.5, brier=1.25)
        for name, error in errors.items()
    ]
    rows += [row("TRACER", "pets", 0.5, top1=0.5), row("TRACER", "cars", 0.5, top1=0.5, ece=0.25)]
    text = as_markdown(rows)
    published = text[text.index("## ECE on ImageNet and its shifts, batches of 512") :]
    assert "| TRACER | 0.045 | 0.039 | 0.041 | 0.104 | 0.078 | 0.103 | 0.066 | 0.073 |" in published
    pooled = text[text.index("## ECE on ImageNet and its shifts, all samples") : text.index(published)]
    assert "| 0.033 | 0.036 |" in pooled
    assert "| TRACER | ImageNet | 50.0 | 25.0 | 0.022 | 0.045 | 1.500 | 1.250 |" in text
    assert "| TRACER | Cars | 50.0 |  | 0.250 |  |  |  |" in text
    assert "Pets" not in text[text.index("## Calibration") :]


def test_table_separates_weights_under_one_label() -> None:
    rows = [
        row("run", "imagenet1k", 0.1, weights_digest="a" * 64, precision="fp32"),
        row("run", "imagenet-r", 0.2, weights_digest="b" * 64, precision="fp32"),
        row("run", "imagenet-r", 0.3, weights_digest="b" * 64, precision="fp16"),
        row("other", "imagenet1k", 0.4),
    ]
    text = as_markdown(rows)
    assert "| run (aaaaaaaa, fp32) | 10.0 |  |  |" in text
    assert "| run (bbbbbbbb, fp32) |  |  | 20.0 |" in text
    assert "| run (bbbbbbbb, fp16) |  |  | 30.0 |" in text
    assert "| other | 40.0 |" in text


def test_table_shows_every_row() -> None:
    rows = [
        row("run", "imagenet-r", 0.1),
        # A user's set with a known name, a second copy of the data set, another metric, and a user's other set.
        row("run", "imagenet-r", 0.2) | {"dataset": None, "title": "imagenet-r"},
        row("run", "imagenet-r", 0.3) | {"set": "copy"},
        row("run", "imagenet-r", 0.4) | {"metric": "macro_f1"},
        row("run", "imagenet-r", 0.5) | {"set": "mine", "dataset": None, "title": "mine\n| all"},
    ]
    for order in (rows, rows[::-1]):
        text = as_markdown(order)
        assert "| run |  |  | 10.0 |  |  |  | 10.0 (1 of 4) | 10.0 (1 of 5) |" in text
        header, _, values = text[text.index("## Other sets") :].splitlines()[2:5]
        cells = dict(zip(header.split(" | "), values.split(" | "), strict=True))
        assert {name.strip("| "): cell.strip("| ") for name, cell in cells.items()} == {
            "Method": "run",
            "imagenet-r": "20.0",
            "ImageNet-R (copy)": "30.0",
            "ImageNet-R (imagenet-r, macro F1)": "40.0",
            r"mine \| all": "50.0",
            "OOD avg.": "35.0",
        }


def add(folder: Path, process: int, count: int) -> None:
    """Adds rows as an evaluation does."""
    results = Results(folder)
    for number in range(count):
        fields = {"label": f"model {process}", "set": f"set {number}", "title": "t", "role": None}
        results.add(fields | {"metric": "top1", "value": 0.5, "key": f"{process} {number}"})
    results.write_tables()


def test_results_of_two_processes_are_all_kept(tmp_path: Path) -> None:
    processes = [context().Process(target=add, args=(tmp_path, process, 6)) for process in range(2)]  # type: ignore[attr-defined]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    rows = Results(tmp_path).rows
    assert sorted(row["key"] for row in rows) == sorted(f"{p} {n}" for p in range(2) for n in range(6))
    with (tmp_path / "results.csv").open(newline="") as lines:
        assert len(list(csv.DictReader(lines))) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "results.jsonl", "results.md"]


def test_results_ignore_only_an_incomplete_last_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add(tmp_path, 0, 3)
    text = (tmp_path / "results.jsonl").read_text()
    (tmp_path / "results.jsonl").write_text(text[:-20])
    results = Results(tmp_path)
    assert [row["set"] for row in results.rows] == ["set 0", "set 1"]
    assert "results.jsonl: its last line is incomplete and is ignored" in caplog.text
    results.add(results.rows[0] | {"set": "more"})
    assert [row["set"] for row in Results(tmp_path).rows] == ["set 0", "set 1", "more"]
    lines = text.splitlines()
    (tmp_path / "results.jsonl").write_text("\n".join([lines[0][:-5], *lines[1:]]) + "\n")
    with pytest.raises(DataError, match="line 1 is not a result"):
        Results(tmp_path)


def test_results_add_appends_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed, written = [], []
    parse = results_module.parse_json
    monkeypatch.setattr(results_module, "parse_json", lambda text: parsed.append(text) or parse(text))
    write = results_module.write_atomic
    monkeypatch.setattr(
        results_module, "write_atomic", lambda path, data: written.append(path.name) or write(path, data)
    )
    add(tmp_path, 0, 20)
    assert len(parsed) == 20  # each line once, however many there are
    assert written == ["results.csv", "results.md"]  # once a command
    parsed.clear()
    Results(tmp_path).add(ROW | {"key": "k"})
    assert len(parsed) == 21
    add(tmp_path, 0, 20)
    assert written[2:] == ["results.jsonl", "results.csv", "results.md"]  # replaced lines are removed
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert rows == Results(tmp_path).rows
    assert [row["set"] for row in rows] == ["s", *(f"set {number}" for number in range(20))]


def test_results_follow_a_file_with_other_ends_of_lines(tmp_path: Path) -> None:
    Results(tmp_path).add(row("a", "imagenetv2", 0.5))
    file = tmp_path / "results.jsonl"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    results = Results(tmp_path)
    for name in ("imagenet-r", "imagenet-a"):
        results.add(row("a", name, 0.5))
    assert [each["set"] for each in Results(tmp_path).rows] == ["imagenetv2", "imagenet-r", "imagenet-a"]


def test_results_follow_other_processes(tmp_path: Path) -> None:
    one, other = Results(tmp_path), Results(tmp_path)
    one.add(ROW | {"key": "1"})
    other.add(ROW | {"key": "2"})
    assert [row["key"] for row in other.rows] == ["1", "2"]
    other.add(ROW | {"key": "1"})
    one.write_tables()  # replaces the file that the other has read
    other.add(ROW | {"key": "3"})
    assert [row["key"] for row in other.rows] == [row["key"] for row in Results(tmp_path).rows] == ["2", "1", "3"]


BINS: dict[str, Any] = {"samples": [1] * 10, "confidence": [0.5] * 10, "accuracy": [0.5] * 10}
ROW = {"label": "a", "set": "s", "title": "S", "role": None, "metric": "top1", "value": 0.5, "top1": 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": 50.0, "top1": 50.0}, "value is 50.0, not between 0 and 1"),
        ({"value": 0.6}, "its value is 0.6, but its top1 is 0.5"),
        ({"top1": "50 %"}, "top1 is '50 %', not between 0 and 1"),
        ({"image_to_text_r1": 0.5}, "a retrieval row needs"),
        ({"samples": "many"}, "samples is 'many', not a count"),
        ({"ece": 1.5}, "ece is 1.5, not between 0 and 1"),
        ({"brier": 2.5}, "brier is 2.5, not between 0 and 2"),
        ({"nll": -1}, "nll is -1, not a finite number of at least 0"),
        ({"nll": 10**400}, "nll is 10*, not a finite number of at least 0"),
        ({"confidence": None}, "confidence is None, not between 0 and 1"),
        ({"reliability": {"samples": [1]}}, "its reliability has other fields than accuracy, confidence, samples"),
        ({"reliability": BINS | {"samples": [0.5] * 10}}, "the samples of its reliability are not 10 counts"),
        ({"reliability": BINS | {"accuracy": [2] * 10}}, "the accuracy of its reliability is not 10 values in"),
        ({"label": 1}, "its label, set, title or metric is not text"),
    ],
)
def test_results_reject_invalid_rows(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "results.jsonl").write_text(json.dumps(ROW | change) + "\n")
    with pytest.raises(DataError, match=f"line 1 is not a result: {message}"):
        Results(tmp_path)


@pytest.mark.parametrize("missing", ["top1", "samples"])
def test_results_find_needs_metric_and_samples(tmp_path: Path, missing: str) -> None:
    row = ROW | {"key": "k", "samples": 3}
    incomplete = {name: row[name] for name in row if name != missing}
    for stored, is_found in ((row, True), (incomplete, False)):
        (tmp_path / "results.jsonl").write_text(json.dumps(stored) + "\n")
        assert (Results(tmp_path).find("k", "a", "s", ("top1",)) is not None) is is_found


def test_row_without_calibration_is_measured_again(
    model: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counted = Counted(model)
    target = tiny.write_target(tmp_path / "set")
    tree = {"seen": {key: target[key] for key in tiny.EVALUATION}}
    (row,), _ = measured(counted, tree, tmp_path / "out")
    for field in (*calibration.METRICS, "reliability"):
        old = {name: value for name, value in row.items() if name != field}
        (tmp_path / "out/results.jsonl").write_text(json.dumps(old) + "\n")
        assert as_markdown(Results(tmp_path / "out").rows)  # old rows can still be read
        (again,), images = measured(counted, tree, tmp_path / "out")
        assert (images, again[field]) == (24, row[field])
        assert f"(measured again: the stored row has no {field})" in capsys.readouterr().out


def write_classifier(name: str, folder: Path, process: int) -> Any:
    model = ModelConfig(name=name)
    towers, names = create(model).eval(), [f"thing {i}" for i in range(30)]
    tokenizer, templates = tokenizer_of(model), read_templates("{}")
    assert process in (0, 1)
    counts = (10, 20)
    return [cached_classifier(towers, tokenizer, names[:n], templates, ALONE, folder).shape for n in counts]


def test_cached_classifier_is_written_by_two_processes(model: ModelConfig, tmp_path: Path) -> None:
    arguments = [(model.name, tmp_path, process) for process in range(2)]
    processes = [context().Process(target=write_classifier, args=args) for args in arguments]  # type: ignore[attr-defined]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".safetensors"]
    write_classifier(model.name, tmp_path, 0)  # reads all of them
