"""On-disk format of a prepared data set: files of complete JPEGs, an index of all samples, and a manifest.

The files are webdataset tars or FFCV's ``data.beton``. In both, an image is a contiguous range of bytes that PIL
and DALI can read. The index holds the location, size, label, texts and hash of each image: a set of millions opens
at once, without scanning tars.
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

FORMAT, FORMAT_UINT16 = 1, 2
"""Versions of the format; the second one has tokens of 16 bits, which earlier versions of the package refuse."""
MANIFEST, INDEX, SKIPPED, BETON = "manifest.json", "index.safetensors", "skipped.jsonl", "data.beton"
Index = dict[str, Tensor]
"""Columns with one row per sample: ``file``, ``offset``, ``size``, ``height``, ``width``, ``label``,
``hash (N, 16)`` and optionally ``tokens (N, context)``: int32, or uint16 where all of them fit. ``keys`` and
``texts`` hold the concatenated UTF-8 bytes of all samples, ``key_ends`` and ``text_ends`` the end of each sample.
A zero byte separates several texts of a sample.
"""

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
    """Index of the file in the manifest."""
    offset: int
    size: int
    height: int
    width: int
    label: int
    texts: tuple[str, ...]
    hash: bytes
    """Hash of the image's bytes."""
    tokens: Tensor | None = None
    """``(context,)``: tokens of the first text."""


@dataclass(frozen=True)
class File:
    """One file of images: a tar or a beton."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Description of a prepared set and of its source."""

    format: int
    samples: int
    content: str
    """Hash of all images, labels and texts in order, which identifies the set for a teacher cache."""
    files: list[File]
    class_names: list[str]
    skipped: dict[str, int]
    """Number of samples that were left out, by reason; ``skipped.jsonl`` lists them."""
    converted: dict[str, int]
    """Number of images that were re-encoded, by reason; all others keep their original bytes."""
    options: dict[str, Any]
    """Options of the preparation, and the digest and modification hash of its source."""


def format_of(index: Index) -> int:
    """The version of the format that a set with this index has."""
    tokens = index.get("tokens")
    return FORMAT if tokens is None or tokens.dtype == torch.int32 else FORMAT_UINT16


def build_index(rows: Sequence[Row]) -> Index:
    """Builds an index from rows."""
    index = {
        name: torch.tensor([getattr(row, name) for row in rows], dtype=dtype) for name, dtype in _COLUMNS.items()
    }
    hashes = np.frombuffer(b"".join(row.hash for row in rows), np.uint8).reshape(-1, HASH_BYTES)
    index["hash"] = torch.from_numpy(hashes.copy())
    index |= _pack_strings("key", [row.key.encode() for row in rows])
    index |= _pack_strings(
        "text", ["\0".join(text.replace("\0", " ") for text in row.texts).encode() for row in rows]
    )
    if rows and rows[0].tokens is not None:
        index["tokens"] = _smallest(torch.stack([row.tokens for row in rows if row.tokens is not None]))
    return index


def concatenate_indexes(parts: Sequence[Index]) -> Index:
    """Concatenates the indexes of single files, in order, and numbers the files."""
    index: Index = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if name == "file":
            tensors = [torch.full_like(tensor, number) for number, tensor in enumerate(tensors)]
        if name.endswith("_ends"):
            offsets = np.cumsum([0] + [int(ends[-1]) if len(ends) else 0 for ends in tensors[:-1]])
            tensors = [tensor + int(offset) for tensor, offset in zip(tensors, offsets, strict=True)]
        if len({tensor.dtype for tensor in tensors}) > 1:  # tokens of which some files need more bits
            tensors = [tensor.int() for tensor in tensors]
        index[name] = torch.cat(tensors)
    return index


def _smallest(tokens: Tensor) -> Tensor:
    """Tokens as uint16 if they fit, otherwise as int32."""
    fits = tokens.numel() == 0 or (int(tokens.min()) >= 0 and int(tokens.max()) < 2**16)
    return tokens.to(torch.uint16 if fits else torch.int32)


