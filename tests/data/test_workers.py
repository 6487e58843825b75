"""Loader processes: whom they obey."""

import os
import signal
import subprocess
import sys

import psutil

ABANDONED = """
from dive_fast.data.workers import in_workers
batches = in_workers(str, range(1000), workers=2)
# One of each process: both have settled in.
print(next(batches), next(batches), flush=True)
input()
print(next(batches), flush=True)
# The interpreter ends with batches that nobody has taken.
"""


def test_processes_obey_the_training_process_alone_and_end_with_it() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ABANDONED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
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
    rest, _ = process.communicate("go on\n", timeout=60)
    assert rest == "2\n"
    assert process.returncode == 0
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
