"""Evaluation during a run, the best weights, early stopping, trained heads, reference batches every k steps."""

import contextlib
import json
import math
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import scipy.optimize
import tiny
import torch
import torch.nn.functional as F
from distributed import run_ranks
from safetensors.torch import load_file
from torch import Tensor

from dive_fast.config import recorded
from dive_fast.data.loaders.loader import Options
from dive_fast.data.open_dataset import open_target
from dive_fast.data.samples import EvaluationSamples
from dive_fast.distributed import Ranks, join
from dive_fast.evaluation.zero_shot import Measured, measure_sets
from dive_fast.methods.method import Part
from dive_fast.methods.run_config import RunConfig
from dive_fast.model import head as heads
from dive_fast.model.towers import Towers, create
from dive_fast.training import linear_probe as probe
from dive_fast.training import loop as train
from dive_fast.training import run_evaluation
from dive_fast.training.validation import BEST, Validation

EPOCHS, STEPS = 3, 9
ACCURACIES = (0.25, 0.75, 0.5)
"""Accuracies of a run's evaluations, in order: the best is neither the first nor the last."""
CLASSES = tuple(f"class number {i}" for i in range(5))


class KilledError(Exception):
    """Ends a run before its end."""


def run(tree: dict[str, Any], output: Path, ranks: Ranks, kill_at: int | None = None) -> Any:
    """Trains; ``kill_at`` raises :class:`KilledError` after that many evaluations."""
    measure, count = train.Validation.evaluate, 0

    def evaluate(self: train.Validation, step: int) -> dict[str, float]:
        nonlocal count
        count += 1
        results = measure(self, step)
        if count == kill_at:
            raise KilledError
        return results

    train.Validation.evaluate = evaluate  # type: ignore[method-assign]
    try:
        return train.train(RunConfig.model_validate_json(json.dumps(tree)), output, ranks)
    finally:
        train.Validation.evaluate = measure  # type: ignore[method-assign]


@contextlib.contextmanager
def fixed_accuracies() -> Iterator[None]:
    """Gives each new set of weights the next accuracy of :data:`ACCURACIES`, and again when it is measured again.

    The accuracy of a random model after a few steps depends on the processor's rounding.
    """
    known: dict[bytes, int] = {}

    def measure_fixed(towers: Towers, *args: Any) -> dict[str, Measured]:
        measured = measure_sets(towers, *args)["seen"]
        assert 0 <= measured.scores["top1"] <= 1
        weights = b"".join(value.numpy().tobytes() for value in towers.state_dict().values())
        accuracy = ACCURACIES[known.setdefault(weights, len(known))]
        return {"seen": measured._replace(scores={"top1": accuracy})}

    with unittest.mock.patch.object(run_evaluation, "measure_sets", measure_fixed):
        yield


