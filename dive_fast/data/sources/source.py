"""A data set as a sequence of samples that are addressed by index.

Image folders, webdataset tars, CSV tables and prepared sets all become a :class:`Source`. It knows the name and
texts of every sample before training, and reads one image by index, in any order and from any process: order,
sharding and resume are therefore exact. Every sample that a reader leaves out is counted.
"""

from __future__ import annotations

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dive_fast.data import content_hashes
from dive_fast.data.decode import UNDECODABLE, decode, decode_error_message
from dive_fast.data.sources.object_store import refuse_url
from dive_fast.data.sources.sample_table import Sample, SampleTable, Strings
from dive_fast.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

EMPTY_CAPTION = "its caption is empty"
"""Reason for skipping a sample whose caption holds nothing but white space."""


class Skipped(NamedTuple):
    """A sample or file that was left out, with the reason."""

    key: str
    reason: str


class SkippedEntries(Sequence[Skipped]):
    """Skipped samples that are created on access: millions of them are two arrays."""

    def __init__(self, strings: Strings) -> None:
        """Takes the stored entries: key, a zero byte, and reason."""
        self.strings = strings

    @classmethod
    def of(cls, entries: Iterable[Skipped]) -> SkippedEntries:
        """The stored form of some entries."""
        if isinstance(entries, SkippedEntries):
            return entries
        return cls(Strings.of(f"{key}\0{reason}".encode() for key, reason in entries))

    def __len__(self) -> int:
        return len(self.strings)

    @overload
    def __getitem__(self, row: int) -> Skipped: ...
    @overload
    def __getitem__(self, row: slice) -> list[Skipped]: ...
    def __getitem__(self, row: int | slice) -> Skipped | list[Skipped]:
        """The entry of a row, or the entries of a slice of rows."""
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        return _entry(self.strings[row % len(self)])

    def __iter__(self) -> Iterator[Skipped]:
        return map(_entry, self.strings)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def _entry(stored: bytes) -> Skipped:
    # A name in a tar can hold a zero byte; no reason does.
    return Skipped(*stored.decode().rsplit("\0", 1))


class Images(ABC):
    """Images that are read by the number of their sample, in any order and from any process."""

    sizes: NDArray[np.int32] | None = None
    """``(N, 2)``: height and width of each image, where they are known without reading it."""

    @abstractmethod
    def sample(self, number: int) -> Sample:
        """One sample."""

    @abstractmethod
    def after(self, number: int) -> int:
        """The number of the sample that replaces one that cannot be used."""

    @abstractmethod
    def digest(self) -> str:
        """A hash that identifies the set, wherever its files lie."""

    def read(self, number: int) -> bytes:
        """Reads the bytes of one image file.

        Raises:
            DataError: they cannot be read.
        """
        sample = self.sample(number)
        try:
            return content_hashes.read_range(content_hashes.ByteRange(sample.path, sample.offset, sample.size))
        except (OSError, ValueError, OverflowError, MemoryError) as error:  # all but OSError: an invalid range
            raise sample.unusable(f"cannot read the image: {error}") from error

    def image(self, number: int) -> Image.Image:
        """Decodes one image to RGB or grey.

        Raises:
            DataError: it cannot be read, or its bytes are not a complete image.
        """
        data = self.read(number)
        try:
            return decode(data)
        except UNDECODABLE as error:
            raise self.sample(number).unusable(
                f"cannot decode the image: {decode_error_message(error)}"
            ) from error


