"""Work done ahead by worker processes, batch by batch and in order."""

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkContext
from multiprocessing.queues import Queue
from typing import Any, Generic, TypeVar

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset

from dive_fast.errors import DataError, MachineError, machine_error

Work = TypeVar("Work")
Made = TypeVar("Made")
PREFETCH = 4
"""Batches that each process makes ahead: all of them may lie in shared memory at once."""
MASKED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that launchers and Slurm send to all processes of a run at once."""
ORPHANED = 1.0
"""Seconds after which a process notices that its parent has gone."""


class _ReportingQueue(Queue):  # type: ignore[type-arg]
    """A queue whose reader gets an error in the place of what could not be sent.

    The thread that sends would print the error and drop the batch: the reader would wait for it for ever.
    """

    def _on_queue_feeder_error(self, error: Exception, sent: Any) -> None:
        # The DataLoader's worker sends (number of the batch, batch).
        number = sent[0] if isinstance(sent, tuple) else 0
        self.put((number, ExceptionWrapper((type(error), error, error.__traceback__), "while a batch is sent")))


class _Context(ForkContext):
    """Processes are forked, whatever Python's default is: any other way would send each all that it is to know."""

    def Queue(self, maxsize: int = 0) -> "Queue[Any]":  # noqa: N802 - multiprocessing's name
        return _ReportingQueue(maxsize, ctx=self)


FORK = _Context()


def in_workers(
    make: Callable[[Work], Made], batches: Iterable[Work], workers: int, pin: bool = False
) -> Iterator[Made]:
    """``make`` of each batch, in order, by torch's DataLoader, whose processes start at once.

    Call it before other threads run: a process forked beside them may find their locks taken for ever.

    Args:
        make: called in other processes, with what it had here when they were started.
        workers: processes; 0 makes each batch here, when it is asked for.
        pin: put what comes out into page-locked memory, for asynchronous copies to a GPU.

    Raises:
        DataError: as ``make`` raised it, in one line.
        MachineError: a process was killed, or shared memory or open files do not suffice.
    """
    options: dict[str, Any] = {}
    if workers:
        options = {"prefetch_factor": PREFETCH, "worker_init_fn": _settle_in, "multiprocessing_context": FORK}
    loader: DataLoader[Any] = DataLoader(
        _Made(make),
        sampler=batches,  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=pin,
        # Else it draws from the random state that a resumed run has been given back.
        generator=torch.Generator(),
        **options,
    )
    try:
        with forking(), _blocking_signals():
            batches_made = iter(loader)
    except (OSError, RuntimeError) as error:
        raise machine_error(error) or error from error
    return _errors_in_one_line(batches_made)


@contextmanager
def forking() -> Iterator[None]:
    """Processes started inside leave alone what is garbage here.

    Else one that collects it may shut down a DALI pipeline of this process, and wait for ever for threads that it
    has not inherited.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _blocking_signals() -> Iterator[None]:
    """Processes started inside are not ended by signals that are sent to all processes of a run.

    Signals are blocked before the fork, so that each thread of the process inherits the mask: PyTorch's own
    threads start before any of our code runs there, and the kernel gives a signal to any thread that takes it.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, MASKED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Made(Dataset[Made], Generic[Work, Made]):
    def __init__(self, make: Callable[[Work], Made]) -> None:
        self.make = make

    def __getitem__(self, batch: Work) -> Made:  # type: ignore[override]
        return self.make(batch)


def _as_it_is(made: Made) -> Made:
    return made


def _errors_in_one_line(batches: Iterator[Made]) -> Iterator[Made]:
    try:
        yield from batches
    except DataError as error:
        # What a worker raises arrives with its whole traceback for a message.
        raise DataError(str(error).strip().rpartition(f"{DataError.__name__}: ")[2]) from error
    except MachineError as error:
        raise MachineError(str(error).strip().rpartition(f"{MachineError.__name__}: ")[2]) from error
    except (OSError, RuntimeError) as error:
        raise machine_error(error) or error from error


def _settle_in(worker: int) -> None:
    # The workers are the parallelism; more threads in each only get in one another's way.
    torch.set_num_threads(1)
    # A signal to all processes of a run is for the training process: it has a last checkpoint to make, and would
    # lose its batches. SIGTERM stays blocked in all threads but the one that waits for the parent's.
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, MASKED)
    threading.Thread(target=_end_when_told, args=(os.getppid(),), name="end", daemon=True).start()


def _end_when_told(parent: int) -> None:
    """Waits for the SIGTERM of the parent, or for its end; ignores the SIGTERM of others."""
    while os.getppid() == parent:
        told = signal.sigtimedwait({signal.SIGTERM}, ORPHANED)
        if told is not None and told.si_pid == parent:
            break
    os._exit(0)
