"""Images that two data sets have in common: the same files, or copies of the same bytes."""

import os

import numpy as np

from dive_fast.data.content_hashes import image_hashes
from dive_fast.data.sources.source import Source

MAX_READ = 4096
"""Images of a set that are read at most, to recognize copies."""


def image_files(source: Source) -> set[tuple[str, str, int]]:
    """The images of a set by folder, file and position, whatever the path that the set was opened by."""
    samples = source.samples
    files = {row: samples.file_path(row) for row in np.unique(samples.file_rows).tolist()}
    folders = {folder: os.path.realpath(folder) for folder in {file.parent for file in files.values()}}
    real = {row: (folders[file.parent], file.name) for row, file in files.items()}
    rows = zip(samples.file_rows.tolist(), samples.offsets.tolist(), strict=True)
    return {(*real[file], offset) for file, offset in rows}


def copies(evaluated: Source, training: Source) -> list[tuple[str, str]]:
    """The keys of images of a set that have the bytes of a training image, and of that image.

    Only images of equal size are read, and at most :data:`MAX_READ` of each set.
    """
    sizes = np.intersect1d(evaluated.samples.sizes, training.samples.sizes)
    sizes = sizes[sizes > 0]
    halves = [
        [source.samples[row] for row in np.flatnonzero(np.isin(source.samples.sizes, sizes))[:MAX_READ].tolist()]
        for source in (evaluated, training)
    ]
    here, there = (image_hashes(half) for half in halves)
    key_of = {value: sample.key for value, sample in zip(there, halves[1], strict=True) if value}
    rows = zip(here, halves[0], strict=True)
    return [(sample.key, key_of[value]) for value, sample in rows if value in key_of]
