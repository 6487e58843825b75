"""Hashes of what samples hold: what decides a result, apart from where the files lie."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

PROBES = 4096
"""Images whose bytes are hashed, spread evenly over the set."""
EDGE = 2**15
"""Bytes that are hashed at either end of an image, where :data:`WHOLE` does not suffice."""
WHOLE = 2**28
"""Bytes of all probed images together up to which they are hashed from end to end."""
HASH_BYTES = 16
_THREADS = 16
"""Network disks answer many questions at a time."""

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class Stored(Protocol):
    """Where a sample's image lies."""

    @property
    def path(self) -> Path: ...
    @property
    def offset(self) -> int: ...
    @property
    def size(self) -> int: ...


class Piece(NamedTuple):
    """Bytes of a file; size -1: up to its end."""

    path: Path
    offset: int
    size: int


def in_threads(ask: Callable[[Asked], Answer], things: Sequence[Asked]) -> list[Answer]:
    """``[ask(thing) for thing in things]``, for questions to a disk."""
    if len(things) < 64:
        return [ask(thing) for thing in things]
    # In groups: a task for each of a million would take longer than the questions.
    size = -(-len(things) // (4 * _THREADS))
    groups = [things[first : first + size] for first in range(0, len(things), size)]
    with ThreadPoolExecutor(_THREADS, "disk") as threads:
        answers = threads.map(lambda group: [ask(thing) for thing in group], groups)
        return [answer for group in answers for answer in group]


def stat(path: Path) -> os.stat_result | None:
    """What the disk says of a file; None: nothing is there."""
    try:
        return os.stat(path)
    except (OSError, ValueError):
        return None


def read_piece(piece: Piece) -> bytes:
    """The bytes.

    Raises:
        OSError, ValueError, OverflowError, MemoryError: they cannot be read, or the file has no such place.
    """
    with piece.path.open("rb") as file:
        file.seek(piece.offset)
        return file.read(piece.size)


def digest_of(samples: Iterable[Stored]) -> list[bytes]:
    """The size of every image, then a hash of the bytes of :data:`PROBES` of them.

    A file that is not there counts as such: it is another set once it is there.
    """
    pieces = list(dict.fromkeys(Piece(sample.path, sample.offset, sample.size) for sample in samples))
    unknown = [piece.path for piece in pieces if piece.size < 0]
    sizes = dict(zip(unknown, in_threads(stat, unknown), strict=True))

    def known(piece: Piece) -> Piece:
        if piece.size >= 0:
            return piece
        found = sizes[piece.path]
        return piece._replace(size=-1 if found is None else found.st_size - piece.offset)

    pieces = [known(piece) for piece in pieces]
    spread = np.linspace(0, len(pieces) - 1, min(PROBES, len(pieces))).round().astype(int)
    probes = [pieces[row] for row in spread]
    edge = None if sum(piece.size for piece in probes) <= WHOLE else EDGE
    hashes = in_threads(lambda piece: _hash(piece, edge), probes)
    return [repr([piece.size for piece in pieces]).encode(), *hashes]


def hashes_of(samples: Iterable[Stored]) -> list[bytes]:
    """A hash of each image's bytes, ``HASH_BYTES`` each; of one that cannot be read, an empty one."""
    pieces = [Piece(sample.path, sample.offset, sample.size) for sample in samples]
    distinct = list(dict.fromkeys(pieces))
    of_piece = dict(zip(distinct, in_threads(lambda piece: _hash(piece, None), distinct), strict=True))
    return [of_piece[piece] for piece in pieces]


def image_hash(data: bytes) -> bytes:
    """The hash of an image's bytes."""
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


def modified(files: Iterable[Path]) -> str:
    """A hash of when each file was last modified."""
    distinct = list(dict.fromkeys(files))
    times = [None if found is None else found.st_mtime_ns for found in in_threads(stat, distinct)]
    return hashlib.sha256(repr(times).encode()).hexdigest()


def _hash(piece: Piece, edge: int | None) -> bytes:
    try:
        if edge is None or piece.size <= 2 * edge:
            return image_hash(read_piece(piece))
        ends = (piece.offset, piece.offset + piece.size - edge)
        return image_hash(b"".join(read_piece(Piece(piece.path, offset, edge)) for offset in ends))
    except (OSError, ValueError, OverflowError, MemoryError):
        return b""
