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
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from dive_fast.data.content_hashes import HASH_BYTES
from dive_fast.data.sources.source import Skipped
from dive_fast.errors import DataError
from dive_fast.io.atomic_files import write_atomic
from dive_fast.io.safe_read import inside, parse_json, read_text

FORMAT = 1
MANIFEST, INDEX, SKIPPED, BETON = "manifest.json", "index.safetensors", "skipped.jsonl", "data.beton"
Index = dict[str, Tensor]
"""One row a sample: ``file``, ``offset``, ``size``, ``height``, ``width``, ``label``, ``hash (N, 16)``, optionally
``tokens (N, context)``; ``keys`` and ``texts`` are UTF-8, those of all samples one after the other, their ends in
``key_ends`` and ``text_ends``. Several texts of a sample are separated by a zero byte."""


_COLUMNS = {
    "file": torch.int32,
    "offset": torch.int64,
    "size": torch.int64,
    "height": torch.int32,
    "width": torch.int32,
    "label": torch.int64,
}


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
        name: torch.tensor([getattr(row, name) for row in rows], dtype=dtype) for name, dtype in _COLUMNS.items()
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
        DataError: there is none, or of another version, or a file that it names lies elsewhere.
    """
    path = folder / MANIFEST
    try:
        text = read_text(path)
        found = parse_json(text)
    except FileNotFoundError:
        raise DataError(
            f"{folder}: no prepared set there (no {MANIFEST}); make one by python launch/prepare.py"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read it: {error}; copy the set anew") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise DataError(f"{path}: not of format {FORMAT}; prepare the set anew: python launch/prepare.py")
    try:
        manifest = parse_manifest(text)
        for file in manifest.files:
            inside(folder, file.name)
    except ValueError as error:
        raise DataError(f"{path}: {error}; copy the set anew") from error
    return manifest


def parse_manifest(text: str) -> Manifest:
    """What the text of a manifest says.

    Raises:
        ValueError: a value is missing, or of another type.
    """
    found = parse_json(text)
    if isinstance(names := found.get("class_names"), list):
        # A preparation of torchvision's ImageNet once wrote all synonyms.
        found["class_names"] = [name[0] if isinstance(name, list) and name else name for name in names]
    try:
        manifest = TypeAdapter(Manifest).validate_json(json.dumps(found), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: {first['msg']}") from error
    if manifest.samples < 1:
        raise ValueError("samples: a set has at least one")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest, which makes the set whole, or nothing."""
    text = json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n"
    write_atomic(folder / MANIFEST, text.encode())


def rows_of(index: Index, rows: Tensor) -> Index:
    """The index of some of its samples."""
    chosen = {
        name: tensor[rows]
        for name, tensor in index.items()
        if tensor.ndim and not name.startswith(("key", "text"))
    }
    for name in ("key", "text"):
        ends, values = index[f"{name}_ends"].tolist(), index[f"{name}s"].numpy().tobytes()
        chosen |= _strings(name, [values[ends[row - 1] if row else 0 : ends[row]] for row in rows.tolist()])
    return chosen


def read_index(folder: Path, manifest: Manifest) -> Index:
    path = folder / INDEX
    try:
        index = load_file(inside(folder, INDEX))
    except Exception as error:  # safetensors raises an error of its own, of no common class
        raise DataError(f"{path}: cannot read it: {error}; copy the set anew") from error
    try:
        _check_index(index, manifest)
    except ValueError as error:
        raise DataError(f"{path}: {error}; copy the set anew") from error
    return index


def _check_index(index: Index, manifest: Manifest) -> None:
    """Holds an index to its manifest.

    Raises:
        ValueError: a column is missing or of another shape or type, or a row points to where nothing is; or it is
            another index than the manifest was written with.
    """
    count = manifest.samples
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        name: (dtype, (count,))
        for name, dtype in (_COLUMNS | dict.fromkeys(("key_ends", "text_ends"), torch.int64)).items()
    }
    shapes["hash"] = (torch.uint8, (count, HASH_BYTES))
    shapes |= {name: (torch.uint8, index[name].shape[:1]) for name in ("keys", "texts") if name in index}
    for name in ("keys", "texts", *shapes):
        if name not in index:
            raise ValueError(f"{name} is missing")
        found = index[name]
        if (found.dtype, found.shape) != shapes[name]:
            raise ValueError(
                f"{name}: {found.dtype} {tuple(found.shape)}, {MANIFEST} wants {shapes[name][0]} {shapes[name][1]}"
            )
    tokens = index.get("tokens")
    if tokens is not None and (tokens.dtype != torch.int32 or tokens.ndim != 2 or len(tokens) != count):
        raise ValueError(f"tokens: {tokens.dtype} {tuple(tokens.shape)} of {count} samples")
    ranges = {"file": (0, len(manifest.files) - 1), "offset": (0, None), "size": (1, None)}
    ranges |= {"height": (1, None), "width": (1, None)}
    for name, (least, most) in ranges.items():
        if int(index[name].min()) < least or (most is not None and int(index[name].max()) > most):
            raise ValueError(f"{name}: a value that no sample can have")
    sizes = torch.tensor([file.bytes for file in manifest.files])
    # In this order: a sum of two large numbers would begin again below zero.
    if bool((index["size"] > sizes[index["file"].long()] - index["offset"]).any()):
        raise ValueError("a sample lies behind the end of its file")
    for name in ("key", "text"):
        ends = index[f"{name}_ends"]
        if int(ends[0]) < 0 or bool((ends.diff() < 0).any()) or int(ends[-1]) != len(index[f"{name}s"]):
            raise ValueError(f"{name}_ends: not the ends of one text after the other")
    if tokens is not None and tokens.numel() and int(tokens.min()) < 0:
        raise ValueError("tokens: a number below zero")
    if content_of(index) != manifest.content:
        raise ValueError(f"labels, texts or hashes are not those of {MANIFEST}")


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_skipped(path: Path, skipped: Iterable[Skipped]) -> None:
    """One JSON object a line."""
    lines = (json.dumps(entry._asdict(), ensure_ascii=False) + "\n" for entry in skipped)
    write_atomic(path, "".join(lines).encode())


def _strings(name: str, values: Sequence[bytes]) -> Index:
    ends = np.cumsum([len(value) for value in values], dtype=np.int64)
    text = np.frombuffer(b"".join(values), np.uint8)
    return {f"{name}s": torch.from_numpy(text.copy()), f"{name}_ends": torch.from_numpy(ends)}
