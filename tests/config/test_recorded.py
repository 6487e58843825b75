"""The config of a run: given by its folder or its ``config.json``, and as the base of another."""

import json
from pathlib import Path
from typing import Any

import pytest
from config_files import CONFIGS, SMALL, write

from dive_fast.config import recorded
from dive_fast.errors import ConfigError
from dive_fast.methods.run_config import RunConfig, load_run_config


def write_run(folder: Path, output: str = "runs/old", **sections: Any) -> Path:
    """A run's folder with its ``config.json``."""
    folder.mkdir(parents=True)
    tree = SMALL | {"train": {"epochs": 3, "output": output}, **sections}
    config = RunConfig.model_validate_json(json.dumps(tree)).model_dump(mode="json")
    write(folder, dict.fromkeys(recorded.KEYS) | {"config": config, "steps": 12, "ranks": 2})
    return folder


@pytest.mark.parametrize("name", ["runs/x", "runs/x/", "runs/x/config.json"])
def test_run_folder_and_its_config_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs/x")
    config = load_run_config(name, ["train.seed=1"], CONFIGS)
    # The folder was moved: its place counts, not the one in the file.
    assert (config.train.output, config.train.epochs, config.train.seed) == ("runs/x", 3, 1)
    assert config.origins.remarks == [
        "runs/x/config.json is the config of a run: train.output = runs/x (the run's)"
    ]
    assert config.origins.of("train.epochs") == "set in runs/x/config.json"
    config = load_run_config(name, ["train.output=runs/y"], CONFIGS)
    assert config.train.output == "runs/y"
    (remark,) = config.origins.remarks
    assert remark.endswith("train.output = runs/y (set on the command line)")


def test_run_folder_that_is_the_present_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "x")
    monkeypatch.chdir(tmp_path / "x")
    assert load_run_config("config.json").train.output == str(tmp_path / "x")
    assert load_run_config(".").train.output == str(tmp_path / "x")


def test_default_teacher_cache_of_a_run_moves_with_its_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "new", teacher={"path": "runs/old/teacher"})
    for overrides in ([], ["train.output=other"]):
        assert load_run_config(str(run), overrides).teacher.path == f"{run}/teacher"
    named = write_run(tmp_path / "named", teacher={"path": "shared/cache"})
    assert load_run_config(str(named)).teacher.path == "shared/cache"


def test_base_that_is_a_run_leaves_its_folder_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x", teacher={"path": "runs/old/teacher"})
    path = write(tmp_path, "base: x/config.json\ntrain: {seed: 4}\n", "mine.yaml")
    config = load_run_config(str(path))
    assert (config.train.output, config.train.epochs, config.train.seed) == (None, 3, 4)
    assert config.teacher.path == f"{run}/teacher"
    assert config.origins.remarks == [
        f"base {run}/config.json is the config of a run: used without its train.output"
    ]


def test_config_of_other_tools_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write(tmp_path / "model", {"architectures": ["CLIPModel"]})
    with pytest.raises(ConfigError, match=r"model/config\.json: unknown key architectures"):
        load_run_config(str(tmp_path / "model"))
    for config in (
        {"train": 5},
        {},
        {"train": {"epochs": "x"}},
        {"teacher": {"path": 5}, "train": {"output": "a"}},
    ):
        write(tmp_path, dict.fromkeys(recorded.KEYS) | {"config": config})
        with pytest.raises(ConfigError, match=r"config\.json: "):
            load_run_config(str(tmp_path / "config.json"))


def test_name_of_a_run_and_of_a_shipped_config_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "demo")
    with pytest.raises(
        ConfigError, match=r"^--config demo is a folder here and a shipped config: write demo/conf"
    ):
        load_run_config("demo", (), CONFIGS)
    assert load_run_config("demo.json", (), CONFIGS).model.name == "demo"
    assert load_run_config("demo/config.json", (), CONFIGS).model.name == "ViT-B-32"


def test_missing_config_names_the_nearest_file_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "", "photos.yaml")
    with pytest.raises(ConfigError, match=r"^--config photo\.yml: no such file; did you mean photos\.yaml\?$"):
        load_run_config("photo.yml", (), CONFIGS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"^--config empty: no such file \(a folder without config\.json\)"):
        load_run_config("empty", (), CONFIGS)
