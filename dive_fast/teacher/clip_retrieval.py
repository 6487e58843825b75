"""A teacher cache from the files of ``clip-retrieval inference``, and those files from a teacher cache.

Of each partition, numbered from 0 (00 where there are ten or more), clip-retrieval has three files with a row a
pair, below one folder (or, moved by their users, all in that folder):

- ``img_emb/img_emb_0.npy`` and ``text_emb/text_emb_0.npy``: ``(n, D)`` unit rows, float16 as a rule;
- ``metadata/metadata_0.parquet``: ``image_path``, webdataset's key of the sample or the path of its image file,
  and ``caption``; img2dataset adds more, its own ``key`` among them.

A pair is known by the stem of its name and its caption, in whatever order and partition it comes.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dive_fast.config.schema import Config
from dive_fast.data.sources.source import Source
from dive_fast.distributed import Ranks
from dive_fast.io.atomic_files import atomic_file
from dive_fast.io.safe_read import map_array
from dive_fast.teacher import cache_files as store
from dive_fast.teacher.cache_files import HALVES, CacheError, Layout, Store
from dive_fast.teacher.fingerprint import Fingerprint
from dive_fast.teacher.write_cache import begin

FILES = {"image": ("img_emb", "npy"), "text": ("text_emb", "npy"), "metadata": ("metadata", "parquet")}
"""Name (of the folder too) and suffix of each kind of file."""
EXPORT_ROWS = 1_000_000
"""Rows of an exported partition; clip-retrieval's own default."""
UNIT_TOLERANCE = 1e-2
_EXPLAINED = 100_000
"""Missing pairs that are searched for with another caption, to bound memory."""


def check(config: Config, adopt: bool) -> None:
    """Whether the cache of a config can come from such files, or go to them.

    Raises:
        CacheError: it has other views than they, adopted rows would have no audit, or pyarrow is missing.
    """
    _pyarrow()
    data = config.data.reference
    assert data is not None
    if data.views != "eval":
        raise CacheError(
            f"data.reference.views = {data.views}: clip-retrieval's files hold evaluation views alone; "
            "set data.reference.views=eval"
        )
    if adopt and config.teacher.audit == 0:
        raise CacheError(
            "teacher.audit = 0: only the audit proves that adopted rows are this model's; leave it at 64"
        )


def stem(name: str) -> str:
    """What a key, a path or webdataset's ``__key__`` calls a sample: the last component up to its first dot.

    Without the ``#row`` that tells the rows of a CSV file apart.
    """
    return re.sub(r"#\d+$", "", name.rpartition("/")[2].partition(".")[0])


