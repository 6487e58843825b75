"""Runs a function or a script on several ranks, in new processes, from within a test."""

import faulthandler
import functools
import gc
import multiprocessing
import os
import pickle
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import unittest.mock
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, NamedTuple

import interpreted
import torch
import torch.distributed as dist
import torch.multiprocessing

# How long other ranks may run after one has failed: enough to report their errors, and much less than the timeout,
# which a rank that waits in a collective would otherwise use up.
GRACE_SECONDS = 3.0


@functools.cache
def context() -> BaseContext:
    """Starts processes with the engine imported: without a GPU they are forked from one that has imported it."""
    if torch.cuda.is_available():
        # CUDA does not survive a fork, and the check for a GPU may have initialized it.
        return torch.multiprocessing.get_context("spawn")
    multiprocessing.set_forkserver_preload(["preload"])
    # The server starts with the path of a new process, and silently ignores modules that it cannot find.
    path = f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    with unittest.mock.patch.dict(os.environ, PYTHONPATH=path):
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


def begin() -> None:
    """Prepares such a process."""
    # ZeRO-3 collects garbage for each engine: a quarter of a second for all imported objects.
    gc.freeze()
    interpreted.speed_up()


class _Outcome(NamedTuple):
    value: Any
    error: str | None
    finished: float


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, init: bool = True, timeout: float = 120.0
) -> list[Any]:
    """Calls ``function(*args)`` in ``world_size`` new processes; returns the results in rank order.

    A process takes a second to start: let one call run many cases, and make it a fixture of module scope.
    ``function`` and ``args`` are pickled, so the function has to be defined at the top level of its module.
    Results
    are pickled by value: a tensor outlives its process.

    On every rank torch has one thread, and the environment is the caller's, with RANK, LOCAL_RANK, WORLD_SIZE,
    LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Args:
        init: whether to create a gloo process group around the call (with a file store, so that two test runs
            cannot collide). False leaves that to the function, for which MASTER_PORT is a free port.
        timeout: seconds for everything, including the start; then all ranks are stopped.

    Raises:
        RuntimeError: a rank raised or died; the message contains the traceback of each rank, earliest first.
        TimeoutError: a rank did not finish in time; the message contains the stacks of its threads.
    """
    # multiprocessing's pickler would pass tensors as shared memory, which ends with its process.
    task = pickle.dumps((function, args))
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder, port = Path(name), _free_port()
        processes = [
            context().Process(  # type: ignore[attr-defined]
                target=_run_rank,
                args=(rank, world_size, task, init, deadline, port, folder, dict(os.environ)),
            )
            for rank in range(world_size)
        ]
        stopped = []
        try:
            for process in processes:
                process.start()
            _wait(processes, deadline)
        finally:
            for rank, process in enumerate(processes):
                if process.pid is not None and process.exitcode is None:
                    stopped.append(rank)
                    process.kill()  # not SIGTERM: DeepSpeed handles that one, and a hung rank never gets to it
                    process.join()
        return _values(folder, [process.exitcode for process in processes], stopped)


def run_script(
    *command: str, cwd: Path, environment: dict[str, str] | None = None, timeout: float = 120.0, ranks: int = 0
) -> subprocess.CompletedProcess[str]:
    """Runs ``python command`` without the seconds that the import of the engine takes.

    Args:
        ranks: number of ranks, with the variables of a launcher; 0: without a launcher.

    Returns:
        The exit code of the first rank that failed, or 0; the output of all ranks, in rank order.

    Raises:
        TimeoutError: the script did not end in time.
    """
    port, deadline = _free_port(), time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="script-") as name:
        processes, logs = [], []
        for rank in range(max(ranks, 1)):
            streams = [Path(name) / f"{rank}.{stream}" for stream in ("stdout", "stderr")]
            variables = (
                os.environ | (_launcher_variables(rank, ranks, port) if ranks else {}) | (environment or {})
            )
            process = context().Process(target=_run_script, args=(command, cwd, variables, streams))  # type: ignore[attr-defined]
            process.start()
            processes.append(process)
            logs.append(streams)
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [process for process in processes if process.exitcode is None]
        for process in late:
            process.kill()
            process.join()
        stdout, stderr = ("".join(log.read_text() for log in both if log.exists()) for both in zip(*logs))
    if late:
        raise TimeoutError(stdout + stderr)
    code = next((process.exitcode for process in processes if process.exitcode), 0)
    return subprocess.CompletedProcess(command, code, stdout, stderr)


