"""A thread that watches over the loop: requests to stop, lost ranks, ranks that hang, data that does not come.

Each rank tells the others through the store of the process group, once a second, that it lives and where it is. So
a rank knows why a collective fails, or never ends, which the collective itself does not. It cannot be interrupted
either: where one never ends, the process is left at once, with exit code :data:`LOST`. What is whole stays.
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
"""Exit codes. The run was saved and left because it was asked to be: start it again, it goes on. Another rank
failed, died or hangs: start it again, it goes on from its newest checkpoint."""
AGAIN = "restart the same command to resume"
REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
Phase = Literal["start", "data", "step", "checkpoint", "evaluation", "end"]
DOING: dict[Phase, str] = {
    "start": "starting",
    "data": "waiting for the batch of",
    "step": "in",
    "checkpoint": "saving after",
    "evaluation": "evaluating after",
    "end": "ending after",
}
ORDER = tuple(DOING)
TIMED = ("data", "step")
"""Phases that a rank must get through within the timeout; the others take what they take."""
STALLED: dict[Phase, str] = {
    "data": "the batch of step {}: the loader, or the storage that it reads, gives none",
    "step": "the end of step {}",
    "checkpoint": "the checkpoint of step {}, or that before it: some rank's storage takes none",
}
"""What a rank may wait for too long."""
BEAT, SILENCE, STALL, GRACE = 1.0, 60.0, 30.0, 3.0
"""Seconds: between signs of life; without one until a rank counts as dead; of waiting until it is said; that a
rank has to end by itself, with a better message, once another one's failure is known."""
HURRY, PATIENCE = 2.0, 20.0
"""Seconds, once a run is asked to stop: of waiting for a batch until ranks agree to save without it; of no step
until a rank is left without saving. Steps that take longer get three times what the longest took."""

NUMBERS = itertools.count()
"""Of the runs of this process group: what was said in one is not of the next."""


class LostError(Exception):
    """Another rank failed, died or hangs; the message names it and its step, in one line."""

    def __init__(self, message: str, code: int = LOST) -> None:
        """Keeps the exit code: 1 where the same command would fail in the same way again."""
        super().__init__(message)
        self.code = code


class _Seen(NamedTuple):
    """What is known of a rank, and since when by this rank's clock."""

    sign: dict[str, Any]
    since: float


