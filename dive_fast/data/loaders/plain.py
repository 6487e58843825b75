"""The plain loader: PIL in torch DataLoader workers. It runs everywhere and is the reference for fast loaders.

With numba (the extra ``resize``), compiled code resizes the images, to the same pixels.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Generic, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dive_fast.data.loaders.loader import Options
from dive_fast.data.loaders.pixel_ring import PixelRing
from dive_fast.data.samples import Batch, SampleKey, Samples
from dive_fast.data.transforms import Preprocess
from dive_fast.data.worker_memory import SPARE, batch_bytes, batches_ahead, largest_batch
from dive_fast.data.workers import in_workers


def load(samples: Samples[Batch], batches: Iterable[list[SampleKey]], options: Options) -> Iterator[Batch]:
    """The batches of these sample keys, with pixels on the CPU, in page-locked memory for a GPU."""
    largest, batches = largest_batch(batches)
    batch = batch_bytes("plain", largest, samples.preprocess.size)
    ahead = batches_ahead(batch, options.workers)
    ring = PixelRing(ahead * options.workers + SPARE, (largest, *samples.preprocess.size, 3))
    on_gpu = options.device.type == "cuda"
    decoded = in_workers(_Decode(samples, ring), ring.numbered(batches), options.workers, on_gpu, ahead)
    if on_gpu:
        ring.pin(options.device)
    return _batches(decoded, ring, options.device)


def _batches(decoded: Iterator["_Decoded[Batch]"], ring: PixelRing, device: torch.device) -> Iterator[Batch]:
    try:
        for each in decoded:
            for pixels in ring.read(each.number, each.size, device):
                yield replace(each.batch, images=pixels)
    finally:
        ring.close()


class _Decoded(NamedTuple, Generic[Batch]):
    """A batch whose pixels are in the ring."""

    number: int
    size: int
    batch: Batch
    """The batch without images."""


class _Decode:
    """Decodes a batch in a worker."""

    def __init__(self, samples: Samples[Any], ring: PixelRing) -> None:
        self.samples, self.ring = samples, ring
        self.view_pixels = _compiled_views(samples.preprocess)

    def __call__(self, numbered: tuple[int, list[SampleKey]]) -> _Decoded[Any]:
        number, sample_keys = numbered
        self.samples.draw_crops(sample_keys)
        pixels = self.ring.slot(number)[: len(sample_keys)]
        keys = [
            self.samples.read_usable(sample_key, partial(self._write, row))[0]
            for sample_key, row in zip(sample_keys, pixels, strict=True)
        ]
        return _Decoded(number, len(keys), self.samples.batch(keys, torch.empty(0)))

    def _write(self, pixels: NDArray[np.uint8], sample_key: SampleKey) -> None:
        """Writes the view of a sample into ``pixels``, ``(H, W, 3)``."""
        image = self.samples.images.image(sample_key[1])
        if self.view_pixels is None:
            pixels[:] = np.asarray(self.samples.transform(sample_key, image))
        else:
            view = self.samples.view(sample_key, (image.height, image.width))
            colours = image if image.mode == "RGB" else image.convert("RGB")  # which copies RGB too
            self.view_pixels(np.asarray(colours), view, pixels)


def _compiled_views(preprocess: Preprocess) -> Callable[..., None] | None:
    """The function that resizes as PIL does in a quarter of its time; None without numba, or if PIL differs."""
    if preprocess.resize_mode == "longest":
        return None
    try:
        from dive_fast.data.loaders import pil_resize  # only this file needs numba
    except ImportError:
        return None
    return pil_resize.view_pixels if pil_resize.equals_pil() else None
