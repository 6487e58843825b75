"""Reads data sets of Hugging Face's `datasets` on disk: folders of `save_to_disk`, and of parquet or arrow files.

An uncompressed arrow file holds the encoded bytes of each image in one piece. Images therefore are byte ranges of
these files, as those of a tar are: they are read by index from any process, and neither decoded nor copied before.
Parquet files are compressed; `datasets` converts them to arrow files in its cache, once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dive_fast.data.decode import IMAGE_SUFFIXES
from dive_fast.data.sources.folder import class_order
from dive_fast.data.sources.node_index import Listing, RawSet, open_raw
from dive_fast.data.sources.sample_table import (
    SampleTable,
    SharedStrings,
    Strings,
    StringsBuilder,
    clean_text,
    in_order_of_use,
    is_own_row,
    pack_texts,
)
from dive_fast.data.sources.source import EMPTY_CAPTION, Skipped, Source, locate, summarize_skipped
from dive_fast.errors import DataError, nearest
from dive_fast.identity import Identity, digest
from dive_fast.io.safe_read import inside, read_json

if TYPE_CHECKING:
    from dive_fast.distributed import Ranks  # imports torch, which takes seconds

DICT, STATE = "dataset_dict.json", "state.json"
"""Files that `save_to_disk` writes: the names of the splits, and the arrow files of one split."""
NO_IMAGE = "no image"
"""Reason for skipping a row whose image is missing."""
NO_LABEL = "no label"
"""Reason for skipping a row whose label is missing or -1, as in test splits."""
NOT_EMBEDDED = "only the path of its image; save_to_disk stores the image itself"
"""Reason for skipping a row that names an image elsewhere."""


class Columns(NamedTuple):
    """Names of the columns that are read; None: the default of each."""

    image: str | None = None
    label: str | None = None
    text: str | None = None


class _Table(NamedTuple):
    """The arrow files of one split, and the types of its columns."""

    files: Sequence[Path]
    features: Mapping[str, Any]


def is_dataset(path: str) -> bool:
    """Whether a folder looks like a data set of `datasets`; does not import it.

    Folders of images or tars are not: img2dataset writes a parquet file next to them.
    """
    root, has_tables = Path(path), False
    if any((root / name).is_file() for name in (DICT, STATE)):
        return True
    for file in chain(root.glob("*"), root.glob("*/*")):
        suffix = file.suffix.lower()
        if suffix in IMAGE_SUFFIXES or suffix == ".tar":
            return False
        has_tables |= suffix in (".parquet", ".arrow")
    return has_tables


def open_huggingface(
    path: str, columns: Columns, split: str | None = None, *, has_texts: bool, ranks: Ranks | None = None
) -> Source:
    """Opens a data set on disk; nothing is downloaded, and no code of the set is executed.

    Rows without an image, with a label that is missing or -1, or without a text are skipped.

    Args:
        columns: default: the first image column; the only ClassLabel column, or the only column of texts.
        split: the split to read, of a set that has several.
        has_texts: whether texts are read instead of labels.
        ranks: see :func:`open_raw`.

    Raises:
        DataError: `datasets` is not installed, the set, split or a column does not exist or has another type, or
            no row is usable.
    """
    return open_raw(ArrowSet(path, columns, split, has_texts=has_texts), ranks)


class ArrowSet(RawSet):
    """The arrow files of a split."""

    def __init__(self, path: str, columns: Columns, split: str | None, *, has_texts: bool) -> None:
        """Takes arguments of :func:`open_huggingface`."""
        self.path, self._columns, self._split, self._has_texts = path, columns, split, has_texts
        self._table = _Table((), {})

    def identity(self) -> Identity:
        options = {"columns": list(self._columns), "split": self._split, "has_texts": self._has_texts}
        return {"format": "huggingface", **options}

    def list_files(self) -> Listing:
        self._table = _open(locate(self.path), self.path, self._split)
        self.root = os.path.commonpath([file.parent for file in self._table.files] or [locate(self.path)])
        # Class names are not in the arrow files alone.
        features = digest([[name, repr(feature)] for name, feature in self._table.features.items()])
        return Listing.of(self.root, self._table.files)._replace(details=features)

    def read(self, listing: Listing) -> tuple[Source, Sequence[str]]:
        try:
            return _read(self._table, self._columns, self._has_texts, self.root, listing.names), ()
        except DataError as error:
            raise DataError(f"{self.path}: {error}") from error


# Files


def _open(root: Path, path: str, split: str | None) -> _Table:
    if not root.is_dir():
        raise DataError(
            f"{path}: no such folder; save the set there first: datasets.load_dataset(...).save_to_disk(...)"
        )
    datasets = _datasets()
    if (root / DICT).is_file():
        splits = _field(root / DICT, "splits")
        return _saved(datasets, _below(root, _choose(splits, split, path)))
    if (root / STATE).is_file():
        if split is not None and split != _field(root / STATE, "_split", str):
            raise DataError(f"{path}: holds a single split; remove split, or name the folder of all splits")
        return _saved(datasets, root)
    if not is_dataset(str(root)):
        raise DataError(
            f"{path}: not a data set of datasets: neither {DICT} nor {STATE}, nor parquet or arrow files below; "
            "write it by save_to_disk"
        )
    with _one_line(path):
        # Of a local folder; version 4 and later know no scripts, earlier ones refuse them with False.
        options = {} if int(datasets.__version__.partition(".")[0]) >= 4 else {"trust_remote_code": False}
        loaded = datasets.load_dataset(str(root), **options)
    dataset = loaded[_choose(list(loaded), split, path)]
    return _Table([Path(entry["filename"]) for entry in dataset.cache_files], dataset.features)


def _saved(datasets: Any, folder: Path) -> _Table:
    """A split that `save_to_disk` wrote."""
    for entry in _field(folder / STATE, "_data_files"):
        _below(folder, entry.get("filename") if isinstance(entry, dict) else entry)
    with _one_line(str(folder)):
        dataset = datasets.load_from_disk(str(folder))
    if dataset._indices is not None:  # versions before 2 stored a selection of rows next to all rows
        raise DataError(f"{folder}: its rows are a stored selection; load it and save it again by save_to_disk")
    return _Table([Path(entry["filename"]) for entry in dataset.cache_files], dataset.features)


def _choose(splits: Sequence[str], split: str | None, path: str) -> str:
    listed = ", ".join(splits)
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None:
        raise DataError(f"{path}: it has the splits {listed}; set split to one of them")
    if split not in splits:
        raise DataError(f"{path}: no split {split}{nearest(split, list(splits))} (it has {listed})")
    return split


def _field(file: Path, key: str, kind: type = list) -> Any:
    """A value of a JSON file that `save_to_disk` wrote; None where it has another type than expected."""
    try:
        value = read_json(file).get(key)
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{file}: cannot read it: {error}; write the set again by save_to_disk") from error
    if kind is list and not isinstance(value, list):
        raise DataError(f"{file}: {key} is not a list; write the set again by save_to_disk")
    return value if isinstance(value, kind) else None


def _below(folder: Path, name: Any) -> Path:
    """A file or folder that a JSON file of the set names.

    Raises:
        DataError: it does not lie in the folder.
    """
    try:
        return inside(folder, name)
    except (ValueError, TypeError) as error:
        raise DataError(f"{folder}: names a file elsewhere: {error}; get the set again") from error


@contextmanager
def _one_line(path: str) -> Iterator[None]:
    """Turns exceptions of `datasets`, which have many classes, into one line."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # an error of generating a set has the actual one as its cause
            cause = cause.__cause__
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())
        raise DataError(f"{path}: datasets cannot load it: {reason[:300]}") from error


