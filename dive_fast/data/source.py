"""Where samples lie: image folder, webdataset tars or CSV, all addressed by index.

A source knows every sample's name and text before training and reads one image by index, in any order and from
any process: that is what makes order, sharding and resume exact.
"""

import csv
import glob
import hashlib
import io
import logging
import stat
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import braceexpand
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dive_fast.errors import UserError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "MPO", "AVIF", "TIFF", "JPEG2000", "PPM", "DIB", "ICO", "TGA")
"""What a file may be, whatever its suffix says. PIL knows more, and gives PostScript to Ghostscript, a program."""


class DataError(UserError):
    """Data that cannot be used; the message names the file and says what was expected."""


@dataclass(frozen=True)
class Sample:
    """One image and what is known of it."""

    key: str
    """Name in the data set, for messages and for the hash that a teacher cache is tied to."""
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
    content: str = ""
    """A hash of all that the samples hold, where it is known without reading them: of a prepared set."""
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
            return _read(sample.path, sample.offset, sample.size)
        except (OSError, ValueError, OverflowError, MemoryError) as error:  # the latter of places no file has
            raise sample.unusable(f"cannot read the image: {error}") from error

    def image(self, index: int) -> Image.Image:
        """Decodes one image.

        Raises:
            DataError: the bytes are no whole image.
        """
        try:
            return decode(self.read(index))
        except UNDECODABLE as error:
            raise self.samples[index].unusable(f"cannot decode the image: {error}") from error

    def digest(self) -> str:
        """A hash of what the samples are, in order, wherever they lie.

        Of a prepared set: of its content. Else of names, texts and sizes.
        """
        if self.content:
            return self.content
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(repr((sample.key, sample.size, sample.texts)).encode())
        return digest.hexdigest()

    def report_skipped(self, name: str) -> None:
        """Says how many samples were left out of the set called ``name``, and why."""
        for reason, count in Counter(reason for _, reason in self.skipped).most_common():
            first = next(key for key, other in self.skipped if other == reason)
            logger.warning("%s: %d samples left out: %s (the first: %s)", name, count, reason, first)