class Watch:
    """Over one rank's loop, as a context manager; every rank has one."""

    def __init__(self, ranks: Ranks, timeout: float) -> None:
        """Does nothing before it is entered.

        Args:
            timeout: seconds, ``train.rank_timeout``.
        """
        self._ranks, self._timeout = ranks, timeout
        self._beat = min(BEAT, timeout / 4)
        self._silence = min(SILENCE, timeout)
        self._step, self._phase, self._since = 0, ORDER[0], time.monotonic()
        self._requested: str | None = None
        self._fault: str | None = None
        self._verdict: str | None = None
        self._suspicious = False
        self._closed = threading.Event()
        self._judged = threading.Event()
        self._threads: list[threading.Thread] = []
        self._seen: dict[int, _Seen] = {}
        self._moved = self._answered = time.monotonic()
        self._stalls = 0
        self._is_saved = True  # there is nothing to lose yet
        self._longest = 0.0
        self._asked_at: float | None = None
        self._code = LOST
        self._is_hopeless = self._has_left = False
        self._taking = False
        self._is_asked = False
        self._told = threading.Event()
        self._ancestors = _launcher()

    def __enter__(self) -> "Watch":
        """Starts the threads; all ranks enter together."""
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        targets: list[Callable[[], None]] = [self._monitor_loop]
        if self._ranks.world_size > 1:
            self._store = c10d.PrefixStore(f"watch/{next(NUMBERS)}", _own_connection())
            self._say_where()
            self._ranks.barrier()
            targets.append(self._heartbeat_loop)
        for target in targets:
            thread = threading.Thread(target=target, name="watch", daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Tells the other ranks how this one has ended."""
        if error is not None and not isinstance(error, (LostError, AllRanksError)):
            meaning = machine_error(error) if isinstance(error, Exception) else None
            self._fault = (
                f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                if meaning is None
                else str(meaning)
            )
            # A scheduler need not start again what cannot fit.
            self._is_hopeless = meaning is not None
        self._closed.set()
        os.write(self._writing, bytes(1))
        for thread in self._threads:
            thread.join(timeout=2 * self._beat)
        if not any(thread.is_alive() for thread in self._threads):
            os.close(self._reading)
            os.close(self._writing)

    def set_phase(self, step: int, phase: Phase, *, is_saved: bool = False) -> None:
        """The loop says where it is, ``step`` being the one it is at, or has done.

        Args:
            is_saved: nothing is lost if the run is left here, at any moment.
        """
        now = time.monotonic()
        if self._phase in TIMED:
            self._longest = max(self._longest, now - self._since)
        self._step, self._phase, self._since, self._stalls = step, phase, now, 0
        self._is_saved = is_saved

    @property
    def stop_reason(self) -> str | None:
        """Why the run is to be saved and left: the name of a signal to any rank, say; None: it is not."""
        return self._requested

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Signals inside ask for a stop, which the loop obeys at its next step; a second Ctrl-C ends at once.

        Where there is nothing to lose (before the first step, during an evaluation whose checkpoint is there), and
        where no step ends any more, the process is left at once, whatever its main thread waits in.
        """
        # The interpreter writes to it at once, though its main thread be inside a collective.
        former_pipe = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        former = {number: signal.signal(number, lambda *_: None) for number in REQUESTS}
        self._taking = True
        try:
            yield
        finally:
            self._taking = False
            for number, handler in former.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(former_pipe)

    def should_leave(self, step: int, wait: Callable[[float], bool]) -> bool:
        """Waits for the batch of a step. True: none comes while the run is asked to stop, so it is left before it.

        Alike on all ranks: one that has promised to leave before a step makes it only if another one has begun it,
        which therefore never promised. If all have promised, all leave.

        Args:
            wait: waits for so many seconds at most; returns whether the batch is there.
        """
        if wait(self._beat):
            return False
        begun, promised = time.monotonic(), False
        while True:
            if wait(self._beat / 4):
                if not promised or self._has_begun(step):
                    return False
                time.sleep(self._beat / 4)
            if self._requested is None or time.monotonic() - begun < HURRY:
                continue
            if self._ranks.world_size == 1:
                return True
            names = [f"leaves/{step}/{rank}" for rank in range(self._ranks.world_size)]
            with suppress(RuntimeError):  # the other thread judges that the store does not answer
                if not promised:
                    self._store.set(names[self._ranks.rank], "")
                    promised = True
                if self._store.check(names):
                    return True

    def _has_begun(self, step: int) -> bool:
        """Whether another rank is in this step, or behind it."""
        signs = [seen.sign for seen in dict(self._seen).values()]
        return any((sign["step"], ORDER.index(sign["phase"])) >= (step, ORDER.index("step")) for sign in signs)

    def find_cause(self) -> LostError | None:
        """Which rank is to blame for a collective that has failed here, if any; waits some seconds to find out."""
        if self._ranks.world_size == 1:
            return None
        self._suspicious = True
        self._judged.wait(timeout=8 * self._beat)
        return None if self._verdict is None else LostError(self._verdict, self._code)

    def _heartbeat_loop(self) -> None:
        """Signs of life out and in; a thread of its own, since a store behind a broken network blocks."""
        others = [rank for rank in range(self._ranks.world_size) if rank != self._ranks.rank]
        while True:
            last = self._closed.is_set()
            try:
                self._say_where()
                if last:
                    return
                signs = self._store.multi_get([str(rank) for rank in others])
                if self._requested is not None:
                    self._store.set("stop", self._requested)
                    self._told.set()
                elif self._store.check(["stop"]):
                    self._requested, self._asked_at = self._store.get("stop").decode(), time.monotonic()
            except RuntimeError:
                # The connection is gone for good, and torch prints a page at each use of it. That there is no
                # answer any more is for the other thread to judge.
                return
            now = self._answered = time.monotonic()
            for rank, sign in zip(others, map(json.loads, signs), strict=True):
                if rank not in self._seen or self._seen[rank].sign["count"] != sign["count"]:
                    self._seen[rank] = _Seen(sign, now)
            self._closed.wait(self._beat)

    def _say_where(self) -> None:
        sign = {
            "count": time.monotonic_ns(),
            "host": socket.gethostname(),
            "step": self._step,
            "phase": self._phase,
            "fault": self._fault,
            "hopeless": self._is_hopeless,
            "left": self._has_left,
            "closed": self._closed.is_set(),
        }
        self._store.set(str(self._ranks.rank), json.dumps(sign))

    def _monitor_loop(self) -> None:
        """Looks, beat for beat, at all that may be amiss."""
        found: str | None = None
        while not self._closed.is_set():
            self._take_signals()
            self._check_launcher()
            if self._requested is not None and self._is_saved:
                # An evaluation may take long, and so may the start. The others leave theirs too.
                if self._ranks.world_size > 1:
                    self._told.wait(2 * self._beat)
                if not self._is_saved:
                    continue  # over meanwhile: the loop obeys
                self._leave(f"{self._requested}: left while {self._own_place()}; {AGAIN}", STOPPED)
            if self._is_stuck():
                line = f"{self._requested}: left without saving, since no step ends: {self._own_place()}; {AGAIN}"
                self._leave(line, STOPPED)
            self._report_stall()
            if (found := self._lost()) is not None:
                break
        if found is None:
            return
        self._verdict = found
        self._judged.set()
        if not self._closed.wait(GRACE):
            self._leave(f"error: {found}", self._code)

    def _is_stuck(self) -> bool:
        """Whether the run is asked to stop and makes no step after which it could."""
        if self._asked_at is None or self._phase not in TIMED:
            return False
        patience = max(PATIENCE, 3 * self._longest)
        return time.monotonic() - max(self._asked_at, self._since) > patience

    def _own_place(self) -> str:
        return _place({"step": self._step, "phase": self._phase})

    def _take_signals(self) -> None:
        """Waits for a beat, or until a signal comes."""
        ready, _, _ = select.select([self._reading], [], [], self._beat)
        for number in os.read(self._reading, 64) if ready else b"":
            if number not in REQUESTS:
                continue
            # One Ctrl-C may reach the ranks one after the other: what another one has heard does not count.
            if number == signal.SIGINT and self._is_asked:
                self._leave("interrupted again: left without saving", 130)
            self._is_asked = True
            self._request(signal.Signals(number).name)

    def _request(self, reason: str) -> None:
        if self._requested is None:
            self._requested, self._asked_at = reason, time.monotonic()
            report(f"{reason}: rank {self._ranks.rank} asks to save and stop")

    def _check_launcher(self) -> None:
        # A launcher that was killed, or a terminal with it, has sent no signal.
        if self._taking and self._requested is None and self._ancestors != _launcher():
            self._request("the launcher has gone")

    def _report_stall(self) -> None:
        waited, missed = time.monotonic() - self._since, STALLED.get(self._phase)
        if missed is None or waited <= STALL * 2**self._stalls:
            return
        self._stalls += 1
        said = missed.format(self._step)
        if self._phase == "step" and (behind := self._behind()):
            said += f"; behind it: {behind}"
        report(f"rank {self._ranks.rank} has waited {waited:.0f} s for {said}")

    def _behind(self) -> str:
        """The ranks that have not come to this step yet, and where they are."""
        own = self._step, ORDER.index("step")
        signs = {rank: seen.sign for rank, seen in dict(self._seen).items()}
        late = [rank for rank, sign in signs.items() if (sign["step"], ORDER.index(sign["phase"])) < own]
        return ", ".join(f"rank {rank} {_place(signs[rank])}" for rank in late)

    def _lost(self) -> str | None:
        """Whom this run has lost, and where; None: no one."""
        now = time.monotonic()
        if self._ranks.world_size == 1:
            if self._phase not in TIMED or now - self._since < self._timeout:
                return None
            faulthandler.dump_traceback(all_threads=True)
            return f"no step for {now - self._since:.0f} s (train.rank_timeout): {self._own_place()}"
        silence = 5 * self._beat if self._suspicious else self._silence
        if now - self._answered > silence:
            return f"rank 0, which all ranks talk through, has not answered for {now - self._answered:.0f} s"
        seen = dict(self._seen)  # the other thread adds to it
        for rank, (sign, since) in seen.items():
            where = f"rank {rank} on {sign['host']}"
            if sign["left"]:
                self._code = STOPPED
                return f"{where} was asked to stop, and has left {_place(sign)}"
            if sign["fault"] is not None:
                self._code = 1 if sign["hopeless"] else LOST
                return f"{where} failed {_place(sign)}: {sign['fault']}"
            if now - since > silence and not sign["closed"]:
                return f"{where} has not been heard of for {now - since:.0f} s; it was {_place(sign)}"
        if self._phase not in TIMED or now - self._since < self._timeout:
            return None
        # No step is made here: whoever is behind all others keeps them waiting.
        places = {rank: (sign["step"], ORDER.index(sign["phase"])) for rank, (sign, _) in seen.items()}
        own = self._step, ORDER.index(self._phase)
        first = min([own, *places.values()])
        if first == own:
            # The place of what hangs, which no other rank can tell.
            faulthandler.dump_traceback(all_threads=True)
        if ORDER[first[1]] not in TIMED:
            return None
        behind = [rank for rank, place in {**places, self._ranks.rank: own}.items() if place == first]
        named = "all ranks" if len(behind) > len(places) else "rank " + ", ".join(map(str, sorted(behind)))
        place = _place({"step": first[0], "phase": ORDER[first[1]]})
        return f"no step for {now - self._since:.0f} s (train.rank_timeout): {named} {place}"

    def _leave(self, line: str, code: int) -> None:
        """Ends the process though its main thread is inside a collective."""
        if code == STOPPED and self._ranks.world_size > 1:
            # Else the others would take this rank for one that has died.
            self._has_left = True
            time.sleep(1.5 * self._beat)
        try:
            report(f"rank {self._ranks.rank}: {line}")
            with suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
        finally:
            os._exit(code)


def _place(sign: dict[str, Any]) -> str:
    phase: Phase = sign["phase"]
    return DOING[phase] if phase == "start" else f"{DOING[phase]} step {sign['step']}"


def _own_connection() -> Any:
    """To the store of the process group: a client blocks while another thread waits on it."""
    store = c10d._get_default_store()
    return store.clone() if hasattr(store, "clone") else store


def _launcher() -> tuple[int, ...]:
    """The processes whose end means that this one should end: torchrun, or DeepSpeed's launcher and its parent."""
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return (parent,)
    with suppress(psutil.Error):
        process = psutil.Process(parent)
        if "deepspeed.launcher.launch" in process.cmdline():
            return parent, process.ppid()
    return ()
