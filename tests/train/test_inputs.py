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
from dive_fast.methods.method import Part
from dive_fast.methods.run_config import RunConfig
from dive_fast.train import loop as train

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
        "model": {"name": tiny.write_model(root / "model")},
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


def run(folder: Path, output: Path, kill_at: int | None = None, **changes: Any) -> Any:
    ranks = join()
    Part.backend = "torch"
    tree = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        section, name = key.split("__")
        tree["data"][section][name] = value
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


def complete_and_resumed(folder: Path) -> tuple[Any, list[str]]:
    """A complete run, one that is killed and resumed, and the errors of resuming it with other data options."""
    metrics, messages = run(folder, folder / "complete"), []
    with pytest.raises(KilledError):
        run(folder, folder / "resumed", kill_at=5)
    changes: dict[str, Any] = {"target__balance": "none", "target__horizontal_flip": 0.0}
    changes |= {"target__crop_scale": [0.9, 1.0], "reference__captions": "one"}
    for key, value in changes.items():
        try:
            run(folder, folder / "resumed", **{key: value})
            messages.append("none")
        except Exception as error:
            messages.append(str(error))
    run(folder, folder / "resumed")
    return metrics, messages


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
    metrics, _ = outcome
    assert "accuracy/test" in metrics
    assert len(losses(folder / "complete")) == 6
    before, after = load_file(folder / "model/open_clip_model.safetensors"), weights(folder / "complete")
    assert not all(torch.equal(before[name], after[name]) for name in before)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_resumed_run_has_the_same_weights(folder: Path, outcome: Any) -> None:
    complete, resumed = weights(folder / "complete"), weights(folder / "resumed")
    assert all(torch.equal(complete[name], resumed[name]) for name in complete)
    assert losses(folder / "complete") == losses(folder / "resumed")


def test_changed_data_options_stop_a_resume(outcome: Any) -> None:
    _, messages = outcome
    keys = [f"data.target.{name}: " for name in ("balance", "horizontal_flip", "crop_scale")]
    for key, message in zip([*keys, "data.reference.captions: "], messages, strict=True):
        assert "\n" not in message
        assert f"belongs to a run with other settings ({key}" in message


def test_two_ranks_train_alike(folder: Path, outcome: Any) -> None:
    run_ranks(2, run_on_rank, folder, init=False, timeout=300)
    one, two = losses(folder / "complete"), losses(folder / "two-ranks")
    assert one == pytest.approx(two, rel=1e-3)
