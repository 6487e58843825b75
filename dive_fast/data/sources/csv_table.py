"""Reads a tab-separated table of image files and captions."""

from __future__ import annotations

import csv
import errno
import os
import stat
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dive_fast.data.sources.listed_files import ListedFiles
from dive_fast.data.sources.node_index import Listing, RawSet, open_raw
from dive_fast.data.sources.sample_table import (
    MAX_SHARED,
    SEPARATOR,
    SampleTable,
    SharedStrings,
    Strings,
    StringsBuilder,
    clean_text,
    in_order_of_use,
    is_own_row,
    pack_texts,
)
from dive_fast.data.sources.source import EMPTY_CAPTION, Skipped, Source, locate
from dive_fast.data.sources.watched import Watched, state_of
from dive_fast.errors import DataError
from dive_fast.identity import Identity, digest

if TYPE_CHECKING:
    from dive_fast.distributed import Ranks

NO_FILE_ERRORS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})
"""Errors that say that there is no file, not that it cannot be examined now."""
NO_FILE = "no such file"
"""Reason for skipping a sample whose image does not exist."""
THREADS, CHUNK = 16, 4096
"""Number of threads that examine files, and number of files that one of them examines at a time."""


def open_csv(path: str, image_root: str | None, *, group: bool, ranks: Ranks | None = None) -> Source:
    """Opens a tab-separated file with columns ``title`` and ``filepath``, as FLYP writes it.

    Rows without a title and rows whose file does not exist are skipped. If no file exists, the paths may begin
    with folders of another machine (FLYP's begin with ``./datasets/data``): leading folders are then removed until
    the first path leads to a file, from all paths that share them, and a warning is logged.

    Args:
        image_root: folder that relative file paths start from; None: the folder of the CSV file.
        group: True: rows of one file become one sample with all its titles (FLYP writes one row per image and
            template). False: each row is a sample.
        ranks: see :func:`open_raw`.

    Raises:
        DataError: the file or a column is missing, a row has a wrong number of cells, a quote is not closed, there
            are no rows, or none of the files exists.
    """
    return open_raw(CsvSet(path, image_root, group=group), ranks)


class CsvRows(RawSet):
    """The rows of a CSV file, whether or not their files exist: samples of unknown size."""

    def __init__(self, path: str, *, group: bool) -> None:
        """Takes arguments of :func:`open_csv`."""
        self.path, self.root, self._group = path, "", group

    def identity(self) -> Identity:
        return {"format": "csv", "rows": os.path.realpath(locate(self.path)), "group": self._group}

    def list_files(self) -> Listing:
        file = locate(self.path)
        try:
            if not stat.S_ISREG(file.stat().st_mode):
                kind = "directory" if file.is_dir() else "pipe or device"
                raise DataError(f"{self.path}: cannot read it: it is a {kind}")
        except FileNotFoundError as error:
            raise DataError(f"{self.path}: no such file") from error
        except OSError as error:
            raise DataError(f"{self.path}: cannot read it: {error}") from error
        return Listing.of(str(file.parent), [file])

    def read(self, listing: Listing) -> tuple[Source, Sequence[str]]:
        skipped: list[Skipped] = []
        runs = _runs(locate(self.path), self.path)
        table = (_grouped if self._group else _ungrouped)(runs, skipped)
        if not len(table):
            empty = f": all {len(skipped)} titles are empty" if skipped else ""
            raise DataError(f"{self.path}: no rows below its header{empty}")
        return Source(table, skipped=skipped), ()


