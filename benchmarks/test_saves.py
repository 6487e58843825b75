"""The benchmark of saves writes its figures and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loss_report import REPOSITORY

pytestmark = pytest.mark.slow


def test_tiny_run_writes_figures(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/saves.py", "--model", "ViT-tiny", "--rounds", "1"]
    command += ["--results", str(tmp_path), "--folder", str(tmp_path)]
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (figures,) = json.loads((tmp_path / "cpu-saves.json").read_text())["rounds"]
    assert figures["gib"] > 0.03
    assert figures["complete"] >= figures["blocked"] > 0
    assert figures["waiting_save"] > 0
    assert figures["deepspeed"] > 0
    # Checkpoints are temporary.
    assert [path.name for path in tmp_path.iterdir()] == ["cpu-saves.json"]
