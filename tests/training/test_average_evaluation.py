"""Evaluations of averaged weights: which weights they measure, during a run, of the best step, and at the end."""

import contextlib
import json
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from distributed import run_ranks
from safetensors.torch import load_file
from test_resume import flyp

from dive_fast.distributed import join
from dive_fast.methods.method import Part
from dive_fast.methods.run_config import RunConfig
from dive_fast.training import loop
from dive_fast.training.evaluation_towers import EvaluationTowers

CASES: dict[str, dict[str, Any]] = {
    "next to it": {"train": {"ema": 0.5}, "evaluate": {"ema": True}},
    "head": {"train": {"ema": 0.5}, "evaluate": {"ema": True}, "objective": {"name": "vanilla_ft"}},
    "best": {"train": {"ema": 0.5}, "evaluate": {"ema": True, "select": "seen"}},
    "exported": {"train": {"ema": 0.5, "export_ema": True}},
}
WEIGHT = "visual.proj"
MODELS, AVERAGES = ("trained", "exported"), ("averaged", "exported_average")
"""Methods that provide the model's weights and the averaged ones."""


class Outcome(NamedTuple):
    measured: list[torch.Tensor]
    """A weight at each evaluation of the model."""
    averages: list[torch.Tensor]
    """The same at each evaluation of the averaged weights."""
    head: list[torch.Tensor]
    """The weight of the head at the latter."""
    lines: list[dict[str, Any]]


def recording(method: Any, weights: list[torch.Tensor], heads: list[torch.Tensor]) -> Any:
    """Wraps a method of :class:`EvaluationTowers` that provides towers and head."""

    @contextlib.contextmanager
    def provide(self: EvaluationTowers, *arguments: Any) -> Iterator[Any]:
        with method(self, *arguments) as (towers, head):
            weights.append(towers.state_dict()[WEIGHT].clone())
            if head is not None:
                heads.append(head.weight.clone())
            yield towers, head

    return provide


def run(tree: dict[str, Any], output: Path) -> Outcome:
    outcome = Outcome([], [], [], [])
    wrapped = {name: recording(getattr(EvaluationTowers, name), outcome.measured, []) for name in MODELS}
    wrapped |= {
        name: recording(getattr(EvaluationTowers, name), outcome.averages, outcome.head) for name in AVERAGES
    }
    with unittest.mock.patch.multiple(EvaluationTowers, **wrapped):
        loop.train(RunConfig.model_validate_json(json.dumps(tree)), output, join())
    written = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    outcome.lines.extend(line for line in written if "accuracy/seen" in line)
    return outcome


def run_cases(folder: Path) -> dict[str, Outcome]:
    Part.backend = "torch"
    base = json.loads((folder / "config.json").read_text())
    return {
        name: run(base | {key: base.get(key, {}) | value for key, value in case.items()}, folder / name)
        for name, case in CASES.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("average")
    tree = flyp(path)
    tree["train"] |= {"max_steps": 4, "learning_rate": 1e-3}
    seen = {key: tree["data"]["target"][key] for key in tiny.EVALUATION}
    tree["evaluate"] = {"sets": {"seen": seen}, "workers": 0, "every_steps": 2}
    (path / "config.json").write_text(json.dumps(tree))
    return path


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Outcome]:
    results: dict[str, Outcome] = run_ranks(1, run_cases, folder, init=False, timeout=300)[0]
    return results


def exported(folder: Path, name: str, file: str) -> torch.Tensor:
    return load_file(folder / name / f"{file}.safetensors")[WEIGHT]


@pytest.mark.parametrize("name", ["next to it", "head"])
def test_both_weights_are_measured_and_exported(outcomes: dict[str, Outcome], folder: Path, name: str) -> None:
    measured, averages, head, lines = outcomes[name]
    # After steps 2 and 4, and at the end.
    assert (len(measured), len(averages)) == (3, 3)
    assert torch.equal(measured[-1], exported(folder, name, "model"))
    assert torch.equal(averages[-1], exported(folder, name, "ema"))
    assert torch.equal(averages[1], averages[2])
    assert not any(torch.equal(one, other) for one, other in zip(measured, averages))
    assert not torch.equal(averages[0], averages[1])
    assert all(0 <= line["ema_accuracy/seen"] <= 1 for line in lines)
    assert len(lines) == 3
    if name == "head":
        assert torch.equal(head[-1], load_file(folder / name / "ema_head.safetensors")["weight"])


def test_average_of_the_best_step_is_measured(outcomes: dict[str, Outcome], folder: Path) -> None:
    measured, averages, _, lines = outcomes["best"]
    best = int(lines[-1]["best_step"]) // 2 - 1
    assert torch.equal(measured[best], exported(folder, "best", "model"))
    assert torch.equal(averages[best], exported(folder, "best", "ema"))
    assert torch.equal(averages[-1], averages[best])
    assert lines[-1]["ema_accuracy/seen"] == lines[best]["ema_accuracy/seen"]


def test_exported_average_is_the_measured_model(outcomes: dict[str, Outcome], folder: Path) -> None:
    measured, averages, _, lines = outcomes["exported"]
    assert averages == []
    assert torch.equal(measured[-1], exported(folder, "exported", "model"))
    # The run is the same as the one that exports the average next to the model.
    assert torch.equal(measured[-1], exported(folder, "next to it", "ema"))
    assert not any("ema_accuracy/seen" in line for line in lines)
