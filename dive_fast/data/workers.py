"""Work done ahead by worker processes, batch by batch and in order."""

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from dive_fast.data.source import DataError

Work = TypeVar("Work")
Made = TypeVar("Made")
FORK = multiprocessing.get_context("fork")
"""Named, as Python 3.14 no longer takes it by itself: any other would send each process all that it is to know."""


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
    """
    options: dict[str, Any] = {}
    if workers:
        options = {"prefetch_factor": 4, "worker_init_fn": _settle_in, "multiprocessing_context": FORK}
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
    with forking():
        batches_made = iter(loader)
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


def _settle_in(worker: int) -> None:
    # The workers are the parallelism; more threads in each only get in one another's way.
    torch.set_num_threads(1)
    # Launchers and Slurm send signals to all processes of a run at once: the training process has then a last
    # checkpoint to make, and would lose its batches. Workers end when it does, or says so.
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told, args=(os.getppid(),), name="end", daemon=True).start()


def _end_when_told(parent: int) -> None:
    """Waits for the SIGTERM of the parent; ignores that of others."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        continue
    os._exit(0)
