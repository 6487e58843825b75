"""The examples do what they say."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import run_script

REPOSITORY = Path(__file__).parents[1]
EXAMPLE = REPOSITORY / "examples/add_a_method.py"
# As a user's: interpreted kernels of the towers would take most of the time.
ENVIRONMENT = os.environ | {"TRITON_INTERPRET": "0"}


def test_added_method_trains_in_under_80_lines(tmp_path: Path) -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 80
    options = ["objective.text_share=0.25", "train.max_steps=2", "train.epochs=1", "evaluate.sets={}"]
    options += [f"train.output={tmp_path / 'run'}", "data.target.workers=0", "data.reference.workers=0"]
    options += ["teacher.mode=online", "data.target.batch_size=16", "data.reference.batch_size=16"]
    command = [sys.executable, str(EXAMPLE), *options]
    run = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    results = ast.literal_eval(run.stdout.splitlines()[-1])
    assert 0 < results["image_norm"] < 1
    assert results["loss"] == pytest.approx(
        results["contrastive_loss"] + 10 * results["distillation_loss"], abs=2e-2
    )
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["image_norm"] < 1e-4
    objective = json.loads((tmp_path / "run/config.json").read_text())["config"]["objective"]
    assert (objective["name"], objective["text_share"], objective["weight"]) == ("both_towers", 0.25, 10)


def test_added_method_refuses_an_option_it_lacks(tmp_path: Path) -> None:
    run = run_script(str(EXAMPLE), "objective.decay=0.5", cwd=tmp_path)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "unknown key objective.decay" in run.stderr
    assert "weight, reference_every, text_share" in run.stderr
