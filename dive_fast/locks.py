"""Locks that admit one process at a time to a folder; the lock file names its holder.

These are POSIX record locks (``fcntl``), which network file systems support too. Unlike ``flock`` they belong to
the
process alone: loader processes forked by a killed run do not keep its folder locked. On the other hand, a process
that closes any descriptor of the file loses its lock, so the holder never opens the file again, not even to read
it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from dive_fast.errors import UserError

if TYPE_CHECKING:
    from dive_fast.distributed import Ranks  # imports torch, which takes seconds

logger = logging.getLogger(__name__)

FILE = ".lock"
"""Name of the lock inside a folder; removed by its holder."""
POLL_SECONDS = 0.5
REPORT_SECONDS = 30.0
"""Seconds between reports of a process that waits for a lock."""
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def holder_name() -> str:
    """Content of a lock file that this process holds."""
    return f"process {os.getpid()} on {socket.gethostname()}\n"


class LockedError(UserError):
    """Another process uses the folder; the message names its host and pid, and says what to do."""


class Lock:
    """An exclusive lock, held by one process on all machines that share the file."""

    def __init__(self, file: Path, name: str) -> None:
        """Stores the arguments; locks nothing yet.

        Args:
            file: lock file in an existing folder.
            name: name of the locked object for messages: ``run folder runs/a``.
        """
        self._file, self._name = file, name
        self._descriptor: int | None = None

    def acquire(self) -> str | None:
        """Tries once to acquire the lock.

        Returns:
            None if this process holds it; otherwise its holder, ``process 12 on host-a``.

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
                    return holder or "a process that has just started"
                if error.errno not in _UNSUPPORTED:
                    os.close(descriptor)
                    raise
                logger.warning(
                    "%s: the file system of %s does not support locks (%s); do not start a second run there",
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
        """Releases the lock if it is held, and removes the file."""
        if self._descriptor is None:
            return
        if self._is_current(self._descriptor):
            self._file.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None

    def _is_current(self, descriptor: int) -> bool:
        """Whether an open file is still the one at the path of the lock."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._file))
        except FileNotFoundError:
            return False


@contextmanager
def folder_lock(
    folder: Path, name: str, *, wait: bool = False, ranks: Ranks | None = None, remedy: str = "end it"
) -> Iterator[None]:
    """Locks a folder while the block runs, and creates it if needed.

    Args:
        name: name of the folder for messages: ``run folder``.
        wait: wait until the holder ends, and report it every 30 seconds; otherwise a holder is an error.
        ranks: all ranks enter together, and the first one holds the lock for all of them.
        remedy: what a user can do instead of waiting.

    Raises:
        LockedError: another process holds the lock, and ``wait`` is false.
        UserError: the folder cannot be created or written; all ranks raise it.
    """
    with file_lock(folder / FILE, f"{name} {folder}", wait=wait, ranks=ranks, remedy=remedy):
        yield


@contextmanager
def file_lock(
    file: Path, name: str, *, wait: bool = False, ranks: Ranks | None = None, remedy: str = "end it"
) -> Iterator[None]:
    """As :func:`folder_lock`, with any lock file.

    Args:
        file: lock file, whose folder is created if needed.
        name: name of the locked object, including its path.
    """
    acquires, lock = ranks is None or ranks.is_main, Lock(file, name)
    start = time.monotonic()
    last_report: float | None = None
    try:
        while True:
            holder: str | UserError | None = _acquire(lock, file, name) if acquires else None
            if ranks is not None:
                # Once per attempt, and not after one long wait: a collective has a timeout.
                holder = ranks.broadcast(holder)
            if isinstance(holder, UserError):
                raise holder
            if holder is None:
                break
            if not wait:
                raise LockedError(
                    f"{name} is in use by {holder}: wait until it ends, or {remedy}; "
                    f"if there is no such process, remove {file}"
                )
            now = time.monotonic()
            if acquires and (last_report is None or now - last_report >= REPORT_SECONDS):
                tqdm.write(f"waiting for {name}, in use by {holder}, for {now - start:.0f} s so far")
                last_report = now
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
