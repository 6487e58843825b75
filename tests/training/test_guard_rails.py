"""Settings under which a run learns little, or its results say little, are reported once, with key and origin."""

import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from config_files import CONFIGS
from distributed import run_ranks

from dive_fast.config.schema import Config
from dive_fast.config.section import sections
from dive_fast.data.open_dataset import open_target
from dive_fast.distributed import Ranks, join
from dive_fast.methods import registry
from dive_fast.methods.method import Part
from dive_fast.methods.run_config import load_run_config
from dive_fast.model.towers import create
from dive_fast.training import loop as train
from dive_fast.training import run_identity
from dive_fast.training.guard_rails import ReferenceShare, warn_of_evaluation, warn_of_schedule


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guard rails")
    tree = tiny.write_config(path)
    (path / "mine.yaml").write_text(json.dumps(tree, indent=1))
    return path


def config_of(folder: Path, *overrides: str) -> Config:
    return load_run_config(str(folder / "mine.yaml"), overrides)


def line_of(folder: Path, key: str) -> int:
    """The line of a key's last part in the config."""
    lines = (folder / "mine.yaml").read_text().splitlines()
    return next(number for number, line in enumerate(lines, start=1) if f'"{key}": ' in line)


# The schedule


def warned_of_schedule(caplog: pytest.LogCaptureFixture, config: Config, total_steps: int) -> list[str]:
    caplog.clear()
    warn_of_schedule(config, registry.needs(config.objective), total_steps)
    return [record.message for record in caplog.records]


def test_weight_decay_with_a_projection_is_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    both = ["projection.name=spd", "train.weight_decay=0.1", "train.warmup_steps=0"]
    (line,) = warned_of_schedule(caplog, config_of(folder, *both), 18)
    assert line.startswith(
        "train.weight_decay = 0.1 (set on the command line) with projection.name = spd (set on the command line): "
    )
    assert "train.weight_decay" not in str(warned_of_schedule(caplog, config_of(folder, both[1]), 18))
    default = config_of(folder, both[0])
    assert default.train.weight_decay == 0
    assert not warned_of_schedule(caplog, default, 10**6)


