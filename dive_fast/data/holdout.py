"""Splits a labelled data set into a part to train on and a part to measure on, without a list of files.

A sample belongs to the held-out part by a hash of its key and the number of samples of its class. Two sections of
a config that name the same data and the same share therefore see parts that never overlap, in every command and on
every machine. The seed of a run does not move a sample from one part to the other.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dive_fast.data.sources.sample_table import SampleTable
from dive_fast.data.sources.source import Source
from dive_fast.errors import DataError

Part = Literal["train", "held_out"]


def split(source: Source, share: float, part: Part) -> Source:
    """One part of a labelled data set.

    Args:
        share: share of each class that is held out; see :func:`num_held_out`.
        part: ``train`` for the other samples, ``held_out`` for the held-out ones. Samples that the reader left
            out stay in the training part, where they are reported.

    Raises:
        DataError: a sample has no label, or no sample is held out.
    """
    is_held_out = held_out(source.samples, share)
    if not is_held_out.any():
        raise DataError(
            f"holdout = {share:g} holds out none of the {len(source)} images: every class has only one; add "
            "images, or remove holdout"
        )
    rows = np.flatnonzero(is_held_out if part == "held_out" else ~is_held_out)
    count, others = len(rows), len(source) - len(rows)
    remark = (
        f"{count:,} images, the held-out part of {len(source):,}"
        if part == "held_out"
        else f"holds out {others:,} of {len(source):,} images for evaluation, trains on {count:,}"
    )
    selected = subset(source, rows, remark)
    return replace(selected, skipped=()) if part == "held_out" else selected


def subset(source: Source, rows: NDArray[np.int64], remark: str) -> Source:
    """Some samples of a data set, in order.

    Args:
        rows: ``(N,)``, ascending.
        remark: a line about them, after those of earlier selections.
    """
    content = source.content_hash
    if content:
        content = hashlib.sha256(content.encode() + rows.astype("<i8").tobytes()).hexdigest()
    return replace(
        source,
        samples=source.samples.select(rows),
        content_hash=content,
        hashes=None if source.hashes is None else source.hashes[rows],
        first_rows=_first_rows(source.first_rows, rows),
        sizes=None if source.sizes is None else source.sizes[rows],
        tokens=None if source.tokens is None else source.tokens[rows.tolist()],
        # FFCV's file contains all samples.
        beton=None,
        held_out=f"{source.held_out}; {remark}" if source.held_out else remark,
    )


def held_out(samples: SampleTable, share: float) -> NDArray[np.bool_]:
    """``(N,)``: whether each sample is held out: those of its class with the smallest hashes of their keys.

    Raises:
        DataError: a sample has no label.
    """
    labels = samples.labels
    if (unlabelled := np.flatnonzero(labels < 0)).size:
        raise samples[int(unlabelled[0])].unusable("holdout needs a class for each image")
    order = _by_label_and_hash(labels, samples.iter_keys())
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    chosen = np.zeros(len(samples), dtype=np.bool_)
    for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
        chosen[order[start : start + num_held_out(count, share)]] = True
    return chosen


def _by_label_and_hash(labels: NDArray[np.int64], keys: Iterable[bytes]) -> NDArray[np.int64]:
    """``(N,)``: the rows by label, then by the hash of their key, then by row."""
    hashes = np.empty((len(labels), 4), ">u8")
    buffer = memoryview(hashes).cast("B")  # type: ignore[arg-type]
    for row, key in enumerate(keys):
        buffer[32 * row : 32 * row + 32] = hashlib.sha256(b"holdout " + key).digest()
    numbers = hashes.astype(np.uint64).T
    order = np.lexsort((numbers[0], labels))
    same = (np.diff(numbers[0][order]) == 0) & (np.diff(labels[order]) == 0)
    # Only equal keys have equal hashes, in practice.
    return np.lexsort((np.arange(len(labels)), *numbers[::-1], labels)) if same.any() else order


def num_held_out(count: int, share: float) -> int:
    """Number of held-out images of a class: the rounded share, at least one, and never all of them."""
    return min(count - 1, max(1, int(count * share + 0.5)))


def _first_rows(first_rows: Sequence[int], rows: NDArray[np.int64]) -> list[int]:
    """The first row of each file among ``rows``; a file without one has the row that follows."""
    positions = np.searchsorted(rows, np.asarray(first_rows, dtype=np.int64))
    return np.unique(positions[positions < len(rows)]).tolist()