UNDECODABLE = (OSError, RuntimeError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What PIL raises for bytes that are no image."""


def decode(data: bytes) -> Image.Image:
    """The (first) picture of an image file.

    Raises:
        UNDECODABLE: the bytes are no whole image.
    """
    image = opened(data)
    image.load()
    return image


def opened(data: bytes) -> Image.Image:
    """The same, not yet decoded."""
    return Image.open(io.BytesIO(data), formats=_formats())


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def why_unusual(image: Image.Image, data: bytes) -> str:
    """Why not every loader decodes a file as PIL does; empty: they do.

    Args:
        image: the file as PIL opened it, decoded or not.
        data: its bytes.
    """
    if image.format != "JPEG":
        return str(image.format)
    if image.mode not in ("RGB", "L"):
        return f"{image.mode} JPEG"
    if image.mode == "RGB" and image.info.get("adobe_transform") == 0:
        return "RGB JPEG without YCbCr"
    # Behind the end some cameras write a few more bytes.
    return "" if b"\xff\xd9" in data[-64:] else "JPEG without end"


def locate(path: str) -> Path:
    """A path of the config on the file system: ``demo:target`` lies in the embedded demo, made when missing.

    Raises:
        DataError: the demo has no such part.
    """
    if not path.startswith("demo:"):
        return Path(path)
    from dive_fast.demo.world import resolve  # the demo is no part of the engine: only when asked for

    try:
        return resolve(path)
    except ValueError as error:
        raise DataError(str(error)) from error


def open_folder(path: str) -> Source:
    """One folder a class, sorted by name, images anywhere below it; hidden folders are none.

    Raises:
        DataError: the folder is missing or holds no images, or one of its folders holds none: whether that is a
            class decides the label of all behind it.
    """
    root = locate(path)
    samples: list[Sample] = []
    folders: list[Path] = []
    try:
        if root.is_dir():
            folders = sorted(
                entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
            )
        for label, folder in enumerate(folders):
            files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in IMAGE_SUFFIXES]
            if not files:
                raise DataError(f"{folder}: no image below, but it would be class {label}; remove it")
            for file in files:
                about = file.stat()
                if not stat.S_ISREG(about.st_mode):
                    # A pipe would be waited for, for ever.
                    raise DataError(f"{file}: called like an image, but no regular file; remove or rename it")
                samples.append(Sample(str(file.relative_to(root)), file, size=about.st_size, label=label))
    except OSError as error:
        raise DataError(f"{path}: cannot list its images: {error}") from error
    if not samples:
        raise DataError(f"{path}: expected one folder a class with images below, found none")
    return Source(samples, tuple(folder.name for folder in folders))


def open_webdataset(path: str, text: str, *, strict: bool = True) -> Source:
    """Webdataset tars: files of one name but for the suffix are one sample.

    Samples without an image or a text, whose text is not UTF-8, or whose name is taken, are skipped.

    Args:
        path: a tar, a brace range, a glob, or a folder of tars.
        text: the suffix that a sample needs beside its image, ``.cls`` (its label) or ``.txt`` (its caption).
        strict: whether a broken tar or label is an error; else what is whole is taken and the rest skipped.

    Raises:
        DataError: no tar there, one that is broken, or none with a whole sample.
    """
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    for tar in _tars(path):
        members = _tar_samples(tar)
        skipped += [Skipped(f"{tar.name}/{name}", "its name is taken") for name in members.duplicates]
        if members.broken is not None:
            if strict:
                raise DataError(f"{tar}: not a whole tar: {members.broken}")
            skipped.append(Skipped(tar.name, "the tar is not whole"))
        for stem, parts in members.samples.items():
            image = next((part for suffix, part in parts.items() if suffix in IMAGE_SUFFIXES), None)
            if image is None or text not in parts:
                skipped.append(Skipped(f"{tar.name}/{stem}", "no image" if image is None else f"no {text}"))
                continue
            offset, size = image
            try:
                value = _read(tar, *parts[text])
                content = value.decode().strip()
                label, texts = (_label(content), ()) if text == ".cls" else (-1, (content,))
            except ValueError as error:
                if strict and text == ".cls":
                    raise DataError(f"{tar}: {stem}{text}: {error}") from error
                reason = "its label is no integer" if text == ".cls" else "its caption is not UTF-8"
                skipped.append(Skipped(f"{tar.name}/{stem}", reason))
                continue
            samples.append(Sample(f"{tar.name}/{stem}", tar, offset, size, label, texts))
    if not samples:
        raise DataError(f"{path}: no sample has both an image and a {text} file")
    return Source(samples, skipped=skipped)


def _label(text: str) -> int:
    label = int(text)
    if not -(2**63) <= label < 2**63:
        raise ValueError(f"{text[:40]} is no label: it has more than 64 bits")
    return label


def open_csv(path: str, image_root: str | None, *, group: bool) -> Source:
    """A tab-separated file with columns ``title`` and ``filepath``, as FLYP writes it.

    Args:
        image_root: where relative file paths start; None: at the CSV file's folder.
        group: rows of one file become one sample with all its titles (FLYP's images x templates rows); else every
            row is a sample.

    Raises:
        DataError: the file or a column is missing, or there is no row.
    """
    file = Path(path)
    root = Path(image_root) if image_root is not None else file.parent
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, delimiter="\t")
            missing = {"title", "filepath"} - set(reader.fieldnames or ())
            if missing:
                raise DataError(
                    f"{path}: no column {' and '.join(sorted(missing))} in its tab-separated first line"
                )
            # One string for equal titles: FLYP's files repeat each prompt once an image.
            titles: dict[str, str] = {}
            rows = [
                (row["filepath"] or "", titles.setdefault(row["title"] or "", row["title"] or ""))
                for row in reader
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot read it: {error}") from error
    if (row := next((row for row, (name, _) in enumerate(rows) if "\0" in name or not name), None)) is not None:
        raise DataError(f"{path}: row {row + 1} names no file: {rows[row][0]!r}")
    if group:
        grouped: dict[str, list[str]] = {}
        for name, title in rows:
            grouped.setdefault(name, []).append(title)
        samples = [Sample(name, root / name, texts=tuple(own)) for name, own in grouped.items()]
    else:
        samples = [Sample(f"{name}#{row}", root / name, texts=(title,)) for row, (name, title) in enumerate(rows)]
    if not samples:
        raise DataError(f"{path}: no rows below its first line")
    if not samples[0].path.is_file():
        raise DataError(f"{path}: {samples[0].path} does not exist; set image_root to where the file paths start")
    return Source(samples)


def _tars(path: str) -> list[Path]:
    root = locate(path)
    if root.is_dir():
        tars = sorted(root.glob("*.tar"))
        if not tars:
            raise DataError(f"{path}: no tar there")
        return tars
    try:
        names = list(braceexpand.braceexpand(path))
    except ValueError as error:
        raise DataError(f"{path}: not a brace range: {error}") from error
    tars = [Path(found) for name in names for found in (sorted(glob.glob(name)) or [name])]
    for tar in tars:
        if not tar.is_file():
            raise DataError(f"{path}: no tar there ({tar} does not exist)")
    return tars


LONGEST_NAME = 2**20
"""Bytes of a header that holds nothing but a member's name and the like, and is read into memory."""
_NAMES = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)


class _Members(NamedTuple):
    """What a tar holds."""

    samples: dict[str, dict[str, tuple[int, int]]]
    """Name and ``{suffix: (offset, size)}`` of each sample, in the tar's order."""
    duplicates: list[str]
    """Files that another one of the same name comes before."""
    broken: str | None
    """Why the tar is not whole, if it is not; what comes before is in ``samples``."""


def _tar_samples(tar: Path) -> _Members:
    found = _Members({}, [], None)
    try:
        with tarfile.open(tar, "r:", tarinfo=_Header) as members:
            file_size, end = tar.stat().st_size, 0
            for member in members:
                if member.size < 0 or members.offset <= end:
                    # By extended headers too: what goes back would be read again, for ever.
                    return found._replace(broken=f"the size of {member.name} is {member.size}")
                end = members.offset
                if not member.isfile():
                    continue
                if member.offset_data + member.size > file_size:
                    return found._replace(broken=f"it breaks off inside {member.name}")
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                parts = found.samples.setdefault(f"{folder}/{stem}".lstrip("/"), {})
                if f".{suffix.lower()}" in parts:
                    found.duplicates.append(member.name)
                else:
                    parts[f".{suffix.lower()}"] = (member.offset_data, member.size)
            end = members.offset
        # tarfile takes a header that it cannot read for the end, which is a block of zeros.
        if _read(tar, end, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            return found._replace(broken=f"it breaks off at byte {end}")
    except (OSError, tarfile.TarError) as error:
        return found._replace(broken=str(error))
    except (ValueError, ArithmeticError, LookupError, MemoryError, RecursionError) as error:
        return found._replace(broken=f"a header cannot be read: {error or type(error).__name__}")
    return found


class _Header(tarfile.TarInfo):
    """Of a member. tarfile believes any size, and goes where it leads."""

    @classmethod
    def frombuf(cls, *arguments: Any, **options: Any) -> Self:
        """Parses one.

        Raises:
            tarfile.HeaderError: it is none, or has a size that nothing has.
        """
        header = super().frombuf(*arguments, **options)
        if not 0 <= header.size <= (LONGEST_NAME if header.type in _NAMES else 2**62):
            raise tarfile.HeaderError(f"{header.size} bytes in a member of type {header.type!r}")
        return header


def _read(file: Path, offset: int, size: int) -> bytes:
    with file.open("rb") as content:
        content.seek(offset)
        return content.read(size)
