"""Rows under attack: reused while nothing that determines them changes, in tables and a figure of their own."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from interrupted_attack import interrupt_at
from PIL import Image

from dive_fast.config.schema import EvaluateConfig, ModelConfig
from dive_fast.data.demo import splits, world
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError, DataError
from dive_fast.evaluation.attacks import attack_figure
from dive_fast.evaluation.attacks.attack_options import AttackOptions
from dive_fast.evaluation.attacks.attacked_sets import attack_all
from dive_fast.evaluation.evaluator import Options, measure_all, open_all
from dive_fast.evaluation.results import Results
from dive_fast.evaluation.tables import as_csv, as_markdown, attacked_lines, lines_of
from dive_fast.model.towers import create, tokenizer_of
from dive_fast.sweep.run_results import read_folder

ALONE = Ranks(0, 1, torch.device("cpu"))
COUNT = 12
DEMO = ModelConfig(name="demo")


class Case:
    """The demo model, a set of its pictures and one of captions, and a results folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.towers = root, create(DEMO).eval()
        samples: dict[str, dict[str, bytes]] = {}
        for index in range(COUNT):
            sample = splits.sample("zs_colour", index)
            content = io.BytesIO()
            sample.image.save(content, "PNG")
            texts = {"cls": str(sample.label).encode(), "txt": sample.text.encode()}
            samples[f"{index:03d}"] = {"png": content.getvalue()} | texts
        tiny.write_tar(root / "set/0.tar", samples)
        (root / "names.txt").write_text("\n".join(world.COLOURS) + "\n")
        labelled = {"class_names": str(root / "names.txt"), "templates": world.COLOUR_TEMPLATES[0], "role": "ood"}
        common = {"format": "webdataset", "path": str(root / "set")}
        self.sets: dict[str, Any] = {"mine": common | labelled, "pairs": common | {"task": "retrieval"}}

    def attack(self, attack: AttackOptions, label: str = "run", **options: Any) -> list[dict[str, Any]]:
        """Attacks the sets; returns the rows."""
        return self._measure(attack, label, options)

    def measure(self, label: str = "run") -> list[dict[str, Any]]:
        """Evaluates the sets without an attack."""
        return self._measure(None, label, {})

    def _measure(self, attack: AttackOptions | None, label: str, options: dict[str, Any]) -> list[dict[str, Any]]:
        config = EvaluateConfig.model_validate_json(json.dumps({"sets": self.sets}))
        results, opened = Results(self.root / "out"), open_all(config.sets, ALONE)
        evaluation = Options(label, **({"precision": "fp32", "batch_size": 4, "workers": 0} | options))
        shared = (self.towers, tokenizer_of(DEMO), config.sets, opened, ALONE, results, evaluation)
        with results.writing_tables():
            return measure_all(*shared, {}) if attack is None else attack_all(*shared, attack, {})

    @property
    def results(self) -> Results:
        return Results(self.root / "out")


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.fixture
def encoded(case: Case) -> list[int]:
    """Sizes of the batches of images that the model of the case encodes."""
    sizes: list[int] = []
    case.towers.visual.register_forward_hook(lambda _, arguments, __: sizes.append(len(arguments[0])))
    return sizes


def attack(*eps: float, **more: Any) -> AttackOptions:
    return AttackOptions(**({"name": "apgd-ce", "eps": eps or (2.0,), "steps": 2} | more))


