"""Opens a folder of images, one folder per class."""

import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

from dive_fast.data.decode import IMAGE_SUFFIXES, looks_like_image
from dive_fast.data.sources.source import HIDDEN, Sample, Skipped, Source, locate, readable, some
from dive_fast.data.sources.source import is_hidden as is_hidden
from dive_fast.data.sources.source import reason_to_skip as reason_to_skip
from dive_fast.data.sources.source import refuse_duplicates as refuse_duplicates
from dive_fast.errors import DataError

logger = logging.getLogger(__name__)


SIDE_SUFFIXES = frozenset(
    {
        ".csv",
        ".htm",
        ".html",
        ".ini",
        ".json",
        ".jsonl",
        ".log",
        ".md",
        ".parquet",
        ".tsv",
        ".txt",
        ".xml",
        ".yaml",
        ".yml",
    }
)
"""Suffixes of files that lie beside images and are none."""


def open_folder(path: str) -> Source:
    """One folder a class, images anywhere below it, also through links; hidden folders are no classes.

    Folders are sorted by name; where all names are whole numbers, as numbers.

    Raises:
        DataError: the folder is missing or holds no images, or one of its folders holds none: whether that is a
            class decides the label of all behind it. Or two names are the same number, or one is not UTF-8.
    """
    root = locate(path)
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    ignored: list[Skipped] = []
    try:
        names = _class_folders(root, path, ignored)
        for label, name in enumerate(names):
            before = len(skipped)
            files = list(_images_below(root / name, name, skipped, ignored))
            if not files:
                lost = skipped[before:]
                do = (
                    f" that is read, but it would be class {label}: {some(lost)}"
                    if lost
                    else (f", but it would be class {label}; remove it")
                )
                raise DataError(f"{root / name}: no image below{do}")
            samples += [Sample(readable(key), file, size=about.st_size, label=label) for key, file, about in files]
    except OSError as error:
        raise DataError(f"{path}: cannot list its images: {error}") from error
    if all(sample.key.count("/") > 1 for sample in samples):
        logger.warning(
            "%s: all images lie in folders below those of the classes (%s); the classes are %s: name a folder "
            "below to make its folders the classes",
            *(path, samples[0].key, ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")),
        )
    return Source(samples, tuple(names), skipped=skipped, ignored=ignored)


SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "eval"})


def _class_folders(root: Path, path: str, ignored: list[Skipped]) -> list[str]:
    if not root.exists():
        raise DataError(f"{path}: no such folder")
    if not root.is_dir():
        raise DataError(f"{path}: expected one folder a class with images below, found a file")
    names: list[str] = []
    hint = ""
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        name, suffix = entry.name, Path(entry.name).suffix.lower()
        if entry.is_dir():
            if is_hidden(name):
                ignored.append(Skipped(readable(name), HIDDEN))
            else:
                names.append(name)
        elif suffix in IMAGE_SUFFIXES and not is_hidden(name):
            ignored.append(Skipped(readable(name), "an image beside the class folders"))
            hint = "; images lie there in no folder of a class"
        elif suffix == ".tar":
            hint = hint or "; it holds tars: use format webdataset"
        elif entry.is_symlink() and not os.path.exists(entry.path) and not is_hidden(name):
            # It may have been the folder of a class, which decides the labels of all behind it.
            raise DataError(f"{entry.path}: a link to nothing; remove it, or bring back what it leads to")
        elif name == "manifest.json":
            hint = "; it looks prepared: use format prepared"
    if not names:
        raise DataError(f"{path}: expected one folder a class with images below, found none{hint}")
    for name in names:
        if readable(name) != name:
            raise DataError(
                f"{path}: the name of class folder {readable(name)} is not UTF-8; rename it (convmv can)"
            )
    refuse_duplicates([root / name for name in names], path)
    if all(name.lower() in SPLITS for name in names) and all(
        entry.is_dir() for name in names for entry in os.scandir(root / name) if not is_hidden(entry.name)
    ):
        raise DataError(f"{path}: {', '.join(names)} are splits of a data set and no classes; name one of them")
    return class_order(names, path)


def class_order(names: Iterable[str], path: str) -> list[str]:
    """Names of class folders in the order of their labels: as numbers where all are whole numbers, else as text.

    Raises:
        DataError: two of them are the same number.
    """
    names = sorted(names)
    if not all(re.fullmatch(r"[0-9]+", name) for name in names):
        return names
    names.sort(key=int)
    for one, other in pairwise(names):
        if int(one) == int(other):
            raise DataError(f"{path}: class folders {one} and {other} are the same number; rename one of them")
    return names


def _images_below(
    folder: Path,
    name: str,
    skipped: list[Skipped],
    ignored: list[Skipped],
    above: tuple[tuple[int, int], ...] = (),
) -> Iterator[tuple[str, Path, os.stat_result]]:
    """Name, path and state of each image, sorted by the parts of its name."""
    about = os.stat(folder)
    here = about.st_dev, about.st_ino
    if here in above:
        raise DataError(f"{folder}: a link to a folder above it; remove it")
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        file, key, suffix = Path(entry.path), f"{name}/{entry.name}", Path(entry.name).suffix.lower()
        if entry.is_dir():
            if is_hidden(entry.name):
                ignored.append(Skipped(readable(key), HIDDEN))
            else:
                yield from _images_below(file, key, skipped, ignored, (*above, here))
        elif (reason := reason_to_skip(entry.name)) is not None:
            (ignored if reason == HIDDEN else skipped).append(Skipped(readable(key), reason))
        elif suffix in IMAGE_SUFFIXES:
            about = entry.stat()
            if not stat.S_ISREG(about.st_mode):
                # A pipe would be waited for, for ever.
                raise DataError(f"{file}: called like an image, but no regular file; remove or rename it")
            yield key, file, about
        elif suffix not in SIDE_SUFFIXES:
            if looks_like_image(_beginning(entry)):
                skipped.append(Skipped(readable(key), "an image by its content, but not by its suffix"))
            else:
                ignored.append(Skipped(readable(key), "no image, by suffix and content"))


def _beginning(entry: "os.DirEntry[str]") -> bytes:
    try:
        if not stat.S_ISREG(entry.stat().st_mode):
            return b""
        with open(entry.path, "rb") as file:
            return file.read(12)
    except OSError:
        return b""
