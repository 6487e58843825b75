"""Where samples lie: image folder, webdataset tars or CSV, all addressed by index.

A source knows every sample's name and text before training and reads one image by index, in any order and from
any process: that is what makes order, sharding and resume exact.
"""

import csv
import glob
import hashlib
import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import braceexpand
from PIL import Image

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})


class DataError(ValueError):
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


@dataclass(frozen=True)
class Source:
    """A data set as a sequence of samples."""

    samples: Sequence[Sample]
    class_names: tuple[str, ...] = ()
    """Of an image folder: its folders' names. Else empty."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Why how many samples were left out, e.g. ``{"no .txt": 3}``."""

    def __len__(self) -> int:
        return len(self.samples)

    def image(self, index: int) -> Image.Image:
        """Decodes one image.

        Raises:
            DataError: the bytes are no whole image.
        """
        sample = self.samples[index]
        try:
            with sample.path.open("rb") as file:
                file.seek(sample.offset)
                image = Image.open(io.BytesIO(file.read(sample.size)))
                image.load()
        except (OSError, RuntimeError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{sample.path}: sample {sample.key}: cannot decode the image: {error}") from error
        return image

    def digest(self) -> str:
        """A hash of what the samples are: names, texts and sizes, in order, wherever they lie."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(repr((sample.key, sample.size, sample.texts)).encode())
        return digest.hexdigest()


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
            samples += [
                Sample(str(file.relative_to(root)), file, size=file.stat().st_size, label=label) for file in files
            ]
    except OSError as error:
        raise DataError(f"{path}: cannot list its images: {error}") from error
    if not samples:
        raise DataError(f"{path}: expected one folder a class with images below, found none")
    return Source(samples, tuple(folder.name for folder in folders))


def open_webdataset(path: str, text: str) -> Source:
    """Webdataset tars: files of one name but for the suffix are one sample.

    Args:
        path: a tar, a brace range, a glob, or a folder of tars.
        text: the suffix that a sample needs beside its image, ``.cls`` (its label) or ``.txt`` (its caption).

    Raises:
        DataError: no tar there, one that is broken, or none with a whole sample.
    """
    samples: list[Sample] = []
    skipped: dict[str, int] = {}
    for tar in _tars(path):
        for stem, parts in _tar_samples(tar):
            image = next((part for suffix, part in parts.items() if suffix in IMAGE_SUFFIXES), None)
            if image is None or text not in parts:
                reason = "no image" if image is None else f"no {text}"
                skipped[reason] = skipped.get(reason, 0) + 1
                continue
            offset, size = image
            value = _read(tar, *parts[text])
            try:
                content = value.decode().strip()
                label, texts = (int(content), ()) if text == ".cls" else (-1, (content,))
            except ValueError as error:
                raise DataError(f"{tar}: {stem}{text}: {error}") from error
            samples.append(Sample(f"{tar.name}/{stem}", tar, offset, size, label, texts))
    if not samples:
        raise DataError(f"{path}: no sample has both an image and a {text} file")
    return Source(samples, skipped=skipped)


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


def _tar_samples(tar: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Name and ``{suffix: (offset, size)}`` of each sample of a tar, in its order."""
    parts: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(tar, "r:") as members:
            for member in members:
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    key = f"{folder}/{stem}".lstrip("/")
                    parts.setdefault(key, {})[f".{suffix.lower()}"] = (member.offset_data, member.size)
            end = members.offset
        # tarfile takes a header that it cannot read for the end, which is a block of zeros.
        if _read(tar, end, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(f"{tar}: not a whole tar: it breaks off at byte {end}")
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{tar}: not a whole tar: {error}") from error
    yield from parts.items()


def _read(file: Path, offset: int, size: int) -> bytes:
    with file.open("rb") as content:
        content.seek(offset)
        return content.read(size)