def _datasets() -> Any:
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise DataError(
            f"format huggingface needs the package datasets ({error}): pip install 'dive_fast[datasets]'"
        ) from error
    return datasets


# Columns


def _read(table: _Table, columns: Columns, has_texts: bool, root: str, names: Strings) -> Source:
    image = columns.image or _image_column(table)
    other = _text_column(table, columns.text) if has_texts else _label_column(table, columns.label)
    for name in (image, other):
        _check_column(table, name)
    files: list[NDArray[np.int32]] = []
    locations: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    values: list[Any] = []
    for row, file in enumerate(table.files):
        with _arrow_errors(file):
            for batch, memory in _batches(file):
                locations.append(_locate(batch.column(image), image, memory))
                files.append(np.full(batch.num_rows, row, np.int32))
                values.append(_checked(batch.column(other), other))
    offsets, sizes = (
        np.concatenate(part) if part else np.empty(0, np.int64) for part in zip(*locations) or ((), ())
    )
    class_names: tuple[str, ...] = ()
    labels = texts = None
    if has_texts:
        texts = _texts(values, other)
        is_usable = texts.counts > 0
    else:
        class_names, labels = _labels(table.features[other], values, other)
        is_usable = labels >= 0
    left_out = np.flatnonzero(~is_usable | (sizes <= 0)).tolist()
    reason_of = {_PATH_ONLY: NOT_EMBEDDED, _MISSING: NO_IMAGE, 0: NO_IMAGE}
    missing = EMPTY_CAPTION if has_texts else NO_LABEL
    skipped = [Skipped(str(row), reason_of.get(int(sizes[row]), missing)) for row in left_out]
    rows = np.flatnonzero(is_usable & (sizes > 0))
    if not len(rows):
        reasons = f" ({summarize_skipped(skipped)})" if skipped else ""
        raise DataError(f"no row has an image and a {'text' if has_texts else 'label'}{reasons}")
    lists, list_of = texts.select(rows) if texts is not None else (Strings.of(()), None)
    label = None if labels is None else labels[rows]
    file_of = np.concatenate(files)[rows]
    samples = SampleTable(
        root,
        names,
        _numbers(rows),
        None if is_own_row(file_of, len(names)) else file_of,
        offsets[rows],
        sizes[rows],
        label,
        lists,
        list_of,
    )
    return Source(samples, class_names, skipped=skipped)


