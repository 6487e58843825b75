"""A prepared data set on disk: files of whole JPEGs, an index of every sample, a manifest.

The files are webdataset tars or FFCV's ``data.beton``; in either an image is so many bytes from some offset on, so
that PIL and DALI read both. The index says where, and how large each image is, its label, texts and hash: a set of
millions opens at once, and no tar is scanned.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from dive_fast.data.source import DataError, Sample, Skipped, Source, locate
from dive_fast.files import write_whole

FORMAT = 1
MANIFEST, INDEX, SKIPPED, BETON = "manifest.json", "index.safetensors", "skipped.jsonl", "data.beton"
HASH_BYTES = 16
Index = dict[str, Tensor]
"""One row a sample: ``file``, ``offset``, ``size``, ``height``, ``width``, ``label``, ``hash (N, 16)``, optionally
``tokens (N, context)``; ``keys`` and ``texts`` are UTF-8, those of all samples one after the other, their ends in
``key_ends`` and ``text_ends``. Several texts of a sample are separated by a zero byte."""


@dataclass(frozen=True)
class Row:
    """One sample of the index."""

    key: str
    file: int
    """Which of the manifest's files."""
    offset: int
    size: int
    height: int
    width: int
    label: int
    texts: tuple[str, ...]
    hash: bytes
    """Of the image's bytes."""
    tokens: Tensor | None = None


@dataclass(frozen=True)
class File:
    """One file of images."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a prepared set is, and what it was made from."""

    format: int
    samples: int
    content: str
    """Hash of all images, labels and texts in order: what a teacher cache is tied to."""
    files: list[File]
    class_names: list[str]
    skipped: dict[str, int]
    """Why how many samples were left out; which ones, ``skipped.jsonl`` says."""
    converted: dict[str, int]
    """Why how many images were encoded anew; all others have their original bytes."""
    options: dict[str, Any]


def index_of(rows: Sequence[Row]) -> Index:
    """The index of some samples."""
    index = {
        name: torch.tensor([getattr(row, name) for row in rows], dtype=dtype)
        for name, dtype in (
            ("file", torch.int32),
            ("offset", torch.int64),
            ("size", torch.int64),
            ("height", torch.int32),
            ("width", torch.int32),
            ("label", torch.int64),
        )
    }
    hashes = np.frombuffer(b"".join(row.hash for row in rows), np.uint8).reshape(-1, HASH_BYTES)
    index["hash"] = torch.from_numpy(hashes.copy())
    index |= _strings("key", [row.key.encode() for row in rows])
    index |= _strings("text", ["\0".join(text.replace("\0", " ") for text in row.texts).encode() for row in rows])
    if rows and rows[0].tokens is not None:
        index["tokens"] = torch.stack([row.tokens for row in rows if row.tokens is not None]).int()
    return index


def joined(parts: Sequence[Index]) -> Index:
    """The index of all samples from those of the files, in order; ``file`` counts them."""
    whole: Index = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if name == "file":
            tensors = [torch.full_like(tensor, number) for number, tensor in enumerate(tensors)]
        if name.endswith("_ends"):
            before = np.cumsum([0] + [int(ends[-1]) if len(ends) else 0 for ends in tensors[:-1]])
            tensors = [tensor + int(first) for tensor, first in zip(tensors, before, strict=True)]
        whole[name] = torch.cat(tensors)
    return whole


