"""Detects the format of a labelled image set, opens it with the project's readers, and describes its contents."""

import logging
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dive_fast.config.schema import TargetConfig
from dive_fast.data.decode import IMAGE_SUFFIXES, UNDECODABLE, open_image, undecodable_reason
from dive_fast.data.sources.csv_table import open_csv
from dive_fast.data.sources.file_rules import is_hidden
from dive_fast.data.sources.folder import open_folder
from dive_fast.data.sources.huggingface import DICT, STATE, is_dataset
from dive_fast.data.sources.sample_table import printable
from dive_fast.data.sources.source import Source, locate
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.errors import ChangedDataError, DataError
from dive_fast.io.safe_read import read_json

EXPECTED = (
    "expected a folder with one folder of images per class (or with train/ and val/ of such folders), tars of "
    "image + .cls, a tab-separated csv with title and filepath, a prepared set, or a Hugging Face data set on disk"
)
"""The formats of a target, for messages."""
FORMATS = {
    "folder": "class folders",
    "webdataset": "webdataset tars with labels",
    "csv": "a csv of images and prompts",
    "prepared": "a prepared set",
    "huggingface": "a Hugging Face data set",
}
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval"),
    "test": ("test", "testing"),
}
"""Names of folders, and first parts of names of tars, that are a split of a data set."""
CLASS_FILES = ("classes.txt", "class_names.txt", "classnames.txt", "labels.txt")
"""Names of files with one class name a line, next to tars."""
NUM_PROBED = 64
PROBE_SECONDS = 1.5
"""Images that are decoded to look for broken ones, and the time after which no further one is."""


@dataclass(frozen=True)
class LabelledSet:
    """An image set in the form in which a config names it."""

    format: str
    path: str
    source: Source
    keys: dict[str, Any] = field(default_factory=dict)
    """Further keys of its config section, such as the split of a Hugging Face data set."""

    @property
    def has_classes(self) -> bool:
        """Whether images have a class; otherwise they have texts."""
        return self.source.samples[0].label >= 0

    def class_sizes(self) -> list[int]:
        """Number of images of each class, in label order."""
        return np.bincount(self.source.samples.labels, minlength=len(self.source.class_names)).tolist()


@dataclass(frozen=True)
class Target:
    """The user's data: what to train on, and what to measure on where the data has such splits."""

    name: str
    train: LabelledSet
    val: LabelledSet | None = None
    test: LabelledSet | None = None
    class_file: Path | None = None
    """A list of class names that lies next to tars."""
    remarks: tuple[str, ...] = ()
    """Lines for the user."""


class Images(NamedTuple):
    """The images of a sample of a data set."""

    checked: int
    broken: list[str]
    """A line for each one that cannot be decoded."""
    size: tuple[int, int] | None
    """Width and height of the image with the median number of pixels."""


def inspect_target(path: str, val_path: str | None = None) -> Target:
    """Opens the data set at a path, with its splits if it has any.

    Args:
        path: what the user names: a folder, tar, glob, brace range or csv.
        val_path: a validation set that the user names; None: the one in the data set, if any.

    Raises:
        DataError: nothing there is a data set of labelled images, or it cannot be trained on.
    """
    path = path.rstrip("/") or "/"
    root = locate(path)
    _refuse_working_folder(root, path)
    splits = _splits(root, path)
    if val_path is not None and locate(val_path).exists() and root.exists() and root.samefile(locate(val_path)):
        raise DataError(f"--val {val_path}: is the target; remove it, and a part of each class is measured")
    with _collect_warnings() as remarks:
        remarks += _remarks_on_folders(root, path, splits)
        train = _open(splits.get("train", Location(path)))
        if val_path is not None:
            splits["val"] = Location(val_path)
        val, test = (_open(splits[name]) if name in splits else None for name in ("val", "test"))
    for name, other in (("val", val), ("test", test)):
        if other is not None and not other.has_classes:
            raise DataError(f"{other.path}: no classes, which the set {name} needs to be measured")
    if train.has_classes and len(train.class_sizes()) == 1:
        name = train.source.class_names[0] if train.source.class_names else "0"
        raise DataError(
            f"{train.path}: only one class, {name!r}; fine-tuning contrasts classes: add a folder for each other "
            "class"
        )
    class_file = _class_file(root, path) if train.format == "webdataset" else None
    return Target(_name(root, path), train, val, test, class_file, tuple(remarks))


