"""Checks real training runs against each other: ``python benchmarks/training.py``.

The demo's first steps, by ``launch/train.py``: on the CPU; on this device; with DALI; and killed in the middle and
started again. Losses of the first must agree with the second's within rounding, those of the last to the digit.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from loss_report import REPOSITORY
from losses import DEVICE
from micro import write

from dive_fast.data.demo import splits

TOLERANCE = 0.02
"""Largest relative difference of losses between devices, and between decoders."""
START_SECONDS = 120


def command(folder: Path, steps: int, *overrides: str) -> list[str]:
    """The command of a run without evaluation, with a checkpoint in the middle."""
    script = REPOSITORY / "launch/train.py"
    common = [f"train.output={folder}", f"train.max_steps={steps}", f"train.checkpoint_every={steps // 2}"]
    common += ["train.log_every=1", "evaluate.sets.id=null", "evaluate.sets.ood=null"]
    common += [f"evaluate.sets.zs_{name}=null" for name in ("colour", "backdrop", "style")]
    # The teacher's rows are computed, so that runs share no file.
    common += ["teacher.mode=online", "deepspeed.zero_optimization.stage=auto"]
    return [sys.executable, str(script), "--config", "demo.json", *common, *overrides]


def environment(device: str) -> dict[str, str]:
    """Environment variables of a run on a device."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if device == "cpu" else {}
    return os.environ | {"HF_HUB_OFFLINE": "1"} | hidden


def losses(folder: Path) -> dict[int, float]:
    """Loss of each step, from the run's metrics."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines]
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def train(folder: Path, steps: int, device: str, *overrides: str) -> dict[int, float]:
    """Runs to the end; returns the losses."""
    run = subprocess.run(
        command(folder, steps, *overrides), env=environment(device), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return losses(folder)


def kill_and_resume(folder: Path, steps: int, device: str) -> dict[int, float]:
    """Kills a run after its first checkpoint and starts it again; returns the losses of all its steps."""
    process = subprocess.Popen(
        command(folder, steps),
        env=environment(device),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and not list((folder / "checkpoints").glob("step*")):
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return train(folder, steps, device)


def largest_difference(first: dict[int, float], second: dict[int, float]) -> float:
    """Largest relative difference of two runs' losses."""
    assert first.keys() == second.keys(), (sorted(first), sorted(second))
    return max(math.fabs(first[step] / second[step] - 1) for step in first)


def main() -> None:
    """Runs all, compares, prints and writes a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20 if DEVICE.type == "cuda" else 4)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    splits.prepare()
    device = DEVICE.type
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = train(folder / "plain", options.steps, device)
        others = {"killed and resumed": kill_and_resume(folder / "killed", options.steps, device)}
        if device == "cuda":
            others["CPU"] = train(folder / "cpu", options.steps, "cpu")
        if find_spec("nvidia") and find_spec("nvidia.dali"):
            dali = ("data.target.loader=dali", "data.reference.loader=dali")
            others["DALI"] = train(folder / "dali", options.steps, device, *dali)
    differences = {name: largest_difference(losses, plain) for name, losses in others.items()}
    write("training", {"losses": plain, "differences": differences}, options.results)
    print(
        "measured: losses differ by " + ", ".join(f"{value:.1e} ({name})" for name, value in differences.items())
    )
    assert differences["killed and resumed"] == 0, "a resumed run must repeat the losses of the uninterrupted one"
    assert max(differences.values()) <= TOLERANCE, differences


if __name__ == "__main__":
    main()
