"""Images that two data sets have in common: the same files, or copies of the same bytes."""

import os
from itertools import islice

from dive_fast.data.content_hashes import image_hashes
from dive_fast.data.sources.source import Source

MAX_READ = 4096
"""Images of a set that are read at most, to recognize copies."""


def image_files(source: Source) -> set[tuple[str, str, int]]:
    """The images of a set by folder, file and position, whatever the path that the set was opened by."""
    folders = {folder: os.path.realpath(folder) for folder in {sample.path.parent for sample in source.samples}}
    return {(folders[sample.path.parent], sample.path.name, sample.offset) for sample in source.samples}


def copies(evaluated: Source, training: Source) -> list[tuple[str, str]]:
    """The keys of images of a set that have the bytes of a training image, and of that image.

    Only images of equal size are read, and at most :data:`MAX_READ` of each set.
    """
    sizes = {sample.size for sample in evaluated.samples} & {sample.size for sample in training.samples} - {-1, 0}
    halves = [
        list(islice((sample for sample in source.samples if sample.size in sizes), MAX_READ))
        for source in (evaluated, training)
    ]
    here, there = (image_hashes(half) for half in halves)
    key_of = {value: sample.key for value, sample in zip(there, halves[1], strict=True) if value}
    rows = zip(here, halves[0], strict=True)
    return [(sample.key, key_of[value]) for value, sample in rows if value in key_of]
