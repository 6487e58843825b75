"""Opens and verifies prepared sets."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dive_fast.data.content_hashes import image_hash
from dive_fast.data.decode import UNDECODABLE, decode
from dive_fast.data.prepared.format import (
    BETON,
    INDEX,
    MANIFEST,
    File,
    Index,
    Manifest,
    content_hash,
    file_hash,
    parse_manifest,
    read_index,
    read_manifest,
    select_rows,
)
from dive_fast.data.sources.sample_table import SampleTable, Strings
from dive_fast.data.sources.source import EMPTY_CAPTION, Skipped, Source, locate
from dive_fast.errors import DataError


def open_prepared(path: str, text: str) -> Source:
    """Opens a set that ``dive-fast prepare`` made.

    Args:
        text: ``.cls``: each sample needs a label or texts; ``.txt``: each sample needs texts.

    Raises:
        DataError: the set does not exist, one of its files is missing or has another size, or labels or texts are
            missing.
    """
    folder = locate(path)
    manifest = read_manifest(folder)
    return _open(folder, manifest, path, text)


def _open(folder: Path, manifest: Manifest, path: str, text: str) -> Source:
    _check_files(folder, manifest)
    index = read_index(folder, manifest)
    has_texts = len(index["texts"]) > 0
    is_unlabelled = index["label"] < 0
    if not has_texts and (text == ".txt" or bool(is_unlabelled.any())):
        raise DataError(f"{path}: prepared without {'captions' if text == '.txt' else 'labels'}")
    beton = folder / BETON if any(file.name == BETON for file in manifest.files) else None
    skipped: list[Skipped] = []
    content = manifest.content
    blank = _has_blank_texts(index) & (is_unlabelled | (text == ".txt"))
    if bool(blank.any()):
        # Sets of earlier versions contain empty captions.
        if beton is not None:
            raise DataError(f"{path}: {int(blank.sum())} of its captions are empty; prepare the set again")
        samples = samples_of(index, folder, manifest.files)
        skipped = [Skipped(samples.key(row), EMPTY_CAPTION) for row in blank.nonzero()[:, 0].tolist()]
        index = select_rows(index, (~blank).nonzero()[:, 0])
        content = content_hash(index)
        if not len(index["label"]):
            raise DataError(f"{path}: all its captions are empty")
    return Source(
        samples_of(index, folder, manifest.files),
        tuple(manifest.class_names),
        skipped=skipped,
        prepared_without=manifest.skipped,
        content_hash=content,
        hashes=index["hash"].numpy(),
        first_rows=np.unique(index["file"].numpy(), return_index=True)[1].tolist(),
        files=[folder / name for name in (MANIFEST, INDEX, *(file.name for file in manifest.files))],
        sizes=torch.stack([index["height"], index["width"]], dim=1).numpy(),
        tokens=index.get("tokens"),
        beton=beton,
    )


def check_written(folder: Path, manifest: Manifest) -> None:
    """Reads back a new set before its manifest is written, with some of its images.

    Raises:
        DataError: the set cannot be opened, or an image differs from the index.
    """
    try:
        parsed = parse_manifest(json.dumps(asdict(manifest), ensure_ascii=False).encode().decode())
    except ValueError as error:
        raise DataError(f"{folder / MANIFEST}: {error}") from error
    source = _open(folder, parsed, str(folder), ".cls")
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
            raise source.samples[row].unusable("its bytes or size differ from the index")


def _has_blank_texts(index: Index) -> Tensor:
    """``(N,)`` bool: whether the texts of a sample hold nothing but white space."""
    ends = index["text_ends"]
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    # A text is blank if none of its bytes is above the space.
    num_visible = torch.cat([ends.new_zeros(1), (index["texts"] > 32).long().cumsum(0)])
    return num_visible[ends] == num_visible[starts]


def _check_files(folder: Path, manifest: Manifest) -> None:
    """Validates the sizes of all files against the manifest."""
    for file in manifest.files:
        size = (folder / file.name).stat().st_size if (folder / file.name).is_file() else None
        if size != file.bytes:
            state = "is missing" if size is None else f"has {size} bytes"
            raise DataError(
                f"{folder / file.name} {state}, {MANIFEST} expects {file.bytes} bytes; copy the set again"
            )


def samples_of(index: Index, folder: Path, files: Sequence[File]) -> SampleTable:
    """The samples of a prepared set, as views of its index."""
    columns = {name: tensor.numpy() for name, tensor in index.items() if name != "tokens"}
    has_texts = len(columns["texts"]) > 0
    return SampleTable(
        str(folder),
        Strings.of(os.fsencode(file.name) for file in files),
        Strings(columns["keys"], columns["key_ends"]),
        columns["file"],
        columns["offset"],
        columns["size"],
        columns["label"],
        Strings(columns["texts"], columns["text_ends"]) if has_texts else Strings.of(()),
        None,
    )


def verify(path: str) -> Manifest:
    """Validates every file of a prepared set against its hash in the manifest, and then the index.

    Raises:
        DataError: a file is missing or has changed.
    """
    folder = locate(path)
    manifest = read_manifest(folder)
    for file in manifest.files:
        try:
            if not (folder / file.name).is_file():
                raise FileNotFoundError("no such file")
            digest = file_hash(folder / file.name)
        except OSError as error:
            raise DataError(f"{folder / file.name}: cannot read it: {error}") from error
        if digest != file.sha256:
            raise DataError(f"{folder / file.name}: changed since it was prepared; copy or prepare the set again")
    read_index(folder, manifest)
    return manifest
