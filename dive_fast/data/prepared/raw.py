"""Raw data sets as the input of a preparation."""

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
from torch import Tensor

from dive_fast.data import content_hashes as content
from dive_fast.data.content_hashes import Piece
from dive_fast.data.decode import UNDECODABLE
from dive_fast.data.decode import undecodable_reason as undecodable_reason
from dive_fast.data.sources.source import Skipped, Source, readable
from dive_fast.errors import DataError


class UnusableError(Exception):
    """A sample that is left out; the message is the reason, in words that many samples share."""


class RawSample(NamedTuple):
    """One sample of a raw set."""

    image: bytes | Image.Image
    label: int
    texts: tuple[str, ...]


class Raw(ABC):
    """A raw data set."""

    class_names: tuple[str, ...] = ()
    skipped: Sequence[Skipped] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str:
        """The name of a sample."""

    @abstractmethod
    def read(self, index: int) -> RawSample:
        """One sample.

        Raises:
            UnusableError: it cannot be read.
        """

    @abstractmethod
    def digest(self) -> str:
        """A hash of what the set is, as far as it is known without reading all of it."""

    @abstractmethod
    def modified(self) -> str:
        """A hash of when its files were last modified; empty: it is not known which they are."""

    def report(self) -> None:  # noqa: B027 - what is left out while decoding, the manifest counts
        """Logs the files that are ignored because they are no samples."""

    def check(self) -> None:  # noqa: B027 - most sets have nothing to look at
        """Looks at what can be known before anything is decoded.

        Raises:
            DataError: the set can never become a prepared one.
        """


class RawSource(Raw):
    """A folder, CSV file or webdataset."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.class_names, self.skipped = source.class_names, source.skipped

    def __len__(self) -> int:
        return len(self._source)

    def report(self) -> None:
        replace(self._source, skipped=()).report_skipped("--input")

    def key(self, index: int) -> str:
        return self._source.samples[index].key

    def read(self, index: int) -> RawSample:
        sample = self._source.samples[index]
        try:
            return RawSample(self._source.read(index), sample.label, sample.texts)
        except DataError as error:
            raise UnusableError("cannot be read") from error

    def digest(self) -> str:
        return self._source.digest()

    def modified(self) -> str:
        return self._source.modified()


class RawDataset(Raw):
    """A data set of torchvision or WILDS: ``dataset[i]`` is (picture, label, ...).

    Its class is somebody else's: whatever it raises becomes a DataError that names its type.
    """

    def __init__(self, dataset: Any, name: str) -> None:
        """Takes an opened data set.

        Raises:
            DataError: its class names are not names.
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
            raise self._foreign(error) from error

    def key(self, index: int) -> str:
        return f"{self._name}/{index}"

    def check(self) -> None:
        if not len(self):
            raise DataError(f"{self._name}: it holds no sample")
        with suppress(UnusableError):  # one of many
            self.read(0)

    def read(self, index: int) -> RawSample:
        try:
            item = self._dataset[index]
        except UNDECODABLE as error:
            if isinstance(error, NotImplementedError):
                raise self._foreign(error) from error
            raise UnusableError(undecodable_reason(error)) from error
        except Exception as error:
            raise self._foreign(error) from error
        if not isinstance(item, tuple) or len(item) < 2:
            raise DataError(f"{self.key(index)}: expected a picture and its label, found {type(item).__name__}")
        image, label, *_ = item
        if not isinstance(image, Image.Image):
            raise UnusableError(f"not a picture but {type(image).__name__}")
        return RawSample(image, self._label(label, index), ())

    def _label(self, label: Any, index: int) -> int:
        try:
            if isinstance(label, str | float) or label is None:
                raise TypeError
            number = int(label)  # also of NumPy and torch
        except (TypeError, ValueError, RuntimeError):
            raise DataError(
                f"{self.key(index)}: its label is {type(label).__name__}, not the number of a class; only sets "
                "for classification are prepared so; captions come by --format csv"
            ) from None
        if self.class_names and not 0 <= number < len(self.class_names):
            raise DataError(
                f"{self.key(index)}: has label {number}, but there are {len(self.class_names)} class names"
            )
        return number

    def digest(self) -> str:
        return self._digest

    @cached_property
    def _digest(self) -> str:
        """Of what the object holds (files, arrays, labels), and of the pixels of some samples."""
        digest = hashlib.sha256(f"{self._name}: {len(self)}: {self.class_names}".encode())
        root = str(getattr(self._dataset, "root", ""))
        for _, value in sorted(vars(self._dataset).items()):
            if isinstance(value, np.ndarray | Tensor) and value.dtype != object:
                digest.update(np.ascontiguousarray(value).tobytes())
            elif isinstance(value, list | tuple):
                # Wherever the files lie.
                digest.update(repr(value).replace(root, "").encode("utf-8", "surrogateescape"))
        for part in content.digest_of(Piece(path, 0, -1) for path in self._files):
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
        return content.modified(self._files) if self._files else ""

    @cached_property
    def _files(self) -> list[Path]:
        """The files that the object's lists name, as those of most classes of torchvision do."""
        found: list[Path] = []
        for _, value in sorted(vars(self._dataset).items()):
            for entry in value if isinstance(value, list | tuple) else ():
                path = entry[0] if isinstance(entry, tuple) and entry else entry
                if isinstance(path, str | Path) and (text := str(path)) and len(text) < 4096 and "\0" not in text:
                    found.append(Path(path))
        found = list(dict.fromkeys(found))
        states = content.in_threads(content.stat, found)
        return [
            path for path, about in zip(found, states, strict=True) if about is not None and S_ISREG(about.st_mode)
        ]

    def _foreign(self, error: Exception) -> DataError:
        return DataError(f"{self._name}: {type(error).__name__}: {error}")


def _class_names(names: Any, of: str) -> tuple[str, ...]:
    """As strings: of synonyms, as ImageNet has them, the first.

    Raises:
        DataError: one is something else, or not UTF-8.
    """
    if not isinstance(names, list | tuple | np.ndarray):
        return ()
    found: list[str] = []
    for name in names:
        first = name[0] if isinstance(name, list | tuple) and name else name
        if not isinstance(first, str | int | np.integer):
            raise DataError(f"{of}: class {len(found)} has {type(name).__name__} for a name; expected a string")
        if readable(str(first)) != str(first):
            raise DataError(
                f"{of}: the name of class {len(found)}, {readable(str(first))}, is not UTF-8; rename it"
            )
        found.append(str(first))
    return tuple(found)
