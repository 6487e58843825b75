"""Makes a teacher cache from the files of ``clip-retrieval inference``, and exports a cache to such files.

clip-retrieval writes three files for each partition, with a row for each pair. Partitions are numbered from 0 (00
if there are ten or more). The files are in subfolders, or directly in the folder if users have moved them:

- ``img_emb/img_emb_0.npy`` and ``text_emb/text_emb_0.npy``: ``(n, D)`` unit rows, usually float16;
- ``metadata/metadata_0.parquet``: ``image_path``, which is webdataset's key or the path of the image file, and
  ``caption``; img2dataset adds columns, including its own ``key``.

A pair is identified by the stem of its name and by its caption, in any order and partition.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dive_fast.config.schema import ReferenceConfig, TeacherConfig
from dive_fast.data.sources.source import Source
from dive_fast.distributed import Ranks
from dive_fast.errors import DataError
from dive_fast.io.atomic_files import atomic_file
from dive_fast.io.safe_read import map_array
from dive_fast.teacher import cache_files as store
from dive_fast.teacher.cache_files import HALVES, CacheError, Layout, Store
from dive_fast.teacher.fingerprint import Fingerprint
from dive_fast.teacher.write_cache import begin

FILES = {"image": ("img_emb", "npy"), "text": ("text_emb", "npy"), "metadata": ("metadata", "parquet")}
"""Name, also of the subfolder, and suffix of each kind of file."""
EXPORT_ROWS = 1_000_000
"""Rows of an exported partition; clip-retrieval's default."""
UNIT_TOLERANCE = 1e-2
"""Largest deviation of a unit row's length from 1."""
_MAX_EXPLAINED = 100_000
"""Missing pairs that are searched for under another caption; limits memory."""


def check(reference: ReferenceConfig, teacher: TeacherConfig, adopt: bool) -> None:
    """Checks that a config's cache can be made from clip-retrieval's files, or exported to them.

    Raises:
        CacheError: the config's views are not the files', adopted rows would have no audit, or pyarrow is missing.
    """
    _pyarrow()
    if reference.views != "eval":
        raise CacheError(
            f"data.reference.views = {reference.views}: clip-retrieval's files contain only evaluation views; "
            "set data.reference.views=eval"
        )
    if reference.captions == "lines":
        raise CacheError(
            "data.reference.captions = lines: clip-retrieval's files contain one caption per image; set "
            "data.reference.captions=one"
        )
    if adopt and teacher.audit == 0:
        raise CacheError(
            "teacher.audit = 0: only the audit proves that adopted rows belong to this model; set it to 64"
        )


def stem(name: str) -> str:
    """Stem of a sample's key or path: the last component up to its first dot.

    Drops the ``#row`` that distinguishes the rows of a CSV file.
    """
    return re.sub(r"#\d+$", "", name.rpartition("/")[2].partition(".")[0])


@dataclass(frozen=True)
class Partition:
    """The files of one partition."""

    paths: dict[str, Path]
    """Paths by kind of file."""
    rows: dict[str, NDArray[Any]]
    """Rows ``(n, D)`` of each half, memory-mapped."""
    name_column: str
    """Metadata column with the sample's name."""

    def __len__(self) -> int:
        return len(self.rows["image"])

    def entries(self) -> Iterator[tuple[str, str]]:
        """Yields name and caption of every row.

        Raises:
            CacheError: the metadata cannot be read.
        """
        arrow, parquet = _pyarrow()
        path = self.paths["metadata"]
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(columns=[self.name_column, "caption"]):
                    names, captions = (batch.column(name).to_pylist() for name in (self.name_column, "caption"))
                    for name, caption in zip(names, captions, strict=True):
                        yield str(name), str(caption or "")
        except (OSError, ValueError, arrow.ArrowException) as error:
            raise _unreadable(path, error) from error


