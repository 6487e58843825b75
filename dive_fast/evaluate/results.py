"""Results of evaluations: one row per model and set in ``results.jsonl``, and the tables made from them."""

import csv
import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dive_fast.errors import DataError
from dive_fast.evaluate import calibration
from dive_fast.evaluate.datasets.catalog import IMAGENET_OOD, KNOWN, SUITES, ZERO_SHOT_10
from dive_fast.io.atomic_files import write_atomic
from dive_fast.io.safe_read import parse_json, read_text
from dive_fast.locks import file_lock

logger = logging.getLogger(__name__)

Row = dict[str, Any]
FILE = "results.jsonl"
LOCK = ".results.lock"
"""Separate from the folder's run lock, which a training run in the same folder holds."""
REQUIRED = ("label", "set", "title", "role", "metric", "value")
"""Fields of every row; the first columns of the table."""


class Results:
    """The rows of a results folder; each added row is on disk when the call returns.

    Several processes may add rows to one folder: each takes the lock, reads the rows, and rewrites the files.
    """

    def __init__(self, folder: Path) -> None:
        """Reads the existing rows.

        Raises:
            DataError: the file cannot be read, or a line of it is not a row.
        """
        self.folder = folder
        self.rows = _read(folder / FILE)

    def find(self, key: str, label: str, name: str, needed: Sequence[str]) -> Row | None:
        """The newest row with this key, renamed to this label and set; None if there is none.

        Args:
            needed: fields besides the number of samples. Rows that lack one of them, from another version or
                edited by hand, are ignored.
        """
        fields = {*needed, "samples"}
        rows = (row for row in reversed(self.rows) if row.get("key") == key and fields <= row.keys())
        return next((row | {"label": label, "set": name} for row in rows), None)

    def latest(self, label: str, name: str) -> Row | None:
        """The newest row of a label and set."""
        rows = (row for row in reversed(self.rows) if (row["label"], row["set"]) == (label, name))
        return next(rows, None)

    def add(self, row: Row) -> None:
        """Adds a row, replacing one with the same label, set and key, and writes all files.

        Raises:
            DataError: the file has changed on disk and cannot be read any more.
            UserError: the folder cannot be written.
        """
        identifying = ("label", "set", "key")
        with file_lock(self.folder / LOCK, f"results folder {self.folder}", wait=True):
            rows = _read(self.folder / FILE)
            self.rows = [other for other in rows if any(other.get(name) != row.get(name) for name in identifying)]
            self.rows.append(row)
            lines = "".join(json.dumps(row) + "\n" for row in self.rows)
            try:
                write_atomic(self.folder / FILE, lines.encode())
                write_atomic(self.folder / "results.csv", as_csv(self.rows).encode())
                write_atomic(self.folder / "results.md", as_markdown(self.rows).encode())
            except OSError as error:
                raise DataError(f"{self.folder}: cannot write the results: {error}") from error


def _read(path: Path) -> list[Row]:
    rows: list[Row] = []
    try:
        text = read_text(path)
    except FileNotFoundError:
        return rows
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read it: {error}") from error
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
    for name in ("value", row["metric"], "top1", *METRICS, *recalls):
        if name in row and (type(row[name]) not in (int, float) or not 0 <= row[name] <= 1):
            raise ValueError(f"{name} is {row[name]!r}, not between 0 and 1")
    for name, largest in calibration.METRICS.items():
        if name in row and (type(row[name]) not in (int, float) or not 0 <= row[name] <= largest):
            bounds = f"between 0 and {largest:g}" if largest < 10 else "a finite number of at least 0"
            raise ValueError(f"{name} is {str(row[name])[:20]}, not {bounds}")
    if "reliability" in row:
        _check_bins(row["reliability"])
    if row.get(row["metric"], row["value"]) != row["value"]:
        raise ValueError(f"its value is {row['value']}, but its {row['metric']} is {row[row['metric']]}")
    for name in ("samples", "left_out"):
        if name in row and (type(row[name]) is not int or row[name] < 0):
            raise ValueError(f"{name} is {row[name]!r}, not a count")


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


