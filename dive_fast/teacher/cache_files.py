"""The files of a teacher cache: rows of both towers in blocks, each block with a checksum.

``image.npy`` is ``(views * N, D)``, view by view: the row of a sample is ``view * N + sample``. ``text.npy`` is
``(N, D)``. If images have several captions, it has the rows of all captions, image by image, and ``captions.npy``
has their numbers, ``(N,)``. A block is BLOCK consecutive samples of one view, their captions with the first view.

An unfinished cache has another name. Each rank records every written block in its own journal, after the rows are
on disk; an interrupted run resumes with the blocks that are in no journal, on any number of ranks.
"""

import hashlib
import json
import math
import mmap
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from dataclasses import replace as replace_fields
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dive_fast.errors import ConfigError
from dive_fast.io.atomic_files import new_file, write_atomic
from dive_fast.io.safe_read import inside, map_array, read_json

FORMAT = 4
BLOCK = 1024
MANIFEST, CHECKSUMS, CAPTIONS = "cache.json", "checksums.npy", "captions.npy"
HALVES = ("image", "text")
COMPUTED = "computed"
"""Origin of a cache embedded by this project; the origin of an adopted cache names the folder of its files."""
_RECORD = struct.Struct("<QIII")
"""Journal record: block, checksums of its image rows and text rows, checksum of the preceding bytes."""


class CacheError(ConfigError):
    """A teacher cache cannot be used; the message says why and what to change."""


class StaleCacheError(CacheError):
    """A teacher cache must be rebuilt. The message ends in "rebuild it", to which a script appends the command."""


@dataclass(frozen=True)
class Layout:
    """Sizes and dtype of a cache."""

    samples: int
    views: int
    width: int
    dtype: str
    """``float32`` or ``float16``."""
    texts: int | None = None
    """Number of all captions; None: one per sample."""
    caption_counts: NDArray[np.int64] | None = field(default=None, compare=False, repr=False)
    """``(N,)``: captions of each sample, where samples have several."""

    @classmethod
    def of(
        cls, samples: int, views: int, width: int, dtype: str, caption_counts: NDArray[np.int64] | None
    ) -> "Layout":
        """The layout for samples with these numbers of captions; None: one each."""
        if caption_counts is None:
            return cls(samples, views, width, dtype)
        return cls(samples, views, width, dtype, int(caption_counts.sum()), caption_counts)

    @cached_property
    def first_texts(self) -> NDArray[np.int64]:
        """``(N + 1,)``: the row of each sample's first caption, and the number of rows."""
        counts = np.ones(self.samples, np.int64) if self.caption_counts is None else self.caption_counts
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])

    @property
    def tree(self) -> dict[str, Any]:
        """The sizes and dtype, for the manifest."""
        tree: dict[str, Any] = {"samples": self.samples, "views": self.views}
        tree |= {"width": self.width, "dtype": self.dtype}
        return tree if self.texts is None else tree | {"texts": self.texts}

    @property
    def blocks_per_view(self) -> int:
        return math.ceil(self.samples / BLOCK)

    @property
    def blocks(self) -> range:
        """All blocks, the first view's before the second's."""
        return range(self.views * self.blocks_per_view)

    def view_and_samples(self, block: int) -> tuple[int, range]:
        """The view and the samples of a block."""
        view, number = divmod(block, self.blocks_per_view)
        return view, range(number * BLOCK, min((number + 1) * BLOCK, self.samples))

    def shape(self, half: str) -> tuple[int, int]:
        """Shape of the array of a half."""
        if half == "text":
            return (self.samples if self.texts is None else self.texts, self.width)
        return (self.samples * self.views, self.width)

    def rows(self, half: str, block: int) -> range:
        """Rows of a block in the array of a half; empty for texts of later views."""
        view, samples = self.view_and_samples(block)
        if half == "text":
            first, end = self.first_texts[samples.start], self.first_texts[samples.stop]
            return range(int(first), int(end)) if view == 0 else range(0)
        first = view * self.samples + samples.start
        return range(first, first + len(samples))