def test_long_warmup_names_key_origin_and_remedy(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (line,) = warned_of_schedule(caplog, config_of(folder, "train.warmup_steps=500"), 18)
    assert line.startswith(
        "train.warmup_steps = 500 (set on the command line) of the 18 steps of this run: the lear"
    )
    assert line.endswith("only rises, to 3.6e-05 of 0.001; set train.warmup_steps=1 for a tenth of the run")
    (line,) = warned_of_schedule(caplog, config_of(folder, "train.warmup_steps=21"), 100)
    assert "rises for 21% of it" in line
    assert warned_of_schedule(caplog, config_of(folder, "train.warmup_steps=20"), 100) == []
    default = config_of(folder)
    assert (
        default.origins.of("train.warmup_steps") == f"set in {folder}/mine.yaml:{line_of(folder, 'warmup_steps')}"
    )
    shipped = load_run_config("vitb16_flyp", ["train.warmup_steps=9"], CONFIGS)
    assert warned_of_schedule(caplog, shipped, 1000) == []


def test_unused_max_steps_and_batch_of_one_are_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(folder, "train.max_steps=40", "data.target.batch_size=1")
    long, single = warned_of_schedule(caplog, config, 30)
    place = f"set in {folder}/mine.yaml:{line_of(folder, 'epochs')}"
    assert long.startswith(f"train.max_steps = 40 (set on the command line), but train.epochs = 1 ({place}) ends")
    assert single.startswith("data.target.batch_size = 1 (set on the command line): the contrastive loss of a")
    assert warned_of_schedule(caplog, config_of(folder, "train.max_steps=40"), 40) == []


# The evaluation sets


def warned_of_evaluation(caplog: pytest.LogCaptureFixture, folder: Path, **evaluate: Any) -> list[str]:
    config = config_of(folder, f"evaluate={json.dumps(evaluate)}")
    caplog.clear()
    opened = {name: open_target(each) for name, each in config.evaluate.sets.items()}
    warn_of_evaluation(config, open_target(config.data.target), opened)
    return [record.message for record in caplog.records]


def set_of(folder: Path, name: str) -> dict[str, Any]:
    """An evaluation set; ``target`` is the training set."""
    section = config_of(folder).data.target.model_dump()
    if not (folder / name).exists():
        section = tiny.write_target(folder / name, count=6)
        images = {f"{i:04d}": {"jpg": tiny.jpeg(500 + i), "cls": str(i % 5).encode()} for i in range(6)}
        tiny.write_tar(folder / name / "shard-00000.tar", images)
    return {key: section[key] for key in tiny.EVALUATION} | {"path": str(folder / name)}


def test_evaluation_on_training_images_is_reported(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = set_of(folder, "target")
    monkeypatch.chdir(folder)
    (folder / "link").symlink_to("target")
    for path in (training["path"], "target", "link", f"{folder}/target/*.tar"):
        (line,) = warned_of_evaluation(caplog, folder, sets={"val": training | {"path": path}})
        assert line.startswith(
            f"evaluate.sets.val.path = {path} (set on the command line): 24 of its 24 images are "
        )
        assert f"(data.target.path, set in {folder}/mine.yaml:" in line
    assert warned_of_evaluation(caplog, folder, sets={"val": set_of(folder, "other")}) == []


def test_copies_of_training_images_are_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(folder / "target", folder / "copied")
    (line,) = warned_of_evaluation(caplog, folder, sets={"val": set_of(folder, "copied")})
    assert "at least 24 of its 24 images are copies of training images (the first: " in line


def test_accuracy_on_the_selecting_set_is_called_optimistic(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    val, test = set_of(folder, "other"), set_of(folder, "third")
    options = {"every_epochs": 1, "select": "val"}
    (only,) = warned_of_evaluation(caplog, folder, sets={"val": val}, **options)
    assert only.startswith(
        "evaluate.select = val (set on the command line) chooses the weights, so the accuracy on"
    )
    assert only.endswith("add a test set to evaluate.sets, and report that")
    (both,) = warned_of_evaluation(caplog, folder, sets={"val": val, "test": test}, **options)
    assert both.endswith("report that on test")
    same, chosen = warned_of_evaluation(caplog, folder, sets={"val": val, "again": val, "test": test}, **options)
    assert same.startswith(
        f"evaluate.sets.again.path = {val['path']} (set on the command line) has 6 of the 6 images"
    )
    assert chosen.endswith("report that on test")
    assert warned_of_evaluation(caplog, folder, sets={"val": val, "test": test}) == []


# The weight of the reference loss


def reported_share(
    caplog: pytest.LogCaptureFixture, config: Config, reference: float, steps: int = 40, first: int = 0
) -> list[str]:
    """The reports of steps with a target loss of 1 and this reference loss."""
    method = registry.create(config.objective, 8)
    share = ReferenceShare(config, method, steps, first)
    caplog.clear()
    for step in range(first + 1, steps + 1):
        has_reference = (step - 1) % config.objective.reference_every == 0
        values = {"contrastive_loss": 1.0, "penalty": 5.0, "loss": 6.0 + reference * has_reference}
        share.add(step, {name: torch.tensor(value) for name, value in values.items()})
    share.close()
    return [record.message for record in caplog.records]


def test_dominant_reference_loss_is_reported_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(folder, "objective.weight=50")
    (line,) = reported_share(caplog, config, 9.5)
    assert line == (
        "objective.weight = 50 (set on the command line): the reference loss is 90 % of the loss after the "
        "warm-up (contrastive_loss 1, reference loss 9.5), so little is learned from the target set; try "
        "objective.weight=5, at which both would be equal"
    )
    assert reported_share(caplog, config, 8.9) == []
    # The default weight of the method.
    (line,) = reported_share(caplog, config_of(folder), 99.0)
    assert line.startswith("objective.weight = 1000 (the default): the reference loss is 99 % of the loss")
    # A run of few steps, and one whose warm-up never ends.
    assert len(reported_share(caplog, config, 99.0, steps=3)) == 1
    assert reported_share(caplog, config_of(folder, "train.warmup_steps=50"), 99.0) == []
    assert reported_share(caplog, config, float("nan")) == []
    # Resumed after the check.
    assert reported_share(caplog, config, 99.0, first=5) == []
    # Every second step has a reference batch, which counts twice.
    every = config_of(folder, "objective.weight=50", "objective.reference_every=2")
    assert len(reported_share(caplog, every, 19.0)) == 1
    assert reported_share(caplog, every, 17.0) == []


ALONE = ("contrastive", "cross_entropy", "tecoa", "coop")
"""Target losses of one term, which is logged."""


def test_share_is_measured_only_where_the_loss_has_no_other_terms() -> None:
    config = load_run_config("demo", ['objective={"name": "tracer_dive"}'], CONFIGS)
    share = ReferenceShare(config, registry.create(config.objective, 8), 40, 0)
    share.add(20, {"loss": torch.tensor(1.0)})  # without its metric
    for name, part in registry.table().targets.items():
        metric = vars(part).get("loss_metric")
        assert (metric is None) == (name not in ALONE), name


def _trained(folder: Path) -> tuple[str, str, dict[str, Any]]:
    """The output of a run with too large a weight and of the same from its config.json, and its config."""
    ranks, printed = join(), []
    Part.backend = "torch"
    sets = {"val": set_of(folder, "target")}
    evaluate = {"sets": sets, "every_epochs": 2, "select": "val", "workers": 0}
    overrides = [
        "objective.weight=1e9",
        "train.epochs=4",
        "train.fast_blocks=false",
        f"evaluate={json.dumps(evaluate)}",
    ]
    for config in (config_of(folder, *overrides), None):
        if config is None:
            config = load_run_config(str(folder / "run"))
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        logging.getLogger("dive_fast").addHandler(handler)
        lines: list[str] = []
        object.__setattr__(ranks, "print", lambda text, lines=lines: lines.append(str(text)))
        train.train(config, folder / "run", ranks)
        logging.getLogger("dive_fast").removeHandler(handler)
        printed.append("\n".join([*lines, stream.getvalue()]))
    return printed[0], printed[1], json.loads((folder / "run/config.json").read_text())["config"]


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[str, str, dict[str, Any]]:
    return run_ranks(1, _trained, folder, init=False)[0]


def test_run_reports_each_guard_rail(trained: tuple[str, str, dict[str, Any]]) -> None:
    first, again, _ = trained
    assert first.count("objective.weight = 1e+09 (set on the command line): the reference loss is ") == 1
    assert first.count("24 of its 24 images are training images") == 1
    assert first.count("evaluate.select = val (set on the command line) chooses the weights") == 1
    assert "already complete: step 12 of 12" in again
    assert "reference loss is" not in again


# The resolved config


def unresolved(config: dict[str, Any], prefix: str = "") -> list[str]:
    """The keys of a resolved config that are null without a meaning, or ``auto``."""
    keys = []
    for key, value in config.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            keys += unresolved(value, f"{path}.")
        elif (value is None and not run_identity.matches(path, list(run_identity.NULLS))) or (
            value == "auto" and path != "train.resume"
        ):
            keys.append(path)
    return keys


def test_config_of_a_run_is_resolved(trained: tuple[str, str, dict[str, Any]], folder: Path) -> None:
    config = trained[2]
    assert unresolved(config) == []
    assert config["evaluate"]["sets"]["val"]["metric"] == "top1"
    assert config["teacher"]["path"] == f"{folder}/run/teacher"
    assert config["objective"]["weight"] == 1e9


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.json")))
def test_no_default_stays_unresolved(name: str) -> None:
    known = '{"dataset": "food101", "path": "x"}'
    own = '{"format": "prepared", "path": "x", "task": "retrieval"}'
    overrides = ["deepspeed.zero_optimization.stage=auto", "model={'name': 'demo'}".replace("'", '"')]
    overrides += [f"evaluate.sets.known={known}", f"evaluate.sets.own={own}", "evaluate.every_epochs=1"]
    config = load_run_config(name, overrides, CONFIGS)
    towers = create(config.model, weights=False)
    complete = run_identity.fill_in(config, Path("runs/x"), towers, Ranks(0, 1, torch.device("cpu")))
    tree = complete.model_dump(mode="json")
    assert unresolved(tree) == []
    assert tree["deepspeed"]["zero_optimization"]["stage"] == 0
    needs = registry.needs(config.objective)
    assert (tree["objective"]["weight"] is None) == (not needs.reference)
    assert tree["evaluate"]["sets"]["known"]["role"] == "zero_shot"
    assert tree["evaluate"]["sets"]["own"]["metric"] == "image_to_text_r1"
    # What is written can be read again, and means the same.
    again = type(config).model_validate_json(json.dumps(tree))
    assert run_identity.fill_in(again, Path("runs/x"), towers, Ranks(0, 1, torch.device("cpu"))) == complete


def test_documented_nulls_are_keys() -> None:
    keys = [
        f"{place.replace('<name>', 'x')}.{key}"
        for place, each in sections(Config, "")
        for key in each.model_fields
    ]
    keys += ["objective.backgrounds", "deepspeed.x"]
    for pattern in run_identity.NULLS:
        assert any(run_identity.matches(key, [pattern]) for key in keys), pattern
