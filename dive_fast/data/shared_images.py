"""Images that two data sets have in common: the same files, or copies of the same bytes."""

import os
from collections.abc import Iterator, Set

import numpy as np

from dive_fast.data.content_hashes import image_hashes
from dive_fast.data.sources.source import Source

MAX_READ = 4096
"""Images of a set that are read at most, to recognize copies."""


class ImageLocations:
    """The images of a data set by folder, file and position, whatever the path that the set was opened by."""

    def __init__(self, source: Source) -> None:
        """Resolves the folders of all files."""
        samples = self._samples = source.samples
        root = os.fsencode(samples.root)
        folders = {os.path.dirname(name) for name in samples.files}
        self._folders = {folder: os.path.realpath(os.path.join(root, folder)) for folder in folders}
        order = np.lexsort((samples.offsets, samples.file_rows))
        self._files, self._offsets = samples.file_rows[order], samples.offsets[order]
        is_new = (np.diff(self._files, prepend=-1) != 0) | (np.diff(self._offsets, prepend=-1) != 0)
        self._files, self._offsets = self._files[is_new], self._offsets[is_new]

    def __len__(self) -> int:
        """Number of distinct images."""
        return len(self._files)

    def num_shared(self, other: "ImageLocations") -> int:
        """Number of distinct images that both sets have."""
        folders = set(self._folders.values()) & set(other._folders.values())
        if not folders:
            return 0
        fewer, more = sorted((self, other), key=len)
        return len(set(fewer._within(folders)).intersection(more._within(folders)))

    def _within(self, folders: Set[bytes]) -> Iterator[tuple[bytes, bytes, int]]:
        """Folder, file name and position of each image in some folders."""
        for first in range(0, len(self), 4096):  # not all as Python integers at once
            rows = slice(first, first + 4096)
            for file, offset in zip(self._files[rows].tolist(), self._offsets[rows].tolist(), strict=True):
                folder, name = os.path.split(self._samples.files[file])
                if (real := self._folders[folder]) in folders:
                    yield real, name, offset


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