@dataclass(frozen=True)
class Source(Images):
    """A data set as a sequence of samples.

    Fields marked "prepared sets" are known without reading the samples, and are empty or None for raw data.
    """

    samples: SampleTable
    class_names: tuple[str, ...] = ()
    """Names of the class folders of an image folder, or those of a prepared set; otherwise empty."""
    skipped: Sequence[Skipped] = ()
    """All samples that the reader left out."""
    ignored: Sequence[Skipped] = ()
    """Files that are not samples: hidden files, resource forks, second images of a sample."""
    prepared_without: Mapping[str, int] = field(default_factory=dict)
    """Prepared sets: number of samples that the preparation left out, by reason."""
    content_hash: str = ""
    """Prepared sets: a hash of the contents of all samples."""
    hashes: NDArray[np.uint8] | None = None
    """Prepared sets: ``(N, 16)``, a hash of each image's bytes."""
    first_rows: Sequence[int] = ()
    """Prepared sets: the index of the first sample of each file."""
    files: Sequence[Path] = ()
    """Prepared sets: all files."""
    sizes: NDArray[np.int32] | None = None
    """Prepared sets: ``(N, 2)``, height and width of each image, all of which are complete JPEGs."""
    tokens: Tensor | None = None
    """Sets prepared with a tokenizer: ``(N, context)``, the tokens of each sample's first text."""
    beton: Path | None = None
    """Sets prepared for FFCV: its file with all images, in the order of the samples."""
    modified_hash: str = ""
    """Raw data: the result of :meth:`modified` where the reader knows it; otherwise empty."""
    held_out: str = ""
    """The part of the data set that ``holdout`` leaves, for the user; empty for a complete set."""

    @classmethod
    def of(
        cls,
        samples: Iterable[Sample],
        class_names: tuple[str, ...] = (),
        *,
        skipped: Sequence[Skipped] = (),
        ignored: Sequence[Skipped] = (),
    ) -> Source:
        """A raw set of some samples."""
        return cls(SampleTable.of(samples), class_names, skipped=skipped, ignored=ignored)

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, number: int) -> Sample:
        return self.samples[number]

    def after(self, number: int) -> int:
        return (number + 1) % len(self)

    def read(self, number: int) -> bytes:
        """Reads the bytes of one image file.

        Raises:
            ChangedDataError: the image, or its text, changed after the set was listed.
            DataError: the bytes cannot be read.
        """
        if self.samples.listed is None:
            return super().read(number)
        sample = self.sample(number)
        try:
            with open(sample.path, "rb", buffering=0) as file:
                data = file.read()
                # Afterwards: a change while the file is read is noticed too.
                self.samples.check_unchanged(number, os.fstat(file.fileno()))
            return data
        except (OSError, MemoryError) as error:
            with suppress(OSError):
                self.samples.check_unchanged(number)
            raise sample.unusable(f"cannot read the image: {error}") from error

    def digest(self) -> str:
        """A hash of everything that decides results, wherever the files lie; computed once.

        Raw data: :meth:`SampleTable.digest`, which covers key, label, texts and image size of every sample in
        order, the class names, and the bytes of up to ``content_hashes.NUM_PROBES`` images spread evenly over the
        set, from end to end or at both ends.
        Prepared sets: the content hash of the manifest, which covers all bytes, and the class names.

        Raises:
            DataError: images of a prepared set differ from its index.
        """
        return self._digest

    def modified(self) -> str:
        """A hash of the modification times of all files; computed once.

        If both it and :meth:`digest` are equal, nothing has changed. A copy of the files has another one.

        Raises:
            ChangedDataError: as :meth:`check_files`.
        """
        self._check_all_files  # noqa: B018 - once
        return self.listed_modified()

    def listed_modified(self) -> str:
        """As :meth:`modified`, of files that may have changed since: for results that read all images again."""
        return self._modified

    def check_files(self, rows: Sequence[int]) -> None:
        """Compares the files of some samples with the listing of a set that was opened without another one.

        Raises:
            ChangedDataError: a file has changed since.
        """
        if self.samples.listed is not None:
            content_hashes.map_in_threads(self.samples.check_if_readable, rows)

    def image_ids(self) -> NDArray[np.int64]:
        """``(N,)``: equal numbers for images of equal bytes; unreadable images are distinct; computed once."""
        return self._image_ids

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        if self.content_hash:
            self._check_hashes()
            if not self.class_names:
                return self.content_hash
            digest.update(self.content_hash.encode())
        else:
            digest.update(self.samples.digest().encode())
            for part in content_hashes.probe_hashes(self.samples, self.samples.sizes):
                digest.update(part)
        digest.update(repr(tuple(self.class_names)).encode())
        return digest.hexdigest()

    @cached_property
    def _check_all_files(self) -> None:
        self.check_files(range(len(self)))

    @cached_property
    def _modified(self) -> str:
        return self.modified_hash or content_hashes.modification_hash(self.files or self.samples.used_files())

    @cached_property
    def _image_ids(self) -> NDArray[np.int64]:
        if self.hashes is None:
            # Otherwise a changed image would be an unreadable or a cut one.
            self._check_all_files  # noqa: B018 - once
            hashes = content_hashes.image_hashes(self.samples)
        else:
            hashes = [row.tobytes() for row in self.hashes]
        id_of: dict[bytes, int] = {}
        ids = [id_of.setdefault(value or str(row).encode(), row) for row, value in enumerate(hashes)]
        return np.array(ids, dtype=np.int64)

    def _check_hashes(self) -> None:
        """Validates some images of a prepared set against its index; opening the set compares file sizes only."""
        if self.hashes is None:
            return
        rows = sorted({*range(0, len(self), max(1, len(self) // 64)), *self.first_rows})
        for row, image_hash in zip(rows, content_hashes.map_in_threads(self._image_hash, rows), strict=True):
            if image_hash != self.hashes[row].tobytes():
                raise self.samples[row].unusable("changed since it was prepared; copy or prepare the set again")

    def _image_hash(self, row: int) -> bytes:
        return content_hashes.image_hash(self.read(row))

    def report_skipped(self, name: str) -> None:
        """Logs how many samples and files were left out of the set called ``name``, and why."""
        for entries, kind, action in ((self.skipped, "sample", "left out"), (self.ignored, "file", "ignored")):
            first: dict[str, str] = {}
            counts: Counter[str] = Counter()
            for key, reason in entries:
                counts[reason] += 1
                if counts[reason] == 1:
                    first[reason] = key
            for reason, count in counts.most_common():
                plural = "" if count == 1 else "s"
                logger.warning(
                    "%s: %d %s%s %s: %s (the first: %s)", name, count, kind, plural, action, reason, first[reason]
                )
        if self.prepared_without:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.prepared_without.items())
            logger.warning("%s: prepared without these samples: %s (skipped.jsonl)", name, reasons)


def locate(path: str) -> Path:
    """Resolves a path of the config; ``demo:target`` lies in the embedded demo, which is generated when missing.

    Raises:
        DataError: the demo has no such split, or the path is a URL of an object store.
    """
    refuse_url(path)
    if not path.startswith("demo:"):
        return Path(path)
    from dive_fast.data.demo.splits import resolve  # only configs of the demo need it

    try:
        return resolve(path)
    except ValueError as error:
        raise DataError(str(error)) from error


def summarize_skipped(entries: Sequence[Skipped]) -> str:
    """The most frequent reasons with their counts, and the first entry, for a message."""
    counts = Counter(reason for _, reason in entries).most_common(3)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts)
    return f"{reasons}; the first: {entries[0].key}"