def detect_format(path: str) -> str:
    """The format of the labelled data set at a path.

    Raises:
        DataError: there is none; says what there is, and what is expected.
    """
    root = locate(path)
    if not root.exists():
        if re.search(r"[*?{\[]", path) and ".tar" in path:
            return "webdataset"
        raise DataError(f"{path}: no such file or folder; {EXPECTED}")
    if not root.is_dir():
        suffix = root.suffix.lower()
        if suffix == ".tar":
            return "webdataset"
        if suffix in (".csv", ".tsv"):
            return "csv"
        raise DataError(f"{path}: a file with suffix {suffix or '(none)'}; {EXPECTED}")
    content = _content(root, path)
    if _is_prepared(root):
        return "prepared"
    if is_dataset(str(root)):
        return "huggingface"
    if content.tars:
        return "webdataset"
    if content.folders:
        return "folder"
    if content.images:
        raise DataError(
            f"{path}: {content} without class folders, so nothing says what they show; move the images of each "
            "class to a folder of its name"
        )
    raise DataError(f"{path}: {content}; {EXPECTED}")


def probe(source: Source) -> Images:
    """Decodes images spread evenly over a data set, for at most :data:`PROBE_SECONDS`."""
    end = time.monotonic() + PROBE_SECONDS
    sizes: list[tuple[int, int]] = []
    broken: list[str] = []
    checked = 0
    step = max(1, len(source) // NUM_PROBED)
    for row in range(0, len(source), step):
        if checked >= 8 and time.monotonic() > end:
            break
        checked += 1
        try:
            image = open_image(source.read(row))
            sizes.append(image.size)
            # JPEG's entropy code is read completely, its pixels only at an eighth of the size.
            image.draft(None, (1, 1))
            image.load()
        except ChangedDataError:
            raise
        except DataError as error:
            broken.append(str(error))
        except UNDECODABLE as error:
            broken.append(f"{source.samples[row].key}: {undecodable_reason(error)}")
    return Images(
        checked, broken, sorted(sizes, key=lambda size: size[0] * size[1])[len(sizes) // 2] if sizes else None
    )


def imbalance(sizes: Sequence[int]) -> float:
    """Images of the largest class for each one of the smallest class that has any."""
    counts = [size for size in sizes if size]
    return max(counts) / min(counts)


def median(sizes: Sequence[int]) -> int:
    """The median size of a class."""
    return int(statistics.median(sizes))


class _Content(NamedTuple):
    """Counts of the visible entries of a folder."""

    folders: int
    tars: int
    images: int
    others: int

    def __str__(self) -> str:
        counts = [
            f"{count:,} {noun}{'' if count == 1 else 's'}"
            for count, noun in zip(self, ("folder", "tar", "image", "other file"), strict=True)
            if count
        ]
        return " and ".join(counts) or "an empty folder"


def _content(root: Path, path: str) -> _Content:
    counts: Counter[str] = Counter()
    try:
        for entry in os.scandir(root):
            if is_hidden(entry.name):
                continue
            suffix = Path(entry.name).suffix.lower()
            kind = "image" if suffix in IMAGE_SUFFIXES else "tar" if suffix == ".tar" else "other"
            counts["folder" if entry.is_dir() else kind] += 1
    except OSError as error:
        raise DataError(f"{path}: cannot list it: {error.strerror}") from error
    return _Content(counts["folder"], counts["tar"], counts["image"], counts["other"])


def _is_prepared(root: Path) -> bool:
    """Whether a folder has the files of a prepared set."""
    return (root / "manifest.json").is_file() and (root / "index.safetensors").is_file()


class Location(NamedTuple):
    """Where an image set lies."""

    path: str
    split: str | None = None
    """The split of a Hugging Face data set that has several."""


def _splits(root: Path, path: str) -> dict[str, Location]:
    """Locations of the splits ``train``, ``val`` and ``test`` below a folder; empty where it is one set.

    A folder named train alone may be a class; with another split next to it, or as the only folder, it is a split.
    """
    if not root.is_dir() or _is_prepared(root):
        return {}
    if is_dataset(str(root)):
        return splits_of_huggingface(root, path)
    entries = sorted(entry.name for entry in os.scandir(root) if not is_hidden(entry.name))
    tars = [name for name in entries if name.lower().endswith(".tar")]
    if tars:
        return _splits_of_tars(tars, path)
    folders = [name for name in entries if (root / name).is_dir()]
    named = {split: Location(f"{path}/{name}") for name in folders if (split := _split_of(name)) is not None}
    if "train" not in named or not (len(named) > 1 or len(folders) == 1):
        return {}
    paths = [location.path for location in named.values()]
    flat = next((each for each in paths if _content(Path(each), each).images), None)
    if flat is not None and len(folders) > len(named):
        return {}
    if flat is not None:
        raise DataError(
            f"{flat}: images without class folders, so nothing says what they show; move the images of each "
            "class to a folder of its name"
        )
    return named


def splits_of_huggingface(root: Path, path: str) -> dict[str, Location]:
    """The splits that ``save_to_disk`` lists, or that names of parquet and arrow files begin with."""
    names: Iterable[str]
    if (root / DICT).is_file():
        try:
            names = map(str, read_json(root / DICT)["splits"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: {DICT} does not list its splits: {error}") from error
    elif (root / STATE).is_file():
        return {}
    else:
        files = (file for pattern in ("*.parquet", "*.arrow") for file in root.rglob(pattern))
        words = {match[0] for file in files if (match := re.match(r"[a-z]+", file.name))}
        # The names that datasets uses for files of such names.
        names = (
            {"val": "validation"}.get(split, split) for word in words if (split := _split_of(word)) is not None
        )
    named = {split: Location(path, name) for name in names if (split := _split_of(name)) is not None}
    return named if "train" in named else {}


def _splits_of_tars(tars: Sequence[str], path: str) -> dict[str, Location]:
    named: dict[str, Location] = {}
    for name in tars:
        match = re.match(r"[a-z]+(?=[^a-z])", name.lower())
        split = None if match is None else _split_of(match[0])
        if match is None or split is None:
            return {}
        named[split] = Location(f"{path}/{name[: match.end()]}*.tar")
    return named if "train" in named else {}


def _remarks_on_folders(root: Path, path: str, splits: Mapping[str, Location]) -> Iterator[str]:
    """Lines about folders that are not read, next to or below the data."""
    if splits and root.is_dir() and not any(location.split for location in splits.values()):
        read = {Path(location.path).name for location in splits.values()}
        folders = (entry.name for entry in os.scandir(root) if entry.is_dir() and not is_hidden(entry.name))
        if not next(root.glob("*.tar"), None) and (others := sorted(set(folders) - read)):
            yield f"only {', '.join(sorted(read))} of {path} are read, not {', '.join(others[:3])}"
    elif _split_of(root.name) == "train" and root.parent.is_dir():
        siblings = sorted(entry.name for entry in os.scandir(root.parent) if entry.is_dir())
        if (
            other := next((name for name in siblings if _split_of(name) not in (None, "train")), None)
        ) is not None:
            yield f"{root.parent / other} lies next to it: --target {root.parent} measures on it"


def _split_of(name: str) -> str | None:
    return next((split for split, names in SPLIT_NAMES.items() if name.lower() in names), None)


def _open(location: Location) -> LabelledSet:
    path, split = location
    kind = detect_format(path)
    keys: dict[str, Any] = {} if split is None else {"split": split}
    if kind == "folder":
        source = open_folder(path)
    elif kind == "csv":
        source = open_csv(path, None, group=True)
    elif kind == "webdataset":
        try:
            source = open_webdataset(path, ".cls")
        except DataError as error:
            hint = (
                "; image-caption pairs are named by --reference"
                if "both an image and a .cls" in str(error)
                else ""
            )
            raise DataError(f"{error}{hint}") from error
    else:
        from dive_fast.data.open_dataset import open_target  # imports torch

        # Labels without names are named later, or refused there.
        section = {"format": kind, "path": path, "class_names": "-", **keys}
        source = open_target(TargetConfig.model_validate(section))
    return LabelledSet(kind, path, source, keys)


def _class_file(root: Path, path: str) -> Path | None:
    """A list of class names next to tars, or one folder above."""
    folder = root if root.is_dir() else Path(path).parent
    candidates = [parent / name for parent in (folder, folder.parent) for name in CLASS_FILES]
    return next((file for file in candidates if file.is_file()), None)


def _name(root: Path, path: str) -> str:
    """A name for the config, from the name of the data."""
    base = root.resolve() if root.exists() else Path(path).parent.resolve()
    name = re.sub(r"[^\w.-]+", "_", printable(base.stem if base.is_file() else base.name)).strip("._-")
    return name or "data"


def _refuse_working_folder(root: Path, path: str) -> None:
    """Refuses data around the working folder, where the run folder ``runs`` would become one of its classes."""
    if root.is_dir() and Path.cwd().resolve().is_relative_to(root.resolve()):
        raise DataError(
            f"{path}: run this command from outside of the data; otherwise its output, and the folder runs of the "
            "training, would lie among the classes"
        )


class _Collector(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def _collect_warnings() -> Iterator[list[str]]:
    """The warnings that readers log in the context, instead of their output."""
    lines: list[str] = []
    logger = logging.getLogger("dive_fast")
    collector, propagate = _Collector(lines), logger.propagate
    logger.addHandler(collector)
    logger.propagate = False
    try:
        yield lines
    finally:
        logger.removeHandler(collector)
        logger.propagate = propagate
