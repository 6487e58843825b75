"""The benchmark of ZeRO's stages: equal losses in every step, and figures for each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loss_report import REPOSITORY
from steps import Case
from zero import PLAIN, STEPS, UNALIGNED, make_step

pytestmark = pytest.mark.slow


def test_every_step_has_the_same_loss() -> None:
    linear = torch.nn.functional.linear
    losses = {
        name: make_step(Case("ViT-tiny", 8, "dive_fast"), stage, name != UNALIGNED)()["loss"]
        for name, stage in STEPS.items()
    }
    # ZeRO-3's replacement would slow the other steps down.
    assert torch.nn.functional.linear is linear
    for name, loss in losses.items():
        torch.testing.assert_close(loss.cpu(), losses[PLAIN].cpu(), rtol=1e-5, atol=0, msg=name)


def test_tiny_run_writes_figures(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/zero.py", "--model", "ViT-tiny", "--rounds", "1"]
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    run = subprocess.run(
        [*command, "--results", str(tmp_path)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads((tmp_path / "cpu-zero.json").read_text())
    (times,), peaks = results["rounds"], results["peak_bytes"]
    assert times.keys() == peaks.keys() == STEPS.keys()
    assert min(times.values()) > 0
    # A stage stores a copy of the weights and buffers for communication.
    assert peaks["no ZeRO"] < peaks["ZeRO 1"]
