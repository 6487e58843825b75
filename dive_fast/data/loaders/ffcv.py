"""The FFCV loader: threads of this process read images of a prepared set from one memory-mapped file.

FFCV's decoders do not give the pixels that CLIP expects: they approximate the cosine transform of JPEGs, resize
with cv2's INTER_AREA and crop with internal random state. These threads decode with cv2's exact transform and
resize as PIL does, in code that releases the interpreter's lock. FFCV's ``Loader`` is not used either: its order
is not a pure function of the epoch, and it cannot start at a given step.
"""

import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Generic

import numpy as np
import torch
from numpy.typing import NDArray

from dive_fast.data.loaders.loader import Options
from dive_fast.data.prepared.beton import require_ffcv
from dive_fast.data.samples import Batch, SampleKey, Samples
from dive_fast.data.sources.source import Source
from dive_fast.data.transforms import View
from dive_fast.data.workers import in_workers
from dive_fast.errors import DataError


def load(samples: Samples[Batch], batches: Iterable[list[SampleKey]], options: Options) -> Iterator[Batch]:
    """The batches of these sample keys, with pixels on the CPU, in page-locked memory for a GPU.

    Raises:
        DataError: FFCV is not installed, or the data is not prepared for it.
    """
    require_ffcv()
    if samples.source.beton is None:
        raise DataError("loader ffcv needs a set prepared for it: dive-fast prepare --container beton ...")
    if samples.preprocess.resize_mode == "longest":
        raise DataError("loader ffcv does not support the borders of resize_mode longest; use loader plain")
    # One process draws crops and texts; a thread would compete with the training loop for the interpreter's lock.
    plans = in_workers(_Plan(samples), batches, min(1, options.workers))
    return _load(samples, plans, options)


def _load(samples: Samples[Batch], plans: Iterator["_Planned[Batch]"], options: Options) -> Iterator[Batch]:
    file = Beton(samples.source)
    height, width = samples.preprocess.size
    pin = options.device.type == "cuda"
    with ThreadPoolExecutor(max(1, options.workers), "ffcv") as threads:
        for plan in plans:
            pixels = torch.empty((len(plan.sample_keys), height, width, 3), dtype=torch.uint8, pin_memory=pin)
            for _ in threads.map(file.decode, plan.sample_keys, plan.views, pixels.numpy()):
                pass
            yield replace(plan.batch, images=pixels)


@dataclass(frozen=True)
class _Planned(Generic[Batch]):
    """A batch before its images are decoded."""

    sample_keys: list[SampleKey]
    views: list[View]
    batch: Batch
    """The batch without images."""


class _Plan:
    """Draws the crops and texts of a batch in a worker."""

    def __init__(self, samples: Samples[Any]) -> None:
        self.samples = samples

    def __call__(self, sample_keys: list[SampleKey]) -> _Planned[Any]:
        sizes = self.samples.source.sizes
        assert sizes is not None
        self.samples.draw_crops(sample_keys)
        views = [self.samples.view(key, tuple(sizes[key[1]].tolist())) for key in sample_keys]
        return _Planned(sample_keys, views, self.samples.batch(sample_keys, torch.empty(0)))


class Beton:
    """The images in a file of FFCV's format."""

    def __init__(self, source: Source) -> None:
        """Opens the file.

        Raises:
            DataError: it is not an FFCV file, or its number of samples differs from the index.
        """
        from ffcv.reader import Reader

        assert source.beton is not None
        self._path = source.beton
        self._source = source
        try:
            count = int(Reader(str(self._path)).num_samples)
        except Exception as error:  # FFCV's parser raises errors of many types
            raise DataError(f"{self._path}: not an FFCV file: {error}; prepare the set again") from error
        if count != len(source):
            raise DataError(f"{self._path}: {count} samples, its index has {len(source)}; prepare the set again")
        self._bytes: NDArray[np.uint8] = np.memmap(self._path, np.uint8, "r")

    def decode(self, sample_key: SampleKey, view: View, pixels: NDArray[np.uint8]) -> None:
        """Writes a view of an image into ``pixels``, ``(H, W, 3)``.

        Raises:
            DataError: the image is damaged, or its size differs from the index.
        """
        import cv2

        from dive_fast.data.loaders.pil_resize import view_pixels

        sample = self._source.samples[sample_key[1]]
        encoded = self._bytes[sample.offset : sample.offset + sample.size]
        image = None
        # JPEG is the only format of a prepared set.
        if bytes(encoded[:2]) == b"\xff\xd8":
            with contextlib.suppress(cv2.error):
                image = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is None:
            raise sample.unusable("cannot decode the image: the file is damaged")
        sizes = self._source.sizes
        # The view is only valid for the size in the index.
        if sizes is not None and image.shape[:2] != tuple(sizes[sample_key[1]].tolist()):
            raise sample.unusable(f"its size is {image.shape[:2]}, the index says {sizes[sample_key[1]].tolist()}")
        view_pixels(image, view, pixels)