@dataclass(frozen=True)
class Partition:
    """The files of one number."""

    paths: dict[str, Path]
    """By kind."""
    rows: dict[str, NDArray[Any]]
    """Of each half, ``(n, D)``, memory-mapped."""
    name_column: str
    """Where the metadata name the sample."""

    def __len__(self) -> int:
        return len(self.rows["image"])

    def entries(self) -> Iterator[tuple[str, str]]:
        """Name and caption of every row.

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
    """The embeddings of a folder."""

    def __init__(self, folder: Path, dtype: str) -> None:
        """Opens its files.

        Args:
            dtype: that the cache is to have.

        Raises:
            CacheError: a file is missing, damaged, or does not go with the others or the cache.
        """
        self.folder = folder
        self._partitions = [_open(paths, dtype) for paths in _paths(folder)]
        self._ends = np.cumsum([len(partition) for partition in self._partitions])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def check_width(self, width: int) -> None:
        """Holds the embeddings to the width of the model's.

        Raises:
            CacheError: those of a file have another one.
        """
        for partition in self._partitions:
            for half in HALVES:
                if (found := partition.rows[half].shape[1]) != width:
                    raise CacheError(
                        f"{partition.paths[half]}: embeddings of width {found}, the model's have {width}; "
                        "embed the data by the config's model"
                    )

    def find(self, source: Source) -> NDArray[np.int64]:
        """The row of every sample, ``(N,)``, counted over all partitions.

        Raises:
            CacheError: a sample has no row, or more than one, or is not known from another one.
        """
        wanted = _digests((sample.key, sample.texts[0]) for sample in source.samples)
        order, twice = _sorted(wanted)
        if len(twice):
            one, other = (source.samples[int(order[place])] for place in (twice[0], twice[0] + 1))
            raise CacheError(
                f"data.reference: samples {one.key} and {other.key} have one file name and one caption, by which "
                "clip-retrieval's files cannot tell them apart; leave one out, or write the cache without --adopt"
            )
        there = _digests(self._entries())
        order, _ = _sorted(there)
        there = there[order]
        first, last = np.searchsorted(there, wanted, "left"), np.searchsorted(there, wanted, "right")
        if len(missing := np.flatnonzero(first == last)):
            raise self._missing(source, missing)
        if len(twice := np.flatnonzero(last - first > 1)):
            places = (self._place(order[first[twice[0]] + after]) for after in (0, 1))
            entries = (f"row {row} of {self._partitions[number].paths['metadata'].name}" for number, row in places)
            raise CacheError(
                f"{self.folder}: two entries for sample {source.samples[int(twice[0])].key}: "
                f"{' and '.join(entries)}; embed the data without one of them"
            )
        return order[first]

    def read(self, half: str, rows: NDArray[np.int64], dtype: str) -> NDArray[Any]:
        """Some rows, ``(n, D)``; from float32 to float16 they are rounded.

        Raises:
            CacheError: one is no unit row.
        """
        partition = np.searchsorted(self._ends, rows, side="right")
        found = np.empty((len(rows), self._partitions[0].rows[half].shape[1]), dtype)
        for number in np.unique(partition):
            own = partition == number
            start = self._ends[number] - len(self._partitions[number])
            found[own] = self._partitions[number].rows[half][rows[own] - start]
        lengths = np.linalg.norm(found.astype(np.float32), axis=1)
        bad = np.flatnonzero(~(np.abs(lengths - 1) <= UNIT_TOLERANCE))  # NaN among them
        if len(bad):
            number, row = self._place(rows[bad[0]])
            raise CacheError(
                f"{self._partitions[number].paths[half]}: row {row} has length {lengths[bad[0]]:.3g}, a unit row "
                "has 1; copy the file again, or embed the data anew"
            )
        return found

    def _entries(self) -> Iterator[tuple[str, str]]:
        for partition in self._partitions:
            yield from partition.entries()

    def _place(self, row: np.int64) -> tuple[int, int]:
        """Partition and row in it."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        return number, int(row - self._ends[number] + len(self._partitions[number]))

    def _missing(self, source: Source, missing: NDArray[np.int64]) -> CacheError:
        keys = ", ".join(source.samples[sample].key for sample in missing[:3].tolist())
        message = (
            f"{self.folder}: of the {len(source)} pairs of data.reference, {len(missing)} are not among its "
            f"{len(self)} entries (the first: {keys})"
        )
        samples = {stem(source.samples[sample].key): sample for sample in missing[:_EXPLAINED].tolist()}
        for name, caption in self._entries():
            if (sample := samples.get(stem(name))) is not None:
                found = source.samples[sample]
                return CacheError(
                    f"{message}; the captions differ: of {found.key} it is {_short(caption)} there and "
                    f"{_short(found.texts[0])} here; give the config the captions that were embedded"
                )
        return CacheError(f"{message}; embed the data set that the config names")


def adopt(
    embeddings: Embeddings, partial: Path, layout: Layout, source: Source, fingerprint: Fingerprint, ranks: Ranks
) -> None:
    """Makes a sealed cache of the embeddings, still under the name of one that is not whole.

    Raises:
        CacheError: the embeddings are not those of the samples, cannot be copied, or another cache was begun.
    """
    with ranks.raise_on_all(CacheError):
        embeddings.check_width(layout.width)
        rows = embeddings.find(source)
    try:
        todo = begin(
            partial, layout, fingerprint, f"adopted from {embeddings.folder.resolve()}", ranks, source.modified()
        )
        with ranks.raise_on_all(CacheError, OSError):
            _copy(embeddings, rows, partial, layout, todo, ranks)
        if ranks.is_main:
            store.seal(partial, layout)
        ranks.barrier()
    except OSError as error:
        raise CacheError(f"{partial}: {error}; nothing of it is kept, run the same command again") from error


