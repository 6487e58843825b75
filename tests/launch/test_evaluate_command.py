"""The command as a user runs it: a run, a model of open_clip's, two ranks, and mistakes in one line."""

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
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PATH": path}
    launched = ["deepspeed", "--num_accelerators", str(ranks), f"--master_port={free_port()}", script, *arguments]
    return subprocess.run(
        launched, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return [line for line in done.stderr.splitlines() if "error: " in line]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A config with a set, a run folder with tuned weights and a head, and a known data set beside it."""
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
    moved = {name: value + 0.05 * torch.randn(value.shape) for name, value in model.state_dict().items()}
    (folder / "run").mkdir()
    towers.save(model.export(moved), folder / "run/model.safetensors")
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
def test_a_run_is_measured_with_its_head_once_and_the_same_on_two_ranks(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    run = Path(tree["train"]["output"])
    config = str(run.parent / "config.json")
    done = call("--config", config)
    assert done.returncode == 0, done.stderr
    rows = rows_of(run)
    assert [(row["set"], row["classifier"], row["label"]) for row in rows] == [
        ("seen", "head", "run"),
        ("other", "prompts", "run"),
    ]
    assert "| run | " in done.stdout
    assert (
        f"seen: top1 {100 * rows[0]['top1']:.2f} % of 24 samples, by the head (5 of 5 rows, by position)\n"
        in done.stdout
    )
    again = call("--config", config)
    assert again.stdout.count("(measured before)") == 2
    assert rows_of(run) == rows
    two = call("--config", config, "--output", str(tmp_path), ranks=2)
    assert two.returncode == 0, two.stderr
    figures = ("set", "value", "top1", "top5", "mean_class_recall", "macro_f1", "key", "weights_digest", "samples")
    assert [[row[name] for name in figures] for row in rows_of(tmp_path)] == [
        [row[name] for name in figures] for row in rows
    ]


def test_a_model_of_open_clips_is_measured_on_a_known_data_set(tree: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(tree["train"]["output"]).parent
    model = ["--model", tree["model"]["name"], "--output", str(tmp_path), "--workers", "0", "--precision", "bf16"]
    data = ["--datasets", "pets", "--templates", "a photo of a {}.", "--root", str(folder / "data/{dataset}")]
    done = call(*model, *data)
    assert done.returncode == 0, done.stderr
    (row,) = rows_of(tmp_path)
    assert (row["dataset"], row["samples"], row["layout"], row["role"]) == ("pets", 74, "folders", "zero_shot")
    assert (row["precision"], row["classes"], row["templates"]) == ("bf16", 37, 1)
    assert "(1 of 10)" in (tmp_path / "results.md").read_text()
    assert len(list((tmp_path / "classifiers").iterdir())) == 1


def test_mistakes_are_told_in_one_line(tree: dict[str, Any], tmp_path: Path) -> None:
    config = str(Path(tree["train"]["output"]).parent / "config.json")
    (line,) = errors(call("--config", config, f"train.output={tmp_path}/none"))
    assert f"{tmp_path}/none/model.safetensors is missing: train first" in line
    (line,) = errors(call("--config", config, "--datasets", "pets", "--root", f"{tmp_path}/{{dataset}}"))
    assert "no pets found: expected CLIP-benchmark's tars (test/*.tar, classnames.txt)" in line
    (line,) = errors(call("--model", "ViT-B-16", "--datasets", "pets"))
    assert "--suite and --datasets need --root" in line


@pytest.mark.parametrize("name", ["evaluate", "geometry", "ensemble"])
def test_cheap_checks_come_first_and_say_the_same(tree: dict[str, Any], tmp_path: Path, name: str) -> None:
    """The model's weights are broken: whoever says so has gone too far before looking at the paths."""
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
    # A random model is compared with nothing.
    random = ["model.name=ViT-S-32-alt", f"train.output={run}"]
    if name == "evaluate":
        random += ["--weights", "pretrained"]
    (line,) = errors(call("--config", str(config), *random, command=name))
    assert "model.pretrained" in line
    assert "model.random" in line


def test_geometry_says_that_its_pairs_are_those_of_training(tree: dict[str, Any], tmp_path: Path) -> None:
    config = str(Path(tree["train"]["output"]).parent / "config.json")
    done = call("--config", config, "--limit", "5", "--output", str(tmp_path), command="geometry")
    assert done.returncode == 0, done.stderr
    assert "pairs: data.reference, whose embeddings training keeps in place" in done.stdout
    assert json.loads((tmp_path / "geometry.json").read_text())["num_pairs"] == 5
