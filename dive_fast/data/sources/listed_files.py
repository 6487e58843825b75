"""The files of a kept index as they were listed; a process that reads one of them notices a later change."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dive_fast.errors import ChangedDataError
from dive_fast.io.column_folder import ABOUT


@dataclass(frozen=True, eq=False)
class ListedFiles:
    """Modification times of files, and sizes and times of the text files next to them, in nanoseconds."""

    times: NDArray[np.int64]
    """``(F,)``: modification time of each file."""
    text_sizes: NDArray[np.int64] | None = None
    """``(F,)``: bytes of the text file of each image; None: texts do not come from text files."""
    text_times: NDArray[np.int64] | None = None
    record: str = ""
    """The folder that lets the next start open the set without listing it; it is emptied after a change."""

    def select(self, rows: NDArray[np.int64]) -> ListedFiles:
        """The listed state of some files."""
        sizes, times = (None if column is None else column[rows] for column in (self.text_sizes, self.text_times))
        return replace(self, times=self.times[rows], text_sizes=sizes, text_times=times)

    def check(self, row: int, path: Path, size: int, status: os.stat_result | None = None) -> None:
        """Compares a file, and its text file, with the listing.

        Args:
            row: number of the file.
            size: bytes of the file when it was listed.
            status: status of the opened file; None: it is asked for.

        Raises:
            ChangedDataError: a file has another size or modification time, or does not exist any more. The next
                start lists the set again.
            OSError: a file cannot be examined.
        """
        self._compare(path, size, int(self.times[row]), status)
        if self.text_sizes is not None and self.text_times is not None:
            text = path.with_name(text_name(path.name))
            self._compare(text, int(self.text_sizes[row]), int(self.text_times[row]), None)

    def _compare(self, path: Path, size: int, time: int, status: os.stat_result | None) -> None:
        with suppress(FileNotFoundError, NotADirectoryError):
            status = status or os.stat(path)
        if status is not None and (status.st_size, status.st_mtime_ns) == (size, time):
            return
        action = "changed" if status is not None else "removed"
        remedy = "start again: the set is then listed again"
        try:
            forget(self.record)
        except OSError as error:
            remedy = f"remove {self.record} ({error.strerror}) and start again"
        raise ChangedDataError(f"{path}: {action} since the data set was listed; {remedy}")


def forget(record: str | Path) -> None:
    """Makes the next start list the set; an index that processes map remains.

    Raises:
        OSError: the record cannot be removed.
    """
    if record:
        Path(record, ABOUT).unlink(missing_ok=True)


def text_name(image: str) -> str:
    """The name of the text file of an image."""
    return image[: image.rindex(".")] + ".txt"
