"""The benchmark of saves writes what a save costs, and whole checkpoints while it does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loss_report import REPOSITORY

pytestmark = pytest.mark.slow


def test_a_tiny_run_ends_in_figures(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/saves.py", "--model", "ViT-tiny", "--rounds", "1"]
    command += ["--results", str(tmp_path), "--folder", str(tmp_path)]
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (found,) = json.loads((tmp_path / "cpu-saves.json").read_text())["rounds"]
    assert found["gib"] > 0.03
    assert found["whole"] >= found["held"] > 0
    assert found["waited_for"] > 0
    assert found["deepspeed"] > 0
    # Checkpoints are written for the figures alone.
    assert [path.name for path in tmp_path.iterdir()] == ["cpu-saves.json"]
