"""Prepares batches in worker processes, ahead of their use and in order."""

import gc
import os
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkContext
from multiprocessing.queues import Queue
from typing import Any, Generic, TypeVar

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from dive_fast.data.worker_memory import MAX_AHEAD
from dive_fast.errors import DataError, MachineError, machine_error

Task = TypeVar("Task")
Result = TypeVar("Result")
BLOCKED_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that launchers and Slurm send to all processes of a run at once."""
PARENT_CHECK_SECONDS = 1.0
"""Interval at which a worker checks that its parent is alive."""


class _ReportingQueue(Queue):  # type: ignore[type-arg]
    """A queue whose reader receives an error instead of an item that could not be sent.

    The sending thread of the base class prints the error and drops the batch, so that the reader waits forever.
    """

    def _on_queue_feeder_error(self, error: Exception, item: Any) -> None:
        # A worker of the DataLoader sends (number of the batch, batch).
        number = item[0] if isinstance(item, tuple) else 0
        self.put((number, ExceptionWrapper((type(error), error, error.__traceback__), "while sending a batch")))


class _Context(ForkContext):
    """Forks processes, whatever Python's default is; other start methods pickle everything a worker needs."""

    def Queue(self, maxsize: int = 0) -> "Queue[Any]":  # noqa: N802 - multiprocessing's name
        return _ReportingQueue(maxsize, ctx=self)


FORK = _Context()
"""Multiprocessing context of all worker processes."""


def in_workers(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    workers: int,
    pin: bool = False,
    ahead: int = MAX_AHEAD,
) -> Generator[Result, None, None]:
    """Applies a function to tasks in worker processes of torch's DataLoader and yields the results in order.

    The processes start at once. Call it before other threads run: a forked process inherits their locks, which may
    be held and never released.

    Args:
        function: called in the workers, with its state at the time of this call.
        workers: number of processes; 0 computes each result in this process when it is requested.
        pin: whether results are copied to page-locked memory, for asynchronous copies to a GPU.
        ahead: results that each process computes ahead.

    Raises:
        DataError: ``function`` raised it; the message is one line.
        MachineError: a process was killed, or shared memory or open files are exhausted.
    """
    options: dict[str, Any] = {}
    if workers:
        options = {
            "prefetch_factor": ahead,
            "worker_init_fn": _initialize_worker,
            "multiprocessing_context": FORK,
        }
    try:
        with warnings.catch_warnings(), forking(), _blocking_signals():
            # More workers than cores are no mistake: they wait for disks.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader: DataLoader[Any] = DataLoader(
                _TaskDataset(function),
                sampler=tasks,  # type: ignore[arg-type]
                batch_size=None,
                collate_fn=_identity,
                num_workers=workers,
                pin_memory=pin,
                # A generator of its own, since the default one holds the random state of a resumed run.
                generator=torch.Generator(),
                **options,
            )
            results = iter(loader)
    except (OSError, RuntimeError) as error:
        raise machine_error(error) or error from error
    return _with_plain_errors(results)


@contextmanager
def forking() -> Iterator[None]:
    """Keeps processes that are started inside from collecting garbage of this process.

    Otherwise a worker may shut down a DALI pipeline of this process and wait forever for threads that it has not
    inherited.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _blocking_signals() -> Iterator[None]:
    """Keeps processes that are started inside from ending by signals to all processes of a run.

    Signals are blocked before the fork so that each thread of the new process inherits the mask: threads of
    PyTorch start before our code runs there, and the kernel delivers a signal to any thread that does not block
    it.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _TaskDataset(Dataset[Result], Generic[Task, Result]):
    def __init__(self, function: Callable[[Task], Result]) -> None:
        self.function = function

    def __getitem__(self, task: Task) -> Result:  # type: ignore[override]
        return self.function(task)


def _identity(result: Result) -> Result:
    return result


def _with_plain_errors(results: Iterator[Result]) -> Generator[Result, None, None]:
    """Yields the results, and restores the one-line messages of errors."""
    try:
        yield from results
    except (DataError, MachineError) as error:
        # The message of an exception from a worker contains its traceback.
        raise type(error)(str(error).strip().rpartition(f"{type(error).__name__}: ")[2]) from error
    except (OSError, RuntimeError) as error:
        raise machine_error(error) or error from error
    finally:
        # The traceback of an error keeps the iterator alive, and with it the processes.
        if isinstance(results, _MultiProcessingDataLoaderIter):
            results._shutdown_workers()


def _initialize_worker(worker: int) -> None:
    # Workers run in parallel already; more threads in each would compete for the cores.
    torch.set_num_threads(1)
    # Signals to all processes of a run concern the training process, which writes a last checkpoint and still
    # needs its batches. SIGTERM stays blocked in all threads; one of them waits for a SIGTERM of the parent.
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), name="end", daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    """Ends this process when the parent sends SIGTERM or ends; ignores SIGTERM from other processes."""
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, PARENT_CHECK_SECONDS)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)
