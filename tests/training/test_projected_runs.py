"""Complete runs with a method in weight space: metrics, evaluation, export, resumes, and heads as anchors."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distributed import run_ranks
from safetensors.torch import load_file
from test_resume import Folder, flyp

from dive_fast.config.schema import ObjectiveConfig
from dive_fast.distributed import join
from dive_fast.methods.method import Part
from dive_fast.methods.registry import has_head_anchor
from dive_fast.model import head as heads

RULE = ("projection", {"name": "digrap", "mu": 1.0})
PROBED = {"name": "lp_ft", "head_start": "random", "probe_epochs": 1}
NAMES = ("triggered", "applied", "omega", "distance", "relative_distance")


def cases(folder: Path) -> dict[str, Any]:
    """Output, metrics and weights of each run."""
    Part.backend = "torch"
    ranks, tree = join(), flyp(folder)
    tree["train"] |= {"max_steps": 4, "checkpoint_every": 1, "learning_rate": 1e-3}
    results: dict[str, Any] = {}

    def state(run: Folder, printed: str) -> dict[str, Any]:
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        files = {path.name: load_file(path) for path in run.path.glob("*.safetensors")}
        return {"printed": printed, "lines": lines, "files": files}

    own = {key: tree["data"]["target"][key] for key in tiny.EVALUATION}
    evaluated = tree | {"evaluate": {"sets": {"seen": own}, "workers": 0, "every_steps": 2, "baseline": False}}
    run = Folder(ranks, evaluated, folder / "run")
    results["run"] = state(run, run.start(RULE, ("train.ema", 0.5)))
    for name, other in {
        "other rule": ("projection", {"name": "spd"}),
        "other option": ("projection.mu", 0.5),
        "none": ("projection", {"name": "none"}),
    }.items():
        results[name] = run.start(RULE, ("train.ema", 0.5), other)
    plain = Folder(ranks, tree, folder / "plain")
    results["plain"] = state(plain, plain.start(("train.weight_decay", 0.0)))
    # A head that a resumed run starts at random.
    tree["objective"] = PROBED
    complete, killed = (Folder(ranks, tree, folder / name) for name in ("complete", "killed"))
    results["complete"] = state(complete, complete.start(RULE))
    killed.start(RULE, kill_at=3)
    results["resumed"] = state(killed, killed.start(RULE))
    random = Folder(ranks, tree, folder / "random")
    objective = ("objective", {"name": "vanilla_ft", "head_start": "random"})
    results["random"] = random.start(RULE, objective, ("train.max_steps", 1))
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(1, cases, tmp_path_factory.mktemp("projected"), init=False, timeout=300)[0]


def test_metrics_of_a_run_show_whether_the_rule_acts(results: dict[str, Any]) -> None:
    steps = [line for line in results["run"]["lines"] if "loss" in line and "accuracy/seen" not in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all(f"projection/{name}" in line for line in steps for name in NAMES)
    assert all(steps[0][f"projection/{name}"] == 0 for name in NAMES)
    assert 0 < steps[1]["projection/distance"] < steps[3]["projection/distance"]
    assert max(line["projection/omega"] for line in steps) > 0
    assert max(line["projection/applied"] for line in steps) > 0
    assert not any(name.startswith("projection/") for line in results["plain"]["lines"] for name in line)
    assert "projection digrap: " in results["run"]["printed"]
    assert "tuned tensors" in results["run"]["printed"]
    assert "left out: logit_scale" in results["run"]["printed"]


def test_projected_run_is_evaluated_averaged_and_exported(results: dict[str, Any]) -> None:
    run, plain = results["run"], results["plain"]
    assert "error" not in run["printed"]
    assert [line["step"] for line in run["lines"] if "accuracy/seen" in line] == [2, 4, 4]
    weights, average, other = (
        files["visual.proj"]
        for files in (
            run["files"]["model.safetensors"],
            run["files"]["ema.safetensors"],
            plain["files"]["model.safetensors"],
        )
    )
    assert weights.isfinite().all()
    assert not torch.equal(weights, other)
    assert not torch.equal(weights, average)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("other rule", 'projection.name: "digrap" there, "spd" here'),
        ("other option", "projection.mu: 1.0 there, 0.5 here"),
        ("none", 'projection.name: "digrap" there, "none" here'),
    ],
)
def test_another_projection_is_refused_at_a_resume(results: dict[str, Any], case: str, expected: str) -> None:
    assert "belongs to a run with other settings" in results[case]
    assert expected in results[case]


def test_probed_head_is_the_anchor_of_a_resumed_run(results: dict[str, Any]) -> None:
    complete, resumed = results["complete"], results["resumed"]
    assert "continues after step " in resumed["printed"]
    assert "left out" not in complete["printed"]
    for file in ("model.safetensors", heads.FILE):
        for name, tensor in complete["files"][file].items():
            assert torch.equal(tensor, resumed["files"][file][name]), name
    for first, second in zip(complete["lines"], resumed["lines"], strict=True):
        for name in NAMES:
            assert first.get(f"projection/{name}") == second.get(f"projection/{name}")


def test_random_head_is_left_out(results: dict[str, Any]) -> None:
    assert "error" not in results["random"]
    assert "left out: head.weight, head.bias" in results["random"]


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({"name": "vanilla_ft"}, True),
        ({"name": "vanilla_ft", "head_start": "random"}, False),
        (PROBED, True),
        ({"name": "flyp"}, True),
    ],
)
def test_heads_have_anchors_unless_they_start_at_random(objective: dict[str, Any], expected: bool) -> None:
    assert has_head_anchor(ObjectiveConfig(**objective)) == expected
