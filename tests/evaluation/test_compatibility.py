"""Accuracy after an update of the model: gain, share and harmonic means by hand, table, figure and options."""

import contextlib
import json
from pathlib import Path
from typing import cast

import pytest

from dive_fast.commands import evaluate
from dive_fast.config.schema import EvaluationSet
from dive_fast.data.sources.source import Source
from dive_fast.evaluation.compatibility import (
    Accuracies,
    Update,
    as_markdown,
    halves,
    harmonic,
    harmonic_mean,
    mean,
    message,
    remarks_on_new_classes,
    write,
)
from dive_fast.evaluation.datasets.evaluation_set import Labelled
from dive_fast.evaluation.datasets.resolve import Opened

FIRST, SECOND = Accuracies(0.6, 0.7, 0.65, 0.68, 0.75), Accuracies(0.5, 0.6, 0.6, 0.55, 0.6)


def test_gain_and_share_equal_worked_example() -> None:
    assert pytest.approx(0.03) == FIRST.gain
    assert pytest.approx(0.3) == FIRST.share
    assert pytest.approx(-0.05) == SECOND.gain
    # Retrained prompts gain nothing, or there are none: no share.
    assert SECOND.share is None
    assert FIRST._replace(retrained=None).share is None


def test_means_equal_worked_example() -> None:
    assert harmonic(0.8, 0.4) == pytest.approx(0.533333, abs=1e-6)
    assert harmonic(0.0, 0.0) == 0
    both = harmonic_mean(FIRST, SECOND)
    assert both.new == pytest.approx(2 * 0.68 * 0.55 / 1.23)
    assert harmonic_mean(FIRST, SECOND._replace(retrained=None)).retrained is None
    assert mean([FIRST, SECOND]) == pytest.approx((0.55, 0.65, 0.625, 0.615, 0.675))


def test_halves_are_sets_that_differ_in_their_part_alone() -> None:
    one = EvaluationSet(dataset="food101", path="/data")
    base, new = (one.model_copy(update={"classes": part}) for part in ("base", "new"))
    other = base.model_copy(update={"path": "/other"})
    sets = {"food101-base": base, "food101-new": new, "all": one, "alone": other}
    assert halves(sets) == {"food101": ("food101-base", "food101-new")}


def test_new_classes_that_were_trained_on_are_named() -> None:
    one = EvaluationSet(dataset="food101", path="/data")
    sets = {part: one.model_copy(update={"classes": part}) for part in ("base", "new", "all")}
    opened: Opened = dict.fromkeys(sets, Labelled(cast("Source", None), ("soup", "pie"), ()))
    (line,) = remarks_on_new_classes(sets, opened, ("pie", "rice"), Path("prompts.safetensors"))
    assert line.startswith("new: prompts.safetensors was trained on 1 of its 2 new classes")
    assert remarks_on_new_classes(sets, opened, ("rice",), Path("prompts.safetensors")) == []


def test_table_figure_and_message_show_all_sets(tmp_path: Path) -> None:
    update = Update({"a": FIRST, "b": SECOND}, {"mean": mean([FIRST, SECOND])})
    assert message(update) == "Old prompts change the new model by -1.0 points and help on 1 of 2 sets"
    header, _, first, second, _ = as_markdown(update).splitlines()
    assert header.endswith("| new, retrained | gain | share |")
    assert first == "| a | 60.0 | 70.0 | 65.0 | 68.0 | 75.0 | +3.0 | 30 |"
    assert second == "| b | 50.0 | 60.0 | 60.0 | 55.0 | 60.0 | -5.0 | - |"
    without = Update({"a": FIRST._replace(retrained=None)}, {})
    assert as_markdown(without).splitlines()[2] == "| a | 60.0 | 70.0 | 65.0 | 68.0 | +3.0 |"
    assert write(update, tmp_path) == ["compatibility.json", "compatibility.md", "compatibility.png"]
    stored = json.loads((tmp_path / "compatibility.json").read_text())
    assert stored["a"]["gain"] == pytest.approx(0.03)
    assert stored["b"]["share"] is None
    assert (tmp_path / "compatibility.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--retrained", "a"], "--retrained goes with --upgrade"),
        (["--upgrade-pretrained", "a"], "--upgrade-pretrained goes with --upgrade"),
        (["--upgrade", "ViT-B-16", "--label", "a"], "--label does not go with --upgrade"),
        (["--upgrade", "ViT-B-16", "--upgrade-pretrained", "openai"], "name the prompts of the old model"),
        (["--upgrade", "ViT-B-16", "--prompts", "none"], "--upgrade measures learned prompts"),
        (["--upgrade", "ViT-B-99"], "--upgrade: open_clip has no model ViT-B-99"),
        (["--prompts", "/none"], "--prompts /none: no such file"),
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "food101").mkdir()
    common = ["--model", "ViT-B-32", "--pretrained", "openai", "--datasets", "food101", "--root", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dive_fast.evaluation.early_checks.check_sets", lambda *_: None)
        with contextlib.suppress(SystemExit):
            assert evaluate.main([*common, *arguments]) == 2
    assert expected in capsys.readouterr().err
