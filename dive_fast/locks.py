"""One process at a time in a folder: a lock on a file that names its holder.

They are POSIX record locks (``fcntl``), which network file systems honour too. Unlike ``flock`` they belong to the
process alone: loader processes forked by a run that was killed do not keep its folder locked. In return, a process
that closes any descriptor of the file loses its lock: the holder never opens the file again, not even to read it.
"""

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from dive_fast.distributed import Ranks
from dive_fast.errors import UserError

logger = logging.getLogger(__name__)

FILE = ".lock"
"""Name of the lock inside a folder; removed by its holder."""
POLL_SECONDS = 0.5
TELL_SECONDS = 30.0
"""Seconds between lines of a process that waits for a lock."""
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def holder_name() -> str:
    """Content of a lock that this process holds."""
    return f"process {os.getpid()} on {socket.gethostname()}\n"


class LockedError(UserError):
    """Another process uses the folder; the message names its host and pid, and says what to do."""


class Lock:
    """The right to write at some place, held by one process on all machines that see the file."""

    def __init__(self, file: Path, name: str) -> None:
        """Takes nothing yet.

        Args:
            file: the lock; its folder exists.
            name: of what is locked, for messages: ``run folder runs/a``.
        """
        self._file, self._name = file, name
        self._descriptor: int | None = None

    def acquire(self) -> str | None:
        """Tries to take the lock, once.

        Returns:
            None once this process holds it; else the holder, ``process 12 on host-a``.

        Raises:
            OSError: the file cannot be written.
        """
        while True:
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    holder = os.read(descriptor, 1000).decode(errors="replace").strip()
                    os.close(descriptor)
                    return holder or "a process that has just begun"
                if error.errno not in _UNSUPPORTED:
                    os.close(descriptor)
                    raise
                logger.warning(
                    "%s: the file system of %s has no locks (%s); start no second run there",
                    *(self._name, self._file.parent, error.strerror),
                )
            if self._is_current(descriptor):
                break
            # The former holder removed the file after it was opened here.
            os.close(descriptor)
        self._descriptor = descriptor
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder_name().encode(), 0)
        return None

    def release(self) -> None:
        """Gives it back, if it is held, and removes the file."""
        if self._descriptor is None:
            return
        if self._is_current(self._descriptor):
            self._file.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None

    def _is_current(self, descriptor: int) -> bool:
        """Whether an open file is still the one under the lock's name."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._file))
        except FileNotFoundError:
            return False


@contextmanager
def folder_lock(
    folder: Path, name: str, *, wait: bool = False, ranks: Ranks | None = None, remedy: str = "end it"
) -> Iterator[None]:
    """Keeps other processes out of a folder while the block runs; the folder is made where there is none.

    Args:
        name: of the folder, for messages: ``run folder``.
        wait: wait for the holder to end, and name it every 30 seconds; otherwise a holder is an error.
        ranks: all ranks enter together, and the first one holds the lock for all of them.
        remedy: what a user can do besides waiting.

    Raises:
        LockedError: another process holds the lock, and ``wait`` is false.
        UserError: the folder cannot be made or written; all ranks raise it.
    """
    with file_lock(folder / FILE, f"{name} {folder}", wait=wait, ranks=ranks, remedy=remedy):
        yield


@contextmanager
def file_lock(
    file: Path, name: str, *, wait: bool = False, ranks: Ranks | None = None, remedy: str = "end it"
) -> Iterator[None]:
    """As :func:`folder_lock`, by a lock anywhere.

    Args:
        file: the lock; its folder is made where there is none.
        name: of what is locked, its path included.
    """
    is_holder, lock = ranks is None or ranks.is_main, Lock(file, name)
    begun = told = time.monotonic()
    try:
        while True:
            found: str | UserError | None = _acquire(lock, file, name) if is_holder else None
            if ranks is not None:
                # In turns, not by one long wait: a collective gives up after a while.
                found = ranks.broadcast(found)
            if isinstance(found, UserError):
                raise found
            if found is None:
                break
            if not wait:
                raise LockedError(
                    f"{name} is in use by {found}: wait until it ends, or {remedy}; "
                    f"if there is no such process, remove {file}"
                )
            now = time.monotonic()
            if is_holder and (told == begun or now - told >= TELL_SECONDS):
                tqdm.write(f"waiting for {name}, in use by {found}, for {now - begun:.0f} s so far")
                told = max(now, begun + 1e-9)
            time.sleep(POLL_SECONDS)
        yield
    finally:
        lock.release()


def _acquire(lock: Lock, file: Path, name: str) -> str | UserError | None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return lock.acquire()
    except OSError as error:
        return UserError(f"{name}: cannot write there: {error.strerror or error}")
