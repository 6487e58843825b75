"""Runs on sets of `datasets`, with several captions, balanced classes and flips: resumed, and on two ranks."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from distributed import run_ranks
from safetensors.torch import load_file

from dive_fast.distributed import join
from dive_fast.errors import ConfigError
from dive_fast.methods.method import Part
from dive_fast.methods.run_config import RunConfig
from dive_fast.training import loop as train
from dive_fast.training.run_identity import check_resumable, config_identity

COUNT = 24
NAMES = ["cat", "dog", "eel"]


class KilledError(Exception):
    """Raised where a run is to end."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    columns = {
        "image": [{"bytes": tiny.jpeg(row), "path": None} for row in range(COUNT)],
        "label": [0 if row < 18 else 1 + row % 2 for row in range(COUNT)],
    }
    train_set = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": train_set, "test": train_set.select(range(12, 24))}).save_to_disk(
        root / "target"
    )
    (root / "pairs").mkdir()
    for row in range(COUNT):
        (root / f"pairs/{row:02d}.jpg").write_bytes(tiny.jpeg(1000 + row))
        (root / f"pairs/{row:02d}.txt").write_text("\n".join(f"text {n} of {row}" for n in range(1 + row % 3)))
    target = {"format": "huggingface", "path": str(root / "target")}
    tree: dict[str, Any] = {
        "model": {"name": tiny.write_model(root / "model", tiny.FEW_TOKENS)},
        "data": {
            "target": target
            | {"split": "train", "templates": "simple", "batch_size": 8, "workers": 1}
            | {"balance": "class", "horizontal_flip": 0.5, "crop_scale": [0.4, 0.9]},
            "reference": {"format": "folder", "path": str(root / "pairs"), "captions": "lines"}
            | {"batch_size": 8, "workers": 0},
        },
        "train": {"epochs": 2, "precision": "fp32", "warmup_steps": 1, "learning_rate": 1e-3, "log_every": 1}
        | {"checkpoint_every": 2},
        "evaluate": {"sets": {"test": target | {"split": "test", "templates": "simple"}}, "workers": 0},
        "deepspeed": {"gradient_clipping": 0.0},
    }
    (root / "config.json").write_text(json.dumps(tree))
    return root


def run(folder: Path, output: Path, kill_at: int | None = None) -> Any:
    ranks = join()
    Part.backend = "torch"
    tree = json.loads((folder / "config.json").read_text())
    log = train.Metrics.log

    def log_until(self: Any, step: int, *values: Any) -> None:
        log(self, step, *values)
        if step == kill_at:
            raise KilledError

    train.Metrics.log = log_until  # type: ignore[method-assign]
    try:
        return train.train(RunConfig.model_validate_json(json.dumps(tree)), output, ranks)
    finally:
        train.Metrics.log = log  # type: ignore[method-assign]


def complete_and_resumed(folder: Path) -> Any:
    """Metrics of a complete run; another one is killed and resumed."""
    metrics = run(folder, folder / "complete")
    with pytest.raises(KilledError):
        run(folder, folder / "resumed", kill_at=5)
    run(folder, folder / "resumed")
    return metrics


def run_on_rank(folder: Path) -> Any:
    return run(folder, folder / "two-ranks")


@pytest.fixture(scope="module")
def outcome(folder: Path) -> Any:
    (outcome,) = run_ranks(1, complete_and_resumed, folder, init=False, timeout=300)
    return outcome


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_run_learns_and_measures_the_other_split(folder: Path, outcome: Any) -> None:
    assert "accuracy/test" in outcome
    assert len(losses(folder / "complete")) == 6
    before, after = load_file(folder / "model/open_clip_model.safetensors"), weights(folder / "complete")
    assert not all(torch.equal(before[name], after[name]) for name in before)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_resumed_run_has_the_same_weights(folder: Path, outcome: Any) -> None:
    complete, resumed = weights(folder / "complete"), weights(folder / "resumed")
    assert all(torch.equal(complete[name], resumed[name]) for name in complete)
    assert losses(folder / "complete") == losses(folder / "resumed")


CHANGED = {
    ("target", "balance"): "none",
    ("target", "horizontal_flip"): 0.0,
    ("target", "crop_scale"): [0.9, 1.0],
    ("reference", "captions"): "one",
}
"""Other values of the options of the runs."""


@pytest.mark.parametrize(("half", "key"), CHANGED)
def test_changed_option_stops_a_resume(folder: Path, half: str, key: str) -> None:
    tree = json.loads((folder / "config.json").read_text())
    stored = config_identity(RunConfig.model_validate_json(json.dumps(tree)))
    tree["data"][half][key] = CHANGED[half, key]
    current = config_identity(RunConfig.model_validate_json(json.dumps(tree)))
    with pytest.raises(ConfigError, match=rf"a run with other settings \(data\.{half}\.{key}: [^;]*\):"):
        check_resumable(folder, stored, current)


def test_checkpoints_without_the_keys_resume_with_the_defaults(folder: Path) -> None:
    tree = json.loads((folder / "config.json").read_text())
    for key in ("balance", "horizontal_flip", "crop_scale"):
        del tree["data"]["target"][key]
    del tree["data"]["reference"]["captions"]
    current = config_identity(RunConfig.model_validate_json(json.dumps(tree)))
    stored = json.loads(json.dumps(current))
    for half, key in CHANGED:
        del stored["data"][half][key]
    del stored["projection"]
    assert check_resumable(folder, stored, current) == []
    changed = json.loads(json.dumps(current))
    changed["data"]["target"]["balance"] = "class"
    with pytest.raises(ConfigError, match=r"data\.target\.balance: nothing there, \"class\" here"):
        check_resumable(folder, stored, changed)
    projected = json.loads(json.dumps(current)) | {"projection": {"name": "spd", "strength": 1.0}}
    with pytest.raises(ConfigError, match=r"projection: nothing there, .*spd.* here"):
        check_resumable(folder, stored, projected)


def test_moved_columns_and_splits_are_locations(folder: Path) -> None:
    tree = json.loads((folder / "config.json").read_text())
    stored = config_identity(RunConfig.model_validate_json(json.dumps(tree)))
    # Their contents are compared instead.
    tree["data"]["target"] |= {"split": "other", "image_column": "picture", "label_column": "class"}
    assert config_identity(RunConfig.model_validate_json(json.dumps(tree))) == stored


def test_two_ranks_train_alike(folder: Path, outcome: Any) -> None:
    run_ranks(2, run_on_rank, folder, init=False, timeout=300)
    one, two = losses(folder / "complete"), losses(folder / "two-ranks")
    assert one == pytest.approx(two, rel=1e-3)
