"""The samples of a data set as columns, so that millions of samples are a few arrays and no Python objects.

The arrays can be memory-mapped: all ranks and loader processes of a node then share one copy, and since reading a
sample changes no reference count of a stored object, a forked process never copies their pages.
"""

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from dive_fast.data.sources.listed_files import ListedFiles, text_name
from dive_fast.errors import DataError

Columns = dict[str, NDArray[Any]]
"""Arrays by name, as they are stored."""
MAX_SHARED = 1 << 18
"""Number of distinct strings up to which equal ones are stored once; bounds the memory that finding them takes."""
SEPARATOR = "\0"
"""Separates several texts of a sample; in a text itself it becomes a space."""


@dataclass(frozen=True)
class Sample:
    """One image with its label and texts."""

    key: str
    """Name of the sample in the data set, made printable by :func:`printable`; part of the data set's digest."""
    path: Path
    """File that holds the image: an image file or a tar."""
    offset: int = 0
    """Position of the image's first byte in the file."""
    size: int = -1
    """Number of bytes; -1: up to the end of the file."""
    label: int = -1
    """Index of the class; -1: unknown."""
    texts: tuple[str, ...] = ()
    """Captions, or texts of a class."""

    def unusable(self, reason: str) -> DataError:
        """The error to raise for a sample whose image cannot be used."""
        return DataError(f"{self.path}: sample {self.key}: {reason}")


def printable(name: str) -> str:
    """A file system name as printable text that can be written as UTF-8.

    Bytes that are not UTF-8, which Python holds as surrogates, become hexadecimal escapes.
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class Strings(Sequence[bytes]):
    """Byte strings in one array."""

    def __init__(self, values: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        """Takes the strings as columns.

        Args:
            values: ``(bytes,)``: all strings, one after the other.
            ends: ``(N,)``: the end of each string in ``values``.
        """
        self.values, self.ends = values, ends

    @classmethod
    def of(cls, strings: Iterable[bytes]) -> Self:
        """The columns of some strings."""
        builder = StringsBuilder()
        for string in strings:
            builder.append(string)
        return cls(*builder.columns())

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, row: int) -> bytes: ...
    @overload
    def __getitem__(self, row: slice) -> list[bytes]: ...
    def __getitem__(self, row: int | slice) -> bytes | list[bytes]:
        """The string of a row in [0, N)."""
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
        return self.values[self.ends[row - 1] if row else 0 : self.ends[row]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        start = 0
        for first in range(0, len(self), 4096):  # not all ends as Python integers at once
            for end in self.ends[first : first + 4096].tolist():
                yield self.values[start:end].tobytes()
                start = end

    def select(self, rows: NDArray[np.int64]) -> "Strings":
        """The strings of some rows, in this order."""
        lengths = self.lengths[rows]
        ends = np.cumsum(lengths)
        values = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
        for first in range(0, len(rows), 1 << 16):  # the positions of all bytes at once take 8 times their memory
            part = slice(first, first + (1 << 16))
            start, end = int(ends[first] - lengths[first]), int(ends[part][-1])
            # The position of each byte here, and the distance to it in the strings' values.
            distance = np.repeat(self.ends[rows[part]] - ends[part], lengths[part])
            values[start:end] = self.values[np.arange(start, end) + distance]
        return Strings(values, ends)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """``(N,)``: the number of bytes of each string."""
        return np.diff(self.ends, prepend=0)


class StringsBuilder:
    """Collects byte strings into two growing arrays."""

    def __init__(self) -> None:
        self.values, self.ends = bytearray(), array("q")

    def __len__(self) -> int:
        return len(self.ends)

    def append(self, string: bytes) -> None:
        """Adds a string."""
        self.values += string
        self.ends.append(len(self.values))

    def extend(self, strings: Strings) -> None:
        """Adds the strings of other columns."""
        self.ends.frombytes((strings.ends + len(self.values)).astype(np.int64).tobytes())
        self.values += strings.values.tobytes()

    def columns(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Values and ends, without a copy; nothing can be added afterwards."""
        return np.frombuffer(self.values, np.uint8), np.frombuffer(self.ends, np.int64)


