"""Tests of worker processes: signals, shared memory, and the end of their parent."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

ABANDONED = """
import torch
# PyTorch starts threads in each process before our code runs there.
torch.set_num_threads(4)
torch.ones(1000, 1000).sum()
from dive_fast.data.workers import in_workers
batches = in_workers(str, range(1000), workers=2)
# One result of each worker: both are initialized.
print(next(batches), next(batches), flush=True)
input()
print(next(batches), flush=True)
# The interpreter exits with unread batches.
"""


def test_workers_ignore_signals_and_end_with_their_parent() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ABANDONED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "4"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "0 1\n"
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            worker.send_signal(number)
    _, alive = psutil.wait_procs(workers, timeout=1)
    assert len(alive) == len(workers)
    rest, _ = process.communicate("continue\n", timeout=60)
    assert rest == "2\n"
    assert process.returncode == 0
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive


USE_SHARED_MEMORY = """
import sys
import torch
from dive_fast.data.workers import in_workers
from dive_fast.errors import MachineError
try:
    print(len(list(in_workers(lambda number: torch.zeros(2**20), range(3), workers=1))))
except MachineError as error:
    sys.exit(f"error: {error}")
"""


def test_workers_full_shared_memory_is_reported() -> None:
    mounted = "mount -t tmpfs -o size=256k tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mounted], capture_output=True, check=False).returncode:
        pytest.skip("mounting a private file system needs root and a permissive kernel")
    command = ["unshare", "-m", "sh", "-c", f'{mounted} && exec "$@"', "sh", sys.executable, "-P", "-c"]
    run = subprocess.run([*command, USE_SHARED_MEMORY], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1
    assert run.stdout == ""
    assert "error: shared memory (/dev/shm) is full: give the container more" in run.stderr
    assert "Traceback" not in run.stderr


def test_workers_end_after_their_parent_is_killed() -> None:
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", ABANDONED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "0 1\n"
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