def changed(tree: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    return tree | {name: tree.get(name, {}) | section for name, section in sections.items()}


def cases(folder: Path) -> dict[str, Any]:
    """Runs of all cases on one of two ranks."""
    ranks, results = join(), {}
    Part.backend = "torch"  # interpreted kernels would take most of the time
    tree = json.loads((folder / "config.json").read_text())
    selecting = changed(tree, evaluate={"every_epochs": 1, "select": "seen"})
    if ranks.is_main:
        for name in ("never", "selected"):
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps({key: {} for key in recorded.KEYS}))
            # The head of another run: it would classify instead of the prompts.
            heads.save(heads.Head(torch.zeros(5, 24), torch.zeros(5), CLASSES), folder / name / heads.FILE)
    results["never"] = run(tree, folder / "never", ranks)
    keeping = changed(selecting, train={"checkpoint_every": 1, "keep_last": 1, "keep_best": True})
    killed = changed(selecting, train={"checkpoint_every": 3})
    with fixed_accuracies():
        results["selected"] = run(keeping, folder / "selected", ranks)
        # Killed after the evaluation, before the checkpoint records it.
        with pytest.raises(KilledError):
            run(killed, folder / "killed", ranks, kill_at=2)
        ranks.barrier()
        results["killed"] = run(killed, folder / "killed", ranks)
    tree["deepspeed"]["zero_optimization"]["stage"] = 1
    # Constant weights never improve.
    selecting = changed(tree, evaluate={"every_epochs": 1, "select": "seen"})
    still = changed(selecting, train={"learning_rate": 0.0, "weight_decay": 0.0}, evaluate={"patience": 1})
    results["stopped"] = run(still, folder / "stopped", ranks)
    results["stopped again"] = run(still, folder / "stopped", ranks)
    every_4 = changed(tree, objective={"reference_every": 4}, train={"checkpoint_every": 5})
    results["every 4"] = run(every_4, folder / "every 4", ranks)
    for name in ("vanilla_ft", "lp_ft"):
        probe_options = {"probe_epochs": 60, "probe_learning_rate": 0.05} if name == "lp_ft" else {}
        alone = selecting | {"objective": {"name": name} | probe_options}
        alone["data"] = {"target": tree["data"]["target"]}
        results[name] = run(alone, folder / name, ranks)
        held = changed(alone, train={"learning_rate": 0.0, "weight_decay": 0.0, "max_steps": 1})
        results[f"{name} begun"] = run(held, folder / f"{name}-begun", ranks)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("validation")
    tree = tiny.write_config(path, epochs=EPOCHS, learning_rate=3e-3)
    tree["objective"] = {"weight": 1.0}
    tree["data"]["reference"]["batch_size"] = 4
    tree["evaluate"] = {
        "sets": {"seen": {key: tree["data"]["target"][key] for key in tiny.EVALUATION}},
        "geometry": {"format": "webdataset", "path": tree["data"]["reference"]["path"], "pairs": 7},
        "workers": 0,
        "baseline": False,
    }
    tree["deepspeed"]["zero_optimization"]["stage"] = 3
    (path / "config.json").write_text(json.dumps(tree))
    return path


