"""The index of a raw data set: built by one process of a node, kept between runs, memory-mapped by all its ranks.

Reading the names, texts and positions of millions of samples takes minutes, and the same set is opened at every
start. The index is kept in the cache folder, under the files' names, sizes and modification times: a set with a
changed file has another index. Its contents decide results only through ``Source.digest``.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dive_fast import __version__
from dive_fast.data.content_hashes import NUM_PROBES, map_in_threads
from dive_fast.data.sources.sample_table import SampleTable, Strings
from dive_fast.data.sources.source import SkippedEntries, Source
from dive_fast.data.sources.watched import Watched, is_racy, state_of
from dive_fast.errors import ChangedDataError, DataError, MachineError, UserError
from dive_fast.identity import Identity, digest
from dive_fast.io.cache_folder import cache_folder, remove_unused
from dive_fast.io.column_folder import columns_hash, load_columns, save_columns
from dive_fast.locks import file_lock

if TYPE_CHECKING:
    from dive_fast.distributed import Ranks  # imports torch, which takes seconds

logger = logging.getLogger(__name__)

FORMAT = 3
"""Version of the stored columns and of the rules by which readers choose samples; change it with either."""
FOLDER = "indexes"
"""Folder of the indexes in the cache."""
SMALL_FILES, SMALL_BYTES = 10_000, 2**26
"""A set of fewer files and bytes is read at each start: that takes no longer than checking its index."""
UNUSED_DAYS = 7
"""Days without use after which the former index of a changed set is removed: a run may still map its files."""


class Listing(NamedTuple):
    """The files that decide the samples of a raw set."""

    names: Strings
    """Names relative to the set's root, as bytes of the file system."""
    sizes: NDArray[np.int64]
    """``(F,)``: bytes of each file."""
    times: NDArray[np.int64]
    """``(F,)``: modification time of each file, in nanoseconds."""
    details: str = ""
    """A hash of everything else that the listing has shown and the samples or messages depend on."""
    changes: NDArray[np.int64] | None = None
    """``(F,)``: time at which the contents, name or attributes of each file last changed, in nanoseconds; programs
    that copy a file with its modification time cannot set it. May be those of some files only. None: unknown."""

    @classmethod
    def of(cls, root: str, files: Sequence[Path]) -> Listing:
        """The listing of files that exist, by the names that they have relative to ``root``.

        Raises:
            DataError: a file cannot be examined.
        """
        try:
            statuses = [os.stat(file) for file in files]
        except OSError as error:
            raise DataError(f"{error.filename}: cannot read it: {error.strerror or error}") from error
        return cls(
            Strings.of(os.fsencode(os.path.relpath(file, root or ".")) for file in files),
            np.array([status.st_size for status in statuses], np.int64),
            np.array([status.st_mtime_ns for status in statuses], np.int64),
            changes=np.array([status.st_ctime_ns for status in statuses], np.int64),
        )

    def digest(self) -> str:
        """A hash of names, sizes, times and details."""
        columns: dict[str, NDArray[Any]] = {
            "names": self.names.values,
            "ends": self.names.ends,
            "sizes": self.sizes,
            "times": self.times,
        }
        if self.changes is not None:
            columns["changes"] = self.changes
        return digest([columns_hash(columns), self.details])

    def modified(self) -> str:
        """A hash of the modification times."""
        return hashlib.sha256(self.times.astype("<i8").tobytes()).hexdigest()


class RawSet(ABC):
    """A raw data set on disk, which :func:`open_raw` opens."""

    path: str
    """The path in the config, for messages."""
    root: str
    """Folder that names of files are relative to: the same set in another folder has another index."""
    reads_all_bytes: bool = True
    """Whether reading the set takes the longer, the larger its files are."""

    @abstractmethod
    def identity(self) -> Identity:
        """Format and options, all that decides the samples besides the files."""

    def known_root(self) -> str | None:
        """The :attr:`root` of a set that is recognized as unchanged by :meth:`watched`; None: it is listed always.

        Raises:
            DataError: the path names no data set.
        """
        return None

    def watched(self, listing: Listing, table: SampleTable) -> Watched | None:
        """Folders and files that show whether the set must be listed again, in their state before they were read.

        Args:
            table: the samples, from this listing or its index. Each has its state in ``listed``, since a file that
                is written in place need not be watched.

        Returns:
            None: the set changed while it was read.
        """
        return None

    @abstractmethod
    def list_files(self) -> Listing:
        """Lists the files.

        Raises:
            DataError: a file or folder is missing, or cannot be read.
        """

    @abstractmethod
    def read(self, listing: Listing) -> tuple[Source, Sequence[str]]:
        """Reads the set: its samples, and warnings about it.

        Raises:
            DataError: the files do not have the configured format.
        """