class CsvSet(RawSet):
    """The rows of a CSV file whose files exist."""

    reads_all_bytes = False

    def __init__(self, path: str, image_root: str | None, *, group: bool) -> None:
        """Takes arguments of :func:`open_csv`."""
        self.path, self._group = path, group
        self.root = str(image_root if image_root is not None else locate(path).parent)
        self._rows: Source = Source.of(())
        self._warnings: list[str] = []
        self._watched = Watched()

    def identity(self) -> Identity:
        return {"format": "csv", "file": os.path.realpath(locate(self.path)), "group": self._group}

    def known_root(self) -> str:
        return self.root

    def list_files(self) -> Listing:
        self._watched, self._warnings = Watched(), []
        file = os.path.abspath(locate(self.path))
        self._watched.add(file, state_of(file))
        self._rows = open_raw(CsvRows(self.path, group=self._group))
        table = self._rows.samples
        names = table.files
        self._watch_folders(names)
        sizes, times = examine_files(self.root, names)
        if (sizes < 0).all():
            names = self._without_prefix(names)
            self._watch_folders(names)
            sizes, times = examine_files(self.root, names)
        details = digest([table.digest(), list(map(list, self._rows.skipped)), self._warnings])
        return Listing(names, sizes, times, details)

    def watched(self, listing: Listing, table: SampleTable) -> Watched | None:
        for row in np.flatnonzero(listing.sizes < 0).tolist():
            path = os.path.join(self.root, os.fsdecode(listing.names[row]))
            state = state_of(path)
            if os.path.isfile(path) or (state[0] < 0 and -state[0] not in NO_FILE_ERRORS):
                return None  # created while the set was read, or an answer of a disk that may be another one later
            if os.path.lexists(path):  # a link, whose target may appear
                self._watched.add(listing.names[row], state)
        return self._watched

    def _watch_folders(self, names: Strings) -> None:
        """Watches the folders of all files; one that does not exist may appear."""
        root = os.fsencode(self.root)
        for folder in sorted({name[: name.rfind(b"/") + 1] for name in names}):
            self._watched.add(folder, state_of(os.path.join(root, folder)))

    def read(self, listing: Listing) -> tuple[Source, Sequence[str]]:
        rows, listed = self._rows.samples, ListedFiles(listing.times)
        table = replace(rows, root=self.root, files=listing.names, listed=listed, stored_digest="")
        size = listing.sizes[table.file_rows]
        skipped = list(self._rows.skipped)
        missing = np.flatnonzero(size < 0).tolist()
        skipped += [Skipped(table.key(row), NO_FILE) for row in missing]
        if missing:
            table = _compact(table, np.flatnonzero(size >= 0))
            size = size[size >= 0]
        return Source(replace(table, size=size), skipped=skipped), self._warnings

    def _without_prefix(self, names: Strings) -> Strings:
        """The names without leading folders that do not exist.

        Raises:
            DataError: the first name leads to no file without them either.
        """
        root, first = Path(self.root), names[0].decode()
        parts = Path(first).parts
        for count in range(1, len(parts)):
            self._watch_folders(Strings.of([os.path.join(*parts[count:]).encode()]))
            if root.joinpath(*parts[count:]).is_file():
                shared = parts[:count]
                self._warnings.append(
                    f"{self.path}: its paths begin with {Path(*shared)}, which does not exist in {root}; this "
                    "prefix is ignored"
                )
                split = ((name, Path(name.decode()).parts) for name in names)
                return Strings.of(
                    str(Path(*components[count:])).encode() if components[:count] == shared else name
                    for name, components in split
                )
        windows = "; its paths are Windows paths: replace each backslash by /" if "\\" in first else ""
        raise DataError(
            f"{self.path}: {root / first} does not exist; set image_root to the folder that the file paths start "
            f"from (none of the {len(names)} files exists){windows}"
        )


def _compact(table: SampleTable, rows: NDArray[np.int64]) -> SampleTable:
    """Some rows of a table, without the columns of the others."""
    files, file = in_order_of_use(table.file_rows[rows])
    lists, list_of = in_order_of_use(table.list_rows[rows])
    names = table.files.select(files)
    has_own_name = table.keys is table.files
    return replace(
        table,
        files=names,
        keys=names if has_own_name else table.keys.select(rows),
        file=None if has_own_name else file.astype(np.int32),
        size=table.size[rows],
        lists=table.lists.select(lists),
        list_of=None if len(lists) == len(rows) else list_of.astype(np.int32),
        listed=None if table.listed is None else table.listed.select(files),
    )


