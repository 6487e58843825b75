"""Supervision of the training loop: stop requests, lost ranks, stalled ranks, missing data.

Once a second each rank publishes a heartbeat with its step and phase in the store of the process group. So a rank
knows why a collective fails or never ends, which the collective itself does not tell. A collective cannot be
interrupted either: where one never ends, the process exits at once with code :data:`LOST`. Finished checkpoints
are kept.
"""

import faulthandler
import itertools
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple

import psutil
import torch.distributed.distributed_c10d as c10d

from dive_fast.distributed import Ranks
from dive_fast.errors import AllRanksError, machine_error
from dive_fast.waiting import report

STOPPED, LOST = 75, 76
"""Exit codes after which the same command resumes: the run was asked to stop; a rank failed, died or hangs."""
RESTART = "restart the same command to resume"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
Phase = Literal["start", "data", "step", "checkpoint", "evaluation", "end"]
ACTIVITIES: dict[Phase, str] = {
    "start": "starting",
    "data": "waiting for the batch of",
    "step": "in",
    "checkpoint": "saving after",
    "evaluation": "evaluating after",
    "end": "ending after",
}
"""Description of each phase, which the number of the step follows."""
ORDER = tuple(ACTIVITIES)
TIMED = ("data", "step")
"""Phases that a rank must complete within the timeout; the others may take any time."""
STALLS: dict[Phase, str] = {
    "data": "the batch of step {}: the loader or the storage that it reads delivers none",
    "step": "the end of step {}",
    "checkpoint": "the checkpoint of step {} or the one before it: the storage of some rank does not accept it",
}
"""Description of what a rank waits for in a phase, for reports of long waits."""
HEARTBEAT_SECONDS = 1.0
"""Interval between heartbeats."""
SILENCE_SECONDS = 60.0
"""Time without a heartbeat after which a rank counts as dead."""
STALL_SECONDS = 30.0
"""Time after which a wait is reported."""
GRACE_SECONDS = 3.0
"""Time for a rank to end by itself, with a more precise message, once the failure of another one is known."""
BATCH_PATIENCE_SECONDS = 2.0
"""Once a run is asked to stop: how long ranks wait for a batch before they agree to save without it."""
STEP_PATIENCE_SECONDS = 20.0
"""Once a run is asked to stop: time without a step after which a rank exits without saving; at least three times
the duration of the longest step."""

_RUN_NUMBERS = itertools.count()
"""Numbers of the runs of this process group, so that keys in the store belong to one run."""


class LostError(Exception):
    """Another rank failed, died or hangs; the one-line message names the rank and its step."""

    def __init__(self, message: str, code: int = LOST) -> None:
        """Stores the exit code: 1 where the same command would fail again in the same way."""
        super().__init__(message)
        self.code = code


class _Received(NamedTuple):
    """The newest heartbeat of another rank, and when it arrived by this rank's clock."""

    beat: dict[str, Any]
    time: float


