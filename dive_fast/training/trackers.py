"""Experiment trackers of ``track``: TensorBoard, W&B, MLflow and trackio receive the lines of ``metrics.jsonl``.

Each client runs in a process of its own (:mod:`dive_fast.training.tracker_process`). Training never waits for it;
if it fails, this is reported in one line, and the run continues without it.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError
from dive_fast.training import tracker_process
from dive_fast.training.tracker_process import TrackedRun

FOLDER = "tracking"
"""Folder of the trackers' files inside the run folder."""
CLOSE_SECONDS = 60.0
"""Time for all trackers to finish at the end of a run."""
CHECK_SECONDS = 60.0
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny", "trackio": "trackio"}
"""Names of the trackers, which are those of their modules and of our extras, with those of their packages."""


def check_trackers(names: Sequence[str]) -> None:
    """Checks that the packages of trackers are installed, and that none of them would ask for a login.

    Raises:
        ConfigError: names the package or the command.
    """
    for name in names:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # the latter: a folder of this name, such as wandb's own files
            raise ConfigError(f"track: {name} needs the package {PACKAGES[name]}: pip install 'dive_fast[{name}]'")
    if "wandb" in names:
        with suppress(subprocess.TimeoutExpired):
            check = subprocess.run(
                _command("check"), capture_output=True, text=True, timeout=CHECK_SECONDS, stdin=subprocess.DEVNULL
            )
            if message := check.stdout.strip():
                raise ConfigError(f"track: {message}")


