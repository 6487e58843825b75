"""Runs whose DeepSpeed launcher gets a signal or is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from jobs import REPOSITORY, config

from dive_fast.distributed import free_port
from dive_fast.fault_tolerance.heartbeat import STOPPED

LAUNCHER = "deepspeed.launcher.launch"


def family(process: psutil.Process) -> dict[str, Any]:
    """DeepSpeed's command, its launcher and the ranks that the launcher started."""
    (launcher,) = (child for child in process.children() if LAUNCHER in child.cmdline())
    ranks = [child for child in launcher.children() if any("train.py" in word for word in child.cmdline())]
    return {"runner": process, "launcher": launcher, "ranks": ranks}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("receiver", "number", "code"),
    [
        ("runner", signal.SIGTERM, -signal.SIGTERM),
        ("runner", signal.SIGKILL, -signal.SIGKILL),
        ("launcher", signal.SIGTERM, 1),
        ("launcher", signal.SIGKILL, None),
        ("ranks", signal.SIGTERM, STOPPED),
        ("ranks", signal.SIGUSR1, STOPPED),
    ],
)
def test_ranks_save_and_end_whichever_process_is_signalled(
    tmp_path: Path, receiver: str, number: signal.Signals, code: int | None
) -> None:
    tree = config(tmp_path)
    tree["train"] |= {"epochs": 10_000, "checkpoint_every": None}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    command = [Path(sys.executable).parent / "deepspeed", "--num_accelerators", "2", "--master_port", free_port()]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            list(map(str, [*command, "launch/train.py", "--config", tmp_path / "config.json"])),
            cwd=REPOSITORY,
            env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
            stdout=log,
            stderr=log,
        )
    metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 180
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.2)
    members = family(psutil.Process(process.pid))
    ranks = members["ranks"]
    assert len(ranks) == 2
    target = ranks[1] if receiver == "ranks" else members[receiver]
    start = time.monotonic()
    target.send_signal(number)
    _, alive = psutil.wait_procs([*ranks, members["launcher"]], timeout=60)
    output = (tmp_path / "log").read_text()
    for survivor in alive:
        survivor.kill()
    assert not alive, output
    assert time.monotonic() - start < 30
    exit_code = process.wait(timeout=30)
    if code is not None:
        assert exit_code == code, output
    (checkpoint,) = (tmp_path / "run/checkpoints").glob("step*")
    assert (checkpoint / "manifest.json").exists()
    assert f"saved after step {int(checkpoint.name.removeprefix('step'))} of" in output
