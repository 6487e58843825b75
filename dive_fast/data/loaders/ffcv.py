"""The FFCV loader: images of a prepared set read from one memory-mapped file by the threads of this process.

FFCV's own decoders cannot show CLIP what it expects: they approximate the cosine transform of JPEGs, resize by
cv2's INTER_AREA, and crop by a random state of their own. These threads decode with cv2's exact transform and
resize as PIL does, in code that needs no lock of the interpreter. FFCV's ``Loader`` is left aside as well: its
order is no pure function of the epoch, and it cannot begin at a step.
"""

import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, Generic

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dive_fast.data.loaders.loader import Options
from dive_fast.data.prepared.beton import require_ffcv
from dive_fast.data.samples import Batch, SampleKey, Samples
from dive_fast.data.sources.source import Source
from dive_fast.data.transforms import View, normalise
from dive_fast.data.workers import in_workers
from dive_fast.errors import DataError


def load(samples: Samples[Batch], batches: Iterable[list[SampleKey]], options: Options) -> Iterator[Batch]:
    """The batches of these places, as ``dive_fast.data.loaders.loader`` describes them; images on ``options.device``.

    Raises:
        DataError: FFCV is not installed, or the data is not prepared for it.
    """
    require_ffcv()
    if samples.source.beton is None:
        raise DataError("loader ffcv needs a set prepared for it: python launch/prepare.py --container beton ...")
    if samples.preprocess.resize_mode == "longest":
        raise DataError("loader ffcv adds no borders, as resize_mode longest wants them: use loader plain")
    # One process draws crops and texts ahead; a thread would take the interpreter's lock from the training loop.
    plans = in_workers(_Plan(samples), batches, min(1, options.workers))
    return _load(samples, plans, options)


def _load(samples: Samples[Batch], plans: Iterator["_Planned[Batch]"], options: Options) -> Iterator[Batch]:
    file = Beton(samples.source)
    height, width = samples.preprocess.size
    bilinear = samples.preprocess.resampling == Image.Resampling.BILINEAR
    pin = options.device.type == "cuda"
    with ThreadPoolExecutor(max(1, options.workers), "ffcv") as threads:
        for plan in plans:
            pixels = torch.empty((len(plan.places), height, width, 3), dtype=torch.uint8, pin_memory=pin)
            for _ in threads.map(file.decode, plan.places, plan.views, pixels.numpy(), repeat(bilinear)):
                pass
            images = normalise(
                pixels.to(options.device, non_blocking=True),
                samples.preprocess,
                options.dtype,
                options.channels_last,
            )
            yield replace(plan.batch, images=images)


@dataclass(frozen=True)
class _Planned(Generic[Batch]):
    places: list[SampleKey]
    views: list[View]
    batch: Batch
    """Still without images."""


class _Plan:
    """All of a batch but its pixels, in a worker."""

    def __init__(self, samples: Samples[Any]) -> None:
        self.samples = samples

    def __call__(self, places: list[SampleKey]) -> _Planned[Any]:
        sizes = self.samples.source.sizes
        assert sizes is not None
        views = [self.samples.view(place, tuple(sizes[place[1]].tolist())) for place in places]
        return _Planned(places, views, self.samples.batch(places, torch.empty(0)))


class Beton:
    """The images of FFCV's file."""

    def __init__(self, source: Source) -> None:
        """Opens the file.

        Raises:
            DataError: it is not FFCV's, or has not the set's samples.
        """
        from ffcv.reader import Reader

        assert source.beton is not None
        self._path = source.beton
        self._source = source
        try:
            count = int(Reader(str(self._path)).num_samples)
        except Exception as error:  # whatever its parser stumbles over
            raise DataError(f"{self._path}: not a file of FFCV: {error}; prepare the set anew") from error
        if count != len(source):
            raise DataError(f"{self._path}: {count} samples, its index has {len(source)}; prepare the set anew")
        self._bytes: NDArray[np.uint8] = np.memmap(self._path, np.uint8, "r")

    def decode(self, place: SampleKey, view: View, pixels: NDArray[np.uint8], bilinear: bool) -> None:
        """Writes a view of an image into ``pixels``, ``(H, W, 3)``.

        Raises:
            DataError: the file was damaged.
        """
        import cv2

        from dive_fast.data.loaders.pil_resize import resize

        sample = self._source.samples[place[1]]
        encoded = self._bytes[sample.offset : sample.offset + sample.size]
        image = None
        # Of the formats that cv2 knows a prepared set has one.
        if bytes(encoded[:2]) == b"\xff\xd8":
            with contextlib.suppress(cv2.error):
                image = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is None:
            raise sample.unusable("cannot decode the image: the file is damaged")
        sizes = self._source.sizes
        # The view was drawn for this size; of another one it would show something else.
        if sizes is not None and image.shape[:2] != tuple(sizes[place[1]].tolist()):
            raise sample.unusable(f"its size is {image.shape[:2]}, the index says {sizes[place[1]].tolist()}")
        crop = view.crop
        part = image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        resize(part, np.array(view.region), pixels, bilinear)
