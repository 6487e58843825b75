"""The study of prompts after an update of the model: its sets, its plan, its configs and its tables."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study import model, prompt_runs, prompt_tables, results, sets
from study.prompt_runs import COARSE, EVALUATED, FINE, LEARNERS, NEW, OLD, TUNED, UNREAD, ZERO_SHOT, PromptRun
from test_study import REAL

pytestmark = REAL
DIGESTS = {OLD: "first", NEW: "second"}


def row_of(run: PromptRun, **accuracies: float) -> dict[str, Any]:
    values = {name: accuracies.get(name, 0.5) for name in EVALUATED[run.target]}
    return run.key("small", DIGESTS) | {"accuracy": values, "cpu_seconds": 3.0}


def worked_off() -> list[dict[str, Any]]:
    """Results of a complete plan; the middle learning rate is best, and gains are 1, 2 and 3 points."""
    rows: list[dict[str, Any]] = []
    gains = {"coop": 0.01, "kgcoop": 0.02, "contcoop": 0.03}
    while left := [run for run in prompt_runs.plan(rows) if run not in set(map(prompt_runs.run_of, rows))]:
        for run in left:
            validation = 0.6 if run.learning_rate in (0.02, 1e-3) else 0.5
            gain = gains.get(run.method, 0.0) if (run.trained, run.measured) == (OLD, NEW) else 0.0
            retrained = 0.05 if run.trained == NEW and run.method != ZERO_SHOT else 0.0
            rows.append(row_of(run, validation=validation, id=0.5 + gain + retrained + 0.001 * run.seed))
    return rows


def test_sets_of_the_targets_share_no_picture_and_no_class() -> None:
    named = prompt_runs.labelled_sets()
    pictures = sets.load(sets.CIFAR100, "test")
    fine = named[FINE]
    counts = {"target": 800, "validation": 400, "id": 1300, "unseen": 1300, "update": 1300}
    assert {name: len(part.images) for name, part in fine.items()} == counts
    assert {name: len(part.images) for name, part in named[COARSE].items()} == {
        "target": 3200, "validation": 1600, "id": 5200,
    }  # fmt: skip
    parts = [set(fine[name].names) for name in ("id", "unseen", "update")]
    assert [len(part) for part in parts] == [25, 25, 25]
    assert len(set.union(*parts)) == 75
    assert fine["target"].names == fine["validation"].names == fine["id"].names
    # Equal numbers of each class, and no picture twice.
    for part in fine.values():
        assert len(set(np.bincount(part.labels).tolist())) == 1
    known = [image.tobytes() for name in ("target", "validation", "id") for image in named[COARSE][name].images]
    assert len(set(known)) == len({image.tobytes() for image in pictures.images})
    old = set(prompt_runs.PRETRAINING[OLD][1])
    by_name = {name: label for label, name in enumerate(pictures.names)}
    assert {name for name in fine["update"].names if by_name[name] in old} == set()
    assert all(by_name[name] in old for name in (*fine["id"].names, *fine["unseen"].names))
    first = int(named[COARSE]["id"].labels[0])
    picture = named[COARSE]["id"].images[0]
    (row,) = (index for index, image in enumerate(pictures.images) if np.array_equal(image, picture))
    assert named[COARSE]["id"].names[first] == sets.superclasses(sets.CIFAR100, "test")[row]


def test_learning_rates_are_chosen_by_the_old_model_alone() -> None:
    rows = worked_off()
    runs = list(map(prompt_runs.run_of, rows))
    assert len(runs) == len(set(runs))
    for target in (FINE, COARSE, UNREAD):
        for method in LEARNERS:
            chosen = [run for run in runs if (run.target, run.method, run.measured) == (target, method, NEW)]
            assert {run.learning_rate for run in chosen} == {0.02}
            assert len(chosen) == 6
            tried = [run for run in runs if (run.target, run.method, run.trained) == (target, method, OLD)]
            assert {run.learning_rate for run in tried if run.measured == OLD} == {0.002, 0.02, 0.2, 2.0}
    assert not [run for run in runs if run.method == TUNED and run.trained != run.measured]
    # Whatever the new model scores, the choice stays.
    changed = [
        row | {"accuracy": row["accuracy"] | {"validation": 0.9}} if row["measured"] == NEW else row
        for row in rows
    ]
    assert prompt_runs.choice(changed, FINE, "coop") == PromptRun(FINE, "coop", OLD, OLD, 0.02)
    assert prompt_runs.choice(rows[:3], FINE, "coop") is None
    equal = [row_of(run) for run in prompt_runs.trials(FINE, "coop")]
    assert prompt_runs.choice(equal, FINE, "coop") == PromptRun(FINE, "coop", OLD, OLD, 0.002)


def test_table_has_gain_and_share_over_seeds(tmp_path: Path) -> None:
    rows = worked_off()
    # Seeds add 0, 0.1 and 0.2 points; retraining 5 points.
    text = "\n".join(prompt_tables.lines(rows, "small", tmp_path))
    line = "| ContCoOp | 0.02 | 3 | 50.0 | 50.1 ± 0.1 | 50.0 | 53.1 ± 0.1 | 55.1 ± 0.1 | +3.1 ± 0.1 | 61 |"
    assert text.count(line) == 3
    assert "| ContCoOp - KgCoOp | +1.0 ± 0.0 | +0.0 ± 0.0 | +0.0 ± 0.0 | +1.0 ± 0.0 | +1.0 ± 0.0 |" in text
    # Harmonic mean of 53.1 and 50.
    assert "53.1, 50.0, 51.5" in text
    assert [path.name for path in tmp_path.iterdir()] == ["study-small-prompts.png"]
    # Results of other weights are not mixed in.
    other = [row | {"measured_weights": "third"} for row in rows[:5]]
    assert "\n".join(prompt_tables.lines([*rows, *other], "small", tmp_path)) == text
    assert prompt_tables.lines(rows[:4], "small", tmp_path) == []


def test_results_are_identified_by_both_models() -> None:
    run = PromptRun(FINE, "coop", OLD, NEW, 0.02)
    rows = [row_of(run), row_of(replace(run, seed=1)), row_of(run, id=0.9)]
    assert prompt_runs.latest(rows) == [rows[2], rows[1]]
    assert len(prompt_runs.latest([rows[0], rows[0] | {"measured_weights": "third"}])) == 2


ONCE = """
import sys
from dataclasses import replace
from pathlib import Path
from dive_fast.distributed import join
from study import prompt_runs, sets
from study.prompt_runs import EVALUATED, FINE, NEW, OLD, PromptRun, PromptStudy