class SharedStrings:
    """Byte strings of which equal ones share a row, as far as the first :data:`MAX_SHARED` are equal to others."""

    def __init__(self) -> None:
        self.strings = StringsBuilder()
        self._rows: dict[bytes, int] = {}

    def row(self, string: bytes) -> int:
        """The row of a string, which is added if it is new."""
        row = self._rows.get(string)
        if row is None:
            row = len(self.strings)
            self.strings.append(string)
            if row < MAX_SHARED:
                self._rows[string] = row
        return row


@dataclass(frozen=True, eq=False)
class SampleTable(Sequence[Sample]):
    """Samples that are created from columns on access: all rows of the columns, or those that ``rows`` selects."""

    root: str
    """Folder that relative names of files start from."""
    files: Strings
    """Names of the files, as bytes of the file system."""
    keys: Strings
    """Keys of the samples, UTF-8; the same object as ``files`` where they are equal."""
    file: NDArray[np.int32] | None
    """Row of each sample's file in ``files``; None: its own row."""
    offset: NDArray[np.int64] | None
    """None: the image is the complete file."""
    size: NDArray[np.int64]
    label: NDArray[np.int64] | None
    """None: unknown."""
    lists: Strings
    """Lists of texts, UTF-8, separated by :data:`SEPARATOR`; empty if no sample has texts."""
    list_of: NDArray[np.int32] | None
    """Row of each sample's list of texts in ``lists``; None: its own row."""
    rows: NDArray[np.int64] | None = None
    """The rows of the columns that are samples, in order; None: all."""
    stored_digest: str = ""
    """The digest of the columns, if it is stored with them."""
    captions_are_lines: bool = False
    """Whether each line of a text is a text of the sample, see :func:`split_lines`."""
    listed: ListedFiles | None = None
    """The state of the files when they were listed, of sets with an index that is used without another listing."""

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> "SampleTable":
        """The table of some samples."""
        builder = TableBuilder()
        for sample in samples:
            file = builder.file(os.fsencode(sample.path))
            place = {"offset": sample.offset, "label": sample.label}
            builder.add(sample.key, file, sample.size, sample.texts, **place)
        return builder.build()

    @classmethod
    def of_files(
        cls,
        root: str,
        files: Strings,
        keys: Strings,
        size: NDArray[np.int64],
        *,
        label: NDArray[np.int64] | None = None,
        lists: Strings | None = None,
        listed: ListedFiles | None = None,
    ) -> "SampleTable":
        """The table of samples that are a complete file each.

        Args:
            lists: the list of texts of each sample; None: none has texts.
        """
        return cls(root, files, keys, None, None, size, label, lists or Strings.of(()), None, listed=listed)

    def __len__(self) -> int:
        return len(self.size) if self.rows is None else len(self.rows)

    @overload
    def __getitem__(self, row: int) -> Sample: ...
    @overload
    def __getitem__(self, row: slice) -> list[Sample]: ...
    def __getitem__(self, row: int | slice) -> Sample | list[Sample]:
        """The sample of a row, or the samples of a slice of rows."""
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
        at = self._at(row)
        return Sample(
            self._text(self.keys, at),
            self._path(at),
            0 if self.offset is None else int(self.offset[at]),
            int(self.size[at]),
            -1 if self.label is None else int(self.label[at]),
            self._texts(at),
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[row] for row in range(len(self)))

    def key(self, row: int) -> str:
        """The key of a sample."""
        return self._text(self.keys, self._at(row))

    def iter_keys(self) -> Iterator[bytes]:
        """The keys of all samples, UTF-8."""
        return iter(self.keys) if self.rows is None else (self.keys[row] for row in self.rows.tolist())

    def path(self, row: int) -> Path:
        """The file of a sample."""
        return self._path(self._at(row))

    def texts(self, row: int) -> tuple[str, ...]:
        """The texts of a sample."""
        return self._texts(self._at(row))

    def image_numbers(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """``(n,)``: numbers of the images of some samples, counted as they first appear among these samples.

        Samples of the same image file have the same number.
        """
        places = np.stack([self.file_rows[rows], self.offsets[rows]])
        _, first, image = np.unique(places, axis=1, return_index=True, return_inverse=True)
        numbers = np.empty(len(first), np.int64)
        numbers[np.argsort(first, kind="stable")] = np.arange(len(first))
        return numbers[image.reshape(-1)]

    def check_unchanged(self, row: int, status: os.stat_result | None = None) -> None:
        """Compares the file of a sample with the listing of the set, if that is known; see :class:`ListedFiles`.

        Args:
            status: status of the opened file; None: it is asked for.
        """
        if self.listed is not None:
            at = self._at(row)
            self.listed.check(self._file_row(at), self._path(at), int(self.size[at]), status)

    def files_of(self, row: int) -> list[Path]:
        """The file of a sample, and its text file if the listing has one."""
        path = self.path(row)
        has_text = self.listed is not None and self.listed.text_sizes is not None
        return [path, path.with_name(text_name(path.name))] if has_text else [path]

    def check_if_readable(self, row: int) -> None:
        """Compares the file of a sample as :meth:`check_unchanged`, unless it cannot be examined."""
        with suppress(OSError):
            self.check_unchanged(row)

    @property
    def labels(self) -> NDArray[np.int64]:
        """``(N,)``: the label of each sample; -1: unknown."""
        if self.label is None:
            return np.full(len(self), -1)
        return self._selected(self.label)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """``(N,)``: the number of bytes of each image; -1: up to the end of its file."""
        return self._selected(self.size)

    @property
    def offsets(self) -> NDArray[np.int64]:
        """``(N,)``: the position of each image in its file."""
        return np.zeros(len(self), np.int64) if self.offset is None else self._selected(self.offset)

    @property
    def file_rows(self) -> NDArray[np.int64]:
        """``(N,)``: the row of each sample's file among all files."""
        rows = np.arange(len(self.size)) if self.file is None else self.file.astype(np.int64)
        return self._selected(rows)

    @property
    def list_rows(self) -> NDArray[np.int64]:
        """``(N,)``: the row of each sample's list of texts; samples of equal numbers have equal texts."""
        rows = np.arange(len(self.size)) if self.list_of is None else self.list_of.astype(np.int64)
        return self._selected(rows)

    @property
    def has_texts(self) -> bool:
        """Whether any sample has a text."""
        return len(self.lists.values) > 0

    def file_path(self, file_row: int) -> Path:
        """The path of a row of :attr:`file_rows`."""
        return Path(self.root, os.fsdecode(self.files[file_row]))

    def used_files(self) -> list[Path]:
        """The distinct files of all samples."""
        return [self.file_path(row) for row in np.unique(self.file_rows).tolist()]

    def texts_of_list(self, list_row: int) -> tuple[str, ...]:
        """The texts of a row of :attr:`list_rows`."""
        return self._split(self.lists[list_row], list_row)

    def text_lists(self) -> Iterator[tuple[str, ...]]:
        """The distinct stored lists of texts of the samples, in the order of their rows."""
        for row in np.unique(self.list_rows).tolist() if self.has_texts else ():
            yield self._split(self.lists[row], row)

    @property
    def text_counts(self) -> NDArray[np.int64]:
        """``(N,)``: the number of texts of each sample."""
        return self.list_counts[self.list_rows] if self.has_texts else np.zeros(len(self), np.int64)

    @cached_property
    def list_counts(self) -> NDArray[np.int64]:
        """The number of texts of each row of :attr:`list_rows`."""
        values, ends = self.lists.values, self.lists.ends
        counts = (self.lists.lengths > 0).astype(np.int64)
        marks = np.flatnonzero(values == 0)
        if self.captions_are_lines:
            marks = np.flatnonzero((values == 0) | (values == 10) | (values == 13))
        # Rows with a separator, or with an end of line that may separate: few of millions.
        for row in np.unique(np.searchsorted(ends, marks, "right")).tolist():
            counts[row] = len(self._split(self.lists[row], row))
        return counts

    @cached_property
    def _lines_are_split(self) -> bool:
        """Whether :attr:`captions_are_lines` changes the texts of a sample."""
        if not self.captions_are_lines:
            return False
        marks = np.flatnonzero((self.lists.values == 10) | (self.lists.values == 13))
        rows = np.unique(np.searchsorted(self.lists.ends, marks, "right")).tolist()
        as_stored = replace(self, captions_are_lines=False)
        return any(self._split(self.lists[row], row) != as_stored._split(self.lists[row], row) for row in rows)

    def select(self, rows: NDArray[np.int64]) -> "SampleTable":
        """The samples of some rows, in this order."""
        return replace(self, rows=rows if self.rows is None else self.rows[rows])

    def with_labels(self, labels: NDArray[np.int64]) -> "SampleTable":
        """The same samples with other labels, ``(N,)``."""
        label = np.full(len(self.size), -1)
        label[slice(None) if self.rows is None else self.rows] = labels
        return replace(self, label=label, stored_digest="")

    def split_lines(self) -> "SampleTable":
        """The same samples, of which each line of a text is a text."""
        return replace(self, captions_are_lines=True)

    def digest(self) -> str:
        """A hash of keys, labels, sizes and texts of all samples in order, wherever their files lie."""
        digest = hashlib.sha256((self.stored_digest or self.digest_of_columns()).encode())
        digest.update(repr(self._lines_are_split).encode())
        if self.rows is not None:
            digest.update(self.rows.astype("<i8").tobytes())
        return digest.hexdigest()

    def digest_of_columns(self) -> str:
        """The part of :meth:`digest` that depends on the columns alone."""
        complete = replace(self, rows=None)
        digest = hashlib.sha256()
        for strings in (self.keys, self.lists):
            digest.update(strings.lengths.astype("<i8").tobytes())
            digest.update(np.ascontiguousarray(strings.values).data)
        for column in (complete.labels, complete.sizes, *((complete.list_rows,) if self.has_texts else ())):
            digest.update(column.astype("<i8").tobytes())
        return digest.hexdigest()

    def columns(self) -> Columns:
        """The arrays of a table without ``rows``, to be stored; :meth:`from_columns` reads them."""
        assert self.rows is None
        columns: Columns = {"size": self.size}
        strings = {"files": self.files, "lists": self.lists}
        if self.keys is not self.files:
            strings["keys"] = self.keys
        for name, each in strings.items():
            columns |= {name: each.values, f"{name}_ends": each.ends}
        optional: dict[str, NDArray[Any] | None] = {}
        optional |= {"file": self.file, "offset": self.offset, "label": self.label, "list_of": self.list_of}
        if self.listed is not None:
            listed = self.listed
            optional |= {"time": listed.times, "text_size": listed.text_sizes, "text_time": listed.text_times}
        return columns | {name: column for name, column in optional.items() if column is not None}

    @classmethod
    def from_columns(cls, columns: Mapping[str, NDArray[Any]], root: str, digest: str) -> Self:
        """The table of stored columns.

        Args:
            digest: the result of :meth:`digest_of_columns` when they were stored.

        Raises:
            ValueError: a column is missing, or has another type or length than the others require.
        """
        count, strings = len(columns.get("size", ())), {}
        for name in ("files", "lists", "keys"):
            if name not in columns and name == "keys":
                continue
            values, ends = (_checked(columns, each, kind) for each, kind in ((name, "u1"), (f"{name}_ends", "i8")))
            if len(ends) and (int(ends[0]) < 0 or bool((np.diff(ends) < 0).any()) or int(ends[-1]) != len(values)):
                raise ValueError(f"{name}_ends: not increasing up to the length of {name}")
            strings[name] = Strings(values, ends)
        numbers: dict[str, Any] = {
            name: _checked(columns, name, kind, count) if name in columns else None
            for name, kind in (("file", "i4"), ("offset", "i8"), ("label", "i8"), ("list_of", "i4"))
        }
        for name, rows in (("file", len(strings["files"])), ("list_of", len(strings["lists"]))):
            column = numbers[name]
            if column is None and rows != count and (rows or name == "file"):
                raise ValueError(f"{name} is missing")
            if column is not None and count and not (int(column.min()) >= 0 and int(column.max()) < rows):
                raise ValueError(f"{name}: a value is out of range")
        keys = strings.get("keys", strings["files"])
        if len(keys) != count:
            raise ValueError(f"keys: {len(keys)} for {count} samples")
        size = _checked(columns, "size", "i8", count)
        listed = _listed(columns, len(strings["files"]))
        optional = {"stored_digest": digest, "listed": listed, **numbers}
        return cls(root, strings["files"], keys, size=size, lists=strings["lists"], **optional)

    def _at(self, row: int) -> int:
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        row = row % len(self)
        return row if self.rows is None else int(self.rows[row])

    def _selected(self, column: NDArray[Any]) -> NDArray[np.int64]:
        return (column if self.rows is None else column[self.rows]).astype(np.int64, copy=False)

    def _path(self, at: int) -> Path:
        return self.file_path(self._file_row(at))

    def _file_row(self, at: int) -> int:
        return at if self.file is None else int(self.file[at])

    def _texts(self, at: int) -> tuple[str, ...]:
        if not self.has_texts:
            return ()
        at = at if self.list_of is None else int(self.list_of[at])
        return self._split(self.lists[at], at)

    def _split(self, stored: bytes, at: int) -> tuple[str, ...]:
        if not stored:
            return ()
        texts = tuple(text for text in self._decode(stored, at).split(SEPARATOR) if text.strip())
        return split_lines(texts) if self.captions_are_lines else texts

    def _text(self, strings: Strings, at: int) -> str:
        return self._decode(strings[at], at)

    def _decode(self, stored: bytes, at: int) -> str:
        try:
            return stored.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.root}: invalid text in row {at} of the index: {error}") from error


