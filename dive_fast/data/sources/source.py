"""Where samples lie: image folder, webdataset tars or CSV, all addressed by index.

A source knows every sample's name and text before training and reads one image by index, in any order and from
any process: that is what makes order, sharding and resume exact. What a reader leaves out, it counts.
"""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

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
    decode_error_message,
)
from dive_fast.errors import DataError

logger = logging.getLogger(__name__)

NO_CLASSES = frozenset(
    {"__MACOSX", "__pycache__", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
)
"""Folders that systems make beside people's own; with hidden ones they are no classes."""
EMPTY_CAPTION = "its caption is empty"
HIDDEN = "hidden, or made by the system"


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
            raise self.samples[index].unusable(
                f"cannot decode the image: {decode_error_message(error)}"
            ) from error

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
    from dive_fast.data.demo.splits import resolve  # the demo is no part of the engine: only when asked for

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


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of a person's own."""
    return (
        name.startswith(".") or name in NO_CLASSES or name.lower() in ("thumbs.db", "ehthumbs.db", "desktop.ini")
    )


def reason_to_skip(name: str) -> str | None:
    """Why a file is left out whatever it holds; None: it may be an image, or something beside one."""
    suffix = Path(name).suffix.lower()
    if is_hidden(name):
        # What macOS calls ._x.jpg is no image; .x.jpg may be one.
        return "a hidden file; rename it" if suffix in IMAGE_SUFFIXES and not name.startswith("._") else HIDDEN
    return f"images of suffix {suffix} are not read" if suffix in OTHER_IMAGE_SUFFIXES else None


# Webdataset


def refuse_duplicates(paths: Sequence[Path], path: str) -> None:
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


# CSV
