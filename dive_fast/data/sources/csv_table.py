"""Opens a tab-separated table of image files and captions."""

import csv
import logging
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dive_fast.data import content_hashes as content
from dive_fast.data.sources.source import EMPTY_CAPTION, Sample, Skipped, Source, locate
from dive_fast.errors import DataError

logger = logging.getLogger(__name__)


class _Row(NamedTuple):
    number: int
    name: str
    title: str


def open_csv(path: str, image_root: str | None, *, group: bool) -> Source:
    """A tab-separated file with columns ``title`` and ``filepath``, as FLYP writes it.

    Rows without a title are skipped, and rows whose file does not exist. Where none exists, the paths may begin
    with folders of another machine (FLYP's begin with ``./datasets/data``): the beginning that all rows share is
    then left out, if the rest leads to a file, which is logged.

    Args:
        image_root: where relative file paths start; None: at the CSV file's folder.
        group: rows of one file become one sample with all its titles (FLYP's images x templates rows); else every
            row is a sample.

    Raises:
        DataError: the file or a column is missing, a row has more or fewer cells, a quote is open, there is no
            row, or none of the files exists.
    """
    file = locate(path)
    root = Path(image_root) if image_root is not None else file.parent
    rows = _csv_rows(file, path)
    skipped = [Skipped(f"{row.name}#{row.number}", EMPTY_CAPTION) for row in rows if not row.title]
    rows = [row for row in rows if row.title]
    if not rows:
        empty = f": all {len(skipped)} titles are empty" if skipped else ""
        raise DataError(f"{path}: no rows below its first line{empty}")
    found = _found_files(list(dict.fromkeys(row.name for row in rows)), root, path)
    lost = [row for row in rows if row.name not in found]
    rows = [row for row in rows if row.name in found]
    samples: list[Sample] = []
    if group:
        grouped: dict[str, list[str]] = {}
        for row in rows:
            grouped.setdefault(row.name, []).append(row.title)
        skipped += [Skipped(name, "no such file") for name in dict.fromkeys(row.name for row in lost)]
        samples = [
            Sample(name, found[name][0], size=found[name][1], texts=tuple(own)) for name, own in grouped.items()
        ]
    else:
        skipped += [Skipped(f"{row.name}#{row.number}", "no such file") for row in lost]
        samples = [
            Sample(f"{row.name}#{row.number}", found[row.name][0], size=found[row.name][1], texts=(row.title,))
            for row in rows
        ]
    return Source(samples, skipped=skipped)


def _csv_rows(file: Path, path: str) -> list[_Row]:
    rows: list[_Row] = []
    # One string for equal titles: FLYP's files repeat each prompt once an image.
    titles: dict[str, str] = {}
    number, line = 0, 1
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise DataError(f"{path}: cannot read it: a {'directory' if file.is_dir() else 'pipe or device'}")
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.reader(lines, delimiter="\t", strict=True)
            header = next(reader, [])
            missing = {"title", "filepath"} - set(header)
            if missing:
                is_other = len(header) == 1 and any(mark in header[0] for mark in ",;")
                remedy = "; separate its cells by tabs" if is_other else ""
                raise DataError(
                    f"{path}: no column {' and '.join(sorted(missing))} in its tab-separated first line{remedy}"
                )
            twice = next((name for name in ("title", "filepath") if header.count(name) > 1), None)
            if twice is not None:
                raise DataError(f"{path}: column {twice} is twice in its first line")
            title_at, name_at = header.index("title"), header.index("filepath")
            line = reader.line_num + 1
            for cells in reader:
                if cells:  # else an empty line
                    where = f"{path}: row {number + 1} (line {line})"
                    if len(cells) != len(header):
                        raise DataError(
                            f"{where} has {len(cells)} tab-separated cells, its first line {len(header)}; "
                            "quote a title that holds a tab"
                        )
                    if any("\t" in cell and ("\n" in cell or "\r" in cell) for cell in cells):
                        raise DataError(
                            f"{where} begins with a quote that ends rows later; close it, or write it twice"
                        )
                    name, title = cells[name_at], cells[title_at].strip()
                    if not name.strip() or "\0" in name:
                        raise DataError(f"{where} names no file: {name!r}")
                    rows.append(_Row(number, name, titles.setdefault(title, title)))
                    number += 1
                line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}: cannot read it: {error} in row {number + 1} (line {line}); a title that begins with a quote "
            "ends with one, and quotes inside are doubled"
        ) from error
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read it: {error}") from error
    return rows


def _found_files(names: Sequence[str], root: Path, path: str) -> dict[str, tuple[Path, int]]:
    """Path and size of each file that exists, by its name in the CSV file."""
    found = _regular_files({name: root / name for name in names})
    if found:
        return found
    parts = Path(names[0]).parts
    for count in range(1, len(parts)):
        if root.joinpath(*parts[count:]).is_file():
            shared = parts[:count]
            found = _regular_files(
                {
                    name: root.joinpath(*own[count:]) if own[:count] == shared else root / name
                    for name, own in ((name, Path(name).parts) for name in names)
                }
            )
            logger.warning(
                "%s: its paths begin with %s, which is not below %s; they are read without it",
                path,
                Path(*shared),
                root,
            )
            return found
    windows = "; its paths are those of Windows: write / for each backslash" if "\\" in names[0] else ""
    raise DataError(
        f"{path}: {root / names[0]} does not exist; set image_root to where the file paths start (none of its "
        f"{len(names)} files was found){windows}"
    )


def _regular_files(paths: Mapping[str, Path]) -> dict[str, tuple[Path, int]]:
    states = content.in_threads(content.stat, list(paths.values()))
    return {
        name: (path, about.st_size)
        for (name, path), about in zip(paths.items(), states, strict=True)
        if about is not None and stat.S_ISREG(about.st_mode)
    }