class TableBuilder:
    """Collects the columns of a :class:`SampleTable` sample by sample, without keeping Python objects."""

    def __init__(self, root: str = "", *, shares_texts: bool = True) -> None:
        """Begins an empty table.

        Args:
            root: folder that relative names of files start from.
            shares_texts: store equal lists of texts once. This keeps each distinct list in memory while the table
                is built: turn it off where most texts differ.
        """
        self._root, self._shares_texts = root, shares_texts
        self.files, self.keys, self.lists = StringsBuilder(), StringsBuilder(), StringsBuilder()
        self._file, self._offset, self._size = array("i"), array("q"), array("q")
        self._label, self._list_of = array("q"), array("i")
        self._file_rows: dict[bytes, int] = {}
        self._list_rows: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._size)

    def file(self, name: bytes) -> int:
        """The row of a file, which is added if it is new."""
        row = self._file_rows.setdefault(name, len(self.files))
        if row == len(self.files):
            self.files.append(name)
        return row

    def add(
        self, key: str, file: int, size: int, texts: Sequence[str] = (), *, offset: int = 0, label: int = -1
    ) -> None:
        """Adds a sample; the arguments are those of :class:`Sample`, but for the row of its file."""
        self.keys.append(key.encode())
        self._list_of.append(self._list_row(pack_texts(texts)))
        for column, value in zip(self._numbers(), (file, offset, size, label), strict=True):
            column.append(value)

    def extend(self, part: SampleTable) -> None:
        """Adds the samples of another table without ``rows``, and its files."""
        assert part.rows is None
        columns = part.file_rows + len(self.files), part.offsets, part.sizes, part.labels
        for column, values in zip(self._numbers(), columns, strict=True):
            column.frombytes(values.astype(column.typecode).tobytes())
        if not part.has_texts:
            rows = np.full(len(part), self._list_row(b"") if len(part) else 0)
        elif self._shares_texts:
            rows = np.array([self._list_row(stored) for stored in part.lists], np.int64)[part.list_rows]
        else:
            rows = part.list_rows + len(self.lists)
            self.lists.extend(part.lists)
        self._list_of.frombytes(rows.astype(np.int32).tobytes())
        self.files.extend(part.files)
        self.keys.extend(part.keys)

    def build(self) -> SampleTable:
        """The table; nothing can be added afterwards."""
        files, keys, lists = (Strings(*each.columns()) for each in (self.files, self.keys, self.lists))
        offset, size, label = (np.frombuffer(each, np.int64) for each in self._numbers()[1:])
        same_names = len(files) == len(keys) and np.array_equal(files.ends, keys.ends)
        file, list_of = np.frombuffer(self._file, np.int32), np.frombuffer(self._list_of, np.int32)
        return SampleTable(
            self._root,
            files,
            files if same_names and np.array_equal(files.values, keys.values) else keys,
            None if is_own_row(file, len(files)) else file,
            offset if offset.any() else None,
            size,
            label if (label != -1).any() else None,
            lists if len(lists.values) else Strings.of(()),
            None if not len(lists.values) or is_own_row(list_of, len(lists)) else list_of,
        )

    def _numbers(self) -> "tuple[array[int], ...]":
        return self._file, self._offset, self._size, self._label

    def _list_row(self, stored: bytes) -> int:
        if not self._shares_texts:
            self.lists.append(stored)
            return len(self.lists) - 1
        row = self._list_rows.setdefault(stored, len(self.lists))
        if row == len(self.lists):
            self.lists.append(stored)
        return row


