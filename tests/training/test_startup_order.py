"""Cheap mistakes are reported before the training data is opened, which can take minutes."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from distributed import run_ranks

from dive_fast.config.schema import Config
from dive_fast.data import data_paths
from dive_fast.distributed import join
from dive_fast.errors import UserError
from dive_fast.evaluation.early_checks import check_training
from dive_fast.methods.method import Part
from dive_fast.methods.run_config import RunConfig
from dive_fast.training import loop, setup


class OpenedError(Exception):
    """Raised instead of opening a training set."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("order")
    for label in "ab":
        for number in range(4):
            file = root / f"photos/{label}/{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(tiny.jpeg(number))
            file.with_suffix(".txt").write_text("a photo")
    (root / "empty").mkdir()
    (root / "names.txt").write_text("a\n\nb\n")
    tiny.write_model(root / "model", tiny.FEW_TOKENS)
    return root


def tree(folder: Path, **changes: Any) -> dict[str, Any]:
    """A config of DiVE; ``data__target__path=...`` changes a key."""
    half = {"format": "folder", "path": str(folder / "photos"), "batch_size": 4, "workers": 0}
    config: dict[str, Any] = {
        "model": {"name": f"local-dir:{folder / 'model'}"},
        "data": {"target": half | {"templates": "a photo of a {}"}, "reference": dict(half)},
        "train": {"epochs": 1, "precision": "fp32", "warmup_steps": 1},
        "evaluate": {"workers": 0},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        section = config
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    return config


MISSING = {"data__reference__path": "/no-such-folder", "data__target__path": "/no-such-folder"}
"""Large sets that are missing, which is the mistake that must not be the first one."""
SMALL = {
    "model": ({"model__name": "ViT-B-61"}, "model.name: open_clip has no model ViT-B-61"),
    "folder of a model": ({"model__name": "local-dir:/no-such-folder"}, "folder not found"),
    "evaluation set": (
        {"evaluate__sets": {"x": {"dataset": "imagenett", "path": "/data"}}},
        "evaluate.sets.x.dataset: no data set is known as imagenett",
    ),
    "path of an evaluation set": (
        {"evaluate__sets": {"x": {"format": "folder", "path": "{folder}/missing"}}},
        "evaluate.sets.x: {folder}/missing: no such folder",
    ),
    "templates of an evaluation set": (
        {
            "evaluate__sets": {
                "x": {"format": "folder", "path": "{folder}/photos", "templates": "{folder}/none.txt"}
            }
        },
        "evaluate.sets.x.templates: {folder}/none.txt: no such file of templates",
    ),
    "class names of an evaluation set": (
        {"evaluate__sets": {"x": {"dataset": "pets", "path": "/data", "class_names": "{folder}/names.txt"}}},
        "evaluate.sets.x.class_names: {folder}/names.txt: expected class names, one per line; line 2 is empty",
    ),
    "class names": (
        {"data__target__class_names": "{folder}/names.txt"},
        "data.target.class_names: {folder}/names.txt: expected class names, one per line; line 2 is empty",
    ),
    "templates": ({"data__target__templates": "a photo"}, "data.target.templates: a photo: no such file"),
}


def formatted(value: Any, folder: Path) -> Any:
    return json.loads(json.dumps(value).replace("{folder}", str(folder)))


@pytest.mark.parametrize("kind", SMALL)
def test_small_mistake_is_reported_before_a_missing_set(folder: Path, kind: str) -> None:
    changes, message = SMALL[kind]
    config = Config.model_validate(tree(folder, **MISSING, **formatted(changes, folder)))
    with pytest.raises(UserError) as caught:
        check_training(config)
    assert message.replace("{folder}", str(folder)) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data__reference__path": "{folder}/missing"},
            "data.reference: {folder}/missing: expected a folder of images",
        ),
        (
            {"data__reference__path": "{folder}/missing/{{0..3}}.tar", "data__reference__format": "webdataset"},
            "no such tar",
        ),
        ({"data__reference__path": "{folder}/empty", "data__reference__format": "prepared"}, "not a prepared set"),
        (
            {"data__target__path": "{folder}/missing.csv", "data__target__format": "csv"},
            "data.target: {folder}/missing.csv",
        ),
        (
            {"data__target__path": "{folder}/missing", "data__target__format": "huggingface"},
            "{folder}/missing: no such folder",
        ),
        (
            {"evaluate__geometry": {"format": "csv", "path": "{folder}/missing.csv"}},
            "evaluate.geometry: {folder}/missing.csv",
        ),
    ],
)
def test_missing_path_is_reported(folder: Path, changes: dict[str, Any], message: str) -> None:
    check_training(Config.model_validate(tree(folder)))
    config = Config.model_validate(tree(folder, **formatted(changes, folder)))
    with pytest.raises(UserError, match=message.replace("{folder}", str(folder))):
        check_training(config)


def test_missing_loader_package_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_paths, "find_spec", lambda name: None)
    for loader, package in (("dali", "nvidia-dali"), ("ffcv", "ffcv")):
        changes = (
            {"data__reference__loader": loader, "data__reference__format": "prepared"}
            | MISSING
            | {"data__target__path": str(folder / "photos")}
        )
        with pytest.raises(UserError, match=rf"data.reference.loader = {loader}: .* pip install .*{package}"):
            check_training(Config.model_validate(tree(folder, **changes)))


IN_SETUP = {
    "an empty evaluation set": (
        {"evaluate__sets": {"x": {"format": "folder", "path": "{folder}/empty"}}},
        "expected one folder per class",
    ),
    "too long texts": ({"data__target__text_length": 1000}, "exceeds the model's context of 77"),
    "no checkpoint": (
        {"train__resume": "/no-such-checkpoint"},
        "train.resume = /no-such-checkpoint: not a complete",
    ),
    "backgrounds": (
        {"objective": {"name": "starft", "backgrounds": "{folder}/missing.txt"}},
        "objective.backgrounds: {folder}/missing.txt: no such file",
    ),
    "another learning rate": ({"train__learning_rate": 0.5}, "train.learning_rate"),
}
"""Mistakes that need torch and the model to be noticed."""


def mistakes_of_setup(folder: Path) -> dict[str, str]:
    """The error of each mistake in a folder with a complete run; opening a training set is another error."""
    ranks, run = join(), folder / "run"
    Part.backend = "torch"
    loop.train(RunConfig.model_validate_json(json.dumps(tree(folder))), run, ranks)

    def fail(*_: Any, **__: Any) -> Any:
        raise OpenedError

    setup.open_target = setup.open_reference = fail  # type: ignore[assignment]
    errors = {}
    for name, (changes, _) in IN_SETUP.items():
        config = RunConfig.model_validate_json(json.dumps(tree(folder, **formatted(changes, folder))))
        output = run if name == "another learning rate" else folder / "other"
        try:
            setup.build(config, output, ranks)
        except UserError as error:
            errors[name] = str(error)
        except OpenedError:
            errors[name] = "the training sets were opened"
    with pytest.raises(OpenedError):  # without a mistake
        setup.build(RunConfig.model_validate_json(json.dumps(tree(folder))), run, ranks)
    return errors


@pytest.fixture(scope="module")
def errors(folder: Path) -> dict[str, str]:
    (errors,) = run_ranks(1, mistakes_of_setup, folder, init=False, timeout=300)
    return errors


@pytest.mark.parametrize("name", IN_SETUP)
def test_setup_reports_it_before_training_sets_are_opened(folder: Path, errors: dict[str, str], name: str) -> None:
    assert IN_SETUP[name][1].replace("{folder}", str(folder)) in errors[name]