@pytest.fixture(scope="module")
def by_rank(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(2, cases, folder, init=False, timeout=400)


def weights(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def lines(path: Path, key: str) -> list[dict[str, Any]]:
    all_lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in all_lines if key in line]


def test_evaluation_changes_no_losses_and_is_logged(by_rank: list[Any], folder: Path) -> None:
    losses = [[line["loss"] for line in lines(folder / name, "loss")] for name in ("never", "selected")]
    assert len(losses[0]) == STEPS
    assert losses[0] == losses[1]
    evaluated = lines(folder / "selected", "accuracy/seen")
    assert [line["step"] for line in evaluated] == [3, 6, 9, 9]
    assert all(0 < line["geometry/rsa"] <= 1 for line in evaluated)
    assert evaluated[0]["geometry/image_norm"] > 0
    assert len(lines(folder / "never", "accuracy/seen")) == 1


def test_run_exports_its_best_weights(by_rank: list[Any], folder: Path) -> None:
    *on_the_way, last = lines(folder / "selected", "accuracy/seen")
    assert [line["accuracy/seen"] for line in on_the_way] == list(ACCURACIES)
    assert [line["best_step"] for line in on_the_way] == [3, 6, 6]
    # The weights of step 6, not of step 9.
    assert (last["best_step"], last["accuracy/seen"]) == (6, max(ACCURACIES))
    assert same(weights(folder / "selected"), weights(folder / "selected/best"))
    assert not (folder / "selected/latest").exists()
    assert not any((folder / name / heads.FILE).exists() for name in ("never", "selected"))
    for results in by_rank:
        assert results["selected"]["best_step"] == 6
        assert results["selected"]["accuracy/seen"] == max(ACCURACIES)
        assert results["selected"]["geometry/rsa"] == pytest.approx(last["geometry/rsa"], rel=1e-6)


def test_checkpoint_of_the_best_step_is_kept(by_rank: list[Any], folder: Path) -> None:
    kept = sorted((folder / "selected/checkpoints").glob("step*"))
    assert [path.name for path in kept] == [f"step{step:08d}" for step in (6, STEPS)]


def test_killed_run_selects_the_same_weights(by_rank: list[Any], folder: Path) -> None:
    assert same(weights(folder / "selected"), weights(folder / "killed"))
    complete, killed = (lines(folder / name, "accuracy/seen") for name in ("selected", "killed"))
    assert [line["step"] for line in killed] == [line["step"] for line in complete]
    assert [line["accuracy/seen"] for line in killed] == [line["accuracy/seen"] for line in complete]


def test_patience_stops_a_run_for_good(by_rank: list[Any], folder: Path) -> None:
    # The second evaluation is no better; started again, the run replaces its final evaluation.
    assert [line["step"] for line in lines(folder / "stopped", "accuracy/seen")] == [3, 6, 6]
    assert lines(folder / "stopped", "loss")[-1]["step"] == 6
    assert by_rank[0]["stopped"]["accuracy/seen"] == by_rank[0]["stopped again"]["accuracy/seen"]


def test_reference_every_k_steps(by_rank: list[Any], folder: Path) -> None:
    written = lines(folder / "every 4", "loss")
    assert len(written) == STEPS
    # Logged values of the reference half are those of the last step with a reference batch.
    losses = [line["pairwise_loss"] for line in written]
    assert [losses[at] == losses[at - 1] for at in range(1, STEPS)] == [at % 4 != 0 for at in range(1, STEPS)]
    for at, line in enumerate(written):
        weighted = 4 * (line["average_loss"] + line["pairwise_loss"]) * (at % 4 == 0)
        assert line["loss"] == pytest.approx(line["contrastive_loss"] + weighted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["vanilla_ft", "lp_ft"])
def test_trained_head_is_exported_and_classifies(by_rank: list[Any], folder: Path, name: str) -> None:
    head = heads.load(folder / name / heads.FILE)
    assert head.class_names == CLASSES
    assert head.weight.shape == (5, 24)
    start, tuned = weights(folder / f"{name}-begun"), weights(folder / name)
    moved = {key for key, value in start.items() if not torch.equal(value, tuned[key])}
    assert moved
    assert all(key.startswith("visual.") for key in moved)
    # Random pictures of a class share nothing but the label, which a head can memorize.
    assert by_rank[0][name]["accuracy/seen"] == max(
        line["accuracy/seen"] for line in lines(folder / name, "accuracy/seen")
    )


def test_lp_ft_first_trains_only_the_head(by_rank: list[Any], folder: Path) -> None:
    begun = {name: heads.load(folder / f"{name}-begun" / heads.FILE) for name in ("vanilla_ft", "lp_ft")}
    pretrained = load_file(folder / "model/open_clip_model.safetensors")
    for name in begun:
        assert same(weights(folder / f"{name}-begun"), pretrained)
    # The start from prompts: unit rows times the logit scale, no bias.
    norms = begun["vanilla_ft"].weight.norm(dim=1)
    assert torch.allclose(norms, pretrained["logit_scale"].exp().expand(5))
    assert not begun["vanilla_ft"].bias.any()
    assert not torch.equal(begun["lp_ft"].weight, begun["vanilla_ft"].weight)
    # Measured on the pictures that it was trained on, in their evaluation view.
    config = RunConfig.model_validate_json((folder / "config.json").read_text())
    towers, source = create(config.model), open_target(config.data.target)
    samples = EvaluationSamples(source, towers.preprocess)
    rows, labels = probe.embed(towers.eval(), samples, Ranks(0, 1, torch.device("cpu")), 8, Options())
    losses = {name: float(F.cross_entropy(rows @ one.weight.T + one.bias, labels)) for name, one in begun.items()}
    assert losses["lp_ft"] < 0.9 * losses["vanilla_ft"]


def resources(folder: Path) -> tuple[list[tuple[int, int, int]], int]:
    """Descriptors, threads and memory in MiB at each evaluation; processes left at the end."""
    Part.backend = "torch"
    process, usage = psutil.Process(), []
    tree = json.loads((folder / "config.json").read_text())
    tree["model"]["name"] = tiny.write_model(folder / "large", tiny.CLIP)
    tree["evaluate"] |= {"every_steps": 1, "workers": 1, "select": "seen"}
    tree["deepspeed"]["zero_optimization"]["stage"] = 0
    measure = train.Validation.evaluate

    def evaluate(self: train.Validation, step: int) -> dict[str, float]:
        values = measure(self, step)
        usage.append((process.num_fds(), process.num_threads(), process.memory_info().rss >> 20))
        return values

    train.Validation.evaluate = evaluate  # type: ignore[method-assign]
    longer = changed(tree, train={"epochs": EVALUATIONS // 3, "keep_last": 1})
    train.train(RunConfig.model_validate_json(json.dumps(longer)), folder / "resources", join())
    _, left = psutil.wait_procs(process.children(recursive=True), timeout=10)
    return usage, len(left)


EVALUATIONS = 12


@pytest.mark.slow
def test_evaluations_leak_no_resources(folder: Path) -> None:
    ((usage, left),) = run_ranks(1, resources, folder, init=False, timeout=400)
    assert left == 0
    assert len(usage) == EVALUATIONS
    # A leak of a descriptor, a thread or a model of 7 MiB at each evaluation would be there seven times more.
    early, late = (list(zip(*part)) for part in (usage[2:5], usage[-2:]))
    for name, before, after, spare in zip(("descriptors", "threads", "MiB"), early, late, (4, 3, 35)):
        assert max(after) <= max(before) + spare, f"{name}: {before}, then {after}"


def test_probe_minimizes_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(60, 6, generator=generator))
    labels = torch.randint(0, 3, (60,), generator=generator)
    options: dict[str, Any] = {"epochs": 200, "learning_rate": 0.1, "batch_size": 20, "seed": 3}
    ranks = Ranks(0, 1, torch.device("cpu"))
    first, again = (torch.nn.Linear(6, 3) for _ in range(2))
    again.load_state_dict(first.state_dict())
    loss = probe.probe(first, rows, labels, ranks, weight_decay=0.0, **options)

    def cross_entropy(flat: Any) -> float:
        weight, bias = torch.tensor(flat).split([18, 3])
        return float(F.cross_entropy(rows.double() @ weight.reshape(3, 6).T + bias, labels))

    least = scipy.optimize.minimize(cross_entropy, [0.0] * 21).fun
    assert least < 0.95 * math.log(3)
    trained = F.cross_entropy(first(rows), labels).item()
    assert trained == pytest.approx(least, rel=2e-3)
    assert loss == pytest.approx(trained, rel=2e-2)
    # The same seed gives the same weights.
    probe.probe(again, rows, labels, ranks, weight_decay=0.0, **options)
    assert torch.equal(first.weight, again.weight)


@pytest.mark.parametrize(
    ("step", "kept", "resumes"),
    [
        (6, (3, 0.5), True),
        (6, None, False),
        (6, (6, 0.5), False),  # of another run, or older than the lost best weights
        (6, (9, 0.4), False),
        (6, (9, 0.6), True),  # the run resumes from an earlier step and reaches them again
        (6, (15, 0.6), False),  # beyond the end of the run
        (6, (8, 0.6), False),  # not a step of an evaluation
        (12, (6, 0.6), False),
        (12, None, False),
    ],
)
def test_best_weights_of_another_step_count_only_if_reached_again(
    tmp_path: Path, step: int, kept: tuple[int, float] | None, resumes: bool
) -> None:
    printed: list[str] = []
    if kept is not None:
        (tmp_path / BEST).mkdir()
        (tmp_path / BEST / "model.safetensors").touch()
        (tmp_path / BEST / "selected.json").write_text(json.dumps({"step": kept[0], "value": kept[1]}))
    ranks = SimpleNamespace(broadcast=lambda value: value, print=printed.append)
    options = SimpleNamespace(select="val", patience=None)
    resumed = Validation.__new__(Validation)
    resumed.__dict__ |= {
        "_run": SimpleNamespace(ranks=ranks, folder=tmp_path, total_steps=12),
        "_options": options,
        "_every": 3,
        "_select": "digest",
        "_best": None,
    }
    resumed.load_state_dict({"best": 0.5, "best_step": 3, "since_best": 1, "select": "digest"}, step)
    assert (resumed._best == 0.5) == resumes
    last = "the last weights are exported instead" if step == 12 else "the best weights are chosen again"
    assert [line.endswith(last) for line in printed] == [True] * (not resumes)
