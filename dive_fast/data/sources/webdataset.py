"""Reads webdataset tars of images with captions or labels."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import braceexpand

from dive_fast.data.sources.file_rules import HIDDEN, is_hidden, refuse_duplicates
from dive_fast.data.sources.node_index import Listing, RawSet, open_raw
from dive_fast.data.sources.sample_table import SampleTable, Strings, StringsBuilder, TableBuilder, printable
from dive_fast.data.sources.source import Skipped, SkippedEntries, Source, locate, summarize_skipped
from dive_fast.data.sources.tar_scan import scan_tar
from dive_fast.errors import DataError
from dive_fast.identity import Identity, digest

if TYPE_CHECKING:
    from dive_fast.distributed import Ranks  # imports torch, which takes seconds

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
MIN_PARALLEL_BYTES = 2**28
"""Sets of fewer bytes are read by this process alone: others would not have started by then."""
MAX_PROCESSES = 32
"""Maximum number of processes that read a set; more would wait for the disk."""


def open_webdataset(path: str, text: str, *, strict: bool = True, ranks: Ranks | None = None) -> Source:
    """Opens webdataset tars, in which files whose names differ only in their suffix form a sample.

    Samples without an image or a text, with an empty text or one that is not UTF-8, or with a duplicate name are
    skipped.

    Args:
        path: a tar, a brace range, a glob, or a folder of tars.
        text: suffix of the file that a sample needs besides its image: ``.cls`` (label) or ``.txt`` (caption).
        strict: whether a broken tar or label is an error; otherwise incomplete samples are skipped.
        ranks: see :func:`open_raw`.

    Raises:
        DataError: there is no tar, a tar is broken, or no sample is complete.
    """
    return open_raw(Tars(path, text, strict), ranks)


class Tars(RawSet):
    """The tars of a set."""

    def __init__(self, path: str, text: str, strict: bool) -> None:
        """Takes the arguments of :func:`open_webdataset`."""
        self.path, self._text, self._strict = path, text, strict
        self._tars: list[Path] = []
        self._skipped: list[Skipped] = []
        self._ignored: list[Skipped] = []

    def identity(self) -> Identity:
        return {"format": "webdataset", "text": self._text, "strict": self._strict}

    def list_files(self) -> Listing:
        self._skipped, self._ignored = [], []
        self._tars = list_tars(self.path, self._skipped, self._ignored)
        self.root = os.path.commonpath([tar.parent for tar in self._tars])
        return Listing.of(self.root, self._tars)._replace(details=digest([self._skipped, self._ignored]))

    def read(self, listing: Listing) -> tuple[Source, Sequence[str]]:
        table = TableBuilder(self.root, shares_texts=False)
        skipped, ignored = StringsBuilder(), StringsBuilder()
        skipped.extend(SkippedEntries.of(self._skipped).strings)
        ignored.extend(SkippedEntries.of(self._ignored).strings)
        for row, part in enumerate(self._scan_all(int(listing.sizes.sum()))):
            table.extend(replace(part.table, files=Strings.of([listing.names[row]])))
            skipped.extend(part.skipped)
            ignored.extend(part.ignored)
        left_out = SkippedEntries(Strings(*skipped.columns()))
        if not len(table):
            reasons = f" ({summarize_skipped(left_out)})" if left_out else ""
            raise DataError(f"{self.path}: no sample has both an image and a {self._text} file{reasons}")
        ignored_files = SkippedEntries(Strings(*ignored.columns()))
        return Source(table.build(), skipped=left_out, ignored=ignored_files), ()

    def _scan_all(self, num_bytes: int) -> Iterator[_Part]:
        """The parts of the set in order, read by a process a core if there are many bytes."""
        if num_bytes < MIN_PARALLEL_BYTES or len(self._tars) == 1:
            yield from map(self._scan, range(len(self._tars)))
            return
        # They import torch, which takes seconds.
        from dive_fast.data.workers import in_workers
        from dive_fast.distributed import progress

        workers = min(len(os.sched_getaffinity(0)), len(self._tars), MAX_PROCESSES)
        parts = in_workers(self._scan, range(len(self._tars)), workers)
        with closing(parts), progress(len(self._tars), f"reading {self.path}", "tar") as bar:
            for part in parts:
                yield part
                bar.update()

    def _scan(self, row: int) -> _Part:
        table, skipped, ignored = scan_tar(self._tars[row], self._text, self._strict)
        return _Part(table, SkippedEntries.of(skipped).strings, SkippedEntries.of(ignored).strings)


class _Part(NamedTuple):
    """A :class:`TarScan` in arrays alone, which are cheap to send between processes."""

    table: SampleTable
    skipped: Strings
    ignored: Strings


def list_tars(path: str, skipped: list[Skipped], ignored: list[Skipped]) -> list[Path]:
    """The tars that a path names: a tar, a brace range, a glob, or a folder of tars.

    Raises:
        DataError: there is no tar, or one of them does not exist.
    """
    root = locate(path)
    if root.is_dir():
        return _tars_in(root, path, skipped, ignored)
    try:
        names = list(braceexpand.braceexpand(path))
    except ValueError as error:
        raise DataError(f"{path}: not a brace range: {error}") from error
    tars = [Path(match) for name in names for match in (sorted(glob.glob(name, recursive=True)) or [name])]
    for tar in tars:
        if not tar.is_file():
            raise DataError(f"{path}: no such tar ({tar} does not exist)")
    refuse_duplicates(tars, path)
    return tars


def _tars_in(root: Path, path: str, skipped: list[Skipped], ignored: list[Skipped]) -> list[Path]:
    tars: list[Path] = []
    compressed: list[str] = []
    try:
        for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
            name = entry.name.lower()
            if entry.is_dir():
                if not is_hidden(entry.name) and any(file.endswith(".tar") for file in os.listdir(entry.path)):
                    ignored.append(Skipped(printable(entry.name), "a folder of tars next to the tars"))
            elif name.endswith(".tar"):
                if is_hidden(entry.name):
                    ignored.append(Skipped(printable(entry.name), HIDDEN))
                elif not entry.is_file():  # reading a pipe could block forever
                    raise DataError(f"{entry.path}: named like a tar, but not a regular file; remove or rename it")
                else:
                    tars.append(root / entry.name)
            elif name.endswith(COMPRESSED_SUFFIXES):
                compressed.append(printable(entry.name))
    except OSError as error:
        raise DataError(f"{path}: cannot list its tars: {error}") from error
    if not tars:
        hint = f"; {compressed[0]} is compressed: unpack it to a plain .tar" if compressed else ""
        hint = hint or (f"; they may be in {ignored[0].key}" if ignored else "")
        raise DataError(f"{path}: no tar in this folder{hint}")
    refuse_duplicates(tars, path)
    skipped += [Skipped(name, "a compressed tar; unpack it to a plain .tar") for name in compressed]
    return tars
