"""Runs of ``launch/train.py`` in separate processes, for faults at exact points.

The processes are forked from one that has imported the engine, so that a run of two ranks starts in a second. Each
rank has its own signals, files, sockets and exit code, as any process.
"""

import contextlib
import functools
import importlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import tiny
from distributed import begin, context
from safetensors.torch import load_file

from dive_fast.distributed import free_port
from dive_fast.errors import DataError
from dive_fast.fault_tolerance import heartbeat
from dive_fast.methods.method import Part

REPOSITORY = Path(__file__).parents[2]
STEPS = 6
CLOCKS = ("images_per_second", "data_wait")
TIMEOUT = 90.0
"""Seconds that a job may take on a busy machine."""


class At(NamedTuple):
    """An event at a point in the run of a rank."""

    place: str
    """``<phase> <step>`` as the loop sets it in ``heartbeat.Watch.set_phase``; or a function, ``module:name``."""
    event: str
    """Name of a signal to the rank itself, or a key of :data:`EVENTS`."""
    rank: int | None = None
    """None: all ranks."""
    call: int = 1
    """For a function: number of the call, from 1, before which the event happens."""
    until: int | None = None
    """For a function: the event repeats at each call up to this number."""


@dataclass
class Outcome:
    """Exit codes and output of all ranks of a job."""

    codes: list[int]
    output: str
    """Standard output and error of all ranks."""
    seconds: float