def _numbers(rows: NDArray[np.int64]) -> Strings:
    """Numbers as texts."""
    builder = StringsBuilder()
    for first in range(0, len(rows), 1 << 16):
        digits = rows[first : first + (1 << 16)].astype("S20").view(np.uint8).reshape(-1, 20)
        builder.extend(Strings(digits[digits != 0], np.cumsum((digits != 0).sum(axis=1))))
    return Strings(*builder.columns())


def _image_column(table: _Table) -> str:
    datasets = _datasets()
    names = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if not names:
        raise DataError(f"no image column; set image_column to one of {_listed(table.features)}")
    return names[0]


def _label_column(table: _Table, name: str | None) -> str:
    if name is not None:
        return name
    datasets = _datasets()
    names = [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(names) != 1:
        which = f"{len(names)} ClassLabel columns" if names else "no ClassLabel column"
        raise DataError(f"{which}; set label_column to one of {_listed(names or table.features)}")
    return names[0]


def _text_column(table: _Table, name: str | None) -> str:
    if name is not None:
        return name
    names = [name for name, feature in table.features.items() if _is_text(feature)]
    if len(names) != 1:
        which = f"{len(names)} columns of texts" if names else "no column of texts"
        raise DataError(f"{which}; set text_column to one of {_listed(names or table.features)}")
    return names[0]


def _is_text(feature: Any) -> bool:
    item = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", feature)
    return getattr(item, "dtype", None) in ("string", "large_string")


def _check_column(table: _Table, name: str) -> None:
    if name not in table.features:
        raise DataError(
            f"no column {name}{nearest(name, list(table.features))} (it has {_listed(table.features)})"
        )


def _listed(names: Mapping[str, Any] | Sequence[str]) -> str:
    return ", ".join(names)


# Rows

_MISSING, _PATH_ONLY = -1, -2
"""Sizes of images that are not in the file."""


def _batches(file: Path) -> Iterator[tuple[Any, Any]]:
    """The record batches of an arrow file, and the memory-mapped file, whose memory they refer to."""
    import pyarrow

    memory = pyarrow.memory_map(str(file)).read_buffer()
    for batch in pyarrow.ipc.open_stream(memory):
        yield batch, memory


@contextmanager
def _arrow_errors(file: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{file.name} is not a complete arrow file: {reason}; copy or save the set again"
        ) from error


def _locate(column: Any, name: str, memory: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the images of a batch in their file, and their sizes, ``(rows,)`` each."""
    import pyarrow

    is_struct = pyarrow.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0
    data = column.field("bytes") if is_struct else column
    if not (pyarrow.types.is_binary(data.type) or pyarrow.types.is_large_binary(data.type)):
        raise DataError(
            f"column {name} holds {column.type}, not encoded images; cast it to datasets.Image() and save it again"
        )
    data.validate(full=True)
    width = np.int64 if pyarrow.types.is_large_binary(data.type) else np.int32
    _, ends, content = data.buffers()
    if not len(data):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    edges = np.frombuffer(ends, width)[data.offset : data.offset + len(data) + 1].astype(np.int64)
    start = 0 if content is None else content.address - memory.address
    sizes = np.diff(edges)
    if edges[-1] > edges[0] and not (start >= 0 and start + edges[-1] <= memory.size):
        raise DataError(f"column {name} is compressed; load the set and save it again by save_to_disk")
    sizes[_is_null(data)] = _MISSING
    if is_struct:
        if column.type.get_field_index("path") >= 0:
            sizes[_is_null(data) & ~_is_null(column.field("path"))] = _PATH_ONLY
        sizes[_is_null(column)] = _MISSING
    return start + edges[:-1], sizes


def _is_null(column: Any) -> NDArray[np.bool_]:
    return np.asarray(column.is_null())


def _checked(column: Any, name: str) -> Any:
    """The labels or texts of a batch, which are integers, texts, or lists of texts."""
    import pyarrow

    types = pyarrow.types
    kind = column.type
    item = kind.value_type if _is_list(kind) else kind
    is_text = types.is_string(item) or types.is_large_string(item)
    if not is_text and not types.is_integer(kind):
        raise DataError(f"column {name} holds {kind}, neither integers nor texts")
    column.validate(full=True)
    return column


def _is_list(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind))


def _labels(feature: Any, batches: Sequence[Any], name: str) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Class names, and the label of each row; -1 where it has none."""
    import pyarrow

    names = tuple(getattr(feature, "names", ()) or ())
    if any(_is_list(batch.type) and batch.null_count < len(batch) for batch in batches):
        raise DataError(f"column {name} holds lists; each image needs one label")
    if any(pyarrow.types.is_string(batch.type) or pyarrow.types.is_large_string(batch.type) for batch in batches):
        encoded = pyarrow.chunked_array([batch.cast(pyarrow.large_string()) for batch in batches])
        encoded = encoded.combine_chunks().dictionary_encode()
        stored = encoded.dictionary.to_pylist()
        names = tuple(class_order({value for value in stored if value.strip()}, f"column {name}"))
        label_of = {value: label for label, value in enumerate(names)}
        # The last value is that of rows without a text.
        table = np.array([*(label_of.get(value, -1) for value in stored), -1])
        return names, table[np.asarray(encoded.indices.fill_null(len(stored)))].astype(np.int64)
    try:
        labels = [np.asarray(batch.cast(pyarrow.int64()).fill_null(-1), np.int64) for batch in batches]
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise DataError(f"column {name}: {error}") from error
    joined = np.concatenate([*labels, np.empty(0, np.int64)])
    if names and len(joined) and int(joined.max()) >= len(names):
        raise DataError(f"column {name}: label {int(joined.max())}, but it has {len(names)} class names")
    return names, joined


class _Texts(NamedTuple):
    """The list of texts of each row."""

    lists: Strings
    """Distinct lists; some may be equal."""
    list_of: NDArray[np.int32]
    """``(N,)``: the list of each row."""
    counts: NDArray[np.int64]
    """``(N,)``: 0 for rows without a text that is not blank."""

    def select(self, rows: NDArray[np.int64]) -> tuple[Strings, NDArray[np.int32] | None]:
        """The lists of some rows, and the list of each row; None: its own."""
        used, list_of = in_order_of_use(self.list_of[rows])
        lists = self.lists.select(used)
        return lists, None if is_own_row(list_of, len(lists)) else list_of.astype(np.int32)


def _texts(batches: Sequence[Any], name: str) -> _Texts:
    """The texts of all rows, without blank ones."""
    import pyarrow

    shared = SharedStrings()
    list_of: list[NDArray[np.int32]] = []
    for batch in batches:
        if pyarrow.types.is_integer(batch.type) and batch.null_count < len(batch):
            raise DataError(f"column {name} holds integers, not texts")
        for first in range(0, len(batch), 1 << 16):  # Python objects of few rows at a time
            stored = (_packed(value) for value in batch.slice(first, 1 << 16).to_pylist())
            list_of.append(np.fromiter((shared.row(each) for each in stored), np.int32))
    lists = Strings(*shared.strings.columns())
    rows = np.concatenate([*list_of, np.empty(0, np.int32)])
    return _Texts(lists, rows, lists.lengths[rows])


def _packed(value: Any) -> bytes:
    """The texts of a row that are not blank, as a table stores them."""
    texts = value if isinstance(value, list) else [value]
    return pack_texts([cleaned for text in texts if text and (cleaned := clean_text(text))])