def clean_text(text: str) -> str:
    """A text as readers of raw sets keep it, without white space at its ends; empty: it has no text."""
    # As it will be stored: a text of zero bytes alone would become blank only there.
    return text.replace(SEPARATOR, " ").strip()


def pack_texts(texts: Sequence[str]) -> bytes:
    """The stored form of a list of texts."""
    return SEPARATOR.join(text.replace(SEPARATOR, " ") for text in texts).encode()


def split_lines(texts: Sequence[str]) -> tuple[str, ...]:
    """Each line of each text that is not blank; a text of one line is unchanged."""
    captions: list[str] = []
    for text in texts:
        # str.splitlines also splits at form feeds and Unicode separators.
        lines = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
        several = [line for line in lines if line]
        captions += several if len(several) > 1 else [text]
    return tuple(captions)


def in_order_of_use(rows: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Distinct rows in the order in which they first occur, and the position of each row among them."""
    distinct, first, position = np.unique(rows, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return distinct[order].astype(np.int64), rank[position]


def is_own_row(rows: NDArray[Any], count: int) -> bool:
    """Whether each of ``count`` samples has its own row, in order: such a column is not stored."""
    return len(rows) == count and bool((rows == np.arange(count, dtype=rows.dtype)).all())


def _listed(columns: Mapping[str, NDArray[Any]], count: int) -> ListedFiles | None:
    if "time" not in columns:
        return None
    times = _checked(columns, "time", "i8", count)
    if "text_size" not in columns:
        return ListedFiles(times)
    text_sizes, text_times = (_checked(columns, name, "i8", count) for name in ("text_size", "text_time"))
    return ListedFiles(times, text_sizes, text_times)


def _checked(columns: Mapping[str, NDArray[Any]], name: str, kind: str, count: int | None = None) -> NDArray[Any]:
    if name not in columns:
        raise ValueError(f"{name} is missing")
    column = columns[name]
    if column.dtype != np.dtype(kind) or column.ndim != 1 or (count is not None and len(column) != count):
        raise ValueError(f"{name}: {column.dtype} {column.shape}, expected {np.dtype(kind)} ({count or 'any'},)")
    return column