def partial_name(folder: Path) -> Path:
    """Path of a cache until it is complete."""
    return folder.with_name(f".{folder.name}.partial")


def is_there(folder: Path) -> bool:
    """Whether ``folder`` has a cache, complete or not."""
    return (folder / MANIFEST).is_file()


class Manifest(NamedTuple):
    """Description of a cache, complete or not."""

    layout: Layout
    fingerprint: dict[str, Any]
    origin: str
    modified: str = ""
    """Hash of the modification times of the reference set; empty if not recorded."""


def create(
    folder: Path, layout: Layout, fingerprint: dict[str, Any], origin: str = COMPUTED, modified: str = ""
) -> None:
    """Creates the files of a cache at full size, without rows.

    Args:
        origin: source of its rows. Not a part of the fingerprint, since equal rows are interchangeable.
        modified: ``Source.modified()`` of the reference set.

    Raises:
        OSError: the disk does not have the space.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for half in HALVES:
        shape, dtype = layout.shape(half), np.dtype(layout.dtype)
        with new_file(folder / f"{half}.npy") as file:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.flush()
            # Allocated now, since a disk that fills up under a memory map hours later kills the process.
            os.posix_fallocate(file.fileno(), 0, file.tell() + shape[0] * shape[1] * dtype.itemsize)
    manifest = {"format": FORMAT, "origin": origin, "modified": modified}
    manifest |= {"layout": layout.tree, "fingerprint": fingerprint}
    if layout.caption_counts is not None:
        with new_file(folder / CAPTIONS) as file:
            np.save(file, layout.caption_counts)
    # Written last: a folder with a manifest can be resumed.
    write_json(folder / MANIFEST, manifest)


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a cache, complete or not.

    Raises:
        StaleCacheError: it cannot be read.
    """
    try:
        tree = read_json(inside(folder, MANIFEST))
        if not isinstance(tree, dict):
            raise ValueError("expected a JSON object")
        if (kind := tree.get("format")) != FORMAT:
            raise StaleCacheError(
                f"{folder}: a teacher cache of format {str(kind)[:40]}, this version has {FORMAT}; rebuild it"
            )
        layout, fingerprint, origin = (tree.get(key) for key in ("layout", "fingerprint", "origin"))
        origin, modified = COMPUTED if origin is None else origin, tree.get("modified", "")
        if not isinstance(fingerprint, dict) or not isinstance(layout, dict):
            raise ValueError("expected layout and fingerprint as objects")
        if not isinstance(origin, str) or not isinstance(modified, str):
            raise ValueError("expected origin and modified as text")
        return Manifest(_layout(layout), fingerprint, origin, modified)
    except CacheError:
        raise
    except (OSError, ValueError) as error:
        raise StaleCacheError(f"{folder / MANIFEST}: cannot read it: {error}; rebuild it") from error


def _layout(tree: dict[str, Any]) -> Layout:
    minima = {"samples": 0, "views": 1, "width": 1} | ({"texts": 0} if "texts" in tree else {})
    # The exact type, since True is an instance of int.
    sizes = [(tree.get(name), minimum) for name, minimum in minima.items()]
    if len(tree) != len(sizes) + 1 or any(type(size) is not int or size < minimum for size, minimum in sizes):
        raise ValueError("layout: expected samples, views, width and dtype, the first three as counts")
    if max(tree["samples"], tree.get("texts", 0), 1) * tree["views"] * tree["width"] >= 2**60:
        raise ValueError("layout: more rows than fit on a disk")
    if tree.get("dtype") not in ("float32", "float16"):
        raise ValueError("layout.dtype: expected float32 or float16")
    return Layout(**tree)


