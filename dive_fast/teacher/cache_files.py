"""The files of a teacher cache: rows of both towers in blocks, each block with a checksum.

``image.npy`` is ``(views * N, D)``, view by view: the row of a sample is ``view * N + sample``. ``text.npy`` is
``(N, D)``. A block is BLOCK consecutive samples of one view, their captions with the first view.

While a cache is written it has another name. Each rank notes every block it has written in a journal of its own,
after the rows are on the disk; after a kill the blocks that no journal names are written, by however many ranks.
"""

import json
import math
import mmap
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dive_fast.errors import ConfigError
from dive_fast.io.atomic_files import new_file, write_atomic
from dive_fast.io.safe_read import inside, map_array, read_json

FORMAT = 4
BLOCK = 1024
MANIFEST, CHECKSUMS = "cache.json", "checksums.npy"
HALVES = ("image", "text")
COMPUTED = "computed"
"""Origin of a cache that this project has embedded; of one made from foreign files: where they lay."""
_RECORD = struct.Struct("<QIII")
"""Of a journal: block, checksums of its image rows and text rows, checksum of the record so far."""


class CacheError(ConfigError):
    """A teacher cache that cannot be used; the message says why and what to do."""


class StaleCacheError(CacheError):
    """One that is to be written anew. The message ends in "rebuild it", to which a script adds its command."""


@dataclass(frozen=True)
class Layout:
    """Sizes of a cache."""

    samples: int
    views: int
    width: int
    dtype: str
    """``float32`` or ``float16``."""

    @property
    def blocks_per_view(self) -> int:
        return math.ceil(self.samples / BLOCK)

    @property
    def blocks(self) -> range:
        """All blocks, the first view's before the second's."""
        return range(self.views * self.blocks_per_view)

    def place(self, block: int) -> tuple[int, range]:
        """The view and the samples of a block."""
        view, number = divmod(block, self.blocks_per_view)
        return view, range(number * BLOCK, min((number + 1) * BLOCK, self.samples))

    def shape(self, half: str) -> tuple[int, int]:
        """Of the array of a half."""
        return (self.samples * (self.views if half == "image" else 1), self.width)

    def rows(self, half: str, block: int) -> range:
        """The rows of a block in the array of a half; a later view has no texts."""
        view, samples = self.place(block)
        if half == "text":
            return samples if view == 0 else range(0)
        first = view * self.samples + samples.start
        return range(first, first + len(samples))


def partial_name(folder: Path) -> Path:
    """What a cache is called until it is whole."""
    return folder.with_name(f".{folder.name}.partial")


def is_there(folder: Path) -> bool:
    """Whether something was begun or finished under this name."""
    return (folder / MANIFEST).is_file()


class Manifest(NamedTuple):
    """What a cache is, whole or not."""

    layout: Layout
    fingerprint: dict[str, Any]
    origin: str
    modified: str = ""
    """A hash of modification times of the reference set; empty: not noted."""


