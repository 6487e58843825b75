"""Runs that learn prompts: few shots, checkpoints and exports of prompts alone, resumes, options."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distributed import run_ranks
from safetensors.torch import load_file
from test_resume import Folder

from dive_fast.checkpoint.load_weights import load_into
from dive_fast.checkpoint.manifest import Tensors, list_checkpoints
from dive_fast.config.schema import ModelConfig
from dive_fast.distributed import join
from dive_fast.errors import ConfigError
from dive_fast.evaluation.early_checks import find_weights
from dive_fast.methods.method import Part
from dive_fast.model import prompt_file
from dive_fast.model.towers import create

STEPS, WIDTH = 4, tiny.TEXT["width"]
CONTEXT = 4
SGD = (("train.optimizer", "sgd"), ("deepspeed.zero_optimization.stage", "auto"))


def tree_of(folder: Path) -> dict[str, Any]:
    Part.backend = "torch"
    tree = tiny.write_config(folder, max_steps=STEPS, checkpoint_every=1, keep_last=9, epochs=9)
    tree["data"].pop("reference")
    tree["objective"] = {"name": "contcoop", "heads": 4}
    target = tree["data"]["target"]
    target |= {"shots": 4, "classes": "base", "batch_size": 6}
    described = {key: target[key] for key in tiny.EVALUATION}
    sets = {part: described | {"classes": part} for part in ("base", "new")}
    tree["evaluate"] = {"sets": sets, "every_steps": 2, "select": "base"}
    return tree


def one_rank(folder: Path) -> dict[str, Any]:
    ranks, tree = join(), tree_of(folder)
    run = Folder(ranks, tree, folder / "run")
    results: dict[str, Any] = {"run": run.start(*SGD)}
    killed = Folder(ranks, tree, folder / "killed")
    killed.start(*SGD, kill_at=3)
    results["other"] = killed.start(*SGD, ("train.momentum", 0.5))
    (killed.path / "model.safetensors").write_bytes(b"of another run")
    results["resumed"] = killed.start(*SGD)
    results["adamw"] = Folder(ranks, tree, folder / "adamw").start(
        ("objective", {"name": "coop", "context": 3}), ("train.precision", "fp16"), ("train.micro_batch_size", 2)
    )
    results["partitioned"] = Folder(ranks, tree, folder / "refused").start(SGD[0])
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return run_ranks(1, one_rank, folder, init=False, timeout=300)[0]


def stored(run: Path) -> dict[str, Any]:
    """Names and values of the newest checkpoint."""
    tensors, cpu = Tensors(list_checkpoints(run / "checkpoints")[-1]), torch.device("cpu")
    return {
        f"{kind}/{name}": tensors.read(kind, name, cpu)
        for kind in ("weights", "fixed", "momentum_buffer", "exp_avg", "exp_avg_sq")
        for name in tensors.shapes(kind)
    }


def test_run_trains_few_shots_of_base_classes(results: dict[str, Any], folder: Path) -> None:
    printed = results["run"]
    assert "error" not in printed, printed
    assert "prompts: 4 context vectors of width 32, 4,224 parameters, 3 classes" in printed
    assert "12 of 15 images, 4 of each class" in printed
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "cross_entropy" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all(line["loss"] == pytest.approx(line["cross_entropy"] + line["prompt_distance"]) for line in steps)


def test_checkpoint_and_export_hold_prompts_alone(results: dict[str, Any], folder: Path) -> None:
    values = stored(folder / "run")
    names = ["context", *(f"attention.{part}.weight" for part in ("query", "key", "value", "output"))]
    kinds = ("weights", "momentum_buffer")
    assert values.keys() == {f"{kind}/prompts.{name}" for kind in kinds for name in names}
    exported = load_file(folder / "run" / "prompts.safetensors")
    assert exported.keys() == set(names)
    assert not any((folder / run / "model.safetensors").exists() for run in ("run", "killed"))
    prompts = prompt_file.load(folder / "run" / "prompts.safetensors")
    origin = prompts.origin
    assert (origin.method, origin.fit.width, origin.fit.context_length) == ("contcoop", WIDTH, 77)
    assert origin.class_names == tuple(f"class number {label}" for label in range(3))
    assert origin.templates == ("a photo of a {}", "a rather blurry picture of the {}.")
    best = json.loads((folder / "run" / "best" / "selected.json").read_text())["step"]
    assert (folder / "run" / "best" / "prompts.safetensors").is_file()
    if best == STEPS:
        assert torch.equal(exported["context"], values["weights/prompts.context"])


def test_resumed_run_has_the_same_bits(results: dict[str, Any], folder: Path) -> None:
    assert "train.momentum" in results["other"]
    assert "error" in results["other"]
    assert "continues after" in results["resumed"]
    expected, resumed = stored(folder / "run"), stored(folder / "killed")
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())
    first = (folder / "run" / "prompts.safetensors").read_bytes()
    assert first == (folder / "killed" / "prompts.safetensors").read_bytes()


def test_random_context_trains_by_adamw_in_pieces(results: dict[str, Any], folder: Path) -> None:
    assert "error" not in results["adamw"], results["adamw"]
    values = stored(folder / "adamw")
    assert values.keys() == {f"{kind}/prompts.context" for kind in ("weights", "exp_avg", "exp_avg_sq")}
    assert values["weights/prompts.context"].shape == (3, WIDTH)
    assert bool(values["exp_avg/prompts.context"].any())


def test_sgd_is_not_partitioned(results: dict[str, Any]) -> None:
    assert "deepspeed.zero_optimization.stage = 2: train.optimizer = sgd" in results["partitioned"]


def test_commands_on_weights_name_the_prompts(results: dict[str, Any], folder: Path) -> None:
    run = folder / "run"
    with pytest.raises(ConfigError, match="has learned prompts and no weights of its own"):
        find_weights(None, "--weights", run)
    model = ModelConfig(name=f"local-dir:{folder / 'model'}")
    with pytest.raises(ConfigError, match="holds learned prompts and no weights; name their file by --prompts"):
        load_into(create(model), model, list_checkpoints(run / "checkpoints")[-1])
    card = (run / "README.md").read_text()
    assert "prompts.safetensors" in card
    assert "open_clip.create_model_from_pretrained" not in card
    shutil.rmtree(folder / "adamw")