class Writer:
    """Writes one rank's blocks of a cache made by :func:`create`."""

    def __init__(self, folder: Path, layout: Layout, rank: int) -> None:
        """Opens the files.

        Raises:
            StaleCacheError: a file differs from those of :func:`create`, or is a link out of the folder.
            OSError: a file cannot be opened.
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
        if torn:  # bytes of a record that was cut off by a kill
            self._journal.truncate(self._journal.tell() - torn)

    def write(self, block: int, rows: dict[str, NDArray[Any]]) -> None:
        """Writes the rows of a block, ``{half: (n, D)}``, and records the block in the journal.

        Raises:
            OSError: they cannot be written.
        """
        checksums = []
        for half in HALVES:
            values = np.ascontiguousarray(rows[half], self._layout.dtype)
            positions = self._layout.rows(half, block)
            assert values.shape == (len(positions), self._layout.width)
            data = values.tobytes()
            checksums.append(zlib.crc32(data))
            stride = self._layout.width * values.itemsize
            _write_at(self._files[half], data, self._starts[half] + positions.start * stride)
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


def finished_blocks(folder: Path) -> dict[int, tuple[int, int]]:
    """Blocks written by any rank, with the checksums of their halves."""
    checksums: dict[int, tuple[int, int]] = {}
    for journal in sorted(folder.glob("journal-*")):
        if not journal.is_file():
            continue
        data = journal.read_bytes()
        for start in range(0, len(data) - _RECORD.size + 1, _RECORD.size):
            block, image, text, checksum = _RECORD.unpack_from(data, start)
            if checksum == zlib.crc32(data[start : start + _RECORD.size - 4]):
                checksums[block] = image, text
    return checksums


def finish(partial: Path, folder: Path, layout: Layout) -> None:
    """Writes the checksums of a cache whose blocks are all written, and gives it its final name."""
    seal(partial, layout)
    partial.rename(folder)


def seal(partial: Path, layout: Layout) -> None:
    """Writes the checksums of a cache whose blocks are all written; it can then be read under its present name."""
    written = finished_blocks(partial)
    assert written.keys() >= set(layout.blocks), "not all blocks are written"
    checksums = np.array([written[block] for block in layout.blocks], np.uint32).reshape(-1, len(HALVES))
    with new_file(partial / CHECKSUMS) as file:
        np.save(file, checksums)
    for journal in partial.glob("journal-*"):
        journal.unlink()


def replace(partial: Path, folder: Path) -> None:
    """Gives a sealed cache its final name; removes an existing cache of this name."""
    if is_there(folder):
        shutil.rmtree(folder)
    partial.rename(folder)


class Store:
    """A complete cache, memory-mapped."""

    def __init__(self, folder: Path, verify: bool = True) -> None:
        """Opens the cache.

        Args:
            verify: check each block against its checksum when one of its rows is first read.

        Raises:
            StaleCacheError: a file is missing, truncated or does not match the manifest.
        """
        self.folder, self._verify = folder, verify
        self.layout, self.fingerprint, self.origin, self.modified = read_manifest(folder)
        try:
            self._rows: dict[str, Any] = {half: map_array(inside(folder, f"{half}.npy")) for half in HALVES}
            for rows in self._rows.values():
                if rows.size:
                    # Rows are read in random order; without this, each read loads 128 KiB of neighbors as well.
                    rows._mmap.madvise(mmap.MADV_RANDOM)
            self._checksums = map_array(inside(folder, CHECKSUMS))
            if self.layout.texts is not None:
                self.layout = replace_fields(self.layout, caption_counts=self._caption_counts())
        except (OSError, ValueError) as error:
            raise StaleCacheError(f"teacher cache {folder}: a file is damaged: {error}; rebuild it") from error
        expected: dict[str, Any] = {half: (self.layout.shape(half), self.layout.dtype) for half in HALVES}
        expected["checksums"] = ((len(self.layout.blocks), len(HALVES)), "uint32")
        arrays = self._rows | {"checksums": self._checksums}
        if {name: (rows.shape, rows.dtype.name) for name, rows in arrays.items()} != expected:
            raise StaleCacheError(f"teacher cache {folder}: its arrays do not match its {MANIFEST}; rebuild it")
        self._verified = np.zeros((len(self.layout.blocks), len(HALVES)), bool)

    def read(
        self,
        half: str,
        sample: NDArray[np.int64],
        view: NDArray[np.int64],
        out: NDArray[Any],
        caption: NDArray[np.int64] | None = None,
    ) -> None:
        """Copies the rows of ``sample`` and ``view``, ``(B,)`` each, into ``out``, ``(B, D)``.

        Args:
            view: not used for texts.
            caption: ``(B,)``, the number of the caption of each sample; None: the first; not used for images.

        Raises:
            StaleCacheError: bytes of these blocks have changed since they were written.
        """
        layout = self.layout
        view = view if half == "image" else np.zeros_like(view)
        if self._verify:
            for block in self._unverified(half, view * layout.blocks_per_view + sample // BLOCK):
                self._check(half, block)
        rows = view * layout.samples + sample
        if half == "text":
            rows = layout.first_texts[sample] + (0 if caption is None else caption)
            assert (rows < layout.first_texts[sample + 1]).all()
        assert len(rows) == 0 or 0 <= rows.min() <= rows.max() < len(self._rows[half])
        self._prefetch(half, rows)
        # With mode "raise" numpy gathers into a temporary array and copies it.
        np.take(self._rows[half], rows, axis=0, out=out, mode="clip")

    def _prefetch(self, half: str, rows: NDArray[np.int64]) -> None:
        """Asks the kernel to read all rows from disk in parallel, not one after another."""
        memory = self._rows[half]
        stride, first = memory.strides[0], memory.offset % mmap.PAGESIZE
        for row in rows.tolist():
            begin = first + row * stride
            start = begin - begin % mmap.PAGESIZE
            memory._mmap.madvise(mmap.MADV_WILLNEED, start, begin + stride - start)

    def rows(self, half: str) -> NDArray[Any]:
        """All rows of a half, in the shape of its file, memory-mapped; not verified."""
        # Not the map that is advised for random reads: callers read all rows in order.
        return np.load(self.folder / f"{half}.npy", mmap_mode="r")

    def check_all(self) -> None:
        """Checks every block against its checksum.

        Raises:
            StaleCacheError: bytes have changed since they were written.
        """
        for half in HALVES:
            for block in self.layout.blocks:
                self._check(half, block)

    def _caption_counts(self) -> NDArray[np.int64]:
        """The number of captions of each sample.

        Raises:
            ValueError: the file is not the one that the cache was written with.
        """
        counts = np.array(map_array(inside(self.folder, CAPTIONS)))
        if (counts.shape, counts.dtype.name) != ((self.layout.samples,), "int64"):
            raise ValueError(f"{CAPTIONS} is not the array of {MANIFEST}")
        if counts_digest(counts) != self.fingerprint.get("captions") or int(counts.sum()) != self.layout.texts:
            raise ValueError(f"{CAPTIONS} has changed since it was written")
        return counts

    def _unverified(self, half: str, blocks: NDArray[np.int64]) -> Iterator[int]:
        verified = self._verified[:, HALVES.index(half)]
        yield from np.unique(blocks[~verified[blocks]]).tolist()

    def _check(self, half: str, block: int) -> None:
        rows = self.layout.rows(half, block)
        column, memory = HALVES.index(half), self._rows[half]
        start = memory.offset + rows.start * memory.strides[0]
        data = np.fromfile(memory.filename, np.uint8, len(rows) * memory.strides[0], offset=start)
        if zlib.crc32(data.data) != self._checksums[block, column]:
            raise StaleCacheError(
                f"{self.folder / half}.npy: rows {rows.start} to {rows.stop - 1} have changed since they were "
                "written, by the disk or a copy; rebuild it"
            )
        self._verified[block, column] = True


def counts_digest(counts: NDArray[np.int64]) -> str:
    """A hash of the number of captions of each sample, for the fingerprint of a cache."""
    return hashlib.sha256(counts.tobytes()).hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file atomically."""
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