def create(
    folder: Path, layout: Layout, fingerprint: dict[str, Any], origin: str = COMPUTED, modified: str = ""
) -> None:
    """Makes the files of a cache, all their space taken, no row written.

    Args:
        origin: where its rows come from. No part of the fingerprint: equal rows serve alike.
        modified: when the files of the reference set were, as its ``Source.modified()`` has it.

    Raises:
        OSError: the disk has not the space.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for half in HALVES:
        shape, dtype = layout.shape(half), np.dtype(layout.dtype)
        with new_file(folder / f"{half}.npy") as file:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.flush()
            # Now rather than in hours: a full disk, met through a memory map, kills the process.
            os.posix_fallocate(file.fileno(), 0, file.tell() + shape[0] * shape[1] * dtype.itemsize)
    # Last: with it there is something to go on with.
    about = {"format": FORMAT, "origin": origin, "modified": modified}
    manifest = about | {"layout": asdict(layout), "fingerprint": fingerprint}
    write_json(folder / MANIFEST, manifest)


def read_manifest(folder: Path) -> Manifest:
    """What the cache of a folder is, whole or not.

    Raises:
        StaleCacheError: it cannot be read.
    """
    try:
        found = read_json(inside(folder, MANIFEST))
        if not isinstance(found, dict):
            raise ValueError("expected a JSON object")
        if (kind := found.get("format")) != FORMAT:
            raise StaleCacheError(
                f"{folder}: a teacher cache of format {str(kind)[:40]}, this version has {FORMAT}; rebuild it"
            )
        layout, fingerprint, origin = (found.get(key) for key in ("layout", "fingerprint", "origin"))
        origin, modified = COMPUTED if origin is None else origin, found.get("modified", "")
        if not isinstance(fingerprint, dict) or not isinstance(layout, dict):
            raise ValueError("expected layout and fingerprint as objects")
        if not isinstance(origin, str) or not isinstance(modified, str):
            raise ValueError("expected origin and modified as text")
        return Manifest(_layout(layout), fingerprint, origin, modified)
    except CacheError:
        raise
    except (OSError, ValueError) as error:
        raise StaleCacheError(f"{folder / MANIFEST}: cannot read it: {error}; rebuild it") from error


def _layout(found: dict[str, Any]) -> Layout:
    least = {"samples": 0, "views": 1, "width": 1}
    # Of a type, not an instance: true is a number to Python.
    sizes = [(found.get(name), one) for name, one in least.items()]
    if len(found) != 4 or any(type(size) is not int or size < one for size, one in sizes):
        raise ValueError("layout: expected samples, views, width and dtype, the first three as counts")
    if max(found["samples"], 1) * found["views"] * found["width"] >= 2**60:
        raise ValueError("layout: more rows than any disk holds")
    if found.get("dtype") not in ("float32", "float16"):
        raise ValueError("layout.dtype: expected float32 or float16")
    return Layout(**found)


class Writer:
    """Writes blocks of a cache that was created, as one of the ranks."""

    def __init__(self, folder: Path, layout: Layout, rank: int) -> None:
        """Opens the files.

        Raises:
            StaleCacheError: one is not as :func:`create` made it, or is a link to elsewhere.
            OSError: one cannot be opened.
        """
        self._layout = layout
        try:
            self._files = {half: inside(folder, f"{half}.npy").open("r+b") for half in HALVES}
            self._starts = {
                half: _data_start(file, layout.shape(half), layout.dtype) for half, file in self._files.items()
            }
            self._journal = inside(folder, f"journal-{rank}").open("ab")
        except ValueError as error:
            raise StaleCacheError(f"{folder}: {error}; rebuild it") from error
        torn = self._journal.tell() % _RECORD.size
        if torn:  # of a record that a kill cut off
            self._journal.truncate(self._journal.tell() - torn)

    def write(self, block: int, rows: dict[str, NDArray[Any]]) -> None:
        """Writes the rows of a block, ``{half: (n, D)}``, and notes that they are there.

        Raises:
            OSError: they cannot be written.
        """
        checksums = []
        for half in HALVES:
            own = np.ascontiguousarray(rows[half], self._layout.dtype)
            place = self._layout.rows(half, block)
            assert own.shape == (len(place), self._layout.width)
            data = own.tobytes()
            checksums.append(zlib.crc32(data))
            stride = self._layout.width * own.itemsize
            _write_at(self._files[half], data, self._starts[half] + place.start * stride)
        for file in self._files.values():
            os.fdatasync(file.fileno())
        head = struct.pack("<QII", block, *checksums)
        self._journal.write(head + struct.pack("<I", zlib.crc32(head)))
        self._journal.flush()
        os.fdatasync(self._journal.fileno())

    def close(self) -> None:
        """Closes the files."""
        for file in (*self._files.values(), self._journal):
            file.close()


def done(folder: Path) -> dict[int, tuple[int, int]]:
    """The blocks that any rank has written, with the checksums of their halves."""
    found: dict[int, tuple[int, int]] = {}
    for journal in sorted(folder.glob("journal-*")):
        if not journal.is_file():
            continue
        data = journal.read_bytes()
        for start in range(0, len(data) - _RECORD.size + 1, _RECORD.size):
            block, image, text, own = _RECORD.unpack_from(data, start)
            if own == zlib.crc32(data[start : start + _RECORD.size - 4]):
                found[block] = image, text
    return found


def finish(partial: Path, folder: Path, layout: Layout) -> None:
    """Gives a cache whose blocks are all written its checksums and its name."""
    seal(partial, layout)
    partial.rename(folder)


def seal(partial: Path, layout: Layout) -> None:
    """Gives a cache whose blocks are all written its checksums: it can be read under the name it has."""
    found = done(partial)
    assert found.keys() >= set(layout.blocks), "not all blocks are written"
    checksums = np.array([found[block] for block in layout.blocks], np.uint32).reshape(-1, len(HALVES))
    with new_file(partial / CHECKSUMS) as file:
        np.save(file, checksums)
    for journal in partial.glob("journal-*"):
        journal.unlink()


def replace(partial: Path, folder: Path) -> None:
    """Gives a sealed cache its name, in the place of one that had it."""
    if is_there(folder):
        shutil.rmtree(folder)
    partial.rename(folder)


class Store:
    """A whole cache, memory-mapped."""

    def __init__(self, folder: Path, verify: bool = True) -> None:
        """Opens it.

        Args:
            verify: hold each block to its checksum when a row of it is first read.

        Raises:
            StaleCacheError: a file is missing, cut off or not as the manifest says.
        """
        self.folder, self._verify = folder, verify
        self.layout, self.fingerprint, self.origin, self.modified = read_manifest(folder)
        try:
            self._rows: dict[str, Any] = {half: map_array(inside(folder, f"{half}.npy")) for half in HALVES}
            for rows in self._rows.values():
                if rows.size:
                    # Rows are read in random order: else each would bring 128 KiB of neighbours from the disk.
                    rows._mmap.madvise(mmap.MADV_RANDOM)
            self._checksums = map_array(inside(folder, CHECKSUMS))
        except (OSError, ValueError) as error:
            raise StaleCacheError(
                f"teacher cache {folder}: a file of it is damaged: {error}; rebuild it"
            ) from error
        expected: dict[str, Any] = {half: (self.layout.shape(half), self.layout.dtype) for half in HALVES}
        expected["checksums"] = ((len(self.layout.blocks), len(HALVES)), "uint32")
        arrays = self._rows | {"checksums": self._checksums}
        if {name: (rows.shape, rows.dtype.name) for name, rows in arrays.items()} != expected:
            raise StaleCacheError(
                f"teacher cache {folder}: its arrays are not those of its {MANIFEST}; rebuild it"
            )
        self._verified = np.zeros((len(self.layout.blocks), len(HALVES)), bool)

    def read(self, half: str, sample: NDArray[np.int64], view: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Copies the rows of samples in their views, ``(B,)`` each, into ``out``, ``(B, D)``.

        Raises:
            StaleCacheError: bytes of their blocks have changed since they were written.
        """
        view = view if half == "image" else np.zeros_like(view)
        if self._verify:
            for block in self._unread(half, view * self.layout.blocks_per_view + sample // BLOCK):
                self._check(half, block)
        rows = view * self.layout.samples + sample
        assert len(rows) == 0 or 0 <= rows.min() <= rows.max() < len(self._rows[half])
        self._ask_for(half, rows)
        # With mode "raise" numpy would gather into memory of its own, and copy from there.
        np.take(self._rows[half], rows, axis=0, out=out, mode="clip")

    def _ask_for(self, half: str, rows: NDArray[np.int64]) -> None:
        """Has the disk read rows side by side; one after the other each would wait for the one before."""
        memory = self._rows[half]
        stride, first = memory.strides[0], memory.offset % mmap.PAGESIZE
        for row in rows.tolist():
            begin = first + row * stride
            start = begin - begin % mmap.PAGESIZE
            memory._mmap.madvise(mmap.MADV_WILLNEED, start, begin + stride - start)

    def rows(self, half: str) -> NDArray[Any]:
        """All rows of a half, ``(views * N, D)`` or ``(N, D)``, memory-mapped and held to no checksum."""
        # Another map than that of random reading: who asks for all of them reads in order.
        return np.load(self.folder / f"{half}.npy", mmap_mode="r")

    def check_all(self) -> None:
        """Holds every block to its checksum.

        Raises:
            StaleCacheError: bytes have changed since they were written.
        """
        for half in HALVES:
            for block in self.layout.blocks:
                self._check(half, block)

    def _unread(self, half: str, blocks: NDArray[np.int64]) -> Iterator[int]:
        verified = self._verified[:, HALVES.index(half)]
        yield from np.unique(blocks[~verified[blocks]]).tolist()

    def _check(self, half: str, block: int) -> None:
        rows = self.layout.rows(half, block)
        place, memory = HALVES.index(half), self._rows[half]
        start = memory.offset + rows.start * memory.strides[0]
        data = np.fromfile(memory.filename, np.uint8, len(rows) * memory.strides[0], offset=start)
        if zlib.crc32(data.data) != self._checksums[block, place]:
            raise StaleCacheError(
                f"{self.folder / half}.npy: rows {rows.start} to {rows.stop - 1} have changed since they were "
                "written, by the disk or a copy; rebuild it"
            )
        self._verified[block, place] = True


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())


def _data_start(file: BinaryIO, shape: tuple[int, int], dtype: str) -> int:
    rows = map_array(Path(file.name))
    if (rows.shape, rows.dtype.name) != (shape, dtype):
        raise ValueError(f"{file.name} is not the array of {MANIFEST}")
    np.lib.format.read_magic(file)
    np.lib.format.read_array_header_1_0(file)
    return file.tell()


def _write_at(file: BinaryIO, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file.fileno(), view, offset)
        view, offset = view[written:], offset + written
