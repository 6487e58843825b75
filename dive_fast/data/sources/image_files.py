"""Lists the images below a folder as columns, with the size and modification time of each."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from dive_fast.data.decode import IMAGE_SUFFIXES, looks_like_image
from dive_fast.data.sources.file_rules import HIDDEN, is_hidden, lower_suffix, reason_to_skip
from dive_fast.data.sources.listed_files import text_name
from dive_fast.data.sources.node_index import Listing
from dive_fast.data.sources.sample_table import Strings, StringsBuilder, printable
from dive_fast.data.sources.source import Skipped
from dive_fast.data.sources.watched import Watched, state_from, state_of
from dive_fast.errors import DataError

Part = TypeVar("Part")

SIDE_SUFFIXES = frozenset(
    {
        ".csv",
        ".htm",
        ".html",
        ".ini",
        ".json",
        ".jsonl",
        ".log",
        ".md",
        ".parquet",
        ".tsv",
        ".txt",
        ".xml",
        ".yaml",
        ".yml",
    }
)
"""Suffixes of files that accompany images and are not images."""
NO_FILE, NOT_READABLE = -1, -2
"""Sizes of a text file that does not exist, and of one that cannot be examined or is not a regular file."""
THREADS = 16
"""Number of concurrent requests; network file systems answer many at a time."""
SHOWN_AFTER = 5.0
"""Seconds after which progress is shown."""
CHUNK = 512
"""Files that one thread examines at a time, in a folder of several times as many."""


@dataclass
class ImageFiles:
    """Images in order, as growing columns."""

    names: StringsBuilder = field(default_factory=StringsBuilder)
    """Names relative to the root, as bytes of the file system."""
    sizes: array[int] = field(default_factory=lambda: array("q"))
    times: array[int] = field(default_factory=lambda: array("q"))
    text_sizes: array[int] = field(default_factory=lambda: array("q"))
    """Sizes of the text files next to the images, if these are listed; see :data:`NO_FILE`."""
    text_times: array[int] = field(default_factory=lambda: array("q"))
    text_changes: array[int] = field(default_factory=lambda: array("q"))
    """Times of the last change of the text files, which a copy with the modification time does not keep."""
    skipped: list[Skipped] = field(default_factory=list)
    ignored: list[Skipped] = field(default_factory=list)
    watched: Watched = field(default_factory=Watched)
    """Folders, and other files whose contents or targets decide what they are."""
    num_direct: int = 0
    """Number of images in the listed folder itself, not in subfolders."""

    def __len__(self) -> int:
        return len(self.sizes)

    def extend(self, part: ImageFiles) -> None:
        """Adds the images of a later folder."""
        self.watched.extend(part.watched)
        self.names.extend(Strings(*part.names.columns()))
        for name in ("sizes", "times", "text_sizes", "text_times", "text_changes", "skipped", "ignored"):
            getattr(self, name).extend(getattr(part, name))

    def listing(self, details: Iterable[str] = ()) -> Listing:
        """The listing of images and texts.

        Args:
            details: everything else that decides the samples.
        """
        # Not the names of other files alone: the reason depends on their contents.
        others = [*details, *(repr(entry) for entry in (*self.skipped, None, *self.ignored))]
        sizes, times = self.sizes + self.text_sizes, self.times + self.text_times
        changes = np.array(self.text_changes, np.int64) if self.text_changes else None
        return Listing(
            Strings(*self.names.columns()),
            np.array(sizes, np.int64),
            np.array(times, np.int64),
            hashlib.sha256("\n".join(others).encode()).hexdigest(),
            changes,
        )


class ImageLister:
    """Lists images below folders, in threads: the time on a network is that of its answers."""

    def __init__(self, *, with_texts: bool = False) -> None:
        """Starts without files.

        Args:
            with_texts: examine the ``.txt`` file of the same name next to each image too.
        """
        self._with_texts = with_texts
        self._folder_threads = ThreadPoolExecutor(THREADS, "folders")
        self._file_threads = ThreadPoolExecutor(THREADS, "files")

    def __enter__(self) -> ImageLister:
        return self

    def __exit__(self, *_: object) -> None:
        for threads in (self._folder_threads, self._file_threads):
            threads.shutdown(cancel_futures=True)

    def list_each(self, root: str, names: Sequence[str]) -> Iterator[ImageFiles]:
        """The images below each of several folders of the root.

        Raises:
            OSError, DataError: as :meth:`list_below`, from the iterator.
        """
        return self._folder_threads.map(lambda name: self._below(os.path.join(root, name), name), names)

    def list_below(self, folder: str) -> ImageFiles:
        """The images at any depth below a folder, sorted by the components of their names.

        Raises:
            OSError: a folder or file cannot be examined.
            DataError: a link leads to a folder above it, or a file named like an image is not a regular file.
        """
        return self._below(folder, "", has_threads=True)

    def _below(
        self, folder: str, name: str, parents: tuple[tuple[int, int], ...] = (), *, has_threads: bool = False
    ) -> ImageFiles:
        """The images below a folder.

        Args:
            name: the folder's part of the images' names; may be empty.
            parents: device and inode of each folder above, to detect links that form a cycle.
            has_threads: list subfolders in threads; only where no thread calls this, which would wait for another.
        """
        status = os.stat(folder)
        inode = status.st_dev, status.st_ino
        if inode in parents:
            raise DataError(f"{folder}: a link to a folder above it; remove it")
        with os.scandir(folder) as unsorted:
            entries = sorted(unsorted, key=lambda entry: entry.name)
        # Runs of images between the other entries, so that the order of all of them remains.
        runs: list[list[os.DirEntry[str]]] = [[]]
        others: list[os.DirEntry[str]] = []
        for entry in entries:
            if (
                lower_suffix(entry.name) in IMAGE_SUFFIXES
                and not entry.name.startswith(".")
                and not entry.is_dir()
            ):
                runs[-1].append(entry)
            else:
                others.append(entry)
                runs.append([])
        prefix = f"{name}/" if name else ""
        subfolders = [entry for entry in others if entry.is_dir() and not is_hidden(entry.name)]

        def below(entry: os.DirEntry[str]) -> ImageFiles:
            return self._below(entry.path, prefix + entry.name, (*parents, inode))

        in_threads = has_threads and len(subfolders) > 1
        parts = iter((self._folder_threads.map if in_threads else map)(below, subfolders))
        texts = {entry.name.lower() for entry in others} if self._with_texts else set()
        result = ImageFiles()
        result.watched.add(name, state_from(status))
        self._add(result, folder, prefix, runs[0], texts)
        for entry, images in zip(others, runs[1:], strict=True):
            if entry.is_dir() and not is_hidden(entry.name):
                result.extend(next(parts))
            else:
                _leave_out(result, prefix + entry.name, entry)
            self._add(result, folder, prefix, images, texts)
        result.num_direct = sum(map(len, runs))
        return result

    def _add(
        self,
        result: ImageFiles,
        folder: str,
        prefix: str,
        images: list[os.DirEntry[str]],
        texts: set[str],
    ) -> None:
        """Adds images of one folder.

        Args:
            prefix: beginning of the images' names.
            texts: names of the other files of the folder in lower case.
        """
        if not images:
            return
        chunks = [images]
        if len(images) >= 4 * CHUNK:
            chunks = [images[first : first + CHUNK] for first in range(0, len(images), CHUNK)]
        map_chunks = self._file_threads.map if len(chunks) > 1 else map
        for sizes, times in map_chunks(_examine, chunks):
            result.sizes.extend(sizes)
            result.times.extend(times)
        if self._with_texts:
            for columns in map_chunks(lambda chunk: _examine_texts(folder, chunk, texts), chunks):
                of_texts = result.text_sizes, result.text_times, result.text_changes
                for column, values in zip(of_texts, columns, strict=True):
                    column.extend(values)
        # No name holds a zero byte.
        joined = np.frombuffer(os.fsencode("".join(f"{prefix}{entry.name}\0" for entry in images)), np.uint8)
        marks = np.flatnonzero(joined == 0)
        result.names.extend(Strings(joined[joined != 0], marks - np.arange(len(marks))))


def with_progress(parts: Iterator[Part], total: int, description: str, unit: str) -> Iterator[Part]:
    """Parts of a task as they are ready, and a progress bar once it has taken :data:`SHOWN_AFTER` seconds."""
    start, bar = time.time(), None
    for number, part in enumerate(parts, 1):
        yield part
        if bar is not None:
            bar.update()
        elif time.time() - start > SHOWN_AFTER:
            from dive_fast.distributed import progress  # imports torch, which takes seconds

            bar = progress(total, description, unit)
            bar.start_t = start
            bar.update(number)
    if bar is not None:
        bar.close()


def printable_names(names: Strings) -> Strings:
    """Names of files as keys of samples: the same object if all of them are UTF-8."""
    try:
        # In parts: all names of a large set as one text would need their memory again.
        for first in range(0, len(names), 1 << 16):
            last = min(first + (1 << 16), len(names)) - 1
            names.values[names.ends[first - 1] if first else 0 : names.ends[last]].tobytes().decode()
    except UnicodeDecodeError:
        return Strings.of(printable(os.fsdecode(name)).encode() for name in names)
    return names


def _leave_out(result: ImageFiles, key: str, entry: os.DirEntry[str]) -> None:
    """Counts an entry that is not an image."""
    name, key = key, printable(key)
    is_side_file = lower_suffix(entry.name) in SIDE_SUFFIXES
    if not is_side_file and (entry.is_symlink() or reason_to_skip(entry.name) is None):
        result.watched.add(name, state_of(entry.path))
    if entry.is_dir():
        result.ignored.append(Skipped(key, HIDDEN))
    elif (reason := reason_to_skip(entry.name)) is not None:
        (result.ignored if reason == HIDDEN else result.skipped).append(Skipped(key, reason))
    elif not is_side_file:
        if looks_like_image(_first_bytes(entry)):
            result.skipped.append(Skipped(key, "an image by its content, but not by its suffix"))
        else:
            result.ignored.append(Skipped(key, "not an image by suffix or content"))


def _examine(images: Sequence[os.DirEntry[str]]) -> tuple[list[int], list[int]]:
    """Sizes and modification times of images."""
    sizes, times = [], []
    for entry in images:
        status = entry.stat()
        if not stat.S_ISREG(status.st_mode):
            # Reading a pipe could block forever.
            raise DataError(f"{entry.path}: named like an image, but not a regular file; remove or rename it")
        sizes.append(status.st_size)
        times.append(status.st_mtime_ns)
    return sizes, times


def _examine_texts(
    folder: str, images: Sequence[os.DirEntry[str]], texts: set[str]
) -> tuple[list[int], list[int], list[int]]:
    """Sizes, modification times and times of the last change of the text files next to images."""
    sizes, times, changes = [], [], []
    for entry in images:
        name, size, time, change = text_name(entry.name), NO_FILE, 0, 0
        if name.lower() in texts:  # some file systems ignore case
            try:
                status = os.stat(os.path.join(folder, name))
                size = status.st_size if stat.S_ISREG(status.st_mode) else NOT_READABLE
                time, change = status.st_mtime_ns, status.st_ctime_ns
            except OSError:
                size = NOT_READABLE
        sizes.append(size)
        times.append(time)
        changes.append(change)
    return sizes, times, changes


def _first_bytes(entry: os.DirEntry[str]) -> bytes:
    try:
        if not stat.S_ISREG(entry.stat().st_mode):
            return b""
        with open(entry.path, "rb") as file:
            return file.read(12)
    except OSError:
        return b""