class Job:
    """A run folder whose run is started, disturbed, and restarted."""

    def __init__(self, folder: Path, tree: dict[str, Any]) -> None:
        """Writes the config.

        Args:
            tree: config, whose output is moved to ``folder``.
        """
        folder.mkdir(parents=True)
        self.folder, self.run = folder, folder / "run"
        tree = tree | {"train": tree["train"] | {"output": str(self.run)}}
        (folder / "config.json").write_text(json.dumps(tree))
        self._processes: list[BaseProcess] = []
        self._logs: list[Path] = []
        self._start_time = 0.0

    def start(
        self,
        *events: At,
        ranks: int = 2,
        overrides: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
    ) -> "Job":
        """Starts all ranks.

        Args:
            environment: variables in addition to a launcher's. OMP_NUM_THREADS: torch threads, default 1.
        """
        port, self._start_time = free_port(), time.monotonic()
        self._logs = [self.folder / f"rank{rank}.log" for rank in range(ranks)]
        self._processes = []
        for rank, log in enumerate(self._logs):
            variables = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            } | (environment or {})
            arguments = ["--config", str(self.folder / "config.json"), *overrides]
            rank_events = [at for at in events if at.rank in (None, rank)]
            process = context().Process(target=_run_rank, args=(variables, arguments, log, rank_events))
            process.start()
            self._processes.append(process)
        return self

    def kill(self, rank: int, number: signal.Signals) -> bool:
        """Sends a signal to a rank; returns whether the rank was still running."""
        process = self._processes[rank]
        if process.exitcode is not None:
            return False
        assert process.pid is not None
        os.kill(process.pid, number)
        return True

    def kill_all_of(self, rank: int, number: signal.Signals) -> None:
        """Sends a signal to a rank and its child processes, as launchers and Slurm do."""
        process = psutil.Process(self._processes[rank].pid)
        for each in [*process.children(recursive=True), process]:
            each.send_signal(number)

    def wait(self, ranks: tuple[int, ...] | None = None, seconds: float = TIMEOUT) -> Outcome:
        """Waits until some ranks end, all by default; kills the others.

        Raises:
            TimeoutError: they did not end in time; contains their output.
        """
        deadline = time.monotonic() + seconds
        waited_for = [process for rank, process in enumerate(self._processes) if ranks is None or rank in ranks]
        for process in waited_for:
            process.join(max(0.0, deadline - time.monotonic()))
        elapsed = time.monotonic() - self._start_time
        late = [process.pid for process in waited_for if process.exitcode is None]
        for process in self._processes:
            if process.exitcode is None:
                process.kill()
                process.join()
        output = "".join(log.read_text(errors="replace") for log in self._logs)
        if late:
            raise TimeoutError(output)
        return Outcome([process.exitcode or 0 for process in self._processes], output, elapsed)

    def end(self) -> None:
        """Kills all ranks that still run."""
        for process in self._processes:
            if process.exitcode is None:
                process.kill()
                process.join()

    def go(self, *events: At, **options: Any) -> Outcome:
        """Starts the job with the options of :meth:`start`, and waits."""
        return self.start(*events, **options).wait()

    def until_step(self, step: int) -> None:
        """Waits for the metrics of a step."""
        deadline = time.monotonic() + TIMEOUT
        while not any(line.get("step", 0) >= step for line in self.metrics()):
            assert time.monotonic() < deadline, "no such step"
            time.sleep(0.02)

    def metrics(self) -> list[dict[str, Any]]:
        """The complete lines of ``metrics.jsonl``."""
        path = self.run / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def checkpoints(self) -> list[Path]:
        """Checkpoints under their final names, oldest first."""
        return sorted((self.run / "checkpoints").glob("step*"))

    def result(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The exported weights and all metrics of the run, without measured times."""
        lines = [{name: line[name] for name in line if name not in CLOCKS} for line in self.metrics()]
        return load_file(self.run / "model.safetensors"), lines


def config(folder: Path) -> dict[str, Any]:
    """A small run of :data:`STEPS` steps with real components."""
    tree = tiny.write_config(folder, epochs=3, learning_rate=1e-4, checkpoint_every=2, keep_last=2)
    tree["objective"] = {"weight": 1.0}
    # For one, two and three ranks.
    tree["data"]["target"]["batch_size"], tree["data"]["reference"]["batch_size"] = 12, 6
    return tree


def _run_rank(environment: dict[str, str], arguments: list[str], log: Path, events: list[At]) -> None:
    """One rank, as the launcher would start it."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    begin()
    import torch

    from dive_fast.commands import train

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
    # The kernels have separate tests; interpreted, they would take most of the time of these.
    Part.backend = "torch"
    for at in events:
        _install(at)
    code = train.main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    # As an ordinary process: the exit of multiprocessing's processes waits for other things.
    os._exit(code)


def _install(at: At) -> None:
    """Installs an event at its point."""
    if ":" not in at.place:
        phase, number = at.place.split()

        def reached(of: Any, step: int, reached_phase: str, **named: Any) -> bool:
            return (step, reached_phase) == (int(number), phase)

        _wrap("dive_fast.fault_tolerance.heartbeat:Watch.set_phase", at.event, reached)
        return
    calls = iter(range(1, 1_000_000))

    def due(*arguments: Any, **named: Any) -> bool:
        return at.call <= next(calls) <= (at.until or at.call)

    _wrap(at.place, at.event, due)


def _wrap(place: str, event: str, when: Callable[..., bool]) -> None:
    module, _, name = place.partition(":")
    holder: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    function = getattr(holder, last)

    @functools.wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        if not when(*arguments, **named):
            return function(*arguments, **named)
        if event in EVENTS:
            with EVENTS[event](*arguments):
                return function(*arguments, **named)
        os.kill(os.getpid(), signal.Signals[event])
        return function(*arguments, **named)

    setattr(holder, last, wrapped)


@contextlib.contextmanager
def _hang(*arguments: Any) -> Iterator[None]:
    while True:
        time.sleep(1)
    yield


@contextlib.contextmanager
def _linger(*arguments: Any) -> Iterator[None]:
    time.sleep(3)
    yield


@contextlib.contextmanager
def _linger_long(*arguments: Any) -> Iterator[None]:
    time.sleep(heartbeat.GRACE_SECONDS + 3)
    yield


@contextlib.contextmanager
def _close_output(*arguments: Any) -> Iterator[None]:
    """The reader of the output has ended."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    yield


@contextlib.contextmanager
def _impatient(*arguments: Any) -> Iterator[None]:
    """Waits are reported after a second."""
    heartbeat.STALL_SECONDS = 1.0
    yield


@contextlib.contextmanager
def _fail(*arguments: Any) -> Iterator[None]:
    raise ZeroDivisionError("a bug of one rank")
    yield


@contextlib.contextmanager
def _data_missing(*arguments: Any) -> Iterator[None]:
    raise DataError("data.target: no tar there")
    yield


@contextlib.contextmanager
def _out_of_memory(*arguments: Any) -> Iterator[None]:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee documentation")
    yield


@contextlib.contextmanager
def _cuda_error(*arguments: Any) -> Iterator[None]:
    import torch

    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with ...")
    yield


def _disk_full(*arguments: Any) -> contextlib.AbstractContextManager[None]:
    """Files may only grow to the size of metrics and manifests."""
    return _files_up_to(100_000)


def _ten_bytes_left(metrics: Any) -> contextlib.AbstractContextManager[None]:
    return _files_up_to((metrics._run.folder / "metrics.jsonl").stat().st_size + 10)


@contextlib.contextmanager
def _files_up_to(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def _nan_images(engine: Any, batches: Any) -> Iterator[None]:
    batches.target.images.fill_(float("nan"))
    yield


@contextlib.contextmanager
def _overflow(engine: Any, batches: Any) -> Iterator[None]:
    """Sets a loss scale that overflows in fp32 too, in which this machine computes gradients."""
    engine.scale.value.fill_(2.0**127)
    yield


EVENTS: dict[str, Callable[..., Any]] = {
    "hangs": _hang,
    "lingers": _linger,
    "lingers long": _linger_long,
    "output closed": _close_output,
    "impatient": _impatient,
    "fails": _fail,
    "data missing": _data_missing,
    "out of memory": _out_of_memory,
    "CUDA error": _cuda_error,
    "disk full": _disk_full,
    "ten bytes left": _ten_bytes_left,
    "nan images": _nan_images,
    "overflow": _overflow,
}
"""Events other than signals; each gets the arguments of the function at whose call it happens."""