def test_rows_are_reused_until_the_attack_changes(
    case: Case, encoded: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = case.attack(attack(0.5, 8.0))
    assert [(row["set"], row["metric"], row["eps"]) for row in rows] == [
        ("mine", "adversarial", 0.5),
        ("mine", "adversarial", 8.0),
    ]
    assert "pairs: left out: it has no labels to attack" in capsys.readouterr().out
    encoded.clear()
    again = case.attack(attack(8.0, 0.5), batch_size=5)
    assert encoded == []
    assert again == rows[::-1]
    assert capsys.readouterr().out.count("(measured before)") == 2
    changes: list[dict[str, Any]] = [{"steps": 1}, {"seed": 1}, {"samples": 6}, {"norm": "l2"}, {"name": "pgd"}]
    for change in changes:
        encoded.clear()
        case.attack(attack(8.0, **change))
        assert encoded, change
    with torch.no_grad():
        case.towers.visual.proj += 1e-3
    encoded.clear()
    case.attack(attack(8.0))
    assert encoded
    assert "(measured again: model.weights changed)" in capsys.readouterr().out
    encoded.clear()
    case.attack(attack(8.0), force=True)
    assert encoded
    assert not (case.root / "out/attacks").exists()


def test_row_has_everything_that_determines_it(case: Case) -> None:
    (row,) = case.attack(attack(2.0, samples=8, seed=3))
    assert {name: row[name] for name in ("attack", "norm", "eps", "steps", "subset", "seed", "samples")} == {
        "attack": "apgd-ce",
        "norm": "linf",
        "eps": 2.0,
        "steps": 2,
        "subset": 8,
        "seed": 3,
        "samples": 8,
    }
    assert row["identity"]["attack"]["samples"]
    assert row["identity"]["versions"]["torch"]
    assert row["classifier"] == "prompts"
    assert 0 <= row["value"] <= row["clean"] <= 1
    assert (row["left_out"], row["not_finite"]) == (0, 0)
    (complete,) = case.attack(attack(2.0, samples=COUNT))
    assert complete["subset"] is None


def test_rows_under_attack_stay_apart_from_other_rows(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    before = case.measure()
    table = (case.root / "out/results.md").read_text()
    attacked = case.attack(attack(2.0))
    capsys.readouterr()
    assert case.measure() == before
    assert "measured again" not in capsys.readouterr().out
    rows = case.results.rows
    assert lines_of(rows) == lines_of(before)
    complete = (case.root / "out/results.md").read_text()
    assert complete.startswith(table)
    assert "## Under attack" not in table
    assert as_markdown(attacked).startswith("## Under attack\n")
    values = f"| {100 * attacked[0]['clean']:.1f} | {100 * attacked[0]['value']:.1f} |"
    assert f"| run | mine | APGD-CE, L-infinity, 2 steps {values}" in complete
    assert attacked[0]["clean"] == next(row["value"] for row in before if row["set"] == "mine")
    # Comparisons of runs are of accuracies without an attack.
    measures = [measure.metric for result in read_folder(case.root / "out") for measure in result.measures]
    assert sorted(measures) == ["image_to_text_r1", "top1"]


def test_interrupted_measurement_resumes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    (complete,) = case.attack(attack(2.0))
    (case.root / "out/results.jsonl").unlink()
    blocks = interrupt_at(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        case.attack(attack(2.0))
    (unfinished,) = (case.root / "out/attacks").iterdir()
    (row,) = case.attack(attack(2.0))
    assert blocks == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [8, 9, 10, 11]]
    assert row | {"seconds": 0} == complete | {"seconds": 0}
    assert not unfinished.exists()


def test_sixteen_bits_and_small_distances_are_warned_of(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    case.attack(attack(2.0, 0.03, samples=4, steps=1))
    assert "rounding hides gradients" not in caplog.text
    assert "eps = 0.03 is 0.03/255, since distances are in 255ths; 7.65/255 is 0.03" in caplog.text
    case.towers.set_precision("bf16")
    case.attack(attack(2.0, samples=4, steps=1), precision="bf16")
    assert "the attack computes in bf16: rounding hides gradients" in caplog.text


def test_retrieval_alone_is_refused(case: Case) -> None:
    del case.sets["mine"]
    with pytest.raises(ConfigError, match="attack = apgd-ce: none of the sets has labels"):
        case.attack(attack(2.0))


@pytest.mark.slow
def test_auto_attack_row_has_its_version_and_batch(case: Case) -> None:
    pytest.importorskip("pyautoattack")
    # Nothing withstands the first of its attacks, so that the slow ones have nothing to do.
    (row,) = case.attack(attack(64.0, name="autoattack", steps=None))
    assert row["value"] == 0 < row["clean"]
    assert row["identity"]["attack"] | {"pyautoattack": "?"} == {
        "attack": "autoattack",
        "norm": "linf",
        "eps": 64.0,
        "steps": None,
        "subset": None,
        "seed": 0,
        "batch_size": 4,
        "targets": 9,
        "pyautoattack": "?",
    }


def rows_of(label: str, values: dict[float, float], **more: Any) -> list[dict[str, Any]]:
    """Rows as :func:`attack_all` writes them, without what tables and figures do not need."""
    common = {"label": label, "set": "a", "title": "A", "role": None, "metric": "adversarial", "clean": 0.8}
    attack = {"attack": "apgd-ce", "norm": "linf", "steps": 100, "subset": None, "seed": 0, "not_finite": 0}
    return [common | attack | {"eps": eps, "value": value} | more for eps, value in values.items()]


def test_table_has_a_column_for_each_distance() -> None:
    rows = rows_of("one", {4.0: 0.1, 1.0: 0.5}) + rows_of("two", {2.0: 0.4}, not_finite=3, left_out=1)
    rows += rows_of("one", {4.0: 0.2}, subset=500) + rows_of("one", {4.0: 0.05})
    assert as_markdown(rows).splitlines()[2:] == [
        "| Method | Set | Attack | Clean | 1/255 | 2/255 | 4/255 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| one | A | APGD-CE, L-infinity, 100 steps | 80.0 | 50.0 |  | 5.0 |",
        "| two | A (1 left out) | APGD-CE, L-infinity, 100 steps | 80.0 |  | 40.0 (3 not finite) |  |",
        "| one | A | APGD-CE, L-infinity, 100 steps, 500 samples | 80.0 |  |  | 20.0 |",
    ]
    assert "0.05" in as_csv(rows)
    assert [list(line.rows) for line in attacked_lines(rows)] == [[1.0, 4.0], [2.0], [4.0]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eps": -1.0}, "eps is -1.0, not a finite number"),
        ({"eps": "4"}, "eps is '4'"),
        ({"clean": 1.5}, "clean is 1.5, not between 0 and 1"),
        ({"norm": None}, "its attack or norm is not text"),
        ({"steps": -3}, "steps is -3, not a count"),
    ],
)
def test_invalid_row_under_attack_is_named(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    (row,) = rows_of("one", {4.0: 0.1})
    (tmp_path / "results.jsonl").write_text(json.dumps(row | wrong) + "\n")
    with pytest.raises(DataError, match=message):
        Results(tmp_path)


def test_figure_has_a_panel_for_each_set_and_a_line_for_each_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    original = attack_figure.save_figure
    monkeypatch.setattr(
        attack_figure, "save_figure", lambda figure, path: (figures.append(figure), original(figure, path))
    )
    rows = [
        *rows_of("one", {4.0: 0.1, 1.0: 0.5}),
        *rows_of("two", {4.0: 0.3}),
        *rows_of("two", {4.0: 0.2}, set="b", title="B"),
        *rows_of("two", {4.0: 0.2}, norm="l2"),
    ]
    assert attack_figure.draw(rows, tmp_path / "a.png", "apgd-ce", "linf")
    first, second = figures[0].axes
    assert [line.get_label() for line in first.lines] == ["one", "two"]
    assert [line.get_label() for line in second.lines] == ["two"]
    assert first.lines[0].get_xydata().tolist() == [[0, 80], [1, 50], [4, 10]]
    assert first.lines[1].get_color() == second.lines[0].get_color()
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width == 2 * 830
    assert not attack_figure.draw(rows, tmp_path / "b.png", "pgd", "linf")
    assert not (tmp_path / "b.png").exists()


def test_python_api_returns_the_accuracy_under_attack(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from dive_fast import api

    monkeypatch.setattr(api, "_ranks", lambda: ALONE)
    (row,) = case.attack(attack(0.5))
    sets, options = {"mine": case.sets["mine"]}, {"batch_size": 4, "workers": 0}
    values = api.evaluate(DEMO, sets, attack={"name": "apgd-ce", "eps": 0.5, "steps": 2}, **options)
    assert values == {"mine": row["value"]}
    with pytest.raises(ConfigError, match="eps = nan: expected a finite number"):
        api.evaluate(DEMO, sets, attack={"name": "apgd-ce"}, **options)