pictures = sets.cut(sets.load(sets.CIFAR100, "test"), 0, 400)
few = sets.of_classes(pictures, [0, 4, 8, 12])
prompt_runs.PROMPTS = prompt_runs.PROMPTS._replace(epochs=1, target={"batch_size": 8})
prompt_runs.TUNING = prompt_runs.TUNING._replace(epochs=1, target={"batch_size": 8})
prompt_runs.REFERENCE = 16
prompt_runs.PRETRAINING = {OLD: (0, [0]), NEW: (1, [1])}
prompt_runs.labelled_sets = lambda: {FINE: dict.fromkeys(("target", *EVALUATED[FINE]), few)}
plugged = PromptRun(FINE, "contcoop", OLD, NEW, 0.02)
runs = [replace(plugged, measured=OLD), plugged, replace(plugged, method="contcoop_attention")]
runs.append(PromptRun(FINE, "dive", OLD, OLD, 1e-3))
runs.append(PromptRun(FINE, "zero-shot", NEW, NEW))
prompt_runs.plan = lambda rows: runs
PromptStudy(Path(sys.argv[1]), "small", "small", join()).work(Path(sys.argv[1], "results.jsonl"))
"""


@pytest.mark.slow
def test_run_is_measured_on_both_models_and_resumes(tmp_path: Path) -> None:
    path = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    command, file = [sys.executable, "-c", ONCE, str(tmp_path)], tmp_path / "results.jsonl"
    subprocess.run(command, env=environment, check=True, timeout=300)
    rows = results.read(file)
    first, second, attending, tuned, plain = rows
    assert (first["measured"], second["measured"]) == (OLD, NEW)
    old = model.digest(tmp_path / "model-small-6-classes-75")
    assert first["trained_weights"] == second["trained_weights"] == first["measured_weights"] == old
    assert second["measured_weights"] == plain["measured_weights"] != old
    assert first["cpu_seconds"] == second["cpu_seconds"]
    assert attending["loss"] != second["loss"]
    assert tuned["loss"] > 0
    # A killed run resumes with the line that is missing, and keeps what was trained.
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    subprocess.run(command, env=environment, check=True, timeout=300)
    assert results.read(file) == rows
