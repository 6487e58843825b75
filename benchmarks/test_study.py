"""The study's data are what they are said to be: the right pictures, and no class on both sides. Its plan chooses
on ID validation alone, and its results survive a kill.
"""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file
from study import model, results, robustness, robustness_tables, runs, sets
from study import summary as report
from study.experiments import (
    LEARNING_RATES,
    MARGIN,
    SEEDS,
    chosen,
    complete,
    grids,
    in_weight_space,
    plan,
    setting_under_attack,
    settled,
    sweeps,
    under_attack,
)
from study.methods import (
    ADAPTERS,
    ADVERSARIAL,
    ATTACK_EPS,
    ATTACKED_FIRST,
    COMBINED,
    DISTILLED,
    ENSEMBLE,
    IN_WEIGHT_SPACE,
    LEARNING_RATES_UNDER_ATTACK,
    LITERAL_COSINE,
    OBJECTIVES,
    PROJECTIONS,
    PUBLISHED_STEPS,
    PUBLISHED_WIDTH,
    STRENGTHS,
    STRENGTHS_UNDER_ATTACK,
    UNDECAYED,
    UNDER_ATTACK,
    Strength,
    grid_of,
    objective,
)
from study.runs import CALIBRATION, SIZES, Run, Study

from dive_fast.config.schema import EvaluationSet
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError
from dive_fast.evaluation.datasets.resolve import open_set
from dive_fast.methods.run_config import load_run_config

REAL = [
    pytest.mark.realdata,
    pytest.mark.skipif(not (sets.DATA / "cifar10").is_dir(), reason=f"no real images in {sets.DATA}"),
]


def real(test: Any) -> Any:
    """Marks a test that needs the pictures."""
    for mark in REAL:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "data"
    return sets.write(folder, 12, 30, 7, corruptions=3, references=(10,), worlds=("cifar10", "pacs"))


