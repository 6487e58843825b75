"""iWildCam and FMoW in the WILDS package's layout, with its official splits.

Their tables are read here, since the package depends on pandas and a graph library; a test compares the results
with the package.
"""

import csv
from pathlib import Path
from typing import TYPE_CHECKING

from dive_fast.data.sources.sample_table import Sample
from dive_fast.data.sources.source import Source
from dive_fast.errors import DataError
from dive_fast.evaluation.datasets.layouts import present
from dive_fast.io.safe_read import below

if TYPE_CHECKING:
    from dive_fast.evaluation.scores import Regions

Row = dict[str, str]


def open_iwildcam(root: Path, split: str) -> tuple[Source, tuple[str, ...]]:
    """Opens an official split of iWildCam.

    Class names are FLYP's English ones if its ``labels.csv`` is in the folder, otherwise the Latin ones of
    ``categories.csv``.

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


def open_fmow(root: Path, split: str) -> "tuple[Source, tuple[str, ...], Regions]":
    """Opens an official split of FMoW (ID: before 2013, OOD: from 2016 on) with the continent of each image.

    Args:
        split: ``id_val``, ``id_test``, ``val`` or ``test``.

    Raises:
        DataError: a table or one of its columns is missing.
    """
    # Imported here, so that names of data sets are known without torch.
    import torch

    from dive_fast.evaluation.scores import Regions

    rows = _read(root / "rgb_metadata.csv", "split", "timestamp", "category", "country_code")
    countries = _read(root / "country_code_mapping.csv", "alpha-3", "region")
    region_of = {row["alpha-3"]: row["region"] for row in countries}
    if len(region_of) < len(countries):
        raise DataError(f"{root / 'country_code_mapping.csv'}: a country is listed twice; get the data set again")
    names = tuple(sorted({row["category"] for row in rows}))
    label_of = {name: label for label, name in enumerate(names)}
    regions: list[str] = []
    samples: list[Sample] = []
    table_split = split.removeprefix("id_")
    for index, row in enumerate(rows):
        year = _number(root, row["timestamp"][:4])
        in_period = (
            year < 2013 if split.startswith("id_") else 2013 <= year < 2016 if split == "val" else year >= 2016
        )
        if row["split"] == table_split and in_period:
            file = f"rgb_img_{index}.png"
            samples.append(Sample(file, root / "images" / file, label=label_of[row["category"]]))
            regions.append(region_of.get(row["country_code"], "Other"))
    region_names = tuple(sorted(set(regions)))
    of_sample = torch.tensor([region_names.index(region) for region in regions])
    return _source(root, samples, split), names, Regions(of_sample, region_names, ("Other",))


def _species(root: Path) -> tuple[str, ...]:
    """iWildCam's class names, in the order of the labels."""
    for file, column in (("labels.csv", "english"), ("categories.csv", "name")):
        if (root / file).is_file():
            rows = _read(root / file, "y", column)
            name_of = {_number(root, row["y"]): row[column].lower() for row in rows}
            labels = [label for label in sorted(name_of) if label < 99999]  # no image has label 99999
            if len(name_of) < len(rows) or labels != list(range(len(labels))):
                raise DataError(f"{root / file}: its column y does not number the species 0, 1, 2, ..., each once")
            return tuple(name_of[label] for label in labels)
    raise DataError(
        f"{root}: no class names: neither labels.csv (y, english) nor categories.csv (y, name) is there"
    )


def _source(root: Path, samples: list[Sample], split: str) -> Source:
    if not samples:
        raise DataError(f"{root}: split {split} has no images")
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
                    amount = "many" if len(row) > len(reader.fieldnames or ()) else "few"
                    raise DataError(f"{path}: row {number} has too {amount} columns; get the data set again")
            return rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot read it: {error}") from error


def _below(folder: Path, file: str) -> Path:
    try:
        return below(folder, file)
    except ValueError as error:
        raise DataError(f"{folder}: the table names a file elsewhere: {error}; get the data set again") from error


def _number(root: Path, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise DataError(f"{root}: {text!r} in its tables is not a number") from error