def export(cache: Store, source: Source, folder: Path) -> int:
    """Writes a cache as clip-retrieval would have, in the cache's own dtype; returns the number of partitions.

    Raises:
        CacheError: such files are there already, they cannot be written, or bytes of the cache have changed.
    """
    count = -(-len(source) // EXPORT_ROWS)
    try:
        for kind in FILES:
            if folder.is_dir() and (found := list(_numbered(folder, kind).values())):
                raise CacheError(f"{found[0]} is there already; remove it, or name another folder")
        cache.check_all()
        for number in range(count):
            rows = range(number * EXPORT_ROWS, min((number + 1) * EXPORT_ROWS, len(source)))
            _write_partition(cache, source, rows, folder, str(number).zfill(len(str(count))))
    except OSError as error:
        raise CacheError(
            f"{folder}: cannot write there: {error}; remove what is there, it is not whole"
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
            own = rows[layout.rows("image", block)]
            writer.write(block, {half: embeddings.read(half, own, layout.dtype) for half in HALVES})
            progress.update(len(own))
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
    """The files of every partition, by kind."""
    names = "img_emb, text_emb and metadata"
    if not folder.is_dir():
        raise CacheError(f"{folder}: no such folder; name that of clip-retrieval inference, with {names} below")
    found = {kind: _numbered(folder, kind) for kind in FILES}
    numbers = sorted(set().union(*found.values()))
    if not numbers:
        raise CacheError(
            f"{folder}: no img_emb_0.npy; name the folder of clip-retrieval inference, with {names} below"
        )
    for number in numbers:
        for kind, (name, suffix) in FILES.items():
            if number not in found[kind]:
                raise CacheError(
                    f"{folder}: {name}_{number}.{suffix} is missing; copy it there, or embed the data anew with "
                    "images, texts and metadata"
                )
    return [{kind: found[kind][number] for kind in FILES} for number in numbers]


def _numbered(folder: Path, kind: str) -> dict[str, Path]:
    """The files of a kind by their numbers, as they are written."""
    name, suffix = FILES[kind]
    place = folder / name if (folder / name).is_dir() else folder
    pattern = re.compile(rf"{name}_(\d+)\.{suffix}")
    return {match[1]: path for path in sorted(place.iterdir()) if (match := pattern.fullmatch(path.name))}


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
        wanted = "image_path or key" if name_column is None else "caption"
        raise CacheError(f"{path}: no column {wanted}, only {', '.join(columns)}; embed the data with its texts")
    for half in HALVES:
        if len(rows[half]) != count:
            raise CacheError(
                f"{paths[half]}: {len(rows[half])} rows, {path.name} has {count}; copy the files again, they are "
                "not of one run"
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
    """What pairs of name and caption are known by, ``(n,)``."""
    return np.fromiter((_digest(stem(name), caption.strip()) for name, caption in entries), np.uint64)


def _digest(name: str, caption: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{name}\0{caption}".encode(), digest_size=8).digest())


def _sorted(digests: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The order that sorts them, and the places in it that equal the next one."""
    order = np.argsort(digests, kind="stable")
    return order, np.flatnonzero(digests[order[1:]] == digests[order[:-1]])


def _short(caption: str) -> str:
    return repr(caption if len(caption) <= 60 else f"{caption[:57]}...")


def _unreadable(path: Path, error: Exception) -> CacheError:
    reason = " ".join(str(error).split())
    return CacheError(f"{path}: cannot read it: {reason}; copy it again, or embed the data anew")


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CacheError(
            f"clip-retrieval's metadata are parquet files: {error}; pip install 'dive_fast[retrieval]'"
        ) from error
    return pyarrow, pyarrow.parquet