class Embeddings:
    """The embeddings in a folder of clip-retrieval's files."""

    def __init__(self, folder: Path, dtype: str) -> None:
        """Opens the files.

        Args:
            dtype: dtype of the cache to be made.

        Raises:
            CacheError: a file is missing or damaged, or does not match the others or ``dtype``.
        """
        self.folder = folder
        self._partitions = [_open(paths, dtype) for paths in _paths(folder)]
        self._ends = np.cumsum([len(partition) for partition in self._partitions])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def check_width(self, width: int) -> None:
        """Checks that the embeddings have the model's width.

        Raises:
            CacheError: the embeddings of a file have another width.
        """
        for partition in self._partitions:
            for half in HALVES:
                if (actual := partition.rows[half].shape[1]) != width:
                    raise CacheError(
                        f"{partition.paths[half]}: embeddings of width {actual}, the model's have {width}; "
                        "embed the data with the config's model"
                    )

    def find_rows(self, source: Source) -> NDArray[np.int64]:
        """Row of every sample, ``(N,)``, counted over all partitions.

        Raises:
            CacheError: a sample has no row or more than one, or two samples are indistinguishable.
        """
        samples = source.samples
        digests = _digests((samples.key(row), samples.texts(row)[0]) for row in range(len(samples)))
        order, duplicates = _sorted(digests)
        if len(duplicates):
            one, other = (source.samples[int(order[i])] for i in (duplicates[0], duplicates[0] + 1))
            raise CacheError(
                f"data.reference: samples {one.key} and {other.key} have the same file name and caption, so that "
                "clip-retrieval's files cannot distinguish them; remove one, or write the cache without --adopt"
            )
        stored = _digests(self._entries())
        order, _ = _sorted(stored)
        stored = stored[order]
        first, last = np.searchsorted(stored, digests, "left"), np.searchsorted(stored, digests, "right")
        if len(missing := np.flatnonzero(first == last)):
            raise self._missing(source, missing)
        if len(duplicates := np.flatnonzero(last - first > 1)):
            located = (self._locate(order[first[duplicates[0]] + offset]) for offset in (0, 1))
            entries = (
                f"row {row} of {self._partitions[number].paths['metadata'].name}" for number, row in located
            )
            raise CacheError(
                f"{self.folder}: two entries for sample {source.samples[int(duplicates[0])].key}: "
                f"{' and '.join(entries)}; embed the data without one of them"
            )
        return order[first]

    def read(self, half: str, rows: NDArray[np.int64], dtype: str) -> NDArray[Any]:
        """Reads rows, ``(n, D)``, and rounds float32 to float16 if ``dtype`` is float16.

        Raises:
            CacheError: a row is not a unit row.
        """
        partition = np.searchsorted(self._ends, rows, side="right")
        values = np.empty((len(rows), self._partitions[0].rows[half].shape[1]), dtype)
        for number in np.unique(partition):
            selected = partition == number
            start = self._ends[number] - len(self._partitions[number])
            values[selected] = self._partitions[number].rows[half][rows[selected] - start]
        lengths = np.linalg.norm(values.astype(np.float32), axis=1)
        bad = np.flatnonzero(~(np.abs(lengths - 1) <= UNIT_TOLERANCE))  # includes NaN
        if len(bad):
            number, row = self._locate(rows[bad[0]])
            raise CacheError(
                f"{self._partitions[number].paths[half]}: row {row} has length {lengths[bad[0]]:.3g}, a unit row "
                "has 1; copy the file again, or embed the data again"
            )
        return values

    def _entries(self) -> Iterator[tuple[str, str]]:
        for partition in self._partitions:
            yield from partition.entries()

    def _locate(self, row: np.int64) -> tuple[int, int]:
        """Partition of a row, and its index there."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        return number, int(row - self._ends[number] + len(self._partitions[number]))

    def _missing(self, source: Source, missing: NDArray[np.int64]) -> CacheError:
        keys = ", ".join(source.samples[sample].key for sample in missing[:3].tolist())
        message = (
            f"{self.folder}: {len(missing)} of the {len(source)} pairs of data.reference are not among its "
            f"{len(self)} entries (the first: {keys})"
        )
        rows = {stem(source.samples.key(sample)): sample for sample in missing[:_MAX_EXPLAINED].tolist()}
        for name, caption in self._entries():
            if (sample := rows.get(stem(name))) is not None:
                key, expected = source.samples[sample].key, source.samples[sample].texts[0]
                return CacheError(
                    f"{message}; the captions differ: that of {key} is {_short(caption)} there and "
                    f"{_short(expected)} here; use the embedded captions in the config"
                )
        return CacheError(f"{message}; embed the config's data set")


def adopt(
    embeddings: Embeddings, partial: Path, layout: Layout, source: Source, fingerprint: Fingerprint, ranks: Ranks
) -> None:
    """Makes a sealed cache of the embeddings, under the name of an unfinished cache.

    Raises:
        CacheError: the embeddings do not match the samples or cannot be copied, or an unfinished cache of another
            configuration has this name.
        ChangedDataError: a file changed after the set was listed.
    """
    with ranks.raise_on_all(CacheError, DataError):
        embeddings.check_width(layout.width)
        rows = embeddings.find_rows(source)
        modified = source.modified()
    try:
        todo = begin(partial, layout, fingerprint, f"adopted from {embeddings.folder.resolve()}", ranks, modified)
        with ranks.raise_on_all(CacheError, OSError):
            _copy(embeddings, rows, partial, layout, todo, ranks)
        if ranks.is_main:
            store.seal(partial, layout)
        ranks.barrier()
    except OSError as error:
        raise CacheError(f"{partial}: {error}; nothing is kept, run the same command again") from error


def export(cache: Store, source: Source, folder: Path) -> int:
    """Exports a cache to clip-retrieval's files, in the cache's dtype; returns the number of partitions.

    Raises:
        CacheError: such files exist or cannot be written, or bytes of the cache have changed.
    """
    count = -(-len(source) // EXPORT_ROWS)
    try:
        for kind in FILES:
            if folder.is_dir() and (existing := list(_numbered(folder, kind).values())):
                raise CacheError(f"{existing[0]} already exists; remove it, or name another folder")
        cache.check_all()
        for number in range(count):
            rows = range(number * EXPORT_ROWS, min((number + 1) * EXPORT_ROWS, len(source)))
            _write_partition(cache, source, rows, folder, str(number).zfill(len(str(count))))
    except OSError as error:
        raise CacheError(
            f"{folder}: cannot write there: {error}; the export is incomplete, remove its files"
        ) from error
    return count


def _copy(
    embeddings: Embeddings,
    rows: NDArray[np.int64],
    partial: Path,
    layout: Layout,
    todo: list[int],
    ranks: Ranks,
) -> None:
    writer = store.Writer(partial, layout, ranks.rank)
    progress = ranks.progress(sum(len(layout.rows("image", block)) for block in todo), "adopted", "pair")
    try:
        for block in todo:
            block_rows = rows[layout.rows("image", block)]
            writer.write(block, {half: embeddings.read(half, block_rows, layout.dtype) for half in HALVES})
            progress.update(len(block_rows))
    finally:
        writer.close()
        progress.close()


def _write_partition(cache: Store, source: Source, rows: range, folder: Path, number: str) -> None:
    arrow, parquet = _pyarrow()
    paths = {kind: folder / name / f"{name}_{number}.{suffix}" for kind, (name, suffix) in FILES.items()}
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    for half in HALVES:
        with atomic_file(paths[half]) as file:
            np.save(file, cache.rows(half)[rows.start : rows.stop])
    samples = [source.samples[row] for row in rows]
    table = {
        "image_path": [stem(sample.key) for sample in samples],
        "caption": [sample.texts[0] for sample in samples],
    }
    with atomic_file(paths["metadata"]) as file:
        parquet.write_table(arrow.table(table), file)


def _paths(folder: Path) -> list[dict[str, Path]]:
    """Paths of every partition by kind of file."""
    subfolders = "img_emb, text_emb and metadata"
    if not folder.is_dir():
        raise CacheError(
            f"{folder}: no such folder; name the output folder of clip-retrieval inference, with {subfolders}"
        )
    paths = {kind: _numbered(folder, kind) for kind in FILES}
    numbers = sorted(set().union(*paths.values()))
    if not numbers:
        raise CacheError(
            f"{folder}: no img_emb_0.npy; name the output folder of clip-retrieval inference, with {subfolders}"
        )
    for number in numbers:
        for kind, (name, suffix) in FILES.items():
            if number not in paths[kind]:
                raise CacheError(
                    f"{folder}: {name}_{number}.{suffix} is missing; copy it there, or embed the data again with "
                    "images, texts and metadata"
                )
    return [{kind: paths[kind][number] for kind in FILES} for number in numbers]


def _numbered(folder: Path, kind: str) -> dict[str, Path]:
    """Paths of one kind of file by number, in the notation of the file name."""
    name, suffix = FILES[kind]
    subfolder = folder / name if (folder / name).is_dir() else folder
    pattern = re.compile(rf"{name}_(\d+)\.{suffix}")
    return {match[1]: path for path in sorted(subfolder.iterdir()) if (match := pattern.fullmatch(path.name))}


def _open(paths: dict[str, Path], dtype: str) -> Partition:
    rows = {half: _map(paths[half], dtype) for half in HALVES}
    arrow, parquet = _pyarrow()
    path = paths["metadata"]
    try:
        with parquet.ParquetFile(path) as file:
            columns, count = file.schema_arrow.names, file.metadata.num_rows
    except (OSError, arrow.ArrowException) as error:
        raise _unreadable(path, error) from error
    name_column = next((name for name in ("image_path", "key") if name in columns), None)
    if name_column is None or "caption" not in columns:
        missing = "image_path or key" if name_column is None else "caption"
        raise CacheError(f"{path}: no column {missing}, only {', '.join(columns)}; embed the data with captions")
    for half in HALVES:
        if len(rows[half]) != count:
            raise CacheError(
                f"{paths[half]}: {len(rows[half])} rows, {path.name} has {count}; copy the files again, they "
                "belong to different runs"
            )
    return Partition(paths, rows, name_column)


def _map(path: Path, dtype: str) -> NDArray[Any]:
    try:
        rows = map_array(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if rows.ndim != 2 or rows.dtype.name not in ("float16", "float32"):
        raise CacheError(
            f"{path}: an array of {rows.dtype.name} with {rows.ndim} axes; expected float16 or float32 rows, as "
            "clip-retrieval inference writes them"
        )
    if rows.dtype.name == "float16" and dtype == "float32":
        raise CacheError(f"{path}: float16 rows do not fill a float32 cache; set teacher.dtype=float16")
    return rows


def _digests(entries: Iterable[tuple[str, str]]) -> NDArray[np.uint64]:
    """Digests ``(n,)`` that identify pairs of name and caption."""
    return np.fromiter((_digest(stem(name), caption.strip()) for name, caption in entries), np.uint64)


def _digest(name: str, caption: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{name}\0{caption}".encode(), digest_size=8).digest())


def _sorted(digests: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The order that sorts the digests, and the positions in it whose digest equals the next."""
    order = np.argsort(digests, kind="stable")
    return order, np.flatnonzero(digests[order[1:]] == digests[order[:-1]])


def _short(caption: str) -> str:
    return repr(caption if len(caption) <= 60 else f"{caption[:57]}...")


def _unreadable(path: Path, error: Exception) -> CacheError:
    reason = " ".join(str(error).split())
    return CacheError(f"{path}: cannot read it: {reason}; copy it again, or embed the data again")


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CacheError(
            f"clip-retrieval's metadata are parquet files: {error}; pip install 'dive_fast[retrieval]'"
        ) from error
    return pyarrow, pyarrow.parquet