def _launcher_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The variables that a launcher sets for a rank."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    return {name: str(number) for name, number in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _run_script(command: tuple[str, ...], cwd: Path, environment: dict[str, str], logs: list[Path]) -> None:
    for number, log in enumerate(logs, 1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv, sys.path[0] = list(command), str(Path(command[0]).parent.resolve())
    code = 0
    begin()
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)  # as the interpreter does
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # As an ordinary process: the exit of multiprocessing's processes waits for other things.
    os._exit(code)


def _wait(processes: list[Any], deadline: float) -> None:
    """Waits until all have finished, one has failed and the grace period is over, or the time is up."""
    # A rank whose time is up prints its stacks and exits by itself: wait a little longer.
    until = deadline + GRACE_SECONDS
    running = {process.sentinel: process for process in processes}
    while running and time.monotonic() < until:
        for sentinel in wait(list(running), timeout=until - time.monotonic()):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode != 0:
                until = min(until, time.monotonic() + GRACE_SECONDS)


def _values(folder: Path, exit_codes: list[int], stopped: list[int]) -> list[Any]:
    """The value of each rank, or one error that reports all failures."""
    outcomes: dict[int, _Outcome] = {}
    stacks: dict[int, str] = {}
    for rank in range(len(exit_codes)):
        if (path := folder / f"{rank}.outcome").exists():
            outcomes[rank] = pickle.loads(path.read_bytes())
        if (path := folder / f"{rank}.stacks").exists() and (text := path.read_text()):
            stacks[rank] = text
    # The earliest error is the cause; most others report that their peer has ended.
    raised = sorted((rank for rank in outcomes if outcomes[rank].error), key=lambda rank: outcomes[rank].finished)
    died = [rank for rank, code in enumerate(exit_codes) if code and rank not in {*raised, *stacks, *stopped}]
    reports = [
        *(f"rank {rank} raised\n{outcomes[rank].error}" for rank in raised),
        *(f"rank {rank} died with exit code {exit_codes[rank]}" for rank in died),
        *(f"rank {rank} ran out of time at\n{text}" for rank, text in stacks.items()),
        *(f"rank {rank} was stopped" for rank in stopped),
    ]
    if raised or died:
        raise RuntimeError("\n".join(reports))
    if reports:
        raise TimeoutError("\n".join(reports))
    return [outcomes[rank].value for rank in range(len(exit_codes))]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run_rank(
    rank: int,
    world_size: int,
    task: bytes,
    init: bool,
    deadline: float,
    port: int,
    folder: Path,
    environment: dict[str, str],
) -> None:
    # faulthandler works without the interpreter: it ends a rank that hangs in a collective, or whose test was
    # killed.
    stacks = (folder / f"{rank}.stacks").open("w")
    faulthandler.dump_traceback_later(max(deadline - time.monotonic(), 0.01), exit=True, file=stacks)
    os.environ.clear()
    os.environ.update(environment | _launcher_variables(rank, world_size, port))
    torch.set_num_threads(1)
    try:
        begin()
        function, args = pickle.loads(task)
        if init:
            store = f"file://{folder / 'store'}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        value = function(*args)
        if init:
            dist.barrier()  # a rank that leaves early closes connections that its peers may still read from
            dist.destroy_process_group()
        outcome, failed = pickle.dumps(_Outcome(value, None, time.monotonic())), False
    except BaseException:
        outcome, failed = pickle.dumps(_Outcome(None, traceback.format_exc(), time.monotonic())), True
    (folder / f"{rank}.outcome").write_bytes(outcome)
    if failed:
        # An ordinary exit would destroy the process group, which may wait for peers that hang.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
