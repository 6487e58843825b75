"""Reads a folder of images with one subfolder per class."""

import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

from dive_fast.data.decode import IMAGE_SUFFIXES, looks_like_image
from dive_fast.data.sources.file_rules import HIDDEN, is_hidden, reason_to_skip, refuse_duplicates
from dive_fast.data.sources.sample_table import Sample, printable
from dive_fast.data.sources.source import Skipped, Source, locate, summarize_skipped
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
"""Suffixes of files that accompany images and are not images."""

SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "eval"})
"""Names of folders that are splits of a data set, not classes."""


def open_folder(path: str) -> Source:
    """Opens a folder with one subfolder per class and images at any depth below, also behind links.

    Class folders are sorted by name, or as numbers if all names are whole numbers. Hidden folders are not classes.

    Raises:
        DataError: the folder is missing or holds no images; a class folder holds none, which would shift the
            labels of all classes after it; two names are the same number; or a name is not UTF-8.
    """
    root = locate(path)
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    ignored: list[Skipped] = []
    try:
        names = _class_folders(root, path, ignored)
        for label, name in enumerate(names):
            num_skipped = len(skipped)
            files = list(images_below(root / name, name, skipped, ignored))
            if not files:
                unread = skipped[num_skipped:]
                kind, hint = (
                    ("readable image", f": {summarize_skipped(unread)}") if unread else ("image", "; remove it")
                )
                raise DataError(f"{root / name}: no {kind} below, but it would be class {label}{hint}")
            samples += [Sample(printable(key), file, size=size, label=label) for key, file, size in files]
    except OSError as error:
        raise DataError(f"{path}: cannot list its images: {error}") from error
    if all(sample.key.count("/") > 1 for sample in samples):
        logger.warning(
            "%s: all images lie in subfolders of the class folders (%s); the classes are %s: name a folder below "
            "to make its subfolders the classes",
            *(path, samples[0].key, ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")),
        )
    return Source.of(samples, tuple(names), skipped=skipped, ignored=ignored)


def _class_folders(root: Path, path: str, ignored: list[Skipped]) -> list[str]:
    if not root.exists():
        raise DataError(f"{path}: no such folder")
    if not root.is_dir():
        raise DataError(f"{path}: expected one folder per class with images below, but it is a file")
    names: list[str] = []
    hint = ""
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        name, suffix = entry.name, Path(entry.name).suffix.lower()
        if entry.is_dir():
            if is_hidden(name):
                ignored.append(Skipped(printable(name), HIDDEN))
            else:
                names.append(name)
        elif suffix in IMAGE_SUFFIXES and not is_hidden(name):
            ignored.append(Skipped(printable(name), "an image next to the class folders"))
            hint = "; it holds images outside class folders"
        elif suffix == ".tar":
            hint = hint or "; it holds tars: use format webdataset"
        elif entry.is_symlink() and not os.path.exists(entry.path) and not is_hidden(name):
            # It may have been a class folder, which shifts the labels of all classes after it.
            raise DataError(f"{entry.path}: a broken link; remove it or restore its target")
        elif name == "manifest.json":
            hint = "; it looks like a prepared set: use format prepared"
    if not names:
        raise DataError(f"{path}: expected one folder per class with images below, but there is none{hint}")
    for name in names:
        if printable(name) != name:
            raise DataError(
                f"{path}: the name of class folder {printable(name)} is not UTF-8; rename it (convmv can)"
            )
    refuse_duplicates([root / name for name in names], path)
    if all(name.lower() in SPLITS for name in names) and all(
        entry.is_dir() for name in names for entry in os.scandir(root / name) if not is_hidden(entry.name)
    ):
        raise DataError(f"{path}: {', '.join(names)} are splits of a data set, not classes; name one of them")
    return class_order(names, path)


def class_order(names: Iterable[str], path: str) -> list[str]:
    """Sorts class folders into the order of their labels: as numbers if all are whole numbers, otherwise as text.

    Raises:
        DataError: two names are the same number.
    """
    names = sorted(names)
    if not all(re.fullmatch(r"[0-9]+", name) for name in names):
        return names
    names.sort(key=int)
    for one, other in pairwise(names):
        if int(one) == int(other):
            raise DataError(f"{path}: class folders {one} and {other} are the same number; rename one of them")
    return names


def images_below(
    folder: Path,
    name: str,
    skipped: list[Skipped],
    ignored: list[Skipped],
    parents: tuple[tuple[int, int], ...] = (),
) -> Iterator[tuple[str, Path, int]]:
    """Key, path and size of each image below a folder, sorted by the components of its key.

    Args:
        name: the folder's part of the key; may be empty.
        parents: device and inode of each folder above, to detect links that form a cycle.
    """
    status = os.stat(folder)
    inode = status.st_dev, status.st_ino
    if inode in parents:
        raise DataError(f"{folder}: a link to a folder above it; remove it")
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        key = f"{name}/{entry.name}" if name else entry.name
        file, suffix = Path(entry.path), Path(entry.name).suffix.lower()
        if entry.is_dir():
            if is_hidden(entry.name):
                ignored.append(Skipped(printable(key), HIDDEN))
            else:
                yield from images_below(file, key, skipped, ignored, (*parents, inode))
        elif (reason := reason_to_skip(entry.name)) is not None:
            (ignored if reason == HIDDEN else skipped).append(Skipped(printable(key), reason))
        elif suffix in IMAGE_SUFFIXES:
            status = entry.stat()
            if not stat.S_ISREG(status.st_mode):
                # Reading a pipe could block forever.
                raise DataError(f"{file}: named like an image, but not a regular file; remove or rename it")
            yield key, file, status.st_size
        elif suffix not in SIDE_SUFFIXES:
            if looks_like_image(_first_bytes(entry)):
                skipped.append(Skipped(printable(key), "an image by its content, but not by its suffix"))
            else:
                ignored.append(Skipped(printable(key), "not an image by suffix or content"))


def _first_bytes(entry: "os.DirEntry[str]") -> bytes:
    try:
        if not stat.S_ISREG(entry.stat().st_mode):
            return b""
        with open(entry.path, "rb") as file:
            return file.read(12)
    except OSError:
        return b""
