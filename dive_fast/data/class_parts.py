"""Parts of a labelled data set for few-shot learning: some classes, and few samples of each.

Base classes are the first half of the labels, new ones the rest, as the evaluations of CoOp's family have it. The
samples of a class that are trained on are chosen by a hash of their keys with a seed: every command and every
machine chooses the same ones.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dive_fast.data.holdout import subset
from dive_fast.data.sources.source import Source
from dive_fast.errors import DataError

ClassPart = Literal["all", "base", "new"]


def labels_of(part: ClassPart, count: int) -> range:
    """The labels of a part of ``count`` classes; of an odd number, base has one more."""
    half = (count + 1) // 2
    return {"all": range(count), "base": range(half), "new": range(half, count)}[part]


def select_classes(source: Source, class_names: Sequence[str], part: ClassPart) -> tuple[Source, tuple[str, ...]]:
    """The samples of some classes, numbered from 0, and the names of these classes.

    Args:
        class_names: names of all classes, in label order.

    Raises:
        DataError: a sample has no label, or there are none of these classes.
    """
    kept, labels = labels_of(part, len(class_names)), source.samples.labels
    _require_labels(source, labels)
    rows = np.flatnonzero((labels >= kept.start) & (labels < kept.stop))
    if not len(rows):
        raise DataError(f"classes = {part}: there are no images of the {len(kept)} {part} classes")
    names = tuple(class_names[kept.start : kept.stop])
    selected = subset(source, rows, f"{len(rows):,} of {len(source):,} images, of {len(kept)} {part} classes")
    samples = selected.samples.with_labels(labels[rows] - kept.start)
    return replace(selected, samples=samples, class_names=names), names


def select_shots(source: Source, shots: int, seed: int) -> Source:
    """At most ``shots`` samples of each class: those with the smallest hashes of seed and key.

    Raises:
        DataError: a sample has no label.
    """
    labels = source.samples.labels
    _require_labels(source, labels)
    prefix = f"shots {seed} ".encode()
    hashes = [hashlib.sha256(prefix + key).digest() for key in source.samples.iter_keys()]
    order = sorted(range(len(source)), key=lambda row: (labels[row], hashes[row], row))
    _, starts = np.unique(labels[order], return_index=True)
    rows = np.sort([order[row] for start, end in _ranges(starts, len(order)) for row in range(start, end)[:shots]])
    smallest = min(np.unique(labels, return_counts=True)[1])
    fewer = f"; some classes have fewer, {smallest} at least" if smallest < shots else ""
    return subset(source, rows, f"{len(rows):,} of {len(source):,} images, {shots} of each class{fewer}")


def _ranges(starts: NDArray[np.int64], count: int) -> list[tuple[int, int]]:
    return list(zip(starts.tolist(), [*starts[1:].tolist(), count], strict=True))


def _require_labels(source: Source, labels: NDArray[np.int64]) -> None:
    if (unlabelled := np.flatnonzero(labels < 0)).size:
        raise source.samples[int(unlabelled[0])].unusable("shots and classes need a class for each image")
