"""A target set of a single class: every method without a reference set trains to the end."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from distributed import run_ranks

from dive_fast.checkpoint.load_weights import head_of
from dive_fast.config.schema import ModelConfig
from dive_fast.distributed import join
from dive_fast.methods.run_config import RunConfig
from dive_fast.model import head as heads
from dive_fast.model.model_identity import weights_digest
from dive_fast.model.towers import create
from dive_fast.training import loop as train

METHODS = ("flyp", "vanilla_ft", "lp_ft")


def trained(root: Path) -> dict[str, dict[str, Any]]:
    ranks, found = join(), {}
    for method in METHODS:
        tree = tiny.write_config(root / "made", max_steps=2)
        target = tree["data"]["target"]
        del tree["data"]["reference"]
        tree["data"]["target"] = target | tiny.write_target(root / "one", count=6, classes=1) | {"batch_size": 3}
        tree["objective"] = {"name": method} | ({"probe_epochs": 1} if method == "lp_ft" else {})
        tree["evaluate"] = {"sets": {"seen": {key: tree["data"]["target"][key] for key in tiny.EVALUATION}}}
        tree["evaluate"]["workers"] = 0
        found[method] = train.train(RunConfig.model_validate_json(json.dumps(tree)), root / method, ranks)
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("one_class")


def test_train_with_a_single_class(root: Path) -> None:
    (found,) = run_ranks(1, trained, root, init=False)
    for method in METHODS:
        assert found[method]["accuracy/seen"] == 1
        assert found[method]["loss"] >= 0
    assert found["vanilla_ft"]["loss"] == found["lp_ft"]["loss"] == 0
    assert heads.load(root / "lp_ft/head.safetensors").class_names == ("class number 0",)
    # Of a checkpoint too: by prompts, it would be another classifier than the run's.
    (checkpoint,) = (root / "lp_ft/checkpoints").glob("step*")
    exported, stored = heads.load(root / "lp_ft/head.safetensors"), head_of(checkpoint)
    assert stored is not None
    assert stored.class_names == exported.class_names
    assert stored.weight.equal(exported.weight)
    assert stored.bias.equal(exported.bias)
    towers = create(ModelConfig(name=f"local-dir:{root / 'lp_ft'}"))
    assert exported.trained_with == weights_digest(towers)
    (without,) = (root / "flyp/checkpoints").glob("step*")
    assert head_of(without) is None
