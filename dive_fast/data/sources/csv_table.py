"""Reads a tab-separated table of image files and captions."""

import csv
import logging
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dive_fast.data.content_hashes import map_in_threads, stat_if_exists
from dive_fast.data.sources.sample_table import Sample
from dive_fast.data.sources.source import EMPTY_CAPTION, Skipped, Source, locate
from dive_fast.errors import DataError

logger = logging.getLogger(__name__)


class _Row(NamedTuple):
    number: int
    """Index of the row, counted from 0 without the header and empty lines."""
    name: str
    title: str


def open_csv(path: str, image_root: str | None, *, group: bool) -> Source:
    """Opens a tab-separated file with columns ``title`` and ``filepath``, as FLYP writes it.

    Rows without a title and rows whose file does not exist are skipped. If no file exists, the paths may begin
    with folders of another machine (FLYP's begin with ``./datasets/data``): leading folders are then removed until
    the first path leads to a file, from all paths that share them, and a warning is logged.

    Args:
        image_root: folder that relative file paths start from; None: the folder of the CSV file.
        group: True: rows of one file become one sample with all its titles (FLYP writes one row per image and
            template). False: each row is a sample.

    Raises:
        DataError: the file or a column is missing, a row has a wrong number of cells, a quote is not closed, there
            are no rows, or none of the files exists.
    """
    file = locate(path)
    root = Path(image_root) if image_root is not None else file.parent
    rows = _csv_rows(file, path)
    skipped = [Skipped(f"{row.name}#{row.number}", EMPTY_CAPTION) for row in rows if not row.title]
    rows = [row for row in rows if row.title]
    if not rows:
        empty = f": all {len(skipped)} titles are empty" if skipped else ""
        raise DataError(f"{path}: no rows below its header{empty}")
    files = _existing_files(list(dict.fromkeys(row.name for row in rows)), root, path)
    missing = [row for row in rows if row.name not in files]
    rows = [row for row in rows if row.name in files]
    samples: list[Sample] = []
    if group:
        grouped: dict[str, list[str]] = {}
        for row in rows:
            grouped.setdefault(row.name, []).append(row.title)
        skipped += [Skipped(name, "no such file") for name in dict.fromkeys(row.name for row in missing)]
        samples = [
            Sample(name, files[name][0], size=files[name][1], texts=tuple(titles))
            for name, titles in grouped.items()
        ]
    else:
        skipped += [Skipped(f"{row.name}#{row.number}", "no such file") for row in missing]
        samples = [
            Sample(f"{row.name}#{row.number}", files[row.name][0], size=files[row.name][1], texts=(row.title,))
            for row in rows
        ]
    return Source.of(samples, skipped=skipped)


def _csv_rows(file: Path, path: str) -> list[_Row]:
    rows: list[_Row] = []
    # Equal titles share one string: FLYP's files repeat each prompt for every image.
    titles: dict[str, str] = {}
    number, line = 0, 1
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            kind = "directory" if file.is_dir() else "pipe or device"
            raise DataError(f"{path}: cannot read it: it is a {kind}")
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.reader(lines, delimiter="\t", strict=True)
            header = next(reader, [])
            missing = {"title", "filepath"} - set(header)
            if missing:
                has_other_separator = len(header) == 1 and any(mark in header[0] for mark in ",;")
                remedy = "; separate its cells by tabs" if has_other_separator else ""
                raise DataError(
                    f"{path}: no column {' and '.join(sorted(missing))} in its tab-separated header{remedy}"
                )
            duplicate = next((name for name in ("title", "filepath") if header.count(name) > 1), None)
            if duplicate is not None:
                raise DataError(f"{path}: duplicate column {duplicate} in its header")
            title_column, name_column = header.index("title"), header.index("filepath")
            line = reader.line_num + 1
            for cells in reader:
                if cells:  # not an empty line
                    where = f"{path}: row {number + 1} (line {line})"
                    if len(cells) != len(header):
                        raise DataError(
                            f"{where} has {len(cells)} tab-separated cells, the header has {len(header)}; "
                            "quote a title that contains a tab"
                        )
                    if any("\t" in cell and ("\n" in cell or "\r" in cell) for cell in cells):
                        raise DataError(
                            f"{where} opens a quote that is closed in a later row; close it, or double it"
                        )
                    name, title = cells[name_column], cells[title_column].strip()
                    if not name.strip() or "\0" in name:
                        raise DataError(f"{where}: invalid file name {name!r}")
                    rows.append(_Row(number, name, titles.setdefault(title, title)))
                    number += 1
                line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}: cannot read it: {error} in row {number + 1} (line {line}); a title that begins with a quote "
            "must end with one, with inner quotes doubled"
        ) from error
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read it: {error}") from error
    return rows


def _existing_files(names: Sequence[str], root: Path, path: str) -> dict[str, tuple[Path, int]]:
    """Maps the names in the CSV file to the path and size of each file that exists."""
    files = _regular_files({name: root / name for name in names})
    if files:
        return files
    parts = Path(names[0]).parts
    for count in range(1, len(parts)):
        if root.joinpath(*parts[count:]).is_file():
            shared = parts[:count]
            split_names = ((name, Path(name).parts) for name in names)
            files = _regular_files(
                {
                    name: root.joinpath(*components[count:]) if components[:count] == shared else root / name
                    for name, components in split_names
                }
            )
            logger.warning(
                "%s: its paths begin with %s, which does not exist in %s; this prefix is ignored",
                path,
                Path(*shared),
                root,
            )
            return files
    windows = "; its paths are Windows paths: replace each backslash by /" if "\\" in names[0] else ""
    raise DataError(
        f"{path}: {root / names[0]} does not exist; set image_root to the folder that the file paths start from "
        f"(none of the {len(names)} files exists){windows}"
    )


def _regular_files(paths: Mapping[str, Path]) -> dict[str, tuple[Path, int]]:
    """Maps names to the path and size of each path that is a regular file."""
    statuses = map_in_threads(stat_if_exists, list(paths.values()))
    return {
        name: (path, status.st_size)
        for (name, path), status in zip(paths.items(), statuses, strict=True)
        if status is not None and stat.S_ISREG(status.st_mode)
    }