def open_raw(raw: RawSet, ranks: Ranks | None = None) -> Source:
    """Opens a raw set by its kept index, which is built if it is missing or a file has changed.

    Args:
        ranks: all ranks call this; the first rank of each node opens the set, and the others map its index. None:
            this process opens it, after any other process that builds the same index.

    Raises:
        DataError: as :meth:`RawSet.read`; all ranks raise it.
    """
    if ranks is None or ranks.world_size == 1:
        return (_open_unlisted(raw) or _open(raw))[0]
    key = raw.path, raw.identity()
    unlisted: list[tuple[Source, Path]] = []
    if _is_watched(raw):

        def open_unlisted() -> bool:
            unlisted.extend(filter(None, [_open_unlisted(raw)]))
            return bool(unlisted)

        are_unlisted = ranks.collect(ranks.once_per_node(key, open_unlisted, UserError, MachineError))
        if not all(are_unlisted):
            # One node has noticed a change: the indexes of others may be from before it.
            unlisted.clear()
    opened: list[Source] = []

    def open_first() -> tuple[Source | Path | None, str]:
        source, index = unlisted[0] if unlisted else _open(raw)
        opened.append(source)
        # A small set travels whole; a large one without an index is too large for that.
        return index or (source if len(source) < SMALL_FILES else None), raw.root

    # Ranks may have other paths; each rank opens its own.
    shared, raw.root = ranks.once_per_node(key, open_first, UserError, MachineError)
    if opened:
        return opened[0]
    if isinstance(shared, Source):
        return shared
    return (shared and _load(shared, raw, None)) or _open(raw)[0]


def _is_watched(raw: RawSet) -> bool:
    return type(raw).known_root is not RawSet.known_root


def _open(raw: RawSet) -> tuple[Source, Path | None]:
    """Lists a set and opens it; returns it and the folder of its index, None if none is kept."""
    start = time.time()
    listing = raw.list_files()
    small_bytes = not raw.reads_all_bytes or int(listing.sizes.sum()) < SMALL_BYTES
    if len(listing.sizes) < SMALL_FILES and small_bytes:
        return _unkept(_read(raw, listing)[0]), None
    stamp = digest([_rules(raw), listing.digest()])
    prefix = _prefix(raw)
    with ExitStack() as lock:
        try:
            folder = cache_folder(FOLDER)
            index = folder / f"{prefix}-{stamp[:20]}"
            source = _load(index, raw, stamp, warn=True)
            if source is None or _is_watched(raw):
                lock.enter_context(file_lock(folder / f"{prefix}.lock", f"the index of {raw.path}", wait=True))
        except (OSError, UserError) as error:
            logger.warning("%s: its index is not kept: %s", raw.path, error)
            return _unkept(_read(raw, listing)[0]), None
        if source is None:
            source = _load(index, raw, stamp, warn=True)
        if source is None:
            source, warnings = _read(raw, listing)
            if is_racy(listing.times, start) or not _save(index, source, warnings, stamp):
                return _unkept(source), None
            _remove_former(folder, prefix, index)
            # Mapped, so that forked processes and other ranks share its pages.
            if (mapped := _load(index, raw, None)) is None:
                return _unkept(source), index
            source = mapped
        watched = raw.watched(listing, source.samples)
        if watched is not None and _watch_probes(watched, source.samples, raw.root) and not watched.is_racy(start):
            _save_record(folder / _record_name(prefix), watched, index, stamp, _rules(raw))
        return source, index


def _rules(raw: RawSet) -> str:
    """A digest of all that decides the samples besides the files."""
    return digest([FORMAT, __version__, raw.identity()])


def _prefix(raw: RawSet) -> str:
    """The beginning of the names of all files about a set."""
    return digest([os.path.realpath(raw.root or "."), raw.path, raw.identity()])[:20]


def _record_name(prefix: str) -> str:
    return f"{prefix}.watched"


def _unkept(source: Source) -> Source:
    """A set without an index, whose files are listed at each start and not compared when they are read."""
    return replace(source, samples=replace(source.samples, listed=None))


