"""The heartbeat's decisions: who is lost or late and when to leave, by a real store and a clock that tests set."""

import signal
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from dive_fast.distributed import Ranks
from dive_fast.errors import AllRanksError
from dive_fast.fault_tolerance import heartbeat
from dive_fast.fault_tolerance.heartbeat import LOST, STOPPED, LostError, Watch

CPU = torch.device("cpu")
TIMEOUT = 100.0


class Clock:
    """The time as the module sees it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.count = 0

    def monotonic(self) -> float:
        return self.now

    def monotonic_ns(self) -> int:
        self.count += 1
        return self.count

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(heartbeat, "time", made)
    monkeypatch.setattr(heartbeat, "faulthandler", SimpleNamespace(dump_traceback=lambda **_: None))
    return made


def make_watches(count: int) -> list[Watch]:
    """The watches of all ranks, which share a store and know one another's first heartbeat."""
    store = dist.HashStore()
    watches = [Watch(Ranks(rank, count, CPU), TIMEOUT) for rank in range(count)]
    for watch in watches:
        watch._store = store
    exchange(*watches)
    return watches


def exchange(*watches: Watch) -> None:
    """One interval: these ranks publish and receive, the others are silent."""
    for watch in watches:
        watch._publish()
    for watch in watches:
        watch._receive()


def test_running_ranks_are_not_lost(clock: Clock) -> None:
    first, second = make_watches(2)
    for step in range(1, 100):
        clock.now += 50
        for watch in (first, second):
            watch.set_phase(step, "step")
        exchange(first, second)
        assert first._lost_rank() is None
        assert second._lost_rank() is None


def test_silent_rank_is_named_with_its_activity(clock: Clock) -> None:
    first, second = make_watches(2)
    second.set_phase(4, "step")
    exchange(first, second)
    clock.now += 61
    exchange(first)
    message = first._lost_rank()
    assert message is not None
    assert message.startswith("rank 1 on ")
    assert message.endswith("sent no heartbeat for 61 s; it was in step 4")
    assert first._exit_code == LOST


def test_closed_rank_may_be_silent(clock: Clock) -> None:
    first, second = make_watches(2)
    second._closed.set()
    exchange(first, second)
    clock.now += 61
    exchange(first)
    assert first._lost_rank() is None


def test_silence_is_shorter_once_a_collective_failed(clock: Clock) -> None:
    first, _ = make_watches(2)
    clock.now += 6
    exchange(first)
    assert first._lost_rank() is None
    first._expects_failure = True
    assert "sent no heartbeat for 6 s" in str(first._lost_rank())


def test_store_without_answers_is_the_first_ranks_loss(clock: Clock) -> None:
    _, second = make_watches(2)
    clock.now += 61
    assert second._lost_rank() == "rank 0, which hosts the store of all ranks, has not answered for 61 s"


def test_failure_of_a_rank_is_reported_with_its_error(clock: Clock) -> None:
    first, second = make_watches(2)
    second.set_phase(3, "step")
    second._failure = "ZeroDivisionError: a bug"
    exchange(first, second)
    assert str(first._lost_rank()).endswith("failed in step 3: ZeroDivisionError: a bug")
    assert first._exit_code == LOST
    second._is_permanent = True
    exchange(first, second)
    assert first._lost_rank() is not None
    assert first._exit_code == 1


def test_rank_that_left_makes_the_others_stop(clock: Clock) -> None:
    first, second = make_watches(2)
    second.set_phase(2, "data")
    second._has_left = True
    exchange(first, second)
    assert str(first._lost_rank()).endswith("was asked to stop and exited waiting for the batch of step 2")
    assert first._exit_code == STOPPED


def test_timeout_names_the_ranks_that_are_behind(clock: Clock) -> None:
    watches = make_watches(3)
    for watch, phase in zip(watches, ("step", "data", "step"), strict=True):
        watch.set_phase(4, phase)  # type: ignore[arg-type]
    clock.now += TIMEOUT - 1
    exchange(*watches)
    assert watches[0]._lost_rank() is None
    clock.now += 1
    for watch in watches:
        expected = "no step for 100 s (train.rank_timeout): rank 1 waiting for the batch of step 4"
        assert watch._lost_rank() == expected


def test_timeout_of_all_ranks_at_one_step(clock: Clock) -> None:
    watches = make_watches(2)
    for watch in watches:
        watch.set_phase(4, "step")
    exchange(*watches)
    clock.now += TIMEOUT
    exchange(*watches)
    assert watches[1]._lost_rank() == "no step for 100 s (train.rank_timeout): all ranks in step 4"


@pytest.mark.parametrize("phase", ["start", "checkpoint", "evaluation", "end"])
def test_phases_without_timeout_may_take_long(clock: Clock, phase: heartbeat.Phase) -> None:
    first, second = make_watches(2)
    first.set_phase(4, phase)
    second.set_phase(5, "data")  # waits for the first rank, which must not be blamed
    exchange(first, second)
    clock.now += 2 * TIMEOUT
    exchange(first, second)
    assert first._lost_rank() is None
    assert second._lost_rank() is None


def test_single_rank_has_a_timeout_too(clock: Clock) -> None:
    watch = Watch(Ranks(0, 1, CPU), TIMEOUT)
    watch.set_phase(2, "step")
    clock.now += TIMEOUT - 1
    assert watch._lost_rank() is None
    clock.now += 1
    assert watch._lost_rank() == "no step for 100 s (train.rank_timeout): in step 2"
    watch.set_phase(2, "evaluation")
    clock.now += 2 * TIMEOUT
    assert watch._lost_rank() is None


