"""Where samples lie: image folder, webdataset tars or CSV, all addressed by index.

A source knows every sample's name and text before training and reads one image by index, in any order and from
any process: that is what makes order, sharding and resume exact. What a reader leaves out, it counts.
"""

import csv
import glob
import hashlib
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import braceexpand
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dive_fast.data import content_hashes as content
from dive_fast.data.decode import (
    IMAGE_SUFFIXES,
    OTHER_IMAGE_SUFFIXES,
    UNDECODABLE,
    decode,
    looks_like_image,
    why_undecodable,
)
from dive_fast.data.sources.tar_index import Member, read_members
from dive_fast.errors import UserError

logger = logging.getLogger(__name__)

NO_CLASSES = frozenset(
    {"__MACOSX", "__pycache__", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
)
"""Folders that systems make beside people's own; with hidden ones they are no classes."""
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
EMPTY_CAPTION = "its caption is empty"
TAKEN = "its name is taken"
HIDDEN = "hidden, or made by the system"


class DataError(UserError):
    """Data that cannot be used; the message names the file and says what was expected."""


@dataclass(frozen=True)
class Sample:
    """One image and what is known of it."""

    key: str
    """Name in the data set, for messages and for the hash that a teacher cache is tied to; printable, see
    :func:`readable`."""
    path: Path
    """The file that holds the image: the image itself, or a tar."""
    offset: int = 0
    """Where in the file its bytes begin."""
    size: int = -1
    """How many there are; -1: the rest of the file."""
    label: int = -1
    texts: tuple[str, ...] = ()

    def unusable(self, why: str) -> DataError:
        """The error that says what is wrong with this sample's image."""
        return DataError(f"{self.path}: sample {self.key}: {why}")


class Skipped(NamedTuple):
    """A sample that was left out."""

    key: str
    reason: str


@dataclass(frozen=True)
class Source:
    """A data set as a sequence of samples."""

    samples: Sequence[Sample]
    class_names: tuple[str, ...] = ()
    """Of an image folder: its folders' names; of a prepared set: those it was prepared with. Else empty."""
    skipped: Sequence[Skipped] = ()
    """Every sample that the reader has left out."""
    ignored: Sequence[Skipped] = ()
    """Files that lie there and are no samples: hidden ones, resource forks, second images of a sample."""
    prepared_without: Mapping[str, int] = field(default_factory=dict)
    """Of a prepared set: reasons, and how many samples the preparation has left out for each."""
    content: str = ""
    """A hash of all that the samples hold, where it is known without reading them: of a prepared set."""
    hashes: NDArray[np.uint8] | None = None
    """``(N, 16)``: a hash of each image's bytes, where it is known without reading them: of a prepared set."""
    first_rows: Sequence[int] = ()
    """The first sample of each file, where it is known without going through the samples: of a prepared set."""
    files: Sequence[Path] = ()
    """All files, where they are known without going through the samples: of a prepared set."""
    sizes: NDArray[np.int32] | None = None
    """``(N, 2)``: height and width of every image, known to be a whole JPEG; of a prepared set."""
    tokens: Tensor | None = None
    """``(N, context)``: every sample's first text, tokenised; of a set prepared with a tokenizer."""
    beton: Path | None = None
    """FFCV's file with all the images, row by row; of a set prepared for that loader."""

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> bytes:
        """The bytes of one image file.

        Raises:
            DataError: they cannot be read.
        """
        sample = self.samples[index]
        try:
            return content.read_piece(content.Piece(sample.path, sample.offset, sample.size))
        except (OSError, ValueError, OverflowError, MemoryError) as error:  # the latter of places no file has
            raise sample.unusable(f"cannot read the image: {error}") from error

    def image(self, index: int) -> Image.Image:
        """Decodes one image, to RGB or grey.

        Raises:
            DataError: the bytes are no whole image.
        """
        try:
            return decode(self.read(index))
        except UNDECODABLE as error:
            raise self.samples[index].unusable(f"cannot decode the image: {why_undecodable(error)}") from error

    def digest(self) -> str:
        """A hash of all that decides results, wherever the files lie; computed once.

        Of every sample, in order: key, label, texts and size of the image; the class names; and the bytes of the
        images: of up to ``content.PROBES``, spread evenly, all bytes or those at both ends. Of a prepared set: the
        hash in its manifest, which holds all bytes, and the class names.

        Raises:
            DataError: images of a prepared set are not those of its index.
        """
        return self._digest

    def modified(self) -> str:
        """A hash of when the files were last modified; computed once.

        Where it is the same, and :meth:`digest` too, nothing has changed. A copy of the files has another one.
        """
        return self._modified

    def image_ids(self) -> NDArray[np.int64]:
        """``(N,)``: equal numbers for images of equal bytes, those that cannot be read apart; computed once."""
        return self._image_ids

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        if self.content:
            self._check_hashes()
            if not self.class_names:
                return self.content
            digest.update(self.content.encode())
        else:
            for sample in self.samples:
                digest.update(repr((sample.key, sample.label, sample.texts)).encode())
            for part in content.digest_of(self.samples):
                digest.update(part)
        digest.update(repr(tuple(self.class_names)).encode())
        return digest.hexdigest()

    @cached_property
    def _modified(self) -> str:
        return content.modified(self.files or (sample.path for sample in self.samples))

    @cached_property
    def _image_ids(self) -> NDArray[np.int64]:
        known = self.hashes
        hashes = [row.tobytes() for row in known] if known is not None else content.hashes_of(self.samples)
        number: dict[bytes, int] = {}
        ids = [number.setdefault(value or str(row).encode(), row) for row, value in enumerate(hashes)]
        return np.array(ids, dtype=np.int64)

    def _check_hashes(self) -> None:
        """Compares some images of a prepared set with its index; opening it compares the sizes of files alone."""
        if self.hashes is None:
            return
        rows = sorted({*range(0, len(self), max(1, len(self) // 64)), *self.first_rows})
        for row, found in zip(rows, content.in_threads(self._image_hash, rows), strict=True):
            if found != self.hashes[row].tobytes():
                raise self.samples[row].unusable("changed since it was prepared; copy or prepare the set again")

    def _image_hash(self, row: int) -> bytes:
        return content.image_hash(self.read(row))

    def report_skipped(self, name: str) -> None:
        """Logs how many samples were left out of the set called ``name``, and why."""
        for entries, what, done in ((self.skipped, "sample", "left out"), (self.ignored, "file", "ignored")):
            first: dict[str, str] = {}
            for key, reason in entries:
                first.setdefault(reason, key)
            for reason, count in Counter(reason for _, reason in entries).most_common():
                many = "" if count == 1 else "s"
                logger.warning(
                    "%s: %d %s%s %s: %s (the first: %s)", name, count, what, many, done, reason, first[reason]
                )
        if self.prepared_without:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.prepared_without.items())
            logger.warning("%s: prepared without these samples: %s (skipped.jsonl)", name, reasons)


def readable(name: str) -> str:
    """A name from the file system as printable text that any file can hold.

    Bytes that are not UTF-8, which Python has as surrogates, become escapes of their hexadecimal values.
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def locate(path: str) -> Path:
    """A path of the config on the file system: ``demo:target`` lies in the embedded demo, made when missing.

    Raises:
        DataError: the demo has no such part.
    """
    if not path.startswith("demo:"):
        return Path(path)
    from dive_fast.data.demo.world import resolve  # the demo is no part of the engine: only when asked for

    try:
        return resolve(path)
    except ValueError as error:
        raise DataError(str(error)) from error


def some(entries: Sequence[Skipped]) -> str:
    """What was left out, in a few words for a message."""
    counts = Counter(reason for _, reason in entries).most_common(3)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts)
    return f"{reasons}; the first: {entries[0].key}"


# Image folder


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
            if _is_hidden(name):
                ignored.append(Skipped(readable(name), HIDDEN))
            else:
                names.append(name)
        elif suffix in IMAGE_SUFFIXES and not _is_hidden(name):
            ignored.append(Skipped(readable(name), "an image beside the class folders"))
            hint = "; images lie there in no folder of a class"
        elif suffix == ".tar":
            hint = hint or "; it holds tars: use format webdataset"
        elif entry.is_symlink() and not os.path.exists(entry.path) and not _is_hidden(name):
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
    _refuse_equal([root / name for name in names], path)
    if all(name.lower() in SPLITS for name in names) and all(
        entry.is_dir() for name in names for entry in os.scandir(root / name) if not _is_hidden(entry.name)
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
            if _is_hidden(entry.name):
                ignored.append(Skipped(readable(key), HIDDEN))
            else:
                yield from _images_below(file, key, skipped, ignored, (*above, here))
        elif (reason := _why_left_out(entry.name)) is not None:
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


def _is_hidden(name: str) -> bool:
    """Whether a file or folder is none of a person's own."""
    return (
        name.startswith(".") or name in NO_CLASSES or name.lower() in ("thumbs.db", "ehthumbs.db", "desktop.ini")
    )


def _why_left_out(name: str) -> str | None:
    """Why a file is left out whatever it holds; None: it may be an image, or something beside one."""
    suffix = Path(name).suffix.lower()
    if _is_hidden(name):
        # What macOS calls ._x.jpg is no image; .x.jpg may be one.
        return "a hidden file; rename it" if suffix in IMAGE_SUFFIXES and not name.startswith("._") else HIDDEN
    return f"images of suffix {suffix} are not read" if suffix in OTHER_IMAGE_SUFFIXES else None


# Webdataset


COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
DOTTED = "a dot before the suffix: webdataset ends the name of a sample at its first dot"


def open_webdataset(path: str, text: str, *, strict: bool = True) -> Source:
    """Webdataset tars: files of one name but for the suffix are one sample.

    Samples without an image or a text, whose text is empty or not UTF-8, or whose name is taken, are skipped.

    Args:
        path: a tar, a brace range, a glob, or a folder of tars.
        text: the suffix that a sample needs beside its image, ``.cls`` (its label) or ``.txt`` (its caption).
        strict: whether a broken tar or label is an error; else what is whole is taken and the rest skipped.

    Raises:
        DataError: no tar there, one that is broken, or none with a whole sample.
    """
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    ignored: list[Skipped] = []
    for tar in _tars(path, skipped, ignored):
        members = read_members(tar)
        if members.broken is not None:
            if strict:
                raise DataError(f"{tar}: not a whole tar: {members.broken}")
            is_compressed = "compressed" in members.broken
            reason = "a compressed tar" if is_compressed else "the tar is not whole"
            skipped.append(Skipped(readable(tar.name), reason))
        try:
            samples += _tar_samples(tar, members.files, text, strict, skipped, ignored)
        except OSError as error:
            raise DataError(f"{tar}: cannot read it: {error}") from error
    if not samples:
        lost = f" ({some(skipped)})" if skipped else ""
        raise DataError(f"{path}: no sample has both an image and a {text} file{lost}")
    return Source(samples, skipped=skipped, ignored=ignored)


def _tar_samples(
    tar: Path, files: Sequence[Member], text: str, strict: bool, skipped: list[Skipped], ignored: list[Skipped]
) -> Iterator[Sample]:
    found = _grouped(readable(tar.name), files, text, skipped, ignored)
    if not found:
        return
    with tar.open("rb") as file:
        for key, (image, about) in found.items():
            file.seek(about.offset)
            try:
                words = file.read(about.size).decode("utf-8-sig").strip()
                label, texts = (_label(words), ()) if text == ".cls" else (-1, (words,))
            except ValueError as error:
                if strict and text == ".cls":
                    raise DataError(f"{tar}: {key}{text}: {error}") from error
                reason = (
                    "its label is not a whole number from 0 on" if text == ".cls" else "its caption is not UTF-8"
                )
                skipped.append(Skipped(f"{readable(tar.name)}/{key}", reason))
                continue
            if texts == ("",):
                skipped.append(Skipped(f"{readable(tar.name)}/{key}", EMPTY_CAPTION))
                continue
            yield Sample(f"{readable(tar.name)}/{key}", tar, image.offset, image.size, label, texts)


def _grouped(
    tar: str, files: Sequence[Member], text: str, skipped: list[Skipped], ignored: list[Skipped]
) -> dict[str, tuple[Member, Member]]:
    """Image and text of each whole sample by its name; of the others, each is counted once."""
    samples: dict[str, dict[str, Member]] = {}
    taken: dict[str, Counter[str]] = {}
    for file in files:
        folder, _, name = file.name.rpartition("/")
        hidden = any(_is_hidden(part) for part in folder.split("/") if part not in (".", ".."))
        if (reason := HIDDEN if hidden else _why_left_out(name)) is not None and "suffix" not in reason:
            (ignored if reason == HIDDEN else skipped).append(Skipped(readable(f"{tar}/{file.name}"), reason))
            continue
        stem, _, suffix = name.partition(".")
        key, suffix = readable(f"{folder}/{stem}".lstrip("/")), readable(f".{suffix.lower()}")
        parts = samples.setdefault(key, {})
        if suffix not in parts:
            parts[suffix] = file
        elif suffix in IMAGE_SUFFIXES or suffix == text:
            taken.setdefault(key, Counter())[suffix] += 1
    for key, counts in taken.items():
        skipped += [Skipped(f"{tar}/{key}", TAKEN)] * max(counts.values())
    whole: dict[str, tuple[Member, Member]] = {}
    for key, parts in samples.items():
        images = [suffix for suffix in parts if suffix in IMAGE_SUFFIXES]
        ignored += [Skipped(f"{tar}/{key}{suffix}", "a second image of its sample") for suffix in images[1:]]
        dotted: dict[str, set[str]] = {}
        for suffix in parts:
            before, _, last = suffix.rpartition(".")
            if before:
                dotted.setdefault(key + before, set()).add(f".{last}")
        of_samples = {name for name, own in dotted.items() if text in own and own & IMAGE_SUFFIXES}
        reason = _why_not_whole(parts, images, text)
        if reason is None:
            whole[key] = parts[images[0]], parts[text]
        elif not images and text not in parts:
            # Nothing of the sample has a plain suffix: the dots have made it of other ones.
            of_samples |= {name for name, own in dotted.items() if text in own or own & IMAGE_SUFFIXES}
            other = next((suffix for suffix in parts if suffix in OTHER_IMAGE_SUFFIXES), None)
            if other is not None:
                skipped.append(Skipped(f"{tar}/{key}", f"images of suffix {other} are not read"))
            elif not of_samples:
                ignored.append(Skipped(f"{tar}/{key}", "no file of a sample"))
        elif not of_samples:
            loose = any(own & IMAGE_SUFFIXES or text in own for own in dotted.values())
            skipped.append(Skipped(f"{tar}/{key}", f"{reason}; {DOTTED}" if loose else reason))
        else:
            skipped.append(Skipped(f"{tar}/{key}", reason))
        skipped += [Skipped(f"{tar}/{name}", DOTTED) for name in sorted(of_samples)]
    return whole


def _why_not_whole(parts: Mapping[str, Member], images: Sequence[str], text: str) -> str | None:
    if not images:
        other = next((suffix for suffix in parts if suffix in OTHER_IMAGE_SUFFIXES), None)
        return "no image" if other is None else f"images of suffix {other} are not read"
    if text not in parts:
        return f"no {text}"
    if min(parts[images[0]].offset, parts[text].offset) < 0:
        return "a link, or in pieces: the tar does not hold its bytes"
    return None


def _label(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", text):  # int() takes 1_000, and digits of any script
        raise ValueError(f"{text[:40]!r} is no integer")
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"{text[:40]} is no label: it has more than 64 bits")
    if int(text) < 0:
        raise ValueError(f"{text} is no label: classes are counted from 0")
    return int(text)


def _tars(path: str, skipped: list[Skipped], ignored: list[Skipped]) -> list[Path]:
    root = locate(path)
    if root.is_dir():
        return _tars_in(root, path, skipped, ignored)
    try:
        names = list(braceexpand.braceexpand(path))
    except ValueError as error:
        raise DataError(f"{path}: not a brace range: {error}") from error
    tars = [Path(found) for name in names for found in (sorted(glob.glob(name, recursive=True)) or [name])]
    for tar in tars:
        if not tar.is_file():
            raise DataError(f"{path}: no tar there ({tar} does not exist)")
    _refuse_equal(tars, path)
    return tars


def _refuse_equal(paths: Sequence[Path], path: str) -> None:
    """Refuses two names of one tar or folder: all its samples would count twice.

    Raises:
        DataError: names both.
    """
    name_of: dict[str, Path] = {}
    for own in paths:
        real = os.path.realpath(own)
        if (other := name_of.get(real)) is not None:
            also = "" if other == own else f", also as {own}"
            raise DataError(f"{path}: names {other} twice{also}, and with it all its samples")
        name_of[real] = own


def _tars_in(root: Path, path: str, skipped: list[Skipped], ignored: list[Skipped]) -> list[Path]:
    tars: list[Path] = []
    compressed: list[str] = []
    try:
        for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
            name = entry.name.lower()
            if entry.is_dir():
                if not _is_hidden(entry.name) and any(below.endswith(".tar") for below in os.listdir(entry.path)):
                    ignored.append(Skipped(readable(entry.name), "a folder of tars beside the tars"))
            elif name.endswith(".tar"):
                if _is_hidden(entry.name):
                    ignored.append(Skipped(readable(entry.name), HIDDEN))
                elif not entry.is_file():  # a pipe would be waited for, for ever
                    raise DataError(f"{entry.path}: called like a tar, but no regular file; remove or rename it")
                else:
                    tars.append(root / entry.name)
            elif name.endswith(COMPRESSED):
                compressed.append(readable(entry.name))
    except OSError as error:
        raise DataError(f"{path}: cannot list its tars: {error}") from error
    if not tars:
        hint = f"; {compressed[0]} is compressed: unpack it to a plain .tar" if compressed else ""
        hint = hint or (f"; they may lie in {ignored[0].key}" if ignored else "")
        raise DataError(f"{path}: no tar there{hint}")
    _refuse_equal(tars, path)
    skipped += [Skipped(name, "a compressed tar; unpack it to a plain .tar") for name in compressed]
    return tars


# CSV


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
