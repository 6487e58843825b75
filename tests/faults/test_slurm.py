"""The job script of docs/reliability.md, with stand-ins for the commands of Slurm."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from jobs import REPOSITORY

SRUN = """#!/bin/bash
trap 'touch {folder}/asked; sleep 0.3; exit 75' USR1
touch {folder}/started
if [ -n "$CODE" ]; then exit "$CODE"; fi
while true; do sleep 0.05; done
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'node0\\nnode1\\n'; else echo "$@" >> {folder}/scontrol.log; fi
"""


def start(folder: Path, **environment: str) -> "subprocess.Popen[bytes]":
    text = (REPOSITORY / "docs/reliability.md").read_text()
    (script,) = re.findall(r"^    (#!/bin/bash\n(?:    .*\n|\n)+)", text, re.MULTILINE)
    (folder / "job").write_text(script.replace("\n    ", "\n"))
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(content.format(folder=folder))
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[0-1]", "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.Popen(["bash", folder / "job"], env=os.environ | slurm | environment)


def requeued(folder: Path) -> bool:
    if not (folder / "scontrol.log").exists():
        return False
    assert (folder / "scontrol.log").read_text() == "requeue 17\n"
    return True


@pytest.mark.parametrize(
    ("code", "restarts", "is_requeued"),
    [(0, 0, False), (1, 0, False), (2, 0, False), (75, 99, True), (76, 19, True), (76, 20, False), (137, 0, True)],
)
def test_job_is_requeued_if_the_command_can_resume(
    tmp_path: Path, code: int, restarts: int, is_requeued: bool
) -> None:
    job = start(tmp_path, CODE=str(code), SLURM_RESTART_COUNT=str(restarts))
    assert job.wait(timeout=20) == code
    assert requeued(tmp_path) == is_requeued


def test_job_at_its_time_limit_saves_and_is_requeued(tmp_path: Path) -> None:
    job = start(tmp_path)
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == 75
    assert (tmp_path / "asked").exists()
    assert requeued(tmp_path)
