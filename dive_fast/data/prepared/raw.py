"""Raw data sets that a preparation reads: our own sources, and data sets of torchvision and WILDS."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dive_fast.data import content_hashes
from dive_fast.data.content_hashes import ByteRange
from dive_fast.data.decode import UNDECODABLE, undecodable_reason
from dive_fast.data.sources.sample_table import printable
from dive_fast.data.sources.source import Skipped, Source
from dive_fast.errors import ChangedDataError, DataError


class UnusableError(Exception):
    """A sample cannot be prepared; the message is a reason that many samples can share."""


class RawSample(NamedTuple):
    """One sample of a raw data set: its image, encoded or decoded, label and texts."""

    image: bytes | Image.Image
    label: int
    texts: tuple[str, ...]


class Raw(ABC):
    """Interface of a raw data set."""

    class_names: tuple[str, ...] = ()
    skipped: Sequence[Skipped] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str:
        """The name of a sample in the data set."""

    @abstractmethod
    def read(self, index: int) -> RawSample:
        """Reads one sample.

        Raises:
            UnusableError: it cannot be read.
            ChangedDataError: its file changed after the set was listed.
        """

    @abstractmethod
    def digest(self) -> str:
        """A hash of the contents, as far as they are known without reading all of them."""

    @abstractmethod
    def modified(self) -> str:
        """A hash of the modification times of the files; empty if the files are unknown."""

    def report(self) -> None:  # noqa: B027 - samples left out while decoding are counted in the manifest
        """Logs the files that are ignored because they are not samples."""

    def check(self) -> None:  # noqa: B027 - most sets need no check
        """Checks the data set before anything is written.

        Raises:
            DataError: the set cannot be prepared.
        """


class RawSource(Raw):
    """Adapts a :class:`Source`: an image folder, webdataset or CSV table."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.class_names, self.skipped = source.class_names, source.skipped

    def __len__(self) -> int:
        return len(self._source)

    def report(self) -> None:
        replace(self._source, skipped=()).report_skipped("--input")

    def key(self, index: int) -> str:
        return self._source.samples.key(index)

    def read(self, index: int) -> RawSample:
        sample = self._source.samples[index]
        try:
            return RawSample(self._source.read(index), sample.label, sample.texts)
        except ChangedDataError:
            raise
        except DataError as error:
            raise UnusableError("cannot be read") from error

    def digest(self) -> str:
        return self._source.digest()

    def modified(self) -> str:
        return self._source.modified()


