"""Folders and files by whose state a start recognizes that a large set need not be listed again.

A file that is added, removed, renamed or replaced changes the times of its folder. Only a file that is written in
place does not: those whose contents decide what is a sample are watched themselves, and the others are compared
with the listing when they are read (:mod:`dive_fast.data.sources.listed_files`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dive_fast.data.content_hashes import map_in_threads
from dive_fast.data.sources.sample_table import Strings

State = tuple[int, int, int, int]
"""Size, modification time and time of the last change in nanoseconds, and inode. The number of the device is left
out: it differs between machines that mount the same file system."""
RACY_SECONDS = 2.0
"""A file that was modified so shortly before it was listed may change again without another modification time."""


class Watched:
    """Folders and files with the state that they had before they were read."""

    def __init__(self) -> None:
        self.states: dict[bytes, State] = {}
        """By name relative to the root of the set, or absolute; in bytes of the file system."""

    def add(self, name: str | bytes, state: State) -> None:
        """Adds a folder or file; of two states the first counts."""
        self.states.setdefault(os.fsencode(name), state)

    def extend(self, other: Watched) -> None:
        """Adds all of another folder."""
        for name, state in other.states.items():
            self.states.setdefault(name, state)

    def is_racy(self, start: float) -> bool:
        """Whether one of them changed a moment before the listing began, at ``start``, or during it."""
        states = np.array(list(self.states.values()), np.int64).reshape(-1, 4)
        return is_racy(states[:, 1], start) or is_racy(states[:, 2], start)

    def is_unchanged(self, root: str) -> bool:
        """Whether all of them have their former state."""
        folder, names = os.fsencode(root), list(self.states)
        states = map_in_threads(lambda name: state_of(os.path.join(folder, name)), names)
        return states == list(self.states.values())

    def columns(self) -> dict[str, NDArray[Any]]:
        """Arrays that :meth:`from_columns` reads."""
        names = Strings.of(self.states)
        states = np.array(list(self.states.values()), np.int64).reshape(-1)
        return {"names": names.values, "ends": names.ends, "states": states}

    @classmethod
    def from_columns(cls, columns: Mapping[str, NDArray[Any]]) -> Watched:
        """The state of stored columns.

        Raises:
            KeyError, ValueError: a column is missing or has another length.
        """
        watched = cls()
        states: Iterable[list[int]] = columns["states"].reshape(-1, 4).tolist()
        names = Strings(columns["names"], columns["ends"])
        for name, (size, modified, changed, inode) in zip(names, states, strict=True):
            watched.states[name] = (size, modified, changed, inode)
        return watched


def state_of(path: str | bytes) -> State:
    """The state of a file or folder, through links; that of one that cannot be examined is the reason."""
    try:
        return state_from(os.stat(path))
    except OSError as error:
        return -(error.errno or 1), 0, 0, 0


def state_from(status: os.stat_result) -> State:
    """The state by a status."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def is_racy(times: NDArray[np.int64], start: float) -> bool:
    """Whether a time, in nanoseconds, lies so little before ``start`` or so near to now that it may not change."""
    # Times of a machine whose clock is ahead are compared as all others.
    seconds = times / 1e9
    return bool(((seconds > start - RACY_SECONDS) & (seconds < time.time() + RACY_SECONDS)).any())
