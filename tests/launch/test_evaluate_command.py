"""The evaluation commands as a user runs them: runs, open_clip models, two ranks, and errors in one line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distributed import run_script

from dive_fast.distributed import free_port
from dive_fast.methods.run_config import RunConfig
from dive_fast.model import head as heads
from dive_fast.model import towers

ROOT = Path(__file__).parents[2]


def call(*arguments: str, ranks: int = 1, command: str = "evaluate") -> subprocess.CompletedProcess[str]:
    script = str(ROOT / f"launch/{command}.py")
    if ranks == 1:
        return run_script(script, *arguments, cwd=ROOT, environment={"DS_ACCELERATOR": "cpu"})
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PATH": path, "TRITON_INTERPRET": "0"}
    launch = ["deepspeed", "--num_accelerators", str(ranks), f"--master_port={free_port()}", script, *arguments]
    return subprocess.run(
        launch, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def errors(completed: subprocess.CompletedProcess[str]) -> list[str]:
    assert completed.returncode == 2, completed.stderr
    assert "Traceback" not in completed.stderr
    return [line for line in completed.stderr.splitlines() if "error: " in line]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A config with sets, its run folder with tuned weights and a head, and a known data set next to it."""
    folder = tmp_path_factory.mktemp("command")
    written = tiny.write_config(folder)
    seen = {key: written["data"]["target"][key] for key in tiny.EVALUATION}
    other = tiny.write_target(folder / "other", classes=4)
    written["evaluate"] = {
        "sets": {"seen": seen, "other": {key: other[key] for key in tiny.EVALUATION}},
        "workers": 0,
    }
    (folder / "names.txt").write_text("cat\ndog\nyurt\nteapot\n")
    written["evaluate"]["sets"]["other"]["class_names"] = str(folder / "names.txt")
    model = towers.create(RunConfig.model_validate_json(json.dumps(written)).model)
    torch.manual_seed(0)
    changed = {name: value + 0.05 * torch.randn(value.shape) for name, value in model.state_dict().items()}
    (folder / "run").mkdir()
    towers.save(model.export(changed), folder / "run/model.safetensors")
    names = tuple(f"class number {i}" for i in range(5))
    heads.save(heads.Head(torch.randn(5, 24), torch.randn(5), names), folder / "run" / heads.FILE)
    (folder / "config.json").write_text(json.dumps(written))
    for label in range(37):
        for copy in range(2):
            path = folder / f"data/pets/test/Breed_{label:02d}/{copy}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tiny.jpeg(2 * label + copy))
    return written


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_evaluate_run_once_and_equal_on_two_ranks(tree: dict[str, Any], tmp_path: Path) -> None:
    run = Path(tree["train"]["output"])
    config = str(run.parent / "config.json")
    completed = call("--config", config)
    assert completed.returncode == 0, completed.stderr
    rows = rows_of(run)
    assert [(row["set"], row["classifier"], row["label"]) for row in rows] == [
        ("seen", "head", "run"),
        ("other", "prompts", "run"),
    ]
    assert "| run | " in completed.stdout
    measured = f"seen: top1 {100 * rows[0]['top1']:.2f} % of 24 samples, ECE {rows[0]['ece']:.3f}"
    assert f"{measured}, by the head (5 of 5 rows, by position)\n" in completed.stdout
    again = call("--config", config)
    assert again.stdout.count("(measured before)") == 2
    assert rows_of(run) == rows
    on_two = call("--config", config, "--output", str(tmp_path), ranks=2)
    assert on_two.returncode == 0, on_two.stderr
    figures = ("set", "value", "top1", "top5", "mean_class_recall", "macro_f1", "key", "weights_digest", "samples")
    assert [[row[name] for name in figures] for row in rows_of(tmp_path)] == [
        [row[name] for name in figures] for row in rows
    ]


