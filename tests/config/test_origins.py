"""Where keys are set: remembered with the config, and named at the end of messages that begin with a key."""

from pathlib import Path

import pytest
from config_files import CONFIGS, SMALL, write

from dive_fast.config.explain import named_key, with_origin
from dive_fast.config.load import read_origins
from dive_fast.config.schema import Config
from dive_fast.methods.run_config import RunConfig, load_run_config

YAML = """\
base: lowest.json
train:
  epochs: 3
  seed: 1
objective: {name: snd}
"""


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    write(tmp_path, SMALL | {"train": {"epochs": 1, "log_every": 1}, "objective": {"weight": 7.0}}, "lowest.json")
    path = write(tmp_path, YAML, "mine.yaml")
    return load_run_config(str(path), ["train.seed=2", 'evaluate={"workers": 0}'])


def test_origin_is_file_with_line_command_line_or_default(config: RunConfig, tmp_path: Path) -> None:
    origins = config.origins
    assert origins.of("train.epochs") == f"set in {tmp_path}/mine.yaml:3"
    assert origins.of("train.log_every") == f"set in {tmp_path}/lowest.json"
    assert origins.of("train.seed") == origins.of("evaluate.workers") == "set on the command line"
    assert origins.of("train.warmup_steps") == "the default"
    # Set for the base's method, and not used by the one that replaces it.
    assert config.objective.weight is None
    assert origins.of("objective.weight") == "the default"


def test_origins_survive_a_copy_and_are_no_part_of_the_value(config: RunConfig) -> None:
    copied = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 9})})
    assert copied.origins.of("train.seed") == "set on the command line"
    again = RunConfig.model_validate_json(config.model_dump_json())
    assert again == config
    assert again.origins.of("train.seed") == "config in Python"
    assert "origins" not in config.model_dump_json()


@pytest.mark.parametrize(
    ("message", "origin"),
    [
        ("data.target: x: no such folder", "(data.target.path is set in LOWEST)"),
        ("data.target.batch_size 9 exceeds the 5 samples", "(the default)"),
        ("train.epochs = 3: too many", "(set in MINE:3)"),
        ("objective.name: no such method", "(set in MINE:5)"),
        ("objective.decay: wrong", "(the default)"),
        ("evaluate.sets.val: x: no such folder", "(evaluate.sets.val.path is set on the command line)"),
        ("evaluate.sets.val.templates: no {}", "(the default)"),
        ("model: cannot load", "(model.name is set in LOWEST)"),
        ("deepspeed.wandb: the package", "(the default)"),
        # Not a key, or a key that is not set.
        ("model.pretrained is missing: name one", None),
        ("data.csv: no such file", None),
        ("data/target.path: no such file", None),
        ("train.tar: no such file", None),
        ("evaluate.geometry: x", None),
        ("model was not found", None),
        ("the limit of data.target.workers", None),
    ],
)
def test_message_about_a_key_ends_with_its_origin(tmp_path: Path, message: str, origin: str | None) -> None:
    write(tmp_path, SMALL, "lowest.json")
    path = write(tmp_path, YAML, "mine.yaml")
    override = 'evaluate.sets={"val": {"format": "folder", "path": "x"}}'
    origins = read_origins(str(path), [override], None)
    expected = "" if origin is None else f" {origin}"
    expected = expected.replace("LOWEST", f"{tmp_path}/lowest.json").replace("MINE", str(path))
    assert with_origin(message, origins) == message + expected


def test_every_key_is_recognized_in_a_message() -> None:
    for section, field in Config.model_fields.items():
        for key in getattr(field.annotation, "model_fields", {}):
            assert named_key(f"{section}.{key} = 1: wrong") == f"{section}.{key}"
    assert named_key("nothing.of.this: wrong") is None


def test_shipped_config_is_named_as_the_origin() -> None:
    assert load_run_config("demo", (), CONFIGS).origins.of("train.epochs") == f"set in {CONFIGS}/demo.json"