def content_of(index: Index) -> str:
    """A hash of what the samples hold, wherever they lie and whatever they are called."""
    digest = hashlib.sha256()
    for name in ("hash", "label", "texts", "text_ends"):
        digest.update(index[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a prepared set.

    Raises:
        DataError: there is none, or of another version.
    """
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise DataError(
            f"{folder}: no prepared set there (no {MANIFEST}); make one by python launch/prepare.py"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / MANIFEST}: cannot read it: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise DataError(
            f"{folder / MANIFEST}: not of format {FORMAT}; prepare the set anew: python launch/prepare.py"
        )
    return Manifest(**found | {"files": [File(**file) for file in found["files"]]})


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest, which makes the set whole, or nothing."""
    text = json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n"
    write_whole(folder / MANIFEST, text.encode())


def open_prepared(path: str, text: str) -> Source:
    """A set that ``launch/prepare.py`` made.

    Args:
        text: what samples need: ``.cls``, a label or texts of their own, or ``.txt``, texts.

    Raises:
        DataError: no such set there, a file of it is missing or has another size, or it has no labels or texts.
    """
    folder = locate(path)
    manifest = read_manifest(folder)
    for file in manifest.files:
        found = (folder / file.name).stat().st_size if (folder / file.name).is_file() else None
        if found != file.bytes:
            state = "is missing" if found is None else f"has {found} bytes"
            raise DataError(f"{folder / file.name} {state}, {MANIFEST} says {file.bytes}: copy the set anew")
    try:
        index = load_file(folder / INDEX)
    except Exception as error:  # safetensors raises an error of its own, of no common class
        raise DataError(f"{folder / INDEX}: cannot read it: {error}; copy the set anew") from error
    if len(index["offset"]) != manifest.samples:
        raise DataError(f"{folder / INDEX}: {len(index['offset'])} samples, {MANIFEST} says {manifest.samples}")
    has_texts = len(index["texts"]) > 0
    if not has_texts and (text == ".txt" or bool((index["label"] < 0).any())):
        raise DataError(f"{path}: was prepared without {'captions' if text == '.txt' else 'labels'}")
    beton = folder / BETON
    return Source(
        PreparedSamples(index, [folder / file.name for file in manifest.files]),
        tuple(manifest.class_names),
        content=manifest.content,
        sizes=torch.stack([index["height"], index["width"]], dim=1).numpy(),
        tokens=index.get("tokens"),
        beton=beton if beton.is_file() else None,
    )


class PreparedSamples(Sequence[Sample]):
    """Samples made from their rows of the index when asked for: millions of them cost no memory."""

    def __init__(self, index: Index, files: Sequence[Path]) -> None:
        self._index = {name: tensor.numpy() for name, tensor in index.items() if name != "tokens"}
        self._files = files

    def __len__(self) -> int:
        return len(self._index["offset"])

    @overload
    def __getitem__(self, row: int) -> Sample: ...
    @overload
    def __getitem__(self, row: slice) -> list[Sample]: ...
    def __getitem__(self, row: int | slice) -> Sample | list[Sample]:
        """The sample of a row."""
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        row %= len(self)
        index = self._index
        texts = self._string("text", row)
        return Sample(
            self._string("key", row),
            self._files[index["file"][row]],
            int(index["offset"][row]),
            int(index["size"][row]),
            int(index["label"][row]),
            tuple(texts.split("\0")) if len(index["texts"]) else (),
        )

    def _string(self, name: str, row: int) -> str:
        ends: NDArray[np.int64] = self._index[f"{name}_ends"]
        start = ends[row - 1] if row else 0
        return self._index[f"{name}s"][start : ends[row]].tobytes().decode()


def verify(path: str) -> Manifest:
    """Reads every file of a prepared set and holds it to the hash in the manifest.

    Raises:
        DataError: a file is missing, or was changed since.
    """
    folder = locate(path)
    manifest = read_manifest(folder)
    for file in manifest.files:
        try:
            found = file_hash(folder / file.name)
        except OSError as error:
            raise DataError(f"{folder / file.name}: cannot read it: {error}") from error
        if found != file.sha256:
            raise DataError(f"{folder / file.name}: changed since it was prepared; copy or prepare the set anew")
    return manifest


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_skipped(path: Path, skipped: Iterable[Skipped]) -> None:
    """One JSON object a line."""
    lines = (json.dumps(entry._asdict(), ensure_ascii=False) + "\n" for entry in skipped)
    write_whole(path, "".join(lines).encode())


def _strings(name: str, values: Sequence[bytes]) -> Index:
    ends = np.cumsum([len(value) for value in values], dtype=np.int64)
    text = np.frombuffer(b"".join(values), np.uint8)
    return {f"{name}s": torch.from_numpy(text.copy()), f"{name}_ends": torch.from_numpy(ends)}
