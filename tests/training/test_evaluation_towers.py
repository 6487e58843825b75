"""Evaluation during a run: sets are opened once, only ZeRO-3 goes through a file, figures are bit-equal."""

import contextlib
import hashlib
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

from dive_fast.checkpoint.export import MODEL, write_model
from dive_fast.data import open_dataset
from dive_fast.distributed import join
from dive_fast.evaluation.zero_shot import Measured, measure_sets
from dive_fast.methods.method import Part
from dive_fast.methods.run_config import RunConfig
from dive_fast.model import head as heads
from dive_fast.model.head import Head
from dive_fast.model.towers import Towers, create
from dive_fast.training import evaluation_towers, loop, run_evaluation, validation
from dive_fast.training.evaluation_towers import EvaluationTowers

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "zero0": {"train": {"precision": "bf16", "activation_checkpointing": "selective"}},
    "zero2": {},
    "zero3": {},
    "head": {"objective": {"name": "vanilla_ft"}, "train": {"activation_checkpointing": "full"}},
    "best": {"evaluate": {"select": "seen"}},
}
STAGES = {"zero0": 0, "zero3": 3}
"""ZeRO stages of cases; of the others: 2."""


class Outcome(NamedTuple):
    """A run that is evaluated after 3 of its 6 steps, after 6, and at its end."""

    opened: list[str]
    """The path of each data set, as often as it is opened."""
    built: int
    """How many towers are built for evaluation."""
    read: int
    """How many files of weights are read for evaluation."""
    freed: bool
    """Whether the towers hold no memory between evaluations."""
    hashes: list[str]
    """Hashes of weights and features at each evaluation."""
    accuracies: list[dict[str, float]]
    """Accuracies in metrics.jsonl."""


def features(towers: Towers) -> str:
    """A hash of the weights, and of the features of two images and two texts."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *towers.preprocess.size, generator=generator)
    tokens = torch.randint(0, 8, (2, towers.context_length or 77), generator=generator)
    with torch.no_grad():
        rows = [*towers.state_dict().values(), towers.encode_image(images), towers.encode_text(tokens)]
    return hashlib.sha256(b"".join(row.float().numpy().tobytes() for row in rows)).hexdigest()


@contextlib.contextmanager
def through_file(towers: EvaluationTowers, class_names: tuple[str, ...]) -> Iterator[tuple[Towers, Head | None]]:
    """Stands for ``EvaluationTowers.trained``: new towers that read the exported weights, as any user's would."""
    engine = towers._engine
    assert engine.towers.config is not None
    folder = Path("through-file")
    write_model(engine, folder, class_names)
    fresh = create(engine.towers.config, weights=False).load_exported(load_file(folder / MODEL)).eval()
    fresh.preprocess, fresh.autocast = engine.towers.preprocess, engine.towers.autocast
    path = heads.find_head(folder / MODEL)
    yield fresh, None if path is None else heads.load(path)


def run(tree: dict[str, Any], output: Path) -> Outcome:
    config = RunConfig.model_validate_json(json.dumps(tree))
    hashes: list[str] = []
    copies: list[EvaluationTowers] = []

    def hashed(towers: Towers, *args: Any) -> dict[str, Measured]:
        hashes.append(features(towers))
        return measure_sets(towers, *args)

    def copied(*args: Any) -> EvaluationTowers:
        copies.append(EvaluationTowers(*args))
        return copies[-1]

    with contextlib.ExitStack() as stack:
        patch = unittest.mock.patch.object
        opens = stack.enter_context(patch(open_dataset, "_open", wraps=open_dataset._open))
        reads = stack.enter_context(patch(evaluation_towers, "load_file", wraps=load_file))
        stack.enter_context(patch(run_evaluation, "measure_sets", hashed))
        stack.enter_context(patch(run_evaluation, "EvaluationTowers", copied))
        loop.train(config, output, join())
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    accuracies = [{key: line[key] for key in line if "/" in key} for line in lines if "accuracy/seen" in line]
    held = [tensor.numel() for copy in copies for tensor in copy._towers.state_dict().values()]
    opened = [call.args[0].path for call in opens.call_args_list]
    return Outcome(opened, len(copies), reads.call_count, not any(held), hashes, accuracies)


def cases(folder: Path) -> dict[str, tuple[Outcome, Outcome]]:
    """Each case, and the same with all weights evaluated through a file in newly built towers."""
    Part.backend = "torch"
    outcomes = {}
    for name, case in CASES.items():
        tree = json.loads((folder / "config.json").read_text())
        tree["deepspeed"]["zero_optimization"]["stage"] = STAGES.get(name, 2)
        for section, options in case.items():
            tree[section] = tree.get(section, {}) | options
        outcome = run(tree, folder / name)
        with (
            contextlib.chdir(folder),
            unittest.mock.patch.object(EvaluationTowers, "trained", through_file),
        ):
            outcomes[name] = outcome, run(tree, folder / f"{name}-file")
    return outcomes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluation")
    tree = tiny.write_config(path, epochs=2, learning_rate=1e-3)
    tree["evaluate"] = {"every_epochs": 1, "workers": 0, "baseline": False, "sets": {}}
    for name in ("seen", "other"):
        options = tiny.write_target(path / name)
        tree["evaluate"]["sets"][name] = {key: options[key] for key in tiny.EVALUATION}
    pairs = tiny.write_reference(path / "pairs")
    tree["evaluate"]["geometry"] = {"format": "webdataset", "path": pairs["path"], "pairs": 7}
    (path / "config.json").write_text(json.dumps(tree))
    return path


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, tuple[Outcome, Outcome]]:
    found: dict[str, tuple[Outcome, Outcome]] = run_ranks(1, cases, folder, init=False, timeout=500)[0]
    return found


@pytest.mark.parametrize("name", CASES)
def test_evaluation_sets_are_opened_once(outcomes: dict[str, Any], folder: Path, name: str) -> None:
    names = ("target", "reference", "seen", "other", "pairs")
    assert sorted(outcomes[name][0].opened) == sorted(str(folder / each) for each in names)
    assert len(outcomes[name][0].accuracies) == 3


@pytest.mark.parametrize(("name", "read"), {"zero0": 0, "zero2": 0, "head": 0, "zero3": 3, "best": 1}.items())
def test_only_zero3_and_best_weights_go_through_a_file(
    outcomes: dict[str, Any], folder: Path, name: str, read: int
) -> None:
    # ZeRO-3 needs it at each evaluation, and the best weights of an earlier step at the end.
    assert outcomes[name][0].read == read
    assert outcomes[name][0].built == 1
    assert outcomes[name][0].freed
    assert not (folder / name / validation.LATEST).exists()
    assert (folder / name / validation.BEST).exists() == (name == "best")


@pytest.mark.parametrize("name", CASES)
def test_evaluation_equals_exported_model_bit_for_bit(outcomes: dict[str, Any], name: str) -> None:
    direct, through_file = outcomes[name]
    assert direct.hashes == through_file.hashes
    assert len(set(direct.hashes[:2])) == 2
    assert direct.accuracies == through_file.accuracies
    assert {"accuracy/seen", "accuracy/other", "geometry/rsa"} <= direct.accuracies[0].keys()
