"""Averaged weights of ``train.ema``: against float64, under ZeRO, with skipped steps, heads and teachers."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distributed import run_ranks
from safetensors.torch import load_file
from step_oracle import CLASSES, Stage
from test_hooks import TRAIN, max_error, toy
from torch import Tensor

from dive_fast.checkpoint.export import AVERAGE, MODEL, copy_model, write_model
from dive_fast.engine.deepspeed_config import deepspeed_section
from dive_fast.engine.step import Engine, StepBatches
from dive_fast.errors import ConfigError
from dive_fast.methods.method import Part
from dive_fast.methods.run_config import RunConfig
from dive_fast.model import head as heads
from dive_fast.model.towers import create

DECAY, SKIPPED, STEPS = 0.75, 2, 3
"""Decay, the step with values that are not finite on the last rank, and the number of steps."""
CASES: dict[str, dict[str, Any]] = {
    "zero 0": {"zero": 0, "name": "flyp", "micro": 3},
    "zero 1": {"zero": 1, "name": "flyp", "precision": "fp16"},
    "kernel": {"zero": 2, "name": "flyp", "decay_all_parameters": False},
    "head": {"zero": 1, "name": "vanilla_ft"},
    "moving teacher": {"zero": 2},
}


def tuned(engine: Engine) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in engine.towers.named_parameters() if p.requires_grad}


def step(stage: Stage, engine: Engine, is_skipped: bool) -> None:
    target = stage.target
    if is_skipped and stage.ranks.rank == stage.ranks.world_size - 1:
        target = replace(target, images=torch.full_like(target.images, math.nan))
    engine.step(StepBatches(target, stage.reference if engine.method.needs.reference else None))


def run_case(stage: Stage, name: str, path: Path) -> dict[str, Any]:
    """Errors of an average, and whether it begins and is kept as it should be."""
    options = {**TRAIN, **CASES[name], "method": toy("teacher") if name == "moving teacher" else None}
    engine = stage.engine(**options, ema=DECAY)
    assert engine.average is not None
    if name == "kernel":
        engine.average._average._backend = "triton"
    averages = engine.average.weights
    expected = {name: p.double() for name, p in tuned(engine).items()}
    results: dict[str, Any] = {"begins": all(torch.equal(averages[n].double(), p) for n, p in expected.items())}
    for number in range(1, STEPS + 1):
        before = {n: p.clone() for n, p in averages.items()}
        step(stage, engine, number == SKIPPED)
        if number == SKIPPED:
            results["kept"] = all(torch.equal(before[n], p) for n, p in averages.items())
        else:
            # Literally, from the weights after each step.
            expected = {n: DECAY * expected[n] + (1 - DECAY) * p.double() for n, p in tuned(engine).items()}
    results["error"] = max_error({n: p.double() for n, p in averages.items()}, expected)
    results["distance"] = max_error({n: p.double() for n, p in tuned(engine).items()}, expected)
    if name in ("zero 1", "head"):
        results["export"] = exports(stage, engine, path / name)
    engine.deepspeed.destroy()
    return results


def exports(stage: Stage, engine: Engine, path: Path) -> dict[str, bool]:
    """Whether exported and copied files have the right weights; then with ``train.export_ema``."""
    assert engine.average is not None
    raw, averages = tuned(engine), engine.average.weights
    names = tuple(map(str, range(CLASSES)))

    def has(file: Path, weights: dict[str, Tensor]) -> bool:
        state = create(stage.student.config).load_exported(load_file(file)).state_dict()
        if (head := heads.find_head(file)) is not None:
            loaded = heads.load(head)
            state |= {"head.weight": loaded.weight, "head.bias": loaded.bias}
        return all(torch.equal(state[name], tensor.cpu()) for name, tensor in weights.items())

    write_model(engine, path / "both", names)
    if not stage.ranks.is_main:
        engine.average.is_exported = True
        write_model(engine, path / "average", names)
        return {}
    (path / "copy").mkdir()
    copy_model(path / "both", path / "copy")
    results = {
        f"{folder} {file}": has(path / folder / file, weights)
        for folder in ("both", "copy")
        for file, weights in ((MODEL, raw), (AVERAGE, averages))
    }
    engine.average.is_exported = True
    write_model(engine, path / "average", names)
    copy_model(path / "average", path / "copy")
    for folder in ("average", "copy"):
        results[f"{folder} exported"] = has(path / folder / MODEL, averages)
        results[f"{folder} alone"] = not list((path / folder).glob("ema*"))
    return results


def run_cases(folder: Path, path: Path) -> dict[str, Any]:
    Part.backend = "torch"
    stage = Stage(folder)
    return {name: run_case(stage, name, path) for name in CASES}


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("model")
    tiny.write_model(folder, tiny.FEW_TOKENS)
    results: list[dict[str, Any]] = run_ranks(2, run_cases, folder, tmp_path_factory.mktemp("export"), timeout=300)
    return results


@pytest.mark.parametrize("case", CASES)
def test_average_is_that_of_the_weights_after_each_update(by_rank: list[dict[str, Any]], case: str) -> None:
    for results in (rank[case] for rank in by_rank):
        assert results["begins"]
        assert results["error"] < 1e-6 < 1e-3 < results["distance"]


@pytest.mark.parametrize("case", CASES)
def test_skipped_step_keeps_the_average(by_rank: list[dict[str, Any]], case: str) -> None:
    assert all(rank[case]["kept"] for rank in by_rank)


@pytest.mark.parametrize("case", ["zero 1", "head"])
def test_average_is_exported_next_to_or_as_the_model(by_rank: list[dict[str, Any]], case: str) -> None:
    results = by_rank[0][case]["export"]
    assert all(results.values()), results
    assert len(results) == 8


def test_average_under_zero_3_is_refused(tmp_path: Path) -> None:
    tree = tiny.write_config(tmp_path, ema=0.9)
    tree["deepspeed"]["zero_optimization"]["stage"] = 3
    with pytest.raises(ConfigError, match=r"^train\.ema: under ZeRO-3 .*stage = 2$"):
        deepspeed_section(RunConfig.model_validate(tree), 2)


@pytest.mark.parametrize(
    ("train", "evaluate", "message"),
    [
        ({"ema": 0.0}, {}, "greater than 0"),
        ({"ema": 1.0}, {}, "less than 1"),
        ({"export_ema": True}, {}, "train.export_ema needs train.ema"),
        ({}, {"ema": True}, "evaluate.ema needs train.ema"),
        ({"ema": 0.9, "export_ema": True}, {"ema": True}, "evaluate.ema: with train.export_ema"),
    ],
)
def test_contradictory_options_are_refused(
    tmp_path: Path, train: dict[str, Any], evaluate: dict[str, Any], message: str
) -> None:
    tree = tiny.write_config(tmp_path, **train) | {"evaluate": evaluate}
    with pytest.raises(ValueError, match=message):
        RunConfig.model_validate(tree)