def test_stop_request_reaches_all_ranks(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = make_watches(2)
    assert second.stop_reason is None
    first._request_stop("SIGTERM")
    first._request_stop("SIGINT")
    exchange(first, second)
    assert first.stop_reason == second.stop_reason == "SIGTERM"
    assert first._stop_announced.is_set()
    assert capsys.readouterr().err == "SIGTERM: rank 0 requests to save and stop\n"


def test_stuck_only_after_a_request_and_patience(clock: Clock) -> None:
    watch = Watch(Ranks(0, 1, CPU), TIMEOUT)
    watch.set_phase(1, "step")
    clock.now += 10
    watch.set_phase(2, "step")  # the longest step took 10 s
    clock.now += 60
    assert not watch._is_stuck()
    watch._request_stop("SIGTERM")
    clock.now += 30
    assert not watch._is_stuck()
    clock.now += 1
    assert watch._is_stuck()
    watch.set_phase(2, "checkpoint")
    assert not watch._is_stuck()


def test_long_waits_are_reported_ever_more_rarely(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = make_watches(2)
    first.set_phase(3, "step")
    second.set_phase(3, "data")
    exchange(first, second)
    reported = []
    for second_of_wait in range(1, 130):
        clock.now += 1
        first._report_stall()
        if line := capsys.readouterr().err:
            reported.append((second_of_wait, line))
    assert [at for at, _ in reported] == [31, 61, 121]
    assert reported[0][1] == (
        "rank 0 has waited 31 s for the end of step 3; not there yet: rank 1 waiting for the batch of step 3\n"
    )
    first.set_phase(3, "evaluation")
    clock.now += 1000
    first._report_stall()
    assert capsys.readouterr().err == ""


def after_request(watch: Watch, clock: Clock) -> Watch:
    watch._request_stop("SIGTERM")
    clock.now += 1
    return watch


def passing(clock: Clock, answers: Iterator[bool]) -> Callable[[float], bool]:
    """A wait for a batch, which takes its seconds."""

    def wait(seconds: float) -> bool:
        clock.now += seconds
        return next(answers, False)

    return wait


def test_batch_in_time_is_taken(clock: Clock) -> None:
    watch = after_request(Watch(Ranks(0, 1, CPU), TIMEOUT), clock)
    assert not watch.should_leave(1, passing(clock, iter([True])))
    assert not watch.should_leave(1, passing(clock, iter([False, False, True])))


def test_single_rank_leaves_without_a_batch_on_request(clock: Clock) -> None:
    watch = Watch(Ranks(0, 1, CPU), TIMEOUT)
    waited = iter([False] * 1000 + [True])
    assert not watch.should_leave(1, passing(clock, waited))  # nobody has asked for a stop
    after_request(watch, clock)
    start = clock.now
    assert watch.should_leave(1, passing(clock, iter([])))
    assert heartbeat.BATCH_PATIENCE_SECONDS <= clock.now - start < 2 * heartbeat.BATCH_PATIENCE_SECONDS + 1


def test_ranks_leave_only_if_all_promise(clock: Clock) -> None:
    first, second = (after_request(watch, clock) for watch in make_watches(2))
    # The first rank promises, but gets its batch late; the second is in the step, so the first makes it too.
    second.set_phase(3, "step")
    exchange(first, second)
    assert not first.should_leave(3, passing(clock, iter([False] * 40 + [True])))
    assert first._store.check(["leaves/3/0"])
    # Neither has a batch of step 4: the promise of the first is there when the second promises.
    second.set_phase(4, "data")
    exchange(first, second)
    first._store.set("leaves/4/0", "")
    assert second.should_leave(4, passing(clock, iter([])))
    assert first.should_leave(4, passing(clock, iter([False] * 20 + [True] * 2)))


def test_end_by_an_error_is_classified() -> None:
    for error, failure, is_permanent in (
        (ZeroDivisionError("a bug\nof two lines"), "ZeroDivisionError: a bug", False),
        (MemoryError(), "the memory of the machine is full", True),
        (LostError("another rank"), None, False),
        (AllRanksError("all ranks"), None, False),
        (None, None, False),
    ):
        watch = Watch(Ranks(0, 1, CPU), 0.04)
        watch.__enter__()
        watch.__exit__(type(error), error, None)
        assert watch._is_permanent == is_permanent
        assert (watch._failure or "").startswith(failure or "")
        assert (watch._failure is None) == (failure is None)


def test_signal_requests_a_stop() -> None:
    """With real threads, pipe and signals; a monitor that leaves would end the tests."""
    watch = Watch(Ranks(0, 1, CPU), TIMEOUT)
    before = signal.getsignal(signal.SIGUSR1)
    with watch, watch.handling_signals():
        watch.set_phase(1, "step")
        signal.raise_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 10
        while watch.stop_reason is None and time.monotonic() < deadline:
            time.sleep(0.005)
    assert watch.stop_reason == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) == before


def test_cause_of_a_failed_collective_is_the_verdict(clock: Clock) -> None:
    first, _ = make_watches(2)
    assert Watch(Ranks(0, 1, CPU), TIMEOUT).find_cause() is None
    first._verdict, first._exit_code = "rank 1 failed", 1
    first._verdict_ready.set()
    cause = first.find_cause()
    assert cause is not None
    assert (str(cause), cause.code) == ("rank 1 failed", 1)