def test_evaluate_open_clip_model_on_known_data_set(tree: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(tree["train"]["output"]).parent
    model = ["--model", tree["model"]["name"], "--output", str(tmp_path), "--workers", "0", "--precision", "bf16"]
    data = ["--datasets", "pets", "--templates", "a photo of a {}.", "--root", str(folder / "data/{dataset}")]
    completed = call(*model, *data, "--compare", "ViT-B/16")
    assert completed.returncode == 0, completed.stderr
    (row,) = rows_of(tmp_path)
    assert "| Pets |" in completed.stdout[completed.stdout.index("## Calibration") :]
    assert f"{row['label']} (measured)" in completed.stdout
    assert f"{row['label']} is measured with {tree['model']['name']}" in completed.stdout
    (figure,) = tmp_path.glob("reliability_*.png")
    assert completed.stdout.endswith(f"results.md, {figure.name}\n")
    assert (row["dataset"], row["samples"], row["layout"], row["role"]) == ("pets", 74, "folders", "zero_shot")
    assert (row["precision"], row["classes"], row["templates"]) == ("bf16", 37, 1)
    assert "(1 of 10)" in (tmp_path / "results.md").read_text()
    assert len(list((tmp_path / "classifiers").iterdir())) == 1


def test_evaluate_measures_accuracy_under_attack(tree: dict[str, Any], tmp_path: Path) -> None:
    config = str(Path(tree["train"]["output"]).parent / "config.json")
    attack = ["--attack", "apgd-ce", "--attack-steps", "2", "--eps", "0", "64"]
    completed = call("--config", config, "--output", str(tmp_path), *attack)
    assert completed.returncode == 0, completed.stderr
    rows = rows_of(tmp_path)
    assert [(row["set"], row["eps"], row["classifier"]) for row in rows] == [
        *(("seen", eps, "head") for eps in (0.0, 64.0)),
        *(("other", eps, "prompts") for eps in (0.0, 64.0)),
    ]
    assert all(row["value"] == row["clean"] for row in rows if row["eps"] == 0)
    assert "| run | seen | APGD-CE, L-infinity, 2 steps |" in completed.stdout
    assert completed.stdout.endswith("results.md, attack_apgd-ce_linf.png\n")
    assert (tmp_path / "attack_apgd-ce_linf.png").is_file()
    plain = call("--config", config, "--output", str(tmp_path))
    assert plain.returncode == 0, plain.stderr
    clean = {row["set"]: row["top1"] for row in rows_of(tmp_path) if "top1" in row}
    assert clean == {row["set"]: row["clean"] for row in rows}


@pytest.mark.slow
def test_evaluate_under_attack_on_two_ranks(tree: dict[str, Any], tmp_path: Path) -> None:
    config = str(Path(tree["train"]["output"]).parent / "config.json")
    attack = ["--attack", "apgd-ce", "--attack-steps", "3", "--eps", "0", "2", "--attack-samples", "9"]
    values = []
    for ranks in (1, 2):
        completed = call("--config", config, "--output", str(tmp_path / str(ranks)), *attack, ranks=ranks)
        assert completed.returncode == 0, completed.stderr
        rows = rows_of(tmp_path / str(ranks))
        assert [(row["samples"], row["ranks"]) for row in rows] == [(9, ranks)] * 4
        values.append([(row["set"], row["eps"], row["clean"], row["key"]) for row in rows])
    assert values[0] == values[1]


def test_evaluate_reports_mistakes_in_one_line(tree: dict[str, Any], tmp_path: Path) -> None:
    config = str(Path(tree["train"]["output"]).parent / "config.json")
    (line,) = errors(call("--config", config, f"train.output={tmp_path}/none"))
    assert f"{tmp_path}/none/model.safetensors is missing: train first" in line
    (line,) = errors(call("--config", config, "--datasets", "pets", "--root", f"{tmp_path}/{{dataset}}"))
    assert "no pets found: expected CLIP-benchmark's tars (test/*.tar, classnames.txt)" in line
    (line,) = errors(call("--model", "ViT-B-16", "--datasets", "pets"))
    assert "--suite and --datasets need --root" in line
    (line,) = errors(call("--config", config, "--compare"))
    assert (
        f"there are no published results of {tree['model']['name']}; name a model by --compare MODEL: ViT-B"
        in line
    )
    (line,) = errors(call("--compare", "ViT-B/16", "--suite", "imagenet"))
    assert "to measure a model before --compare, name it by --config or --model" in line
    published = call("--compare", "ViT-L-14", "--output", str(tmp_path / "none"))
    assert published.returncode == 0, published.stderr
    assert "## ViT-L/14 tuned on ImageNet: top-1 accuracy" in published.stdout
    assert "none/results.jsonl has no measured rows" in published.stdout


@pytest.mark.parametrize("name", ["evaluate", "geometry", "ensemble", "tpgm"])
def test_commands_check_paths_before_loading_weights(tree: dict[str, Any], tmp_path: Path, name: str) -> None:
    """The model's weights are broken: a command that loads them before its checks reports another error."""
    option = "--after" if name == "geometry" else "--weights"
    model = tmp_path / "model"
    shutil.copytree(Path(tree["model"]["name"].removeprefix("local-dir:")), model)
    (model / "open_clip_model.safetensors").write_bytes(b"broken")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tree | {"model": {"name": f"local-dir:{model}"}}))
    run = Path(tree["train"]["output"])
    (tmp_path / "file").touch()
    for arguments, message in (
        ([f"train.output={tmp_path}/none"], f"{tmp_path}/none/model.safetensors is missing: train first, or name"),
        ([option, f"{tmp_path}/no.bin"], f"{option} {tmp_path}/no.bin: no such file or folder"),
        (
            ["--output", f"{tmp_path}/file/a"],
            f"{tmp_path}/file/a: results cannot be written there: {tmp_path}/file",
        ),
    ):
        (line,) = errors(call("--config", str(config), *arguments, command=name))
        assert message in line
    # A random model cannot be compared.
    random = ["model.name=ViT-S-32-alt", f"train.output={run}"]
    if name == "evaluate":
        random += ["--weights", "pretrained"]
    (line,) = errors(call("--config", str(config), *random, command=name))
    assert "model.pretrained" in line
    assert "model.random" in line


def test_geometry_reports_pairs_used_in_training(tree: dict[str, Any], tmp_path: Path) -> None:
    config = str(Path(tree["train"]["output"]).parent / "config.json")
    completed = call("--config", config, "--limit", "5", "--output", str(tmp_path), command="geometry")
    assert completed.returncode == 0, completed.stderr
    assert "pairs: data.reference, whose embeddings training keeps in place" in completed.stdout
    assert json.loads((tmp_path / "geometry.json").read_text())["num_pairs"] == 5