def content_hash(index: Index) -> str:
    """A hash of all images, labels and texts, independent of file locations and sample keys."""
    digest = hashlib.sha256()
    for name in ("hash", "label", "texts", "text_ends"):
        digest.update(index[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a prepared set.

    Raises:
        DataError: it is missing or of another format version, or lists a file outside the folder.
    """
    path = folder / MANIFEST
    try:
        text = read_text(path)
        fields = parse_json(text)
    except FileNotFoundError:
        raise DataError(f"{folder}: not a prepared set (no {MANIFEST}); make one with dive-fast prepare") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read it: {error}; copy the set again") from error
    if not isinstance(fields, dict) or fields.get("format") not in (FORMAT, FORMAT_UINT16):
        raise DataError(
            f"{path}: not of format {FORMAT} or {FORMAT_UINT16}; prepare the set again: dive-fast prepare"
        )
    try:
        manifest = parse_manifest(text)
        for file in manifest.files:
            inside(folder, file.name)
    except ValueError as error:
        raise DataError(f"{path}: {error}; copy the set again") from error
    return manifest


def parse_manifest(text: str) -> Manifest:
    """Parses and validates the text of a manifest.

    Raises:
        ValueError: a value is missing or of the wrong type.
    """
    fields = parse_json(text)
    if isinstance(names := fields.get("class_names"), list):
        # Earlier versions wrote all synonyms of torchvision's ImageNet.
        fields["class_names"] = [name[0] if isinstance(name, list) and name else name for name in names]
    try:
        manifest = TypeAdapter(Manifest).validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{key}: {first['msg']}") from error
    if manifest.samples < 1:
        raise ValueError("samples: must be at least 1")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest atomically; a set with a manifest is complete."""
    text = json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n"
    write_atomic(folder / MANIFEST, text.encode())


def select_rows(index: Index, rows: Tensor) -> Index:
    """The index of the samples in ``rows``."""
    selected = {
        name: tensor[rows]
        for name, tensor in index.items()
        if tensor.ndim and not name.startswith(("key", "text"))
    }
    for name in ("key", "text"):
        ends, values = index[f"{name}_ends"].tolist(), index[f"{name}s"].numpy().tobytes()
        selected |= _pack_strings(name, [values[ends[row - 1] if row else 0 : ends[row]] for row in rows.tolist()])
    return selected


def read_index(folder: Path, manifest: Manifest) -> Index:
    """Reads the index of a prepared set and validates it against the manifest.

    Raises:
        DataError: it is missing, damaged, or belongs to another manifest.
    """
    path = folder / INDEX
    try:
        index = load_file(inside(folder, INDEX))
    except Exception as error:  # safetensors has an exception class of its own
        raise DataError(f"{path}: cannot read it: {error}; copy the set again") from error
    try:
        _check_index(index, manifest)
    except ValueError as error:
        raise DataError(f"{path}: {error}; copy the set again") from error
    return index


def _check_index(index: Index, manifest: Manifest) -> None:
    """Validates an index against its manifest.

    Raises:
        ValueError: a column is missing or has a wrong shape or type, a row points outside its file, or the
            contents are not those of the manifest.
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
        column = index[name]
        if (column.dtype, column.shape) != shapes[name]:
            dtype, shape = shapes[name]
            raise ValueError(
                f"{name}: {column.dtype} {tuple(column.shape)}, but {MANIFEST} requires {dtype} {shape}"
            )
    tokens = index.get("tokens")
    types = (torch.int32, torch.uint16)
    if tokens is not None and (tokens.dtype not in types or tokens.ndim != 2 or len(tokens) != count):
        raise ValueError(f"tokens: {tokens.dtype} {tuple(tokens.shape)} for {count} samples")
    ranges = {"file": (0, len(manifest.files) - 1), "offset": (0, None), "size": (1, None)}
    ranges |= {"height": (1, None), "width": (1, None)}
    for name, (minimum, maximum) in ranges.items():
        if int(index[name].min()) < minimum or (maximum is not None and int(index[name].max()) > maximum):
            raise ValueError(f"{name}: a value is out of range")
    sizes = torch.tensor([file.bytes for file in manifest.files])
    # A difference, since the sum of two large values would overflow.
    if bool((index["size"] > sizes[index["file"].long()] - index["offset"]).any()):
        raise ValueError("a sample lies beyond the end of its file")
    for name in ("key", "text"):
        ends = index[f"{name}_ends"]
        if int(ends[0]) < 0 or bool((ends.diff() < 0).any()) or int(ends[-1]) != len(index[f"{name}s"]):
            raise ValueError(f"{name}_ends: not increasing up to the length of {name}s")
    if tokens is not None and tokens.dtype == torch.int32 and tokens.numel() and int(tokens.min()) < 0:
        raise ValueError("tokens: a value is negative")
    if content_hash(index) != manifest.content:
        raise ValueError(f"labels, texts or hashes do not match {MANIFEST}")


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_skipped(path: Path, skipped: Iterable[Skipped]) -> None:
    """Writes the skipped samples as JSON lines."""
    lines = (json.dumps(entry._asdict(), ensure_ascii=False) + "\n" for entry in skipped)
    write_atomic(path, "".join(lines).encode())


def _pack_strings(name: str, values: Sequence[bytes]) -> Index:
    """Columns ``<name>s`` and ``<name>_ends`` of an index."""
    ends = np.cumsum([len(value) for value in values], dtype=np.int64)
    text = np.frombuffer(b"".join(values), np.uint8)
    return {f"{name}s": torch.from_numpy(text.copy()), f"{name}_ends": torch.from_numpy(ends)}
