"""Hashes of the contents of samples, independent of where their files lie."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

NUM_PROBES = 4096
"""Maximum number of images whose bytes are hashed, spread evenly over the set."""
EDGE_BYTES = 2**15
"""Bytes hashed at each end of an image, where the probes exceed :data:`MAX_FULL_BYTES`."""
MAX_FULL_BYTES = 2**28
"""Maximum size of all probed images together up to which they are hashed from end to end."""
HASH_BYTES = 16
"""Length of the hash of an image."""
_THREADS = 16
"""Number of concurrent requests; network file systems answer many at a time."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class StoredImage(Protocol):
    """The location of an image: a range of bytes in a file."""

    @property
    def path(self) -> Path: ...
    @property
    def offset(self) -> int: ...
    @property
    def size(self) -> int: ...


class ByteRange(NamedTuple):
    """A range of bytes in a file; size -1 reaches to its end."""

    path: Path
    offset: int
    size: int


def map_in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Applies a function that waits for a disk to items, in threads; returns the results in order."""
    if len(items) < 64:
        return [function(item) for item in items]
    # In groups: one task for each of a million items would take longer than the work.
    size = -(-len(items) // (4 * _THREADS))
    groups = [items[first : first + size] for first in range(0, len(items), size)]
    with ThreadPoolExecutor(_THREADS, "disk") as threads:
        results = threads.map(lambda group: [function(item) for item in group], groups)
        return [result for group in results for result in group]


def stat_if_exists(path: Path) -> os.stat_result | None:
    """The status of a file; None if it does not exist or cannot be examined."""
    try:
        return os.stat(path)
    except (OSError, ValueError):
        return None


def read_range(location: ByteRange) -> bytes:
    """Reads a range of bytes.

    Raises:
        OSError, ValueError, OverflowError, MemoryError: the file cannot be read, or the range is invalid.
    """
    with location.path.open("rb") as file:
        file.seek(location.offset)
        return file.read(location.size)


def probe_hashes(images: Sequence[StoredImage], sizes: NDArray[np.int64]) -> list[bytes]:
    """The sizes of images that lack one, followed by hashes of the bytes of up to :data:`NUM_PROBES` images.

    A missing file has size -1: the set is another one once the file exists.

    Args:
        sizes: ``(N,)``: the size of each image; -1: the complete file.
    """
    unsized = np.flatnonzero(sizes < 0).tolist()
    stats = map_in_threads(lambda row: stat_if_exists(images[row].path), unsized)
    size_of = {
        row: -1 if status is None else status.st_size - images[row].offset
        for row, status in zip(unsized, stats, strict=True)
    }
    rows = np.linspace(0, len(images) - 1, min(NUM_PROBES, len(images))).round().astype(int).tolist()
    probes = [
        ByteRange(image.path, image.offset, size_of.get(row, image.size))
        for row, image in ((row, images[row]) for row in rows)
    ]
    edge = None if sum(location.size for location in probes) <= MAX_FULL_BYTES else EDGE_BYTES
    hashes = map_in_threads(lambda location: _hash(location, edge), probes)
    return [repr(list(size_of.values())).encode(), *hashes]


def image_hashes(samples: Iterable[StoredImage]) -> list[bytes]:
    """A hash of each image's bytes, ``HASH_BYTES`` long; empty where the image cannot be read."""
    ranges = [ByteRange(sample.path, sample.offset, sample.size) for sample in samples]
    distinct = list(dict.fromkeys(ranges))
    hashes = map_in_threads(lambda location: _hash(location, None), distinct)
    hash_of = dict(zip(distinct, hashes, strict=True))
    return [hash_of[location] for location in ranges]


def image_hash(data: bytes) -> bytes:
    """The hash of an image's bytes, ``HASH_BYTES`` long."""
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


def modification_hash(files: Iterable[Path]) -> str:
    """A hash of the modification times of files."""
    distinct = list(dict.fromkeys(files))
    stats = map_in_threads(stat_if_exists, distinct)
    times = [None if status is None else status.st_mtime_ns for status in stats]
    return hashlib.sha256(repr(times).encode()).hexdigest()


def _hash(location: ByteRange, edge: int | None) -> bytes:
    """The hash of a range, or of ``edge`` bytes at each of its ends; empty if it cannot be read."""
    try:
        if edge is None or location.size <= 2 * edge:
            return image_hash(read_range(location))
        offsets = (location.offset, location.offset + location.size - edge)
        return image_hash(b"".join(read_range(ByteRange(location.path, offset, edge)) for offset in offsets))
    except (OSError, ValueError, OverflowError, MemoryError):
        return b""
