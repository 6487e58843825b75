"""Opens and verifies a prepared set."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dive_fast.data.content_hashes import image_hash
from dive_fast.data.decode import UNDECODABLE, decode
from dive_fast.data.prepared.format import (
    BETON,
    INDEX,
    MANIFEST,
    Index,
    Manifest,
    content_of,
    file_hash,
    parse_manifest,
    read_index,
    read_manifest,
    rows_of,
)
from dive_fast.data.sources.source import EMPTY_CAPTION, Sample, Skipped, Source, locate
from dive_fast.errors import DataError


def open_prepared(path: str, text: str) -> Source:
    """A set that ``launch/prepare.py`` made.

    Args:
        text: what samples need: ``.cls``, a label or texts of their own, or ``.txt``, texts.

    Raises:
        DataError: no such set there, a file of it is missing or has another size, or it has no labels or texts.
    """
    folder = locate(path)
    manifest = read_manifest(folder)
    return _opened(folder, manifest, path, text)


def _opened(folder: Path, manifest: Manifest, path: str, text: str) -> Source:
    _check_files(folder, manifest)
    index = read_index(folder, manifest)
    has_texts = len(index["texts"]) > 0
    is_unlabelled = index["label"] < 0
    if not has_texts and (text == ".txt" or bool(is_unlabelled.any())):
        raise DataError(f"{path}: was prepared without {'captions' if text == '.txt' else 'labels'}")
    beton = folder / BETON if any(file.name == BETON for file in manifest.files) else None
    skipped: list[Skipped] = []
    content = manifest.content
    blank = _blank(index) & (is_unlabelled | (text == ".txt"))
    if bool(blank.any()):
        # Written before empty captions were left out.
        if beton is not None:
            raise DataError(f"{path}: {int(blank.sum())} of its captions are empty; prepare the set again")
        everything = PreparedSamples(index, [folder / file.name for file in manifest.files])
        skipped = [Skipped(everything[row].key, EMPTY_CAPTION) for row in blank.nonzero()[:, 0].tolist()]
        index = rows_of(index, (~blank).nonzero()[:, 0])
        content = content_of(index)
        if not len(index["label"]):
            raise DataError(f"{path}: all its captions are empty")
    return Source(
        PreparedSamples(index, [folder / file.name for file in manifest.files]),
        tuple(manifest.class_names),
        skipped=skipped,
        prepared_without=manifest.skipped,
        content=content,
        hashes=index["hash"].numpy(),
        first_rows=np.unique(index["file"].numpy(), return_index=True)[1].tolist(),
        files=[folder / name for name in (MANIFEST, INDEX, *(file.name for file in manifest.files))],
        sizes=torch.stack([index["height"], index["width"]], dim=1).numpy(),
        tokens=index.get("tokens"),
        beton=beton,
    )


def check_written(folder: Path, manifest: Manifest) -> None:
    """Opens a set whose manifest is not written yet, and some of its images, as its readers will.

    Raises:
        DataError: it cannot be read back.
    """
    try:
        again = parse_manifest(json.dumps(asdict(manifest), ensure_ascii=False).encode().decode())
    except ValueError as error:
        raise DataError(f"{folder / MANIFEST}: {error}") from error
    source = _opened(folder, again, str(folder), ".cls")
    assert source.hashes is not None
    assert source.sizes is not None
    for row in range(0, len(source), max(1, len(source) // 64)):
        data = source.read(row)
        try:
            image = decode(data)
        except UNDECODABLE as error:
            raise source.samples[row].unusable(f"cannot decode the image: {error}") from error
        if image_hash(data) != source.hashes[row].tobytes() or image.size[::-1] != tuple(
            source.sizes[row].tolist()
        ):
            raise source.samples[row].unusable("its bytes or size are not those of the index")


def _blank(index: Index) -> Tensor:
    """``(N,)`` bool: the samples whose texts are nothing but spaces."""
    ends = index["text_ends"]
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    # A text is blank where no byte of it is more than a space.
    letters = torch.cat([ends.new_zeros(1), (index["texts"] > 32).long().cumsum(0)])
    return letters[ends] == letters[starts]


def _check_files(folder: Path, manifest: Manifest) -> None:
    for file in manifest.files:
        found = (folder / file.name).stat().st_size if (folder / file.name).is_file() else None
        if found != file.bytes:
            state = "is missing" if found is None else f"has {found} bytes"
            raise DataError(f"{folder / file.name} {state}, {MANIFEST} says {file.bytes}: copy the set anew")


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
            tuple(text for text in texts.split("\0") if text.strip()) if len(index["texts"]) else (),
        )

    def _string(self, name: str, row: int) -> str:
        ends: NDArray[np.int64] = self._index[f"{name}_ends"]
        start = ends[row - 1] if row else 0
        try:
            return self._index[f"{name}s"][start : ends[row]].tobytes().decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{self._files[0].parent / INDEX}: {name} of row {row}: {error}") from error


def verify(path: str) -> Manifest:
    """Reads every file of a prepared set and holds it to the hash in the manifest, and the index to its contents.

    Raises:
        DataError: a file is missing, or was changed since.
    """
    folder = locate(path)
    manifest = read_manifest(folder)
    for file in manifest.files:
        try:
            if not (folder / file.name).is_file():
                raise FileNotFoundError("no such file")
            found = file_hash(folder / file.name)
        except OSError as error:
            raise DataError(f"{folder / file.name}: cannot read it: {error}") from error
        if found != file.sha256:
            raise DataError(f"{folder / file.name}: changed since it was prepared; copy or prepare the set anew")
    read_index(folder, manifest)
    return manifest
