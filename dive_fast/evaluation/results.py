"""Results of evaluations: one row per model and set in ``results.jsonl``, and the files made from them."""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dive_fast.errors import DataError
from dive_fast.evaluation import calibration
from dive_fast.evaluation.tables import (
    METRICS,
    QUESTIONS,
    RECALLS,
    REQUIRED,
    Row,
    as_csv,
    as_markdown,
    is_adversarial,
)
from dive_fast.io.atomic_files import write_atomic
from dive_fast.io.safe_read import parse_json, read_text
from dive_fast.locks import file_lock

logger = logging.getLogger(__name__)

FILE = "results.jsonl"
LOCK = ".results.lock"
"""Separate from the folder's run lock, which a training run in the same folder holds."""


class Results:
    """The rows of a results folder; each added row is on disk when the call returns, tables are written later.

    Several processes may add rows to one folder. A row is one appended line, which replaces earlier lines with the
    same label, set and key: the cost of a row does not depend on the number of rows.
    """

    def __init__(self, folder: Path) -> None:
        """Reads the existing rows.

        Raises:
            DataError: the file cannot be read, or a line of it is not a row.
        """
        self.folder, self._file = folder, folder / FILE
        self._rows: dict[str, Row] = {}
        self._num_lines = 0
        self._position = _Position()
        self._read_new_lines()

    @property
    def rows(self) -> list[Row]:
        """The rows, in the order in which they were added."""
        return list(self._rows.values())

    def find(self, key: str, label: str, name: str, needed: Sequence[str]) -> Row | None:
        """The newest row with this key, renamed to this label and set; None if there is none.

        Args:
            needed: fields besides the number of samples. Rows that lack one of them, from another version or
                edited by hand, are ignored.
        """
        fields = {*needed, "samples"}
        rows = (row for row in reversed(self._rows.values()) if row.get("key") == key and fields <= row.keys())
        return next((row | {"label": label, "set": name} for row in rows), None)

    def latest(self, label: str, name: str, attack: Mapping[str, Any] | None = None) -> Row | None:
        """The newest row of a label and set.

        Args:
            attack: fields of a row under attack; None: of a row without one.
        """
        expected = {"label": label, "set": name, **(attack or {})}
        rows = (row for row in reversed(self._rows.values()) if is_adversarial(row) == (attack is not None))
        return next((row for row in rows if all(row.get(field) == expected[field] for field in expected)), None)

    def add(self, row: Row) -> None:
        """Adds a row, replacing one with the same label, set and key, by one line of the file.

        Raises:
            DataError: the file has changed on disk and cannot be read any more.
            UserError: the folder cannot be written.
        """
        with self._changing():
            if not self._position.is_complete:
                self._rewrite()  # a line that is appended to an incomplete one would be lost
            with self._file.open("ab") as file:
                file.write(json.dumps(row).encode() + b"\n")
            self._read_new_lines()

    @contextmanager
    def writing_tables(self) -> Iterator[None]:
        """Writes the tables once at the end of the context, also of one that an error ends.

        Raises:
            DataError, UserError: as :meth:`write_tables`.
        """
        try:
            yield
        finally:
            self.write_tables()

    def write_tables(self) -> None:
        """Writes ``results.csv`` and ``results.md`` from all rows, and removes replaced lines of the file.

        Raises:
            DataError, UserError: as :meth:`add`.
        """
        with self._changing():
            if self._num_lines > len(self._rows) or not self._position.is_complete:
                self._rewrite()
            write_atomic(self.folder / "results.csv", as_csv(self.rows).encode())
            write_atomic(self.folder / "results.md", as_markdown(self.rows).encode())

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Holds the lock of the folder, with the rows of other processes read."""
        with file_lock(self.folder / LOCK, f"results folder {self.folder}", wait=True):
            self._read_new_lines()
            try:
                yield
            except OSError as error:
                raise DataError(f"{self.folder}: cannot write the results: {error}") from error

    def _rewrite(self) -> None:
        """Replaces the file by one with a line for each row."""
        write_atomic(self._file, "".join(json.dumps(row) + "\n" for row in self._rows.values()).encode())
        status = self._file.stat()
        self._position, self._num_lines = _Position(status.st_ino, status.st_size), len(self._rows)

    def _read_new_lines(self) -> None:
        """Reads what has been appended since the last call, or everything if the file was replaced."""
        try:
            content, self._position, is_continued = _read_after(self._file, self._position)
        except (OSError, ValueError) as error:
            raise DataError(f"{self._file}: cannot read it: {error}") from error
        lines = _parse(self._file, content)
        if not is_continued:
            self._rows, self._num_lines = {}, 0
        self._num_lines += len(lines)
        for row in lines:
            identifying = repr([row.get(name) for name in ("label", "set", "key")])
            self._rows.pop(identifying, None)
            self._rows[identifying] = row


class _Position(NamedTuple):
    """The part of a results file that has been read."""

    inode: int = 0
    size: int = 0
    """Bytes."""
    is_complete: bool = True
    """Whether it ends with the end of a line."""


def _read_after(path: Path, position: _Position) -> tuple[str, _Position, bool]:
    """The text of a file after a position, the position after that, and whether it is still the same file.

    Raises:
        OSError, ValueError: as :func:`dive_fast.io.safe_read.read_text`.
    """
    try:
        status = path.stat()
        is_continued = status.st_ino == position.inode and status.st_size >= position.size and position.is_complete
        if is_continued:
            with path.open("rb") as file:
                file.seek(position.size)
                text = file.read().decode()
        else:
            read_text(path)  # validates it
            text = path.read_bytes().decode()  # with the ends of lines as they are, for the position
    except FileNotFoundError:
        return "", _Position(), False
    size = len(text.encode()) + (position.size if is_continued else 0)
    return text, _Position(status.st_ino, size, not text or text.endswith("\n")), is_continued


def _parse(path: Path, text: str) -> list[Row]:
    rows: list[Row] = []
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
            if not isinstance(row, dict) or not set(REQUIRED) <= set(row):
                raise ValueError(f"a row needs {', '.join(REQUIRED)}")
            _check_row(row)
        except ValueError as error:
            if number == len(lines) and not text.endswith("\n"):
                logger.warning("%s: its last line is incomplete and is ignored: %s", path, line[:60])
                break
            raise DataError(f"{path}: line {number} is not a result: {error}; remove it") from error
        rows.append(row)
    return rows


def _check_row(row: Row) -> None:
    """Validates the fields that tables are made from.

    Raises:
        ValueError: a field is missing or invalid; the message names it.
    """
    if not all(isinstance(row[name], str) for name in ("label", "set", "title", "metric")):
        raise ValueError("its label, set, title or metric is not text")
    recalls = {f"{direction}_r{k}" for direction, k in RECALLS}
    if recalls & row.keys() and not recalls <= row.keys():
        raise ValueError(f"a retrieval row needs {', '.join(sorted(recalls))}")
    if set(QUESTIONS) & row.keys() and not {*QUESTIONS, "candidates"} <= row.keys():
        raise ValueError(f"a row of questions needs candidates, {', '.join(QUESTIONS)}")
    for name in ("value", row["metric"], "top1", *METRICS, *recalls, *QUESTIONS):
        if name in row and (type(row[name]) not in (int, float) or not 0 <= row[name] <= 1):
            raise ValueError(f"{name} is {row[name]!r}, not between 0 and 1")
    for name, largest in calibration.METRICS.items():
        if name in row and (type(row[name]) not in (int, float) or not 0 <= row[name] <= largest):
            bounds = f"between 0 and {largest:g}" if largest < 10 else "a finite number of at least 0"
            raise ValueError(f"{name} is {str(row[name])[:20]}, not {bounds}")
    if "reliability" in row:
        _check_bins(row["reliability"])
    if is_adversarial(row):
        _check_attack(row)
    if row.get(row["metric"], row["value"]) != row["value"]:
        raise ValueError(f"its value is {row['value']}, but its {row['metric']} is {row[row['metric']]}")
    for name in ("samples", "left_out"):
        if name in row and (type(row[name]) is not int or row[name] < 0):
            raise ValueError(f"{name} is {row[name]!r}, not a count")


def _check_attack(row: Row) -> None:
    if not all(isinstance(row.get(name), str) for name in ("attack", "norm")):
        raise ValueError("its attack or norm is not text")
    if not _is_number(row.get("eps")) or not 0 <= row["eps"] < math.inf:
        raise ValueError(f"eps is {row.get('eps')!r}, not a finite number of at least 0")
    if not _is_number(row.get("clean")) or not 0 <= row["clean"] <= 1:
        raise ValueError(f"clean is {row.get('clean')!r}, not between 0 and 1")
    for name in ("steps", "subset", "not_finite", "seed"):
        if row.get(name) is not None and (type(row[name]) is not int or row[name] < 0):
            raise ValueError(f"{name} is {row[name]!r}, not a count")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _check_bins(bins: Any) -> None:
    fields = calibration.Bins._fields
    if not isinstance(bins, dict) or set(bins) != set(fields):
        raise ValueError(f"its reliability has other fields than {', '.join(sorted(fields))}")
    for name, values in bins.items():
        is_complete = isinstance(values, list) and len(values) == calibration.BINS
        if name == "samples":
            if not is_complete or not all(type(value) is int and 0 <= value < 2**53 for value in values):
                raise ValueError(f"the samples of its reliability are not {calibration.BINS} counts")
        elif not is_complete or not all(type(value) in (int, float) and 0 <= value <= 1 for value in values):
            raise ValueError(f"the {name} of its reliability is not {calibration.BINS} values in [0, 1]")