class Watch:
    """Supervises the loop of one rank, as a context manager; every rank has one."""

    def __init__(self, ranks: Ranks, timeout: float) -> None:
        """Sets the initial state; nothing runs before the context is entered.

        Args:
            timeout: ``train.rank_timeout`` in seconds.
        """
        self._ranks, self._timeout = ranks, timeout
        self._interval = min(HEARTBEAT_SECONDS, timeout / 4)
        self._max_silence = min(SILENCE_SECONDS, timeout)
        self._step, self._phase, self._phase_start = 0, ORDER[0], time.monotonic()
        self._longest_phase = 0.0
        self._stall_reports = 0
        self._is_saved = True  # there is nothing to lose yet
        self._stop_reason: str | None = None
        self._stop_time: float | None = None
        self._stop_announced = threading.Event()
        self._handles_signals = self._was_signalled = False
        self._failure: str | None = None
        self._is_permanent = False
        self._has_left = False
        self._verdict: str | None = None
        self._verdict_ready = threading.Event()
        self._exit_code = LOST
        self._expects_failure = False
        self._received: dict[int, _Received] = {}
        self._last_answer = time.monotonic()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._launcher = _launcher_processes()

    def __enter__(self) -> "Watch":
        """Starts the threads; all ranks enter together."""
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        targets: list[Callable[[], None]] = [self._monitor_loop]
        if self._ranks.world_size > 1:
            self._store = c10d.PrefixStore(f"watch/{next(_RUN_NUMBERS)}", _store_connection())
            self._publish()
            self._ranks.barrier()
            targets.append(self._heartbeat_loop)
        for target in targets:
            thread = threading.Thread(target=target, name="watch", daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Publishes how this rank has ended."""
        if error is not None and not isinstance(error, (LostError, AllRanksError)):
            meaning = machine_error(error) if isinstance(error, Exception) else None
            self._failure = (
                f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                if meaning is None
                else str(meaning)
            )
            # A scheduler should not restart a run that does not fit the machine.
            self._is_permanent = meaning is not None
        self._closed.set()
        os.write(self._writing, bytes(1))
        for thread in self._threads:
            thread.join(timeout=2 * self._interval)
        if not any(thread.is_alive() for thread in self._threads):
            os.close(self._reading)
            os.close(self._writing)

    def set_phase(self, step: int, phase: Phase, *, is_saved: bool = False) -> None:
        """Records the position of the loop.

        Args:
            step: the current step in the phases ``data`` and ``step``, otherwise the last completed one.
            is_saved: the process may exit at any moment of this phase without losing anything.
        """
        now = time.monotonic()
        if self._phase in TIMED:
            self._longest_phase = max(self._longest_phase, now - self._phase_start)
        self._step, self._phase, self._phase_start, self._stall_reports = step, phase, now, 0
        self._is_saved = is_saved

    @property
    def stop_reason(self) -> str | None:
        """Why the run has to save and stop, for example the name of a signal to any rank; None if it has not."""
        return self._stop_reason

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Signals inside request a stop, which the loop obeys at its next step; a second Ctrl-C exits at once.

        Where there is nothing to lose (before the first step, during an evaluation with a checkpoint) and where no
        step ends any more, the process exits at once, even if its main thread is blocked.
        """
        # The interpreter writes to the pipe at once, even if the main thread is inside a collective.
        previous_pipe = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        previous = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
        self._handles_signals = True
        try:
            yield
        finally:
            self._handles_signals = False
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous_pipe)

    def should_leave(self, step: int, wait: Callable[[float], bool]) -> bool:
        """Waits for the batch of a step; True if no batch arrives while the run is asked to stop.

        The result is equal on all ranks: a rank that has promised to leave before a step makes the step only if
        another rank has started it, which therefore never promised. If all ranks have promised, all leave.

        Args:
            wait: waits up to the given number of seconds; returns whether the batch has arrived.
        """
        if wait(self._interval):
            return False
        start, has_promised = time.monotonic(), False
        while True:
            if wait(self._interval / 4):
                if not has_promised or self._others_started(step):
                    return False
                time.sleep(self._interval / 4)
            if self._stop_reason is None or time.monotonic() - start < BATCH_PATIENCE_SECONDS:
                continue
            if self._ranks.world_size == 1:
                return True
            promises = [f"leaves/{step}/{rank}" for rank in range(self._ranks.world_size)]
            with suppress(RuntimeError):  # the monitor thread handles a store that does not answer
                if not has_promised:
                    self._store.set(promises[self._ranks.rank], "")
                    has_promised = True
                if self._store.check(promises):
                    return True

    def _others_started(self, step: int) -> bool:
        """Whether another rank has started this step or is past it."""
        beats = [received.beat for received in dict(self._received).values()]
        return any((beat["step"], ORDER.index(beat["phase"])) >= (step, ORDER.index("step")) for beat in beats)

    def find_cause(self) -> LostError | None:
        """The rank that made a collective fail here, if one is found within some seconds."""
        if self._ranks.world_size == 1:
            return None
        self._expects_failure = True
        self._verdict_ready.wait(timeout=8 * self._interval)
        return None if self._verdict is None else LostError(self._verdict, self._exit_code)

    def _heartbeat_loop(self) -> None:
        """Exchanges heartbeats, in a thread of its own: a store behind a broken network blocks."""
        while True:
            is_last = self._closed.is_set()
            try:
                self._publish()
                if is_last:
                    return
                self._receive()
            except RuntimeError:
                # The connection is lost for good, and torch prints a page at each further use. The monitor thread
                # notices that there are no answers.
                return
            self._closed.wait(self._interval)

    def _publish(self) -> None:
        """Publishes the heartbeat of this rank."""
        beat = {
            "count": time.monotonic_ns(),
            "host": socket.gethostname(),
            "step": self._step,
            "phase": self._phase,
            "failure": self._failure,
            "is_permanent": self._is_permanent,
            "has_left": self._has_left,
            "is_closed": self._closed.is_set(),
        }
        self._store.set(str(self._ranks.rank), json.dumps(beat))

    def _receive(self) -> None:
        """Reads the heartbeats of all other ranks, and exchanges the request to stop."""
        others = [rank for rank in range(self._ranks.world_size) if rank != self._ranks.rank]
        beats = self._store.multi_get([str(rank) for rank in others])
        if self._stop_reason is not None:
            self._store.set("stop", self._stop_reason)
            self._stop_announced.set()
        elif self._store.check(["stop"]):
            self._stop_reason, self._stop_time = self._store.get("stop").decode(), time.monotonic()
        now = self._last_answer = time.monotonic()
        for rank, beat in zip(others, map(json.loads, beats), strict=True):
            if rank not in self._received or self._received[rank].beat["count"] != beat["count"]:
                self._received[rank] = _Received(beat, now)

    def _monitor_loop(self) -> None:
        """Checks for stop requests, stalls and lost ranks, once per heartbeat interval."""
        verdict: str | None = None
        while not self._closed.is_set():
            self._handle_signals()
            self._check_launcher()
            if self._stop_reason is not None and self._is_saved:
                # An evaluation or the start may take long. The other ranks leave theirs too.
                if self._ranks.world_size > 1:
                    self._stop_announced.wait(2 * self._interval)
                if not self._is_saved:
                    continue  # the phase has ended meanwhile, and the loop obeys the request
                self._leave(f"{self._stop_reason}: exited while {self._activity()}; {RESTART}", STOPPED)
            if self._is_stuck():
                line = f"{self._stop_reason}: exited without saving, because no step ends: {self._activity()}"
                self._leave(f"{line}; {RESTART}", STOPPED)
            self._report_stall()
            if (verdict := self._lost_rank()) is not None:
                break
        if verdict is None:
            return
        self._verdict = verdict
        self._verdict_ready.set()
        if not self._closed.wait(GRACE_SECONDS):
            self._leave(f"error: {verdict}", self._exit_code)

    def _is_stuck(self) -> bool:
        """Whether the run is asked to stop but makes no step after which it could."""
        if self._stop_time is None or self._phase not in TIMED:
            return False
        patience = max(STEP_PATIENCE_SECONDS, 3 * self._longest_phase)
        return time.monotonic() - max(self._stop_time, self._phase_start) > patience

    def _activity(self) -> str:
        return _describe(self._step, self._phase)

    def _handle_signals(self) -> None:
        """Waits for one heartbeat interval, or until a signal arrives."""
        ready, _, _ = select.select([self._reading], [], [], self._interval)
        for number in os.read(self._reading, 64) if ready else b"":
            if number not in STOP_SIGNALS:
                continue
            # One Ctrl-C may reach the ranks one after the other, so a request from another rank does not count
            # here.
            if number == signal.SIGINT and self._was_signalled:
                self._leave("interrupted again: exited without saving", 130)
            self._was_signalled = True
            self._request_stop(signal.Signals(number).name)

    def _request_stop(self, reason: str) -> None:
        if self._stop_reason is None:
            self._stop_reason, self._stop_time = reason, time.monotonic()
            report(f"{reason}: rank {self._ranks.rank} requests to save and stop")

    def _check_launcher(self) -> None:
        # A launcher that was killed, or whose terminal was closed, has sent no signal.
        if self._handles_signals and self._stop_reason is None and self._launcher != _launcher_processes():
            self._request_stop("the launcher has ended")

    def _report_stall(self) -> None:
        waited, description = time.monotonic() - self._phase_start, STALLS.get(self._phase)
        if description is None or waited <= STALL_SECONDS * 2**self._stall_reports:
            return
        self._stall_reports += 1
        cause = description.format(self._step)
        if self._phase == "step" and (behind := self._ranks_behind()):
            cause += f"; not there yet: {behind}"
        report(f"rank {self._ranks.rank} has waited {waited:.0f} s for {cause}")

    def _ranks_behind(self) -> str:
        """The ranks that have not reached this step yet, and what they do."""
        position = self._step, ORDER.index("step")
        beats = {rank: received.beat for rank, received in dict(self._received).items()}
        late = [rank for rank, beat in beats.items() if (beat["step"], ORDER.index(beat["phase"])) < position]
        return ", ".join(f"rank {rank} {_describe_beat(beats[rank])}" for rank in late)

    def _lost_rank(self) -> str | None:
        """The verdict on a rank that failed, died or hangs, for messages; None if there is none."""
        now = time.monotonic()
        if self._ranks.world_size == 1:
            if self._phase not in TIMED or now - self._phase_start < self._timeout:
                return None
            faulthandler.dump_traceback(all_threads=True)
            return f"no step for {now - self._phase_start:.0f} s (train.rank_timeout): {self._activity()}"
        max_silence = 5 * self._interval if self._expects_failure else self._max_silence
        if now - self._last_answer > max_silence:
            silence = now - self._last_answer
            return f"rank 0, which hosts the store of all ranks, has not answered for {silence:.0f} s"
        received = dict(self._received)  # the other thread adds to it
        for rank, (beat, received_at) in received.items():
            where = f"rank {rank} on {beat['host']}"
            if beat["has_left"]:
                self._exit_code = STOPPED
                return f"{where} was asked to stop and exited {_describe_beat(beat)}"
            if beat["failure"] is not None:
                self._exit_code = 1 if beat["is_permanent"] else LOST
                return f"{where} failed {_describe_beat(beat)}: {beat['failure']}"
            if now - received_at > max_silence and not beat["is_closed"]:
                return f"{where} sent no heartbeat for {now - received_at:.0f} s; it was {_describe_beat(beat)}"
        if self._phase not in TIMED or now - self._phase_start < self._timeout:
            return None
        # No step is made here: the ranks that are behind all others keep them waiting.
        positions = {rank: (beat["step"], ORDER.index(beat["phase"])) for rank, (beat, _) in received.items()}
        own_position = self._step, ORDER.index(self._phase)
        earliest = min([own_position, *positions.values()])
        if earliest == own_position:
            # Where exactly this rank hangs, which no other rank can tell.
            faulthandler.dump_traceback(all_threads=True)
        step, phase = earliest[0], ORDER[earliest[1]]
        if phase not in TIMED:
            return None
        positions[self._ranks.rank] = own_position
        behind = sorted(rank for rank, position in positions.items() if position == earliest)
        named = "all ranks" if len(behind) == len(positions) else "rank " + ", ".join(map(str, behind))
        waited = now - self._phase_start
        return f"no step for {waited:.0f} s (train.rank_timeout): {named} {_describe(step, phase)}"

    def _leave(self, line: str, code: int) -> None:
        """Ends the process, even if its main thread is inside a collective."""
        if code == STOPPED and self._ranks.world_size > 1:
            # Otherwise the other ranks would report this one as dead.
            self._has_left = True
            time.sleep(1.5 * self._interval)
        try:
            report(f"rank {self._ranks.rank}: {line}")
            with suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
        finally:
            os._exit(code)


def _describe(step: int, phase: Phase) -> str:
    return ACTIVITIES[phase] if phase == "start" else f"{ACTIVITIES[phase]} step {step}"


def _describe_beat(beat: dict[str, Any]) -> str:
    return _describe(beat["step"], beat["phase"])


def _store_connection() -> Any:
    """A connection of its own to the process group's store: a client blocks while another thread waits on it."""
    store = c10d._get_default_store()
    return store.clone() if hasattr(store, "clone") else store


def _launcher_processes() -> tuple[int, ...]:
    """The processes whose end must end this one: torchrun, or DeepSpeed's launcher and its parent."""
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return (parent,)
    with suppress(psutil.Error):
        process = psutil.Process(parent)
        if "deepspeed.launcher.launch" in process.cmdline():
            return parent, process.ppid()
    return ()
