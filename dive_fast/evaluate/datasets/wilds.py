"""iWildCam and FMoW as the WILDS package leaves them on the disk, with its official splits and metrics.

The two tables are read here: the package itself brings pandas and a graph library. A test holds both to it.
"""

import csv
from pathlib import Path

import torch

from dive_fast.data.sources.source import Sample, Source
from dive_fast.errors import DataError
from dive_fast.evaluate.datasets.layouts import present
from dive_fast.evaluate.scores import Regions
from dive_fast.io.safe_read import below

Row = dict[str, str]


def open_iwildcam(root: Path, split: str) -> tuple[Source, tuple[str, ...]]:
    """One official split; class names are FLYP's English ones where its ``labels.csv`` was put beside, else latin.

    Args:
        split: ``id_val``, ``id_test``, ``val`` or ``test``.

    Raises:
        DataError: a table or one of its columns is missing, or a label has no name.
    """
    rows = [row for row in _read(root / "metadata.csv", "split", "y", "filename") if row["split"] == split]
    samples = [
        Sample(row["filename"], _below(root / "train", row["filename"]), label=_number(root, row["y"]))
        for row in rows
    ]
    return _source(root, samples, split), _species(root)


def open_fmow(root: Path, split: str) -> tuple[Source, tuple[str, ...], Regions]:
    """One official split (ID: before 2013, OOD: from 2016 on) with the continent of each image.

    Args:
        split: ``id_val``, ``id_test``, ``val`` or ``test``.

    Raises:
        DataError: a table or one of its columns is missing.
    """
    rows = _read(root / "rgb_metadata.csv", "split", "timestamp", "category", "country_code")
    countries = _read(root / "country_code_mapping.csv", "alpha-3", "region")
    region_of = {row["alpha-3"]: row["region"] for row in countries}
    if len(region_of) < len(countries):
        raise DataError(f"{root / 'country_code_mapping.csv'}: a country is listed twice; get the data set again")
    names = tuple(sorted({row["category"] for row in rows}))
    label_of = {name: label for label, name in enumerate(names)}
    regions: list[str] = []
    samples: list[Sample] = []
    wanted = split.removeprefix("id_")
    for place, row in enumerate(rows):
        year = _number(root, row["timestamp"][:4])
        period = (
            year < 2013 if split.startswith("id_") else 2013 <= year < 2016 if split == "val" else year >= 2016
        )
        if row["split"] == wanted and period:
            file = f"rgb_img_{place}.png"
            samples.append(Sample(file, root / "images" / file, label=label_of[row["category"]]))
            regions.append(region_of.get(row["country_code"], "Other"))
    found = tuple(sorted(set(regions)))
    of_sample = torch.tensor([found.index(region) for region in regions])
    return _source(root, samples, split), names, Regions(of_sample, found, ("Other",))


def _species(root: Path) -> tuple[str, ...]:
    for file, column in (("labels.csv", "english"), ("categories.csv", "name")):
        if (root / file).is_file():
            rows = _read(root / file, "y", column)
            named = {_number(root, row["y"]): row[column].lower() for row in rows}
            kept = [label for label in sorted(named) if label < 99999]  # 99999: of no image
            if len(named) < len(rows) or kept != list(range(len(kept))):
                raise DataError(f"{root / file}: its column y does not count the species from 0, each once")
            return tuple(named[label] for label in kept)
    raise DataError(
        f"{root}: no class names: neither labels.csv (y, english) nor categories.csv (y, name) is there"
    )


def _source(root: Path, samples: list[Sample], split: str) -> Source:
    if not samples:
        raise DataError(f"{root}: no image is of split {split}")
    return present(samples)


def _read(path: Path, *columns: str) -> list[Row]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, strict=True)
            missing = set(columns) - set(reader.fieldnames or ())
            if missing:
                raise DataError(f"{path}: no column {', '.join(sorted(missing))}")
            rows = list(reader)
            for number, row in enumerate(rows, start=1):
                if any(row[column] is None for column in columns) or len(row) > len(reader.fieldnames or ()):
                    few = "many" if len(row) > len(reader.fieldnames or ()) else "few"
                    raise DataError(f"{path}: row {number} has too {few} columns; get the data set anew")
            return rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot read it: {error}") from error


def _below(folder: Path, file: str) -> Path:
    try:
        return below(folder, file)
    except ValueError as error:
        raise DataError(f"{folder}: the table names a file elsewhere: {error}; get the data set anew") from error


def _number(root: Path, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise DataError(f"{root}: {text!r} in its tables is no number") from error
