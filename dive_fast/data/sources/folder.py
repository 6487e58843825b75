"""Reads a folder of images with one subfolder per class."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dive_fast.data.decode import IMAGE_SUFFIXES
from dive_fast.data.sources.file_rules import HIDDEN, is_hidden, lower_suffix, refuse_duplicates
from dive_fast.data.sources.image_files import ImageFiles, ImageLister, printable_names, with_progress
from dive_fast.data.sources.listed_files import ListedFiles
from dive_fast.data.sources.node_index import Listing, RawSet, open_raw
from dive_fast.data.sources.sample_table import SampleTable, printable
from dive_fast.data.sources.source import Skipped, Source, locate, summarize_skipped
from dive_fast.data.sources.watched import Watched, state_of
from dive_fast.errors import DataError
from dive_fast.identity import Identity

if TYPE_CHECKING:
    from dive_fast.distributed import Ranks  # imports torch, which takes seconds

SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "eval"})
"""Names of folders that are splits of a data set, not classes."""


def open_folder(path: str, ranks: Ranks | None = None) -> Source:
    """Opens a folder with one subfolder per class and images at any depth below, also behind links.

    Class folders are sorted by name, or as numbers if all names are whole numbers. Hidden folders are not classes.

    Args:
        ranks: see :func:`open_raw`.

    Raises:
        DataError: the folder is missing or holds no images; a class folder holds none, which would shift the
            labels of all classes after it; two names are the same number; or a name is not UTF-8.
    """
    return open_raw(ClassFolders(path), ranks)


class ClassFolders(RawSet):
    """The images of a folder with one subfolder per class."""

    reads_all_bytes = False

    def __init__(self, path: str) -> None:
        """Takes the argument of :func:`open_folder`."""
        self.path = path
        self._images = ImageFiles()
        self._counts: list[int] = []
        self._class_names: tuple[str, ...] = ()
        self._is_deep = False

    def identity(self) -> Identity:
        return {"format": "folder"}

    def known_root(self) -> str:
        return str(locate(self.path))

    def list_files(self) -> Listing:
        root = locate(self.path)
        self.root = str(root)
        self._images, self._counts = ImageFiles(), []
        num_direct = 0
        try:
            self._images.watched.add("", state_of(self.root))
            names = _class_folders(root, self.path, self._images)
            with ImageLister() as lister:
                folders = lister.list_each(self.root, names)
                folders = with_progress(folders, len(names), f"listing {self.path}", "folder")
                for label, images in enumerate(folders):
                    if not len(images):
                        raise _no_images(root / names[label], label, images.skipped)
                    self._counts.append(len(images))
                    self._images.extend(images)
                    num_direct += images.num_direct
        except OSError as error:
            raise DataError(f"{self.path}: cannot list its images: {error}") from error
        self._class_names, self._is_deep = tuple(names), not num_direct
        return self._images.listing(names)

    def watched(self, listing: Listing, table: SampleTable) -> Watched:
        return self._images.watched

    def read(self, listing: Listing) -> tuple[Source, Sequence[str]]:
        keys, names = printable_names(listing.names), self._class_names
        labels = np.repeat(np.arange(len(names)), self._counts)
        listed = ListedFiles(listing.times)
        table = SampleTable.of_files(self.root, listing.names, keys, listing.sizes, label=labels, listed=listed)
        source = Source(table, names, skipped=self._images.skipped, ignored=self._images.ignored)
        if not self._is_deep:
            return source, ()
        warning = (
            f"{self.path}: all images lie in subfolders of the class folders ({table.key(0)}); the classes are "
            f"{', '.join(names[:3]) + (', ...' if len(names) > 3 else '')}: name a folder below to make its "
            "subfolders the classes"
        )
        return source, (warning,)


def _no_images(folder: Path, label: int, skipped: Sequence[Skipped]) -> DataError:
    kind, hint = ("readable image", f": {summarize_skipped(skipped)}") if skipped else ("image", "; remove it")
    return DataError(f"{folder}: no {kind} below, but it would be class {label}{hint}")


def _class_folders(root: Path, path: str, images: ImageFiles) -> list[str]:
    if not root.exists():
        raise DataError(f"{path}: no such folder")
    if not root.is_dir():
        raise DataError(f"{path}: expected one folder per class with images below, but it is a file")
    names: list[str] = []
    ignored, hint = images.ignored, ""
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        name, suffix = entry.name, lower_suffix(entry.name)
        if entry.is_symlink():
            images.watched.add(name, state_of(entry.path))
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
