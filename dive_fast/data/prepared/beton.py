"""Writes FFCV's file format with the original bytes of each JPEG."""

import queue
from collections.abc import Callable, Iterable, Mapping
from multiprocessing import Value
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from dive_fast.data.sources.source import Source
from dive_fast.errors import DataError

MIN_PAGE_SIZE = 2**23
"""FFCV's default page size; pages are larger if a sample does not fit."""


def write_beton(
    path: Path, source: Source, arrays: Mapping[str, NDArray[Any]] | None = None
) -> dict[str, torch.Tensor]:
    """Writes all samples of a prepared set to one file that FFCV's ``Loader`` can read.

    The fields are ``image``, ``label``, ``index`` (the number of the sample), ``tokens`` if the set has them, and
    ``arrays``.

    Args:
        arrays: additional fields, ``(N, ...)`` each, e.g. embeddings of a teacher.

    Returns:
        Columns ``file``, ``offset`` and ``size`` of the set's index, ``(N,)`` each: the locations of the JPEGs.

    Raises:
        DataError: FFCV is not installed, or the number of rows of an array is not the number of samples.
        OSError: the disk is full.
    """
    require_ffcv()
    from ffcv.fields import IntField, NDArrayField, RGBImageField
    from ffcv.reader import Reader

    assert source.sizes is not None, "only prepared sets are known to hold complete JPEGs"
    arrays = dict(arrays or {})
    if source.tokens is not None:
        arrays["tokens"] = source.tokens.int().numpy()  # torch computes little with 16 unsigned bits
    for name, array in arrays.items():
        if len(array) != len(source):
            raise DataError(f"{name}: {len(array)} rows for {len(source)} samples")
    image = RGBImageField()
    # Set on the instance, since FFCV's readers do not know classes of ours.
    image.encode = _store_jpeg
    fields = {"image": image, "label": IntField(), "index": IntField()} | {
        name: NDArrayField(array.dtype, array.shape[1:]) for name, array in arrays.items()
    }
    sizes = source.samples.sizes
    largest = int(sizes.max()) + sum(array[0].nbytes for array in arrays.values())
    page = max(MIN_PAGE_SIZE, 1 << largest.bit_length())
    progress = tqdm(total=len(source), desc="beton", unit="image")
    try:
        _writer()(str(path), fields, page_size=page, num_workers=1).from_indexed_dataset(
            _Rows(source, arrays, progress.update)
        )
    finally:
        progress.close()
    offsets = Reader(str(path)).metadata["f0"]["data_ptr"].astype(np.int64)
    return {
        "file": torch.zeros(len(source), dtype=torch.int32),
        "offset": torch.from_numpy(offsets),
        "size": torch.from_numpy(sizes.astype(np.int64)),
    }


def require_ffcv() -> None:
    """Checks that FFCV can be imported.

    Raises:
        DataError: FFCV or a system library that it needs is missing; the message says how to install both.
    """
    try:
        import ffcv.fields  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"FFCV cannot be imported ({error}): apt-get install libopencv-dev libturbojpeg0-dev pkg-config, "
            "then pip install --no-build-isolation ffcv"
        ) from error


class _Rows:
    """Samples as FFCV's writer expects them: a tuple with one value per field."""

    def __init__(self, source: Source, arrays: Mapping[str, NDArray[Any]], report: Callable[[], Any]) -> None:
        self._source, self._arrays, self._report = source, arrays, report

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> tuple[Any, ...]:
        assert self._source.sizes is not None
        self._report()
        image = self._source.read(row), *self._source.sizes[row]
        return image, self._source.samples[row].label, row, *(array[row] for array in self._arrays.values())


def _store_jpeg(destination: Any, image: tuple[bytes, int, int], malloc: Callable[[int], tuple[int, Any]]) -> None:
    """Replaces FFCV's encoder, which would compress the pixels a second time."""
    from ffcv.fields.rgb_image import IMAGE_MODES

    data, height, width = image
    destination["mode"] = IMAGE_MODES["jpg"]
    destination["height"], destination["width"] = height, width
    destination["data_ptr"], storage = malloc(len(data))
    storage[:] = np.frombuffer(data, np.uint8)


def _writer() -> Any:
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.writer import DatasetWriter

    class Writer(DatasetWriter):  # type: ignore[misc]
        """A writer that works in this process, since FFCV waits forever for a worker that fails on a sample."""

        metadata_sm: Any

        def _write_common(
            self, num_samples: int, chunks: Iterable[Any], work: Callable[..., None], arguments: tuple[Any, ...]
        ) -> None:
            self.num_samples = num_samples
            self.prepare()
            # Shared memory is small in containers, and no other process reads this.
            self.metadata_sm.close()
            self.metadata_sm.unlink()
            self.metadata_sm = SimpleNamespace(buf=bytearray(num_samples * self.metadata_type.itemsize))
            tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
            allocations: queue.SimpleQueue[Any] = queue.SimpleQueue()
            for chunk in [*chunks, None]:
                tasks.put(chunk)
            allocator = MemoryAllocator(self.fname, self.data_region_start, self.page_size)
            work(
                *(tasks, self.metadata_sm, self.metadata_type, self.fields),
                *(allocator, Value("Q", 0), allocations, *arguments),
            )
            self.finalize(allocations.get())

    return Writer