class Trackers:
    """The trackers of a run; only rank 0 has any. Nothing that happens to them ends the run."""

    def __init__(self, names: Sequence[str], folder: Path, run: str, ranks: Ranks) -> None:
        """Starts nothing yet.

        Args:
            folder: the run folder.
            run: id of the run, which stays when it resumes.
        """
        self._names, self._folder, self._run, self._ranks = names if ranks.is_main else (), folder, run, ranks
        self._processes: list[_Process] = []
        self._sent: set[tuple[int, str]] = set()
        """Steps and names of the metrics that were sent before the run resumed."""
        self._first_step = self._step = 0
        self._shown: dict[str, float] = {}
        """Values of the present step."""
        self._final: dict[str, float] = {}

    def start(self, step: int, kept: Iterable[str], logged: Iterable[str]) -> None:
        """Starts the clients; called after the run folder was claimed for this run.

        Args:
            step: step after which the run starts or resumes.
            kept: lines of ``metrics.jsonl`` that the run keeps, for trackers that do not know it yet.
            logged: its lines until now, which the other trackers have.
        """
        if not self._names:
            return
        self._first_step = self._step = step
        self._sent = {(line["step"], name) for line in map(json.loads, logged) for name in line}
        earlier = [json.loads(line) for line in kept]
        content = json.loads((self._folder / "config.json").read_text())
        machine = {key: content[key] for key in ("steps", "versions", "device", "ranks", "commit")}
        settings = flat(content["config"] | machine)
        name = self._folder.resolve().name
        for tracker in self._names:
            folder = self._folder / FOLDER / tracker
            is_known = folder.with_suffix(".json").is_file()
            run = TrackedRun(name, self._run, str(folder), settings, step, is_known)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                process = _Process(tracker, folder.with_suffix(".log"), is_known)
            except OSError as error:
                self._print(f"{tracker}: cannot be started: {error}; the run continues without it")
                continue
            self._processes.append(process)
            process.send(run)
            for line in () if is_known else earlier:
                values = {
                    metric: value for metric, value in line.items() if metric != "step" and value is not None
                }
                process.send((line["step"], values), is_event=True)
        keeping = [process.name for process in self._processes if process.is_known and not process.rewinds]
        if keeping and (last := max((sent for sent, _ in self._sent), default=0)) > step:
            self._print(f"{', '.join(keeping)}: cannot rewind: the values of steps {step + 1} to {last} stay")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends metrics of a step, except those that a tracker has."""
        if step > self._step:
            self._step, self._shown = step, {}
        # The results at the end repeat those of an evaluation after the last step.
        values = {name: value for name, value in values.items() if self._shown.get(name) != value}
        self._shown |= values
        for process in self._processes:
            is_new = not process.is_known or (process.rewinds and step > self._first_step)
            new = {name: value for name, value in values.items() if is_new or (step, name) not in self._sent}
            if new:
                process.send((step, new), is_event=True)
            for message in process.messages():
                self._print(f"{process.name}: {message}")

    def summarize(self, final: Mapping[str, float]) -> None:
        """Keeps the metrics of the exported weights until :meth:`close`."""
        self._final = dict(final)

    def close(self, state: str) -> None:
        """Ends the run in all trackers, and waits for them for a limited time.

        Args:
            state: ``finished``, ``stopped`` or ``failed``.
        """
        for process in self._processes:
            process.send((self._step, self._final if state == "finished" else {}, state))
        deadline = time.monotonic() + CLOSE_SECONDS
        for process in self._processes:
            for message in process.finish(deadline):
                self._print(f"{process.name}: {message}")
        self._processes = []

    def _print(self, text: str) -> None:
        self._ranks.print(f"track: {text}")


class _Process:
    """The process of one tracker; its pipe is written without waiting."""

    def __init__(self, name: str, log: Path, is_known: bool) -> None:
        """Starts it.

        Raises:
            OSError: it cannot be started.
        """
        self.name, self.is_known, self.rewinds, self._log = name, is_known, name == "tensorboard", log
        self._events, self._failed = 0, False
        self._received: int | None = None
        """Events that the client received before it failed."""
        self._waiting, self._replies = bytearray(), bytearray()
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                _command(name),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,  # without the signals that a terminal sends
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._input, False)
        os.set_blocking(self._output, False)

    def send(self, message: Sequence[Any], is_event: bool = False) -> None:
        """Sends a message once the process reads it.

        Args:
            is_event: whether it counts as a line of metrics.
        """
        self._events += is_event
        if not self._failed:
            self._waiting += f"{json.dumps(message)}\n".encode()
            self._write()

    def messages(self) -> Iterator[str]:
        """Yields what has happened since the last call, without waiting."""
        exit_code = self._process.poll()  # before the last replies are read
        with suppress(BlockingIOError):
            while content := os.read(self._output, 1 << 16):
                self._replies += content
        *lines, rest = self._replies.split(b"\n")
        self._replies = bytearray(rest)
        for line in lines:
            reply = json.loads(line)
            yield self._fail(reply["error"], reply["events"]) if "error" in reply else str(reply["at"])
        if exit_code and not self._failed:
            yield self._fail(f"its process ended with exit code {exit_code}", self._events)

    def finish(self, deadline: float) -> Iterator[str]:
        """Waits until the process has received everything and has ended; yields messages.

        Args:
            deadline: on the clock of ``time.monotonic``.
        """
        while self._waiting and self._process.poll() is None and (left := deadline - time.monotonic()) > 0:
            select.select([], [self._input], [], min(left, 1.0))
            self._write()
        try:
            self._process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            yield f"did not finish within {CLOSE_SECONDS:.0f} s and was ended; see {self._log}"
            self._failed = True
        yield from self.messages()
        if self._missed:
            yield f"misses {self._missed} of the lines that metrics.jsonl has"
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(OSError):
                stream.close()

    def _fail(self, reason: str, received: int) -> str:
        self._failed, self._received = True, received
        self._waiting.clear()
        return f"{reason}; the run continues without it (log: {self._log})"

    @property
    def _missed(self) -> int:
        """Events that a tracker that failed did not receive."""
        return 0 if self._received is None else self._events - self._received

    def _write(self) -> None:
        with suppress(BlockingIOError, BrokenPipeError):
            while self._waiting:
                del self._waiting[: os.write(self._input, self._waiting[: 1 << 16])]


def _command(argument: str) -> list[str]:
    # Without the working folder on the path, which may hold a folder "wandb".
    return [sys.executable, "-P", "-m", tracker_process.__name__, argument]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a tree by dotted key; lists and empty objects as JSON."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list | Mapping) else value
    return values