class RawDataset(Raw):
    """Adapts a data set of torchvision or WILDS, where ``dataset[i]`` is (picture, label, ...).

    Any exception of its third-party class becomes a DataError that names the exception's type.
    """

    def __init__(self, dataset: Any, name: str) -> None:
        """Wraps an open data set.

        Args:
            name: prefix of the samples' keys.

        Raises:
            DataError: its class names are not strings or integers.
        """
        self._dataset, self._name = dataset, name
        self.class_names = _class_names(getattr(dataset, "classes", ()), name)

    def __len__(self) -> int:
        return self._count

    @cached_property
    def _count(self) -> int:
        try:
            return len(self._dataset)
        except Exception as error:
            raise self._dataset_error(error) from error

    def key(self, index: int) -> str:
        return f"{self._name}/{index}"

    def check(self) -> None:
        if not len(self):
            raise DataError(f"{self._name}: the data set is empty")
        with suppress(UnusableError):  # a single broken sample is left out later
            self.read(0)

    def read(self, index: int) -> RawSample:
        try:
            item = self._dataset[index]
        except UNDECODABLE as error:
            if isinstance(error, NotImplementedError):
                raise self._dataset_error(error) from error
            raise UnusableError(undecodable_reason(error)) from error
        except Exception as error:
            raise self._dataset_error(error) from error
        if not isinstance(item, tuple) or len(item) < 2:
            raise DataError(f"{self.key(index)}: expected a tuple of picture and label, got {type(item).__name__}")
        image, label, *_ = item
        if not isinstance(image, Image.Image):
            raise UnusableError(f"not a picture but {type(image).__name__}")
        return RawSample(image, self._label(label, index), ())

    def _label(self, label: Any, index: int) -> int:
        try:
            if isinstance(label, str | float) or label is None:
                raise TypeError
            number = int(label)  # NumPy and torch scalars too
        except (TypeError, ValueError, RuntimeError):
            raise DataError(
                f"{self.key(index)}: its label is {type(label).__name__}, not the number of a class; only "
                "classification data sets can be prepared; use --format csv for captions"
            ) from None
        if self.class_names and not 0 <= number < len(self.class_names):
            raise DataError(
                f"{self.key(index)}: its label is {number}, but there are {len(self.class_names)} class names"
            )
        return number

    def digest(self) -> str:
        return self._digest

    @cached_property
    def _digest(self) -> str:
        """A hash of the data set's attributes (files, arrays, labels) and of the pixels of some samples."""
        from torch import Tensor  # data sets of torchvision and WILDS have it imported

        digest = hashlib.sha256(f"{self._name}: {len(self)}: {self.class_names}".encode())
        root = str(getattr(self._dataset, "root", ""))
        for _, value in sorted(vars(self._dataset).items()):
            if isinstance(value, np.ndarray | Tensor) and value.dtype != object:
                digest.update(np.ascontiguousarray(value).tobytes())
            elif isinstance(value, list | tuple):
                # Without the location of the files.
                digest.update(repr(value).replace(root, "").encode("utf-8", "surrogateescape"))
        files = [ByteRange(path, 0, -1) for path in self._files]
        for part in content_hashes.probe_hashes(files, np.full(len(files), -1)):
            digest.update(part)
        for index in range(0, len(self), max(1, len(self) // 64)):
            try:
                sample = self.read(index)
                assert isinstance(sample.image, Image.Image)
                digest.update(f"{sample.image.size} {sample.image.mode} {sample.label}".encode())
                digest.update(sample.image.tobytes())
            except UnusableError as reason:
                digest.update(str(reason).encode())
        return digest.hexdigest()

    def modified(self) -> str:
        return content_hashes.modification_hash(self._files) if self._files else ""

    @cached_property
    def _files(self) -> list[Path]:
        """The files named in the data set's lists; most classes of torchvision have such lists."""
        paths: list[Path] = []
        for _, value in sorted(vars(self._dataset).items()):
            for entry in value if isinstance(value, list | tuple) else ():
                path = entry[0] if isinstance(entry, tuple) and entry else entry
                if isinstance(path, str | Path) and (text := str(path)) and len(text) < 4096 and "\0" not in text:
                    paths.append(Path(path))
        paths = list(dict.fromkeys(paths))
        statuses = content_hashes.map_in_threads(content_hashes.stat_if_exists, paths)
        return [
            path
            for path, status in zip(paths, statuses, strict=True)
            if status is not None and S_ISREG(status.st_mode)
        ]

    def _dataset_error(self, error: Exception) -> DataError:
        return DataError(f"{self._name}: {type(error).__name__}: {error}")


def _class_names(names: Any, dataset: str) -> tuple[str, ...]:
    """Converts class names to strings; of several synonyms, as ImageNet has them, the first is kept.

    Raises:
        DataError: a name is neither a string nor an integer, or is not UTF-8.
    """
    if not isinstance(names, list | tuple | np.ndarray):
        return ()
    class_names: list[str] = []
    for name in names:
        first = name[0] if isinstance(name, list | tuple) and name else name
        if not isinstance(first, str | int | np.integer):
            raise DataError(
                f"{dataset}: the name of class {len(class_names)} is {type(name).__name__}; expected a string"
            )
        if printable(str(first)) != str(first):
            name = printable(str(first))
            raise DataError(f"{dataset}: the name of class {len(class_names)}, {name}, is not UTF-8; rename it")
        class_names.append(str(first))
    return tuple(class_names)
