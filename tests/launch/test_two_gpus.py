"""Two ranks from their start to an evaluation: on two GPUs over NCCL, and on the CPU over gloo as a rehearsal.

The commands are those of a user, with DeepSpeed's launcher. ``make gpu-check`` runs the case of the GPUs; the slow
tests have the other.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import tiny
import torch

from dive_fast.distributed import free_port
from dive_fast.fault_tolerance.heartbeat import LOST

STAGES = (0, 1, 2, 3)
STEPS, EVERY = 12, 3
TOLERANCE = {"cpu": 1e-4, "cuda": 1e-2}
"""Largest relative difference of losses: sums in another order in fp32, and fp16 products in other shapes."""
START_SECONDS, LEAVING_SECONDS = 240.0, 60.0
ABORTED = -signal.SIGABRT
"""Exit code of a rank that NCCL's watchdog ends."""
NOISE = re.compile("was not finalized before destruction|destroy_process_group|leaked", re.IGNORECASE)
"""What PyTorch says of process groups and memory that a process leaves behind."""


class Machine(NamedTuple):
    """Where the ranks run, and the run's config there."""

    device: str
    folder: Path

    def command(self, name: str, *arguments: str) -> list[str]:
        program = str(Path(sys.executable).with_name("dive-fast"))
        return [program, name, "--config", str(self.folder / "config.json"), *arguments]

    def environment(self, **variables: str) -> dict[str, str]:
        hidden = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {}
        # Without Triton's interpreter: as a user starts it.
        return os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"} | hidden | variables

    def start(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        environment = self.environment(**variables)
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def call(self, name: str, *arguments: str) -> str:
        """Runs a command to its end; returns its output."""
        process = self.start(*self.command(name, *arguments))
        output, _ = process.communicate(timeout=START_SECONDS)
        assert process.returncode == 0, output
        assert not NOISE.search(output), output
        return output

    def train(self, run: Path, stage: int, gpus: int) -> dict[int, float]:
        """Trains to the end, also from a checkpoint; returns the loss of each step."""
        self.call("train", *self.settings(run, stage), "--gpus", str(gpus))
        assert json.loads((run / "config.json").read_text())["ranks"] == gpus
        return losses(run)

    def settings(self, run: Path, stage: int) -> list[str]:
        return [f"train.output={run}", f"deepspeed.zero_optimization.stage={stage}"]


def losses(run: Path) -> dict[int, float]:
    """Loss of each step, from the run's metrics."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def largest_difference(first: dict[int, float], second: dict[int, float]) -> float:
    assert list(first) == list(second) == list(range(1, STEPS + 1))
    return max(abs(first[step] / second[step] - 1) for step in first)


def wait_for_checkpoint(run: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not list((run / "checkpoints").glob("step*")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.01)


@pytest.fixture(
    scope="module",
    params=[pytest.param("cuda", marks=pytest.mark.two_gpus), pytest.param("cpu", marks=pytest.mark.slow)],
)
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, and DIVE_TEST_GPU=1")
    folder = tmp_path_factory.mktemp(request.param)
    precision = "fp16" if request.param == "cuda" else "fp32"
    tree = tiny.write_config(folder, epochs=STEPS // 3, checkpoint_every=EVERY, precision=precision)
    # At the first step DiVE's loss and gradient are rounding errors, which AdamW turns into steps of full size for
    # tokens of captions alone: with a large weight, the losses of later steps would differ between ZeRO stages.
    tree["objective"] = {"weight": 0.01}
    tree["train"]["learning_rate"] = 1e-4
    target = tree["data"]["target"]
    tree["evaluate"] = {"sets": {"id": {key: target[key] for key in tiny.EVALUATION}}}
    (folder / "config.json").write_text(json.dumps(tree))
    return Machine(request.param, folder)


@pytest.fixture(scope="module")
def whole(machine: Machine) -> dict[int, dict[int, float]]:
    """Losses of an uninterrupted run of two ranks, for each ZeRO stage."""
    return {stage: machine.train(machine.folder / f"whole{stage}", stage, 2) for stage in STAGES}


def test_stages_agree_on_two_ranks(machine: Machine, whole: dict[int, dict[int, float]]) -> None:
    assert abs(whole[0][STEPS] / whole[0][1] - 1) > 10 * TOLERANCE["cpu"], "the weights hardly change"
    for stage in STAGES[1:]:
        assert largest_difference(whole[stage], whole[0]) <= TOLERANCE[machine.device], stage


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_resumes_what_two_began(machine: Machine, whole: dict[int, dict[int, float]], stage: int) -> None:
    run = machine.folder / f"resumed{stage}"
    process = machine.start(*machine.command("train", *machine.settings(run, stage), "--gpus", "2"))
    wait_for_checkpoint(run, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert largest_difference(machine.train(run, stage, 1), whole[stage]) <= TOLERANCE[machine.device]


def test_a_rank_leaves_when_the_other_is_killed(machine: Machine, whole: dict[int, dict[int, float]]) -> None:
    run = machine.folder / "killed"
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    # Without a launcher, which would end the other rank itself; srun does not.
    ranks = [
        machine.start(
            *machine.command("train", *machine.settings(run, 1)), **shared, RANK=str(rank), LOCAL_RANK=str(rank)
        )
        for rank in range(2)
    ]
    wait_for_checkpoint(run, ranks[0])
    for process in [*psutil.Process(ranks[1].pid).children(recursive=True), psutil.Process(ranks[1].pid)]:
        process.kill()
    start = time.monotonic()
    output, _ = ranks[0].communicate(timeout=LEAVING_SECONDS + 30)
    ranks[1].communicate()
    assert ranks[0].returncode in (LOST, ABORTED), output
    assert time.monotonic() - start <= LEAVING_SECONDS
    assert largest_difference(machine.train(run, 1, 2), whole[1]) <= TOLERANCE[machine.device]


def test_evaluation_on_two_ranks_is_that_on_one(machine: Machine, whole: dict[int, dict[int, float]]) -> None:
    rows: list[dict[str, Any]] = []
    for gpus in (1, 2):
        results = machine.folder / f"evaluated{gpus}"
        settings = machine.settings(machine.folder / "whole0", 0)
        machine.call("evaluate", *settings, "--gpus", str(gpus), "--output", str(results))
        rows.append(json.loads((results / "results.jsonl").read_text().splitlines()[-1]))
    assert [row["ranks"] for row in rows] == [1, 2]
    assert rows[0]["value"] == rows[1]["value"]