def _read(raw: RawSet, listing: Listing) -> tuple[Source, Sequence[str]]:
    source, warnings = raw.read(listing)
    for warning in warnings:
        logger.warning("%s", warning)
    return replace(source, modified_hash=listing.modified()), warnings


def _remove_former(folder: Path, prefix: str, index: Path) -> None:
    """Removes the indexes of the same set before a change, unless they were used lately, and all unused ones."""
    oldest = time.time() - 86400 * UNUSED_DAYS
    for other in folder.glob(f"{prefix}-*"):
        with suppress(OSError):
            if other != index and other.stat().st_mtime < oldest:
                shutil.rmtree(other, ignore_errors=True)
    remove_unused(folder)


# A set that need not be listed


def _open_unlisted(raw: RawSet) -> tuple[Source, Path] | None:
    """The set and its index, if all that is watched is unchanged; None: the set must be listed."""
    root = raw.known_root()
    if root is None:
        return None
    raw.root = root
    try:
        folder = cache_folder(FOLDER)
        record = folder / _record_name(_prefix(raw))
        if (loaded := load_columns(record, _rules(raw))) is None:
            return None
        watched = Watched.from_columns(loaded[0])
        index, stamp = folder / loaded[1]["index"], loaded[1]["stamp_of_index"]
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s: it is listed, since what is known about it cannot be read: %s", raw.path, error)
        return None
    if not watched.is_unchanged(root) or (source := _load(index, raw, stamp, warn=True)) is None:
        return None
    return source, index


def _watch_probes(watched: Watched, table: SampleTable, root: str) -> bool:
    """Adds the files of some samples: a change of many files in place should not wait until one of them is read.

    Returns:
        False: one of them has changed since it was listed.
    """
    probes = np.linspace(0, len(table) - 1, min(NUM_PROBES, len(table))).astype(int).tolist()
    files = [str(file) for row in probes for file in table.files_of(row)]
    states = map_in_threads(state_of, files)
    try:
        # Afterwards: a state before a change is noticed at the next start.
        map_in_threads(table.check_unchanged, probes)
    except (OSError, ChangedDataError) as error:
        logger.info("%s", error)
        return False
    for file, state in zip(files, states, strict=True):
        watched.add(os.path.relpath(file, root or "."), state)
    return True


def _save_record(record: Path, watched: Watched, index: Path, stamp: str, rules: str) -> None:
    """Lets the next start open an index without listing, as long as all that is watched is unchanged."""
    try:
        save_columns(record, watched.columns(), {"index": index.name, "stamp_of_index": stamp}, rules)
    except OSError as error:
        logger.warning("%s: the set is listed again at the next start: %s", record, error)


# Files


def _save(folder: Path, source: Source, warnings: Sequence[str], stamp: str) -> bool:
    """Writes an index, a folder of one array a column; returns False, with a warning, if the disk refuses it."""
    columns = source.samples.columns()
    for name, entries in (("skipped", source.skipped), ("ignored", source.ignored)):
        strings = SkippedEntries.of(entries).strings
        columns |= {name: strings.values, f"{name}_ends": strings.ends}
    about = {
        "digest": source.samples.digest_of_columns(),
        "modified": source.modified_hash,
        "class_names": list(source.class_names),
        "warnings": list(warnings),
    }
    try:
        save_columns(folder, columns, about, stamp)
    except OSError as error:
        logger.warning("%s: the index of this data set is not kept: %s", folder, error)
        return False
    return True


def _load(folder: Path, raw: RawSet, stamp: str | None, *, warn: bool = False) -> Source | None:
    """The set of an index, memory-mapped; None if there is none, or it is damaged.

    Args:
        stamp: as for :func:`load_columns`.
        warn: log the warnings of the reader.
    """
    try:
        if (loaded := load_columns(folder, stamp)) is None:
            return None
        columns, about = loaded
        entries = [
            SkippedEntries(Strings(columns.pop(name), columns.pop(f"{name}_ends")))
            for name in ("skipped", "ignored")
        ]
        table = SampleTable.from_columns(columns, raw.root, about["digest"])
        if table.listed is not None:
            record = str(folder.with_name(_record_name(folder.name.split("-")[0])))
            table = replace(table, listed=replace(table.listed, record=record))
        source = Source(
            table,
            tuple(about["class_names"]),
            skipped=entries[0],
            ignored=entries[1],
            modified_hash=about["modified"],
        )
        warnings = list(about["warnings"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s: the index is damaged (%s); it is built again", folder, error)
        return None
    for warning in warnings if warn else ():
        logger.warning("%s", warning)
    return source