RECALLS = [(direction, k) for direction in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
"""Directions and cut-offs of retrieval."""


def as_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV, without the identity and the bins of the reliability diagram."""
    names = [
        name
        for name in dict.fromkeys([*REQUIRED, *(name for row in rows for name in row)])
        if name not in ("identity", "reliability")
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: Sequence[Row]) -> str:
    """Tables 2, 3 and 4 of the paper, retrieval, and all other sets, in percent, as Markdown.

    A line is one model at one precision; if several share a label, digest and precision are appended to it. An
    average over only part of its sets is marked, e.g. ``(2 of 5)``.
    """
    lines = _lines(rows)
    imagenet = [("imagenet1k", "ImageNet (ID)"), *((name, KNOWN[name].title) for name in IMAGENET_OOD)]
    zero_shot = [(name, KNOWN[name].title) for name in ZERO_SHOT_10]
    wilds = [(name, KNOWN[name].title) for name in SUITES["wilds"]]
    parts = [
        _table("ImageNet and its shifts", lines, imagenet, {"OOD avg.": IMAGENET_OOD}),
        _table("Zero-shot", lines, zero_shot, {"ZS avg.": ZERO_SHOT_10}),
        _table(
            "iWildCam (macro F1) and FMoW (accuracy; OOD of the worst region)",
            lines,
            wilds,
            {"ZS avg.": ZERO_SHOT_10},
        ),
        _retrieval(lines),
        _others(lines, {name for name, _ in (*imagenet, *zero_shot, *wilds)}),
    ]
    return "\n".join(part for part in parts if part)


Lines = dict[str, dict[str, Row]]
"""For each model, its newest row for each column: a known data set by its metric, or one of the user's sets."""
METRICS = {
    "top5": "top-5",
    "mean_class_recall": "mean class recall",
    "macro_f1": "macro F1",
    "worst_region": "worst region",
}
"""Metrics that the header of a column names, and how; top-1 is not named."""


def _lines(rows: Sequence[Row]) -> Lines:
    variants: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        variant = str(row.get("weights_digest", "")), str(row.get("precision", ""))
        if variant not in variants.setdefault(row["label"], []):
            variants[row["label"]].append(variant)
    lines: Lines = {}
    for row in rows:
        digest, precision = str(row.get("weights_digest", "")), str(row.get("precision", ""))
        several = len(variants[row["label"]]) > 1
        line = lines.setdefault(f"{row['label']} ({digest[:8]}, {precision})" if several else row["label"], {})
        column = _known_column(row)
        if column is None:
            line[_separate_column(row)] = row
            continue
        other = line.get(column)
        if other is None or other["set"] == row["set"]:
            line[column] = row
        elif row["set"] == column:
            line[_separate_column(other)], line[column] = other, row
        else:  # the same data set from two folders: both are shown
            line[_separate_column(row)] = row
    return lines


def _known_column(row: Row) -> str | None:
    """The known data set whose column shows this row; None for the user's sets and other metrics."""
    known = KNOWN.get(str(row.get("dataset")))
    return str(row["dataset"]) if known is not None and known.metric == row["metric"] else None


def _separate_column(row: Row) -> str:
    """Key of a column that only rows of this set, metric and data set share."""
    return f"{row['set']}\0{row['metric']}\0{row.get('dataset')}"


def _title(column: str, row: Row) -> str:
    notes = [str(row["set"])] if row.get("dataset") and column not in KNOWN else []
    notes += [METRICS[row["metric"]]] if row["metric"] in METRICS else []
    return str(row["title"]) + (f" ({', '.join(notes)})" if notes else "")


def _table(
    title: str, lines: Lines, columns: Sequence[tuple[str, str]], averages: dict[str, Sequence[str]]
) -> str:
    sets = [name for name, _ in columns]
    shown = {line: rows for line, rows in lines.items() if any(name in rows for name in sets)}
    if not shown:
        return ""
    cells = [["Method", *(column for _, column in columns), *averages]]
    for line, rows in shown.items():
        values = [_cell(rows[name], "value") if name in rows else "" for name in sets]
        means = [_mean([rows[name]["value"] for name in members if name in rows], len(members))
                 for members in averages.values()]  # fmt: skip
        cells.append([line, *values, *means])
    return _markdown(title, cells)


def _retrieval(lines: Lines) -> str:
    columns = [f"{direction.replace('_', ' ')} R@{k}" for direction, k in RECALLS]
    cells = [["Method", "Set", *columns]]
    for line, rows in lines.items():
        for column, row in rows.items():
            if "image_to_text_r1" in row:
                recalls = [_percent(row[f"{direction}_r{k}"]) for direction, k in RECALLS]
                cells.append([line, _title(column, row) + _left_out(row), *recalls])
    return _markdown("Retrieval", cells) if len(cells) > 1 else ""


def _others(lines: Lines, tabled: set[str]) -> str:
    """Table of the sets that no other table has, with averages by role."""
    titles = {
        name: _title(name, row)
        for rows in lines.values()
        for name, row in rows.items()
        if name not in tabled and "image_to_text_r1" not in row
    }
    if not titles:
        return ""
    roles = {"id": "ID avg.", "ood": "OOD avg.", "zero_shot": "ZS avg."}
    members = {
        column: [name for name in titles if any(rows.get(name, {}).get("role") == role for rows in lines.values())]
        for role, column in roles.items()
    }
    averages: dict[str, Sequence[str]] = {column: names for column, names in members.items() if names}
    return _table("Other sets", lines, list(titles.items()), averages)


def _markdown(title: str, cells: list[list[str]]) -> str:
    header, *body = [[" ".join(cell.split()).replace("|", r"\|") for cell in row] for row in cells]
    rows = [header, ["---", *("---:" for _ in header[1:])], *body]
    return f"## {title}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(row: Row, name: str) -> str:
    return _percent(row[name]) + _left_out(row)


def _left_out(row: Row) -> str:
    """A note with the number of samples left out, if any."""
    return f" ({row['left_out']} left out)" if row.get("left_out") else ""


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _mean(shares: Sequence[float], expected: int) -> str:
    if not shares:
        return ""
    note = "" if len(shares) == expected else f" ({len(shares)} of {expected})"
    return _percent(sum(shares) / len(shares)) + note