def examine_files(root: str, names: Strings) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Size and modification time of each file; -1 and 0 for one that does not exist or is not a regular file."""

    def examine(rows: range) -> list[tuple[int, int]]:
        return [_size_and_time(os.path.join(root, os.fsdecode(names[row]))) for row in rows]

    chunks = [range(first, min(first + CHUNK, len(names))) for first in range(0, len(names), CHUNK)]
    with ThreadPoolExecutor(THREADS, "files") as threads:
        parts = [np.array(part, np.int64) for part in (threads.map if len(chunks) > 1 else map)(examine, chunks)]
    columns = np.concatenate(parts)
    return columns[:, 0].copy(), columns[:, 1].copy()


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return -1, 0
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else (-1, 0)


# Rows

Run = tuple[int, str, list[str]]
"""Consecutive rows of a file: the index of the first, counted from 0 without the header and empty lines; the name
of the file; and the title of each row, as it is written."""


def _ungrouped(runs: Iterator[Run], skipped: list[Skipped]) -> SampleTable:
    """The table of all rows with a title."""
    names, titles, keys = SharedStrings(), SharedStrings(), StringsBuilder()
    file, list_of = array("i"), array("i")
    for first, name, run in runs:
        name_row = None
        for number, written in enumerate(run, first):
            if title := clean_text(written):
                name_row = names.row(name.encode()) if name_row is None else name_row
                keys.append(f"{name}#{number}".encode())
                file.append(name_row)
                list_of.append(titles.row(pack_texts((title,))))
            else:
                skipped.append(Skipped(f"{name}#{number}", EMPTY_CAPTION))
    files, lists = Strings(*names.strings.columns()), Strings(*titles.strings.columns())
    return _table(files, Strings(*keys.columns()), np.array(file, np.int32), lists, np.array(list_of, np.int32))


def _grouped(runs: Iterator[Run], skipped: list[Skipped]) -> SampleTable:
    """The table of the files: each has the titles of all its rows, in order."""
    names: dict[str, int] = {}
    titles, lists = SharedStrings(), _Lists()
    row_of: dict[str, int] = {}  # of titles as they are written; -1: blank
    run_file, run_list = array("i"), array("i")
    for first, name, run in runs:
        try:
            rows = tuple(map(row_of.__getitem__, run))
        except KeyError:  # a new title
            rows = tuple([_title_row(written, titles, row_of) for written in run])
        if -1 in rows:
            blank = [number for number, row in enumerate(rows, first) if row < 0]
            skipped += [Skipped(f"{name}#{number}", EMPTY_CAPTION) for number in blank]
            rows = tuple(row for row in rows if row >= 0)
        if rows:
            run_file.append(names.setdefault(name, len(names)))
            run_list.append(lists.row(rows))
    files = Strings.of(name.encode() for name in names)
    del names, row_of
    joined = _joined(np.array(run_file, np.int32), np.array(run_list, np.int32), len(files), lists)
    used, list_of = in_order_of_use(joined)
    stored = Strings(*titles.strings.columns())
    texts = Strings.of(
        SEPARATOR.encode().join([stored[title] for title in lists.titles(row)]) for row in used.tolist()
    )
    return _table(files, files, np.arange(len(files), dtype=np.int32), texts, list_of.astype(np.int32))


def _title_row(written: str, titles: SharedStrings, row_of: dict[str, int]) -> int:
    row = row_of.get(written)
    if row is None:
        row = titles.row(pack_texts((title,))) if (title := clean_text(written)) else -1
        if len(row_of) < MAX_SHARED:
            row_of[written] = row
    return row


class _Lists:
    """Lists of rows of titles; equal ones share a row, until many have been stored."""

    def __init__(self) -> None:
        self._titles, self._ends = array("i"), array("q", [0])
        self._rows: dict[tuple[int, ...], int] = {}

    def row(self, titles: tuple[int, ...]) -> int:
        row = self._rows.get(titles)
        if row is None:
            row = len(self._ends) - 1
            self._titles.extend(titles)
            self._ends.append(len(self._titles))
            if len(self._titles) < 4 * MAX_SHARED:
                self._rows[titles] = row
        return row

    def titles(self, row: int) -> array[int]:
        return self._titles[self._ends[row] : self._ends[row + 1]]


def _joined(
    run_file: NDArray[np.int32], run_list: NDArray[np.int32], num_files: int, lists: _Lists
) -> NDArray[np.int32]:
    """The list of titles of each file: that of its run, or those of all its runs joined."""
    if len(run_file) == num_files:
        return run_list
    order = np.argsort(run_file, kind="stable")
    ends = np.cumsum(np.bincount(run_file, minlength=num_files)).tolist()
    list_of, start = np.empty(num_files, np.int32), 0
    for file, end in enumerate(ends):
        rows = run_list[order[start:end]].tolist()
        several = len(rows) > 1
        list_of[file] = (
            lists.row(tuple(title for row in rows for title in lists.titles(row))) if several else rows[0]
        )
        start = end
    return list_of


def _table(
    files: Strings, keys: Strings, file: NDArray[np.int32], lists: Strings, list_of: NDArray[np.int32]
) -> SampleTable:
    """The table of complete files of unknown size."""
    size = np.full(len(keys), -1, np.int64)
    return SampleTable(
        *("", files, keys, None if is_own_row(file, len(files)) else file, None, size, None),
        *(lists, None if is_own_row(list_of, len(lists)) else list_of),
    )


def _runs(file: Path, path: str) -> Iterator[Run]:
    """The rows of a CSV file.

    Raises:
        DataError: as :func:`open_csv`.
    """
    number, line = 0, 1
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.reader(lines, delimiter="\t", strict=True)
            header = next(reader, [])
            title_column, name_column = _columns(header, path)
            width = len(header)
            line = reader.line_num + 1
            first, name, titles = 0, "", list[str]()
            for cells in reader:
                if cells:  # not an empty line
                    # A cell of several lines makes the row end in a later line than it begins.
                    if len(cells) != width or reader.line_num != line:
                        _check_row(cells, width, f"{path}: row {number + 1} (line {line})")
                    if cells[name_column] != name:
                        if titles:
                            yield first, name, titles
                        first, name, titles = number, cells[name_column], []
                        if not name.strip() or "\0" in name:
                            raise DataError(f"{path}: row {number + 1} (line {line}): invalid file name {name!r}")
                    titles.append(cells[title_column])
                    number += 1
                line = reader.line_num + 1
            if titles:
                yield first, name, titles
    except csv.Error as error:
        raise DataError(
            f"{path}: cannot read it: {error} in row {number + 1} (line {line}); a title that begins with a quote "
            "must end with one, with inner quotes doubled"
        ) from error
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read it: {error}") from error


def _columns(header: Sequence[str], path: str) -> tuple[int, int]:
    """The columns of titles and of file names."""
    missing = {"title", "filepath"} - set(header)
    if missing:
        has_other_separator = len(header) == 1 and any(mark in header[0] for mark in ",;")
        remedy = "; separate its cells by tabs" if has_other_separator else ""
        raise DataError(f"{path}: no column {' and '.join(sorted(missing))} in its tab-separated header{remedy}")
    duplicate = next((name for name in ("title", "filepath") if header.count(name) > 1), None)
    if duplicate is not None:
        raise DataError(f"{path}: duplicate column {duplicate} in its header")
    return header.index("title"), header.index("filepath")


def _check_row(cells: Sequence[str], width: int, where: str) -> None:
    if len(cells) != width:
        raise DataError(
            f"{where} has {len(cells)} tab-separated cells, the header has {width}; quote a title that "
            "contains a tab"
        )
    if any("\t" in cell and ("\n" in cell or "\r" in cell) for cell in cells):
        raise DataError(f"{where} opens a quote that is closed in a later row; close it, or double it")
