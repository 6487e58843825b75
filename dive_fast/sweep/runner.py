"""Runs the runs of a sweep, each in a process of its own, one after the other."""

import json
import logging
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from dive_fast.errors import one_line
from dive_fast.fault_tolerance.heartbeat import STOPPED
from dive_fast.io.atomic_files import write_atomic
from dive_fast.io.safe_read import read_json
from dive_fast.sweep.grid import Planned
from dive_fast.sweep.run_results import REPORT
from dive_fast.training.measurements import FILE as MEASUREMENTS

logger = logging.getLogger(__name__)

LOG, RECORD = "log.txt", "sweep_record.json"
"""A run's output, and the record of its end, in its folder."""
SIGNALS = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,
}
"""Signals that stop a sweep, and the one that the run gets for each."""
LAST_BYTES = 65536
"""Bytes at the end of a log in which its last line is searched."""


class Outcome(NamedTuple):
    """The end of a run."""

    is_finished: bool
    seconds: float | None = None
    """Time of the run; None: unknown."""
    error: str = ""
    """The reason of a failure, with the last line of the log."""
    was_finished: bool = False
    """Whether the run had finished before, so that it was not started."""


class Interrupted(Exception):  # noqa: N818 - not an error
    """The sweep was asked to stop; the run has saved what it can."""


class Runner:
    """Runs training commands; a signal is passed on to the present run, and ends the sweep after it."""

    def __init__(self, command: Callable[[Sequence[str]], list[str]], environment: dict[str, str]) -> None:
        """Starts nothing.

        Args:
            command: the command line that trains with the overrides that it is called with.
            environment: environment of the runs.
        """
        self._command, self._environment = command, environment
        self._measured: Path | None = None
        """Measurements of a finished run, of which those of the pre-trained model are the same for other runs."""
        self._process: subprocess.Popen[bytes] | None = None
        self._signal: int | None = None

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Passes signals inside on to the run; a signal that was ignored before stays so."""
        ignored = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN]
        previous = {number: signal.signal(number, self._pass_on) for number in SIGNALS if number not in ignored}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if self._process is not None and self._process.poll() is None:
            # The run has its own session, so that Ctrl-C in a terminal reaches it only here, and once.
            os.killpg(self._process.pid, SIGNALS[signal.Signals(number)])

    def run(self, run: Planned, folder: Path, again: bool = False) -> Outcome:
        """Runs one run, unless its record says that it has finished with the same settings.

        Args:
            again: start a finished run too: it compares the contents of its data and model with those of the
                command, and reports that it is complete.

        Raises:
            Interrupted: the sweep or the run was asked to stop.
        """
        if self._signal is not None:
            raise Interrupted
        if not again and (seconds := finished_seconds(run, folder)) is not None:
            self._measured = folder / MEASUREMENTS
            return Outcome(True, seconds, was_finished=True)
        folder.mkdir(parents=True, exist_ok=True)
        self._copy_measurements(folder)
        before, earlier = _read_record(folder), _earlier_seconds(run, folder)
        started = time.monotonic()
        code, start = self._train(run, folder)
        seconds = earlier + time.monotonic() - started
        if code == 0 and (folder / REPORT).is_file():
            self._measured = folder / MEASUREMENTS
            if before.get("report") == _report_digest(folder):  # it was complete
                seconds = _seconds(before)
            _write_record(run, folder, seconds, is_finished=True)
            return Outcome(True, seconds)
        _write_record(run, folder, seconds, is_finished=False)
        if self._signal is not None or code == STOPPED:
            raise Interrupted
        reason = "no report was written" if code == 0 else f"exit code {code}"
        return Outcome(False, seconds, f"{reason}: {last_line(folder / LOG, start)}")

    def _copy_measurements(self, folder: Path) -> None:
        """Copies the measurements of a finished run, which a run uses only where their identities are its own."""
        if self._measured is None or (folder / MEASUREMENTS).exists():
            return
        try:
            write_atomic(folder / MEASUREMENTS, self._measured.read_bytes())
        except OSError as error:
            logger.warning("%s: cannot copy %s: %s; the run measures again", folder, self._measured, error)

    def _train(self, run: Planned, folder: Path) -> tuple[int, int]:
        """The exit code of a run, and the size of its log before it."""
        command = self._command(run.overrides)
        with (folder / LOG).open("ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            start = log.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
            if self._signal is not None:  # it came while the process was starting
                self._pass_on(self._signal, None)
            return self._process.wait(), start


def finished_seconds(run: Planned, folder: Path) -> float | None:
    """The time of a run that has finished with these settings and whose report is unchanged; None otherwise."""
    record = _read_record(folder)
    if record.get("settings") != run.settings or record.get("report") != _report_digest(folder):
        return None
    return _seconds(record) if record.get("report") is not None else None


def _earlier_seconds(run: Planned, folder: Path) -> float:
    """The time that interrupted starts of this run have taken."""
    record = _read_record(folder)
    return _seconds(record) if record.get("settings") == run.settings and record.get("report") is None else 0.0


def _seconds(record: dict[str, object]) -> float:
    seconds = record.get("seconds")
    return float(seconds) if isinstance(seconds, int | float) else 0.0


def _read_record(folder: Path) -> dict[str, object]:
    try:
        record = read_json(folder / RECORD)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _write_record(run: Planned, folder: Path, seconds: float, is_finished: bool) -> None:
    record = {
        "settings": run.settings,
        "report": _report_digest(folder) if is_finished else None,
        "seconds": round(seconds, 1),
    }
    try:
        write_atomic(folder / RECORD, (json.dumps(record) + "\n").encode())
    except OSError as error:
        logger.warning("cannot write %s: %s; the run is started again to resume", folder / RECORD, error)


def _report_digest(folder: Path) -> str | None:
    try:
        return sha256((folder / REPORT).read_bytes()).hexdigest()
    except OSError:
        return None


def last_line(log: Path, start: int = 0) -> str:
    """The last line of a log that is not empty.

    Args:
        start: bytes of earlier runs, which are not read.
    """
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - LAST_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return "no log"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return one_line(lines[-1]) if lines else "no output"