def given() -> Any:
    """The loader that comes with the files."""
    spec = importlib.util.spec_from_file_location("tiles", sets.DATA / "tiles.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@real
@pytest.mark.parametrize(
    ("file", "split"), [("cifar100/cifar100.npz", "test"), ("cifar10/cifar10_test1k_lossless.npz", "test")]
)
def test_pictures_are_those_of_the_files_own_loader(file: str, split: str) -> None:
    images, labels, names = given().load(sets.DATA / file, split)
    found = sets.load(file, split)
    assert np.array_equal(found.images, images)
    assert np.array_equal(found.labels, labels)
    assert found.names == tuple(name.replace("_", " ").lower() for name in names)


@real
def test_reference_and_zero_shot_set_share_no_class(data: Path) -> None:
    test = sets.load("cifar100/cifar100.npz", "test")
    reference, zero_shot = sets.halves(test)
    assert sorted(reference + zero_shot) == list(range(100))
    kept = sets.of_classes(test, zero_shot)
    assert len(kept.images) == 5000
    rows = np.flatnonzero(np.isin(test.labels, zero_shot))
    for row in range(0, 5000, 501):
        assert kept.names[kept.labels[row]] == test.names[test.labels[rows[row]]]
        assert np.array_equal(kept.images[row], test.images[rows[row]])
    coarse = sets.names("cifar100/cifar100.npz", "coarse")
    samples = open_webdataset(str(data / "reference"), ".txt").samples
    said = [text for sample in samples for text in sample.texts]
    allowed = [*(test.names[one] for one in reference), *coarse]
    assert len(said) == 30
    assert all(any(name in text for name in allowed) for text in said)


@real
def test_the_engine_reads_every_set(data: Path) -> None:
    tree = runs.tree(data, data / "no-model")
    for name, count in {"validation": 7, "id": 7, "ood": 3 * len(sets.CORRUPTIONS), "zs": 7}.items():
        source, names, templates = open_set(EvaluationSet.model_validate(tree["evaluate"]["sets"][name]))
        assert len(source) == count
        assert len(names) == (50 if name == "zs" else 10)
        assert len(templates) == len(sets.TEMPLATES)
    assert len(open_webdataset(str(data / "target"), ".cls")) == 12


@real
def test_corruptions_change_pictures_the_same_way_again() -> None:
    pictures = sets.cut(sets.load("cifar10/cifar10.npz", "test"), 0, 3)
    once, again = sets.corrupted(pictures), sets.corrupted(pictures)
    assert np.array_equal(once.images, again.images)
    parts = [pictures.images, *np.split(once.images, len(sets.CORRUPTIONS))]
    assert once.labels.tolist() == pictures.labels.tolist() * len(sets.CORRUPTIONS)
    assert all(not np.array_equal(one, other) for one, other in itertools.combinations(parts, 2))
    # Changed, not destroyed.
    assert all(np.abs(part.astype(float) - pictures.images).mean() < 70 for part in parts)


@real
def test_the_tokenizer_knows_every_word(tmp_path: Path) -> None:
    model.write_shape(tmp_path, "small")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    unknown = tokenizer(["zyzzyva"])[0, 1]
    random = np.random.default_rng(0)
    fine, coarse = (sets.names("cifar100/cifar100.npz", kind) for kind in ("class", "coarse"))
    texts = [sets.caption(one, coarse[place // 5], random) for place, one in enumerate(fine) for _ in range(5)]
    texts += [form.format(name) for form in sets.TEMPLATES for name in sets.names("cifar10/cifar10.npz")]
    tokens = tokenizer(texts)
    assert not (tokens == unknown).any()
    # The end of text is there: nothing was cut.
    assert (tokens.max(1).values == tokens.max()).all()


@real
def test_a_config_of_the_study_is_one(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "cifar10.json"
    path.write_text(json.dumps(runs.tree(data, tmp_path / "model")))
    config = load_run_config(str(path), ["objective.weight=3"], tmp_path)
    assert set(config.evaluate.sets) == set(runs.EVALUATED)
    assert config.objective.weight == 3


@real
def test_pacs_is_trained_on_photos_and_tested_on_others(data: Path) -> None:
    photos = sets.load(sets.PACS, "photo")
    cuts = sorted(sets.PHOTOS.values())
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(cuts))
    assert cuts[-1][1] == len(photos.images)
    parts = sets.labelled_sets("pacs", 12, 7, 3)
    whole = np.bincount(photos.labels) / len(photos.labels)
    seen = {one.tobytes() for one in parts["target"].images}
    for name in sets.PHOTOS:
        shares = np.bincount(parts[name].labels, minlength=7) / len(parts[name].labels)
        assert np.abs(shares - whole).max() < 0.06
        if name != "target":
            # Two photos of PACS may be the same file.
            assert np.mean([one.tobytes() in seen for one in parts[name].images]) < 0.02
    for name in ("target", *sets.evaluated("pacs")):
        assert len(open_webdataset(str(data / "pacs" / name), ".cls")) > 0
        said = (data / "pacs" / name / "classes.txt").read_text().split("\n")
        assert not sets.IN_PACS & set(said) or name not in ("zs", "tiny")


@real
def test_tiny_imagenet_has_no_class_that_training_has(data: Path) -> None:
    del data
    decided = sets.decisions()
    with np.load(sets.DATA / sets.TINY) as arrays:
        assert [one.wnid for one in decided] == arrays["wnids"].tolist()
        assert [one.name for one in decided] == arrays["class_names"].tolist()
    hundred = sets.load(sets.CIFAR100, "test")
    reference, zero_shot = ({hundred.names[label] for label in half} for half in sets.halves(hundred))
    trained = {"CIFAR-10": set(sets.names(sets.CIFAR10)), "reference": reference}
    for one in decided:
        assert not (one.collides_with and one.read_as)
        assert not one.read_as or one.read_as in zero_shot
        if one.collides_with:
            where, name = one.collides_with.split(": ")
            assert name in trained[where]
        else:
            # What is called by a trained class's name collides with it.
            assert one.name.lower() not in trained["CIFAR-10"] | reference
    found = sets.tiny()
    names = {one.read_as for one in decided if one.read_as}
    assert set(found.names) == names
    assert len(found.images) == 40 * sum(bool(one.read_as) for one in decided)
    pictures = sets.load(sets.TINY, "test")
    rows = [row for row, label in enumerate(pictures.labels) if decided[label].read_as]
    for place in range(0, len(rows), 97):
        assert np.array_equal(found.images[place], pictures.images[rows[place]])
        assert found.names[found.labels[place]] == decided[pictures.labels[rows[place]]].read_as


def test_more_words_leave_the_old_ones_as_they_were(tmp_path: Path) -> None:
    made, more = tmp_path / "made", tmp_path / "more"
    made.mkdir()
    model.write_shape(made, "small", {"cat", "dog", "photo"})
    clip = open_clip.create_model(f"local-dir:{made}", load_weights=False, force_custom_text=True).eval()
    model.pretrain.save(clip, made)
    model.with_words(made, more, ["sea otter", "cat"])
    other = open_clip.create_model(f"local-dir:{more}", force_custom_text=True).eval()
    old, new = (open_clip.get_tokenizer(f"local-dir:{folder}") for folder in (made, more))
    texts = ["photo dog", "cat cat photo"]
    assert not torch.equal(old(texts), new(texts))
    with torch.no_grad():
        assert torch.equal(clip.encode_text(old(texts)), other.encode_text(new(texts)))
        otter = other.encode_text(new(["otter", "sea", "elsewhere"]))
    assert not torch.equal(otter[0], otter[1])
    assert not torch.equal(otter[0], otter[2])
    assert model.digest(made) != model.digest(more)


MODELS = {"cifar10": "digest", "pacs": "digest"}


def row_of(run: Run, validation: float, **figures: float) -> dict[str, Any]:
    measured = {name: 0.5 for name in ("id", "ood", "zs", "tiny", "rsa", "distance", "relative_distance")}
    measured |= {"seconds": 1.0, "course": []}
    norms = {} if run.method == "flyp" else {"u": 1e-3, "v": 1e-3, "m": 1e-4}
    calibration = {metric: dict.fromkeys(("id", "ood"), 0.25) for metric in CALIBRATION}
    return run.key("small", "digest") | measured | norms | calibration | {"validation": validation} | figures


def grid_rows(method: str, score: Any) -> list[dict[str, Any]]:
    return [row_of(run, score(run), id=score(run)) for run in grids("cifar10", [method])]


def test_what_is_chosen_is_chosen_on_validation() -> None:
    rates = {rate: 0.5 - 0.05 * place for place, rate in enumerate(LEARNING_RATES)}
    rows = grid_rows("flyp", lambda run: rates[run.learning_rate])
    light, middle, heavy = map(float, grid_of("dive"))  # type: ignore[arg-type]
    lost = {light: -0.02, middle: MARGIN, heavy: 2 * MARGIN}
    rows += grid_rows("dive", lambda run: round(rates[run.learning_rate] - lost[run.strength], 6))
    assert chosen(rows, "cifar10", "flyp", "equal") == Run("cifar10", "flyp", None, LEARNING_RATES[0])
    assert chosen(rows, "cifar10", "dive", "best") == Run("cifar10", "dive", light, LEARNING_RATES[0])
    assert chosen(rows, "cifar10", "dive", "equal") == Run("cifar10", "dive", middle, LEARNING_RATES[0])
    # Whatever a run does elsewhere, or with another seed or option, has no part in it.
    tempting = Run("cifar10", "dive", heavy, LEARNING_RATES[1])
    rows += [row_of(replace(tempting, seed=1), 0.9), row_of(replace(tempting, every=2), 0.9)]
    rows[-3] |= {"id": 1.0, "zs": 1.0}
    assert chosen(rows, "cifar10", "dive", "equal") == Run("cifar10", "dive", middle, LEARNING_RATES[0])
    assert chosen(rows[:-3], "cifar10", "dive", "best") is None
    assert chosen(rows, "cifar10", "snd", "best") is None


def test_a_plan_worked_off_has_every_method_with_every_seed_and_ends() -> None:
    rows: list[dict[str, Any]] = []
    for _ in range(1000):
        known = [runs.Run(**{name: row[name] for name in Run.__dataclass_fields__}) for row in rows]
        left = [run for run in plan(rows, SIZES["small"], MODELS) if run not in known]
        if not left:
            break
        # Runs may come in any order, as long as the first one comes first.
        rows += [row_of(run, 0.5 - (run.strength or 0) * 1e-5) for run in left[:7]]
    assert not left
    assert len(set(known)) == len(known)
    for world in runs_worlds():
        for method in STRENGTHS:
            run = chosen(rows, world, method, "equal")
            assert (run is None) == (world == "pacs" and method in IN_WEIGHT_SPACE)
            assert run is None or {replace(run, seed=seed) for seed in SEEDS} <= set(known)
    dive = chosen(rows, "cifar10", "dive", "equal")
    assert dive is not None
    for change in ({"every": 8}, {"reference_batch": 8}, {"decay": 0.0}, {"reference": 500}):
        assert {replace(dive, seed=seed, **change) for seed in SEEDS} <= set(known)


def test_settings_chosen_for_earlier_weights_are_taken_over() -> None:
    rows = grid_rows("flyp", lambda run: 0.5) + grid_rows("dive", lambda run: 0.5 - (run.strength or 0) * 1e-5)
    left = plan(rows, SIZES["small"], MODELS | {"cifar10": "new"})
    dive = chosen(rows, "cifar10", "dive", "equal")
    assert dive is not None
    assert [run for run in left if run.method == "dive" and run.is_plain()][:3] == [
        replace(dive, seed=seed) for seed in SEEDS
    ]
    # The level that methods are compared at is that of the new weights, and so are the grids of other methods.
    assert set(grids("cifar10", ["flyp", DISTILLED])) <= set(left)
    assert not set(grids("cifar10", ["dive"])) <= set(left)
    # A grid for the new weights takes precedence.
    new = [row | {"model": "new"} for row in grid_rows("dive", lambda run: run.learning_rate)]
    assert chosen([*rows, *new], "cifar10", "dive", "best") == chosen(new, "cifar10", "dive", "best")


def test_methods_in_weight_space_are_run_next_to_flyp_and_dive_of_earlier_weights() -> None:
    rows = grid_rows("flyp", lambda run: 0.5) + grid_rows("dive", lambda run: 0.5 - (run.strength or 0) * 1e-5)
    models = {"cifar10": "new"}
    first = in_weight_space(rows, models)
    dive = chosen(rows, "cifar10", "dive", "equal")
    assert first[:2] == [chosen(rows, "cifar10", "flyp", "equal"), dive]
    assert set(grids("cifar10", IN_WEIGHT_SPACE)) <= set(first)
    assert {run.learning_rate for run in first} == {LEARNING_RATES[0]}
    # Their level is FLYP without decay, from the same weights: the strongest within the margin of it.
    rows += [row | {"model": "new"} for row in grid_rows(UNDECAYED, lambda run: 0.4)]
    lost = {strength: place * MARGIN for place, strength in enumerate(grid_of("flyp_spd"))}
    rows += [row | {"model": "new"} for row in grid_rows("flyp_spd", lambda run: 0.4 - lost[run.strength])]
    spd = chosen(rows, "cifar10", "flyp_spd", "equal")
    assert spd == Run("cifar10", "flyp_spd", grid_of("flyp_spd")[1], LEARNING_RATES[0])
    assert {replace(spd, seed=seed) for seed in SEEDS} <= set(in_weight_space(rows, models))


def test_settings_of_another_size_are_taken_over_a_seed_after_the_other() -> None:
    rows = grid_rows("flyp", lambda run: 0.5) + grid_rows("dive", lambda run: 0.5 + run.learning_rate)
    # PACS has no grid, and the other methods none on CIFAR-10.
    found = settled(rows, ["cifar10", "pacs"])
    dive = chosen(rows, "cifar10", "dive", "equal")
    assert dive is not None
    assert dive.learning_rate == max(LEARNING_RATES)
    assert [run.method for run in found] == ["flyp", "dive"] * len(SEEDS)
    assert [run.seed for run in found] == [seed for seed in SEEDS for _ in range(2)]
    assert found[1] == dive
    assert settled(rows, ["pacs"]) == []


@pytest.mark.parametrize("size", SIZES)
def test_every_run_of_a_plan_is_a_config_of_the_engine(size: str, tmp_path: Path) -> None:
    study = Study(tmp_path, size, Ranks(0, 1, torch.device("cpu")))
    study.digests = dict.fromkeys(report.WORLDS, "0123456789abcdef")
    dive = Run("cifar10", "dive", 10.0, 1e-3)
    known = [*plan([], SIZES[size], MODELS), *sweeps(dive, SIZES[size])]
    assert {run.method for run in known} == {*STRENGTHS, LITERAL_COSINE}
    for run in known[::3]:
        config = study.config(run)
        known = STRENGTHS.get(run.method, Strength("weight", ()))
        values = {"weight": config.objective.weight} | (config.objective.model_extra or {})
        values |= (config.projection.model_extra or {}) | {"1 - alpha": run.strength}
        assert known is None or values[known.option] == run.strength
        assert config.projection.name == PROJECTIONS.get(run.method, "none")
        assert config.train.weight_decay == (0 if run.method in IN_WEIGHT_SPACE else 0.1)
        assert config.objective.reference_every == run.every
        assert (config.objective.model_extra or {}).get("decay", run.decay) == run.decay
        assert config.objective.name == OBJECTIVES.get(run.method, {"name": run.method})["name"]
        assert config.data.reference is not None
        assert config.data.reference.batch_size == run.reference_batch or run.reference_batch is None
        assert list(config.evaluate.sets) == list(sets.evaluated(run.world))
        assert ("pacs" in config.model.name) == (run.world == "pacs")


def test_option_that_a_method_lacks_makes_its_run_impossible(tmp_path: Path) -> None:
    study = Study(tmp_path, "small", Ranks(0, 1, torch.device("cpu")))
    study.digests = dict.fromkeys(report.WORLDS, "0123456789abcdef")
    with pytest.raises(ConfigError, match=r"unknown key objective\.decay \(options of objective\.name = flyp"):
        study.config(Run("cifar10", "flyp", None, 1e-3, decay=0.5))
    with pytest.raises(ConfigError, match=r"objective\.name = ") as caught:
        study.config(Run("cifar10", "unheard_of", None, 1e-3))
    assert "expected one of" in str(caught.value)


def test_tables_have_every_method_of_the_grid() -> None:
    orders = [group.order for group in report.GROUPS]
    assert {method for order in orders for method in order} == set(STRENGTHS)
    assert all(len(set(order)) == len(order) for order in orders)
    assert report.LABELS["cosine"] == "Cosine, m from 1"
    assert all(report.COLOURS[name].startswith("#") for name in STRENGTHS)


def test_strength_is_the_option_that_a_grid_varies() -> None:
    tracer, combined, flyp = (
        objective(method, strength, 1, 0.99, 0.99, width=PUBLISHED_WIDTH, steps=PUBLISHED_STEPS)
        for method, strength in ((DISTILLED, 3.0), (COMBINED, 10.0), ("flyp", None))
    )
    assert tracer["distillation_weight"] == 3
    assert "weight" not in tracer
    assert combined["weight"] == 10
    # The default, which is the middle of the distilled method's grid.
    assert "distillation_weight" not in combined
    assert grid_of(DISTILLED) == (0.09, 0.9, 9.0)
    assert flyp == {"name": "flyp"}


def test_options_of_published_sizes_are_rescaled() -> None:
    for width, steps, feature_weight, every in (
        (PUBLISHED_WIDTH, PUBLISHED_STEPS, 2000, 500),
        (64, 156, 250, 3),
        (64, 10, 250, 1),
    ):
        sections = (
            objective(method, None, 1, 0.99, 0.99, width=width, steps=steps) for method in (DISTILLED, "carot")
        )
        tracer, carot = sections
        assert tracer["feature_weight"] == feature_weight
        assert tracer["teacher_every"] == 1
        assert carot["teacher_every"] == every
        assert "feature_weight" not in carot
    assert SIZES["small"].steps("cifar10") == 156
    assert SIZES["small"].steps("pacs") == 150


@pytest.mark.parametrize("missing", [CALIBRATION, ("distance",)])
def test_compared_runs_without_calibration_or_distance_are_measured_again(missing: tuple[str, ...]) -> None:
    rows = grid_rows("flyp", lambda run: 0.5) + grid_rows("dive", lambda run: 0.5 - (run.strength or 0) * 1e-5)
    rows = [{name: value for name, value in row.items() if name not in missing} for row in rows]
    dive = chosen(rows, "cifar10", "dive", "equal")
    assert dive is not None
    left_out = [row for row in rows if row not in complete(rows)]
    assert [row["method"] for row in left_out] == ["flyp", "dive"]
    assert results.has(left_out, dive.key("small", "digest"))
    again = row_of(dive, 0.5)
    latest = results.latest([*rows, again])
    assert len(latest) == len(rows)
    assert again in complete(latest)


def attacked_row(run: Run, validation: float, accuracy: float, **figures: float) -> dict[str, Any]:
    eps = list(robustness.ATTACK.eps)
    return row_of(run, validation, shift=0.5, sharpness=100.0, **figures) | {
        "attacked": {"eps": eps, "accuracy": [accuracy] * len(eps), "clean": 0.5, "samples": 500, "not_finite": 0}
    }


def attacked_rows() -> list[dict[str, Any]]:
    """A plan of attacks that was worked off, after grids of earlier weights."""
    earlier = [
        row for name in ("flyp", "dive", "tracer", "vanilla_ft") for row in grid_rows(name, lambda run: 0.5)
    ]
    rows = [row | {"model": "earlier"} for row in earlier]
    while left := [run for run in under_attack(rows, MODELS) if not results.has(rows, run.key("small", "digest"))]:
        # What the gentler rate has is better.
        rows.append(attacked_row(left[0], 0.5 - left[0].learning_rate, 0.1 * left[0].seed))
    return rows


def test_attacked_methods_have_three_seeds_at_the_better_learning_rate() -> None:
    rows = attacked_rows()
    known = under_attack(rows, MODELS)
    assert {run.method for run in known} == set(UNDER_ATTACK)
    for method in ATTACKED_FIRST:
        setting = setting_under_attack(rows, method, "digest")
        assert setting is not None
        assert {replace(setting, seed=seed) for seed in SEEDS} <= set(known)
        assert setting.learning_rate == min(LEARNING_RATES_UNDER_ATTACK.get(method, (setting.learning_rate,)))
    seeds = [run.seed for run in known if run.method in ATTACKED_FIRST]
    assert seeds == sorted(seeds)
    # Trials from other weights, and results without attacks, choose nothing.
    for change in ({"model": "other"}, {"attacked": None}):
        other = [row | change if row["method"] == "tecoa" else row for row in rows]
        assert setting_under_attack(other, "tecoa", "digest") is None


def test_every_attacked_run_is_a_config_of_the_engine(tmp_path: Path) -> None:
    study = Study(tmp_path, "small", Ranks(0, 1, torch.device("cpu")))
    study.digests = {"cifar10": "0123456789abcdef"}
    for method in UNDER_ATTACK:
        config = study.config(Run("cifar10", method, STRENGTHS_UNDER_ATTACK.get(method), 1e-3))
        assert (config.model.lora is not None) == (method in ADAPTERS)
        options = config.objective.model_extra or {}
        options = config.objective.target if isinstance(config.objective.target, dict) else options
        assert options.get("attack_eps") == (ATTACK_EPS if method in ADVERSARIAL else None)
    combined = study.config(Run("cifar10", "grace_dive", 1.0, 1e-3)).objective
    assert combined.name is None
    assert isinstance(combined.reference, dict)
    assert (combined.reference["name"], combined.weight) == ("dive", 1.0)


def test_tables_compare_methods_under_attack() -> None:
    rows = attacked_rows()
    groups = robustness_tables.selected(rows)
    assert set(groups) == set(UNDER_ATTACK)
    lines = robustness_tables.table(groups)
    # ID and OOD are 0.5, and under attack 0, 0.1 and 0.2 at the seeds: harmonic means of 0, 3 / 14 and 1 / 3.
    row = next(line for line in lines if line.startswith("| TeCoA | "))
    assert "| 3 | 50.0 ± 0.0 | 50.0 ± 0.0 | 10.0 ± 10.0 | 18.3 ± 16.9 |" in row
    assert {line.count("|") for line in lines} == {14}
    trials = robustness_tables.trial_table(rows, groups)
    assert "| TeCoA | 0.001 | 49.9 | 50.0 | 0.0 |" in trials
    assert len(trials) == 2 + len(LEARNING_RATES_UNDER_ATTACK)
    assert "| TeCoA | 3 | +0.0 ± 0.0 |" in robustness_tables.difference_table(groups)[2]
    assert robustness_tables.message(groups).startswith("Under attack: vanilla FT 10 %, DiVE 10 %, TeCoA 10 %")
    assert robustness_tables.selected([row | {"attacked": None} for row in rows]) == {}


def test_sharpness_is_the_largest_eigenvalue_of_the_exact_hessian() -> None:
    torch.manual_seed(0)
    first, second = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (2, 3)))
    unused = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    images, labels = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 2

    def loss(flat: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(images @ flat[:12].view(3, 4).T)
        return torch.nn.functional.cross_entropy(4 * hidden @ flat[12:18].view(2, 3).T, labels)

    flat = torch.cat([first.flatten(), second.flatten(), unused]).detach()
    exact = torch.autograd.functional.hessian(loss, flat)
    values = torch.linalg.eigvalsh(exact)
    product = robustness.hessian_product(
        loss(torch.cat([first.flatten(), second.flatten(), unused])), [first, second, unused]
    )
    vector = torch.randn(20, dtype=torch.float64)
    assert torch.allclose(product(vector), exact @ vector, atol=1e-12)
    largest = robustness.largest_eigenvalue(product, vector, tolerance=1e-9)
    assert largest.value == pytest.approx(float(values[-1]), rel=1e-9)
    # The largest eigenvalue, not that of the largest absolute value.
    largest = robustness.largest_eigenvalue(lambda x: -(exact @ x), vector, tolerance=1e-9)
    assert largest.value == pytest.approx(-float(values[0]), rel=1e-9)
    coarse = robustness.largest_eigenvalue(product, vector, products=3)
    assert coarse.products == 3
    assert float((values - coarse.value).abs().min()) <= coarse.error


def test_feature_shift_is_one_minus_the_cosine() -> None:
    before = torch.eye(2)
    after = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    assert robustness.feature_shift(before, after) == pytest.approx(0.2)
    assert robustness.feature_shift(before, before) == 0


def runs_worlds() -> tuple[str, ...]:
    return tuple(report.WORLDS)


def test_results_outlive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first, second = row_of(Run("cifar10", "flyp", None, 1e-3), 0.5), row_of(Run("pacs", "snd", 3.0, 1e-3), 0.4)
    results.append(path, first)
    with path.open("a") as file:
        file.write(json.dumps(second)[:40])
    assert results.read(path) == [first]
    results.append(path, second)
    assert results.read(path) == [first, second]
    assert results.has([first], Run("cifar10", "flyp", None, 1e-3).key("small", "digest"))
    for other in (Run("cifar10", "flyp", None, 1e-3, seed=1), Run("cifar10", "flyp", 1.0, 1e-3)):
        assert not results.has([first], other.key("small", "digest"))
    assert not results.has([first], Run("cifar10", "flyp", None, 1e-3).key("small", "another"))
    again = first | {"ece": {}}
    assert results.latest([first, second, again]) == [second, again]
    other = first | {"model": "new"}
    assert results.of_one_model([other, first, second, first], "cifar10", ["flyp"]) == [first, first]
    assert results.of_one_model([first, second, other], "pacs", ["flyp"]) == []


def test_accuracies_are_compared_at_equal_id() -> None:
    points = [(0.5, 0.4), (0.6, 0.3), (0.55, 0.2), (0.4, 0.1)]
    assert report.front(points) == [(0.5, 0.4), (0.6, 0.3)]
    assert report.at_level(points, 0.55) == pytest.approx(0.35)
    assert report.at_level(points, 0.3) == 0.4
    assert report.at_level(points, 0.61) is None
    found = report.figure([{"id": 0.4}, {"id": 0.5}, {"id": 0.6}], lambda row: float(row["id"]))
    assert found.percent() == "50.0 ± 10.0"


def test_a_report_is_made_of_what_there_is(tmp_path: Path) -> None:
    start = row_of(Run("cifar10", "pretrained", None, 1e-3), 0.2)
    rows = [start, *grid_rows("flyp", lambda run: 0.5)]
    report.write(rows, "small", tmp_path)
    course = [{"step": step, "u": 1e-3, "v": 1e-3, "m": 1e-4} for step in (1, 5)]
    for method in ("dive", "snd"):
        rows += grid_rows(method, lambda run: 0.5 + run.strength * 1e-4)
    rows = [row | {"course": course} for row in rows]
    run = chosen(rows, "cifar10", "dive", "equal")
    assert run is not None
    rows += [row_of(replace(run, seed=1), 0.5, id=0.7) | {"course": course}]
    text = report.write(rows, "small", tmp_path).read_text()
    assert "| k = 1 | 2 |" in text
    rows += [row_of(replace(run, every=4), 0.5) | {"course": course}]
    text = report.write(rows, "small", tmp_path).read_text()
    mean = (run_id(rows, run) + 0.7) / 2
    line = next(line for line in text.splitlines() if line.startswith("| DiVE |"))
    assert f"| {100 * mean:.1f} ± " in line
    assert f"| DiVE | {run.strength:g} | 2 | 0.250 ± 0.000 | 0.250 ± 0.000 |" in text
    assert "-distilling" not in text
    # What is compared has the same seeds.
    assert "| k = 1 | 1 |" in text
    assert "| k = 4 | 1 |" in text
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".png"}


def test_report_compares_the_combination_with_its_halves_seed_by_seed(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for method in ("flyp", "dive", DISTILLED, COMBINED):
        rows += grid_rows(method, lambda run: 0.5)
        run = chosen(rows, "cifar10", method, "equal")
        assert run is not None
        better = 0.01 * (method == COMBINED)
        rows += [row_of(replace(run, seed=seed), 0.5, zs=0.1 * seed + seed * better) for seed in (1, 2)]
    course = [{"step": step, "u": 1e-3, "v": 1e-3, "m": 1e-4} for step in (1, 5)]
    text = report.write([row | {"course": course} for row in rows], "small", tmp_path).read_text()
    # 0, 1 and 2 points at seeds 0, 1 and 2; the seeds' own differences have no part in it.
    lines = [line for line in text.splitlines() if line.startswith("| TRACER | 3 |")]
    assert any("| +1.0 ± 1.0 |" in line for line in lines)
    assert {f"study-small-cifar10-{kind}-distilling.png" for kind in ("methods", "curves")} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_a_report_of_settings_from_elsewhere_compares_methods_and_no_more(tmp_path: Path) -> None:
    grid = grid_rows("flyp", lambda run: 0.5) + grid_rows("dive", lambda run: 0.5)
    rows = [row_of(run, 0.6, id=0.65) for run in settled(grid, ["cifar10"])]
    text = report.write(rows, "full", tmp_path, grid).read_text()
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith(("| FLYP |", "| DiVE |"))]
    # Accuracies, then calibration.
    assert [line[3] for line in lines[:2]] + [line[2] for line in lines[2:]] == ["3"] * 4
    assert "Sweeps" not in text
    assert {path.name for path in tmp_path.iterdir()} == {"study-full.md", "study-full-cifar10-methods.png"}


def test_report_says_how_much_methods_in_weight_space_act(tmp_path: Path) -> None:
    rows = [row for method in IN_WEIGHT_SPACE for row in grid_rows(method, lambda run: 0.5)]
    for row in rows:
        row |= {"distance": 2.0, "relative_distance": 0.25}
        if PROJECTIONS.get(row["method"]) == "digrap":
            row["projection"] = {"triggered": 0.5, "applied": 0.25, "omega": 0.125}
    lines = report.distance_table(rows, "cifar10", rows, IN_WEIGHT_SPACE)
    assert "| FLYP, no decay |  | 1 | 2.00 | 25.0 |  |  |  |" in lines
    assert "| + DiGraP | 10 | 1 | 2.00 | 25.0 | 50.0 | 25.0 | omega 0.12 |" in lines
    assert lines[-1].startswith(f"| + ensemble | {max(grid_of(ENSEMBLE)):g} | 1 | 2.00 |")  # type: ignore[type-var]
    # A method without a strength has a point without a number.
    path = tmp_path / "curves.png"
    report.draw_curves(rows, "cifar10", [UNDECAYED], path, [UNDECAYED])
    assert path.stat().st_size > 0


def test_distance_is_that_of_all_tensors_but_the_scale() -> None:
    before = {"a": torch.tensor([3.0, 0.0]), "b.weight": torch.tensor([[4.0]]), "logit_scale": torch.tensor(1.0)}
    after = {"a": torch.tensor([3.0, 1.0]), "b.weight": torch.tensor([[4.0]]), "logit_scale": torch.tensor(9.0)}
    assert runs.distance(before, after) == {"distance": 1, "relative_distance": pytest.approx(0.2)}
    lines = [
        {"step": 1, "projection/omega": 0.0, "projection/distance": 1.0},
        {"step": 2},
        {"step": 3, "projection/omega": 0.5, "projection/relative_distance": 1.0},
    ]
    assert runs.projected(lines) == {"projection": {"omega": 0.25}}
    assert runs.projected([{"step": 1}]) == {}


def run_id(rows: list[dict[str, Any]], run: Run) -> float:
    return float(next(row["id"] for row in rows if results.has([row], run.key("small", "digest"))))


ONCE = """
import sys
from pathlib import Path
from dive_fast.distributed import join
from study import results, runs
from study.runs import Run, Size, Study

size = Size("small", 0, 64, 16, {"cifar10": 1, "pacs": 1}, 40, 5, (16, 32), "fp32", 0, 1)
runs.SIZES["test"], runs.REFERENCE = size, 48
study = Study(Path(sys.argv[1]), "test", join())
study.prepare(("cifar10",))
cases = [("flyp", None, 1), ("dive", 10.0, 2), ("flyp_ensemble", 0.5, 1), ("flyp_digrap", 0.5, 1)]
cases.append(cases[0])
for method, weight, every in cases[int(sys.argv[2]) :]:
    run = Run("cifar10", method, weight, 1e-3, every=every, reference=48)
    results.append(Path(sys.argv[1], "found"), study.measure(run, Path(sys.argv[1], "weights")))
if sys.argv[2] == "0":
    run = Run("cifar10", "grace_dive", 1.0, 1e-3, reference=48)
    results.append(Path(sys.argv[1], "attacked"), study.measure(run, Path(sys.argv[1], "adapted"), attacks=True))
"""


@real
@pytest.mark.slow
def test_a_run_is_the_same_alone_and_after_another(tmp_path: Path) -> None:
    path = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    for skipped in ("0", "4"):
        command = [sys.executable, "-c", ONCE, str(tmp_path), skipped]
        subprocess.run(command, env=environment, check=True, timeout=300)
    first, dive, ensemble, digrap, again, alone = results.read(tmp_path / "found")
    del first["seconds"], again["seconds"], alone["seconds"]
    assert first == again == alone
    assert set(sets.evaluated("cifar10")) <= set(first)
    assert 0 < first["rsa"] < 1
    assert dive["course"][0]["step"] == 1
    assert dive["u"] > 0
    # The weights that an ensemble is made of are trained for it.
    assert len(list((tmp_path / "weights").iterdir())) == 4
    assert 0 < ensemble["distance"] < first["distance"]
    assert digrap["projection"].keys() == {"triggered", "applied", "omega"}
    assert digrap["relative_distance"] > 0
    weights = load_file(next((tmp_path / "weights").glob("*flyp*")))
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    (attacked,) = results.read(tmp_path / "attacked")
    assert robustness.is_measured(attacked)
    assert attacked["attacked"]["samples"] == 40
    assert 0 < attacked["shift"] < 2
    assert attacked["sharpness"] > attacked["sharpness_error"] > 0
    assert attacked["perturbed"].keys() == set(runs.PERTURBED)
    # Weights and the head.
    assert len(list((tmp_path / "adapted").iterdir())) == 2
