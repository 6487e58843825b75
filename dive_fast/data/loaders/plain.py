"""The plain loader: PIL in torch DataLoader workers. It runs everywhere and is the reference for fast loaders.

With numba (the extra ``resize``), compiled code resizes the images, to the same pixels.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dive_fast.data.loaders.loader import Options
from dive_fast.data.samples import Batch, SampleKey, Samples
from dive_fast.data.transforms import Preprocess
from dive_fast.data.workers import in_workers


def load(samples: Samples[Batch], batches: Iterable[list[SampleKey]], options: Options) -> Iterator[Batch]:
    """The batches of these sample keys, with pixels on the CPU."""
    return in_workers(_Decode(samples), batches, options.workers, options.device.type == "cuda")


class _Decode:
    """Decodes a batch in a worker."""

    def __init__(self, samples: Samples[Any]) -> None:
        self.samples = samples
        self.view_pixels = _compiled_views(samples.preprocess)

    def __call__(self, sample_keys: list[SampleKey]) -> Any:
        pixels = torch.empty((len(sample_keys), *self.samples.preprocess.size, 3), dtype=torch.uint8)
        keys = [
            self.samples.read_usable(sample_key, partial(self._write, row))[0]
            for sample_key, row in zip(sample_keys, pixels.numpy(), strict=True)
        ]
        return self.samples.batch(keys, pixels)

    def _write(self, pixels: NDArray[np.uint8], sample_key: SampleKey) -> None:
        """Writes the view of a sample into ``pixels``, ``(H, W, 3)``."""
        image = self.samples.source.image(sample_key[1])
        if self.view_pixels is None:
            pixels[:] = np.asarray(self.samples.transform(sample_key, image))
        else:
            view = self.samples.view(sample_key, (image.height, image.width))
            self.view_pixels(np.asarray(image.convert("RGB")), view, pixels)


def _compiled_views(preprocess: Preprocess) -> Callable[..., None] | None:
    """The function that resizes as PIL does in a quarter of its time; None without numba, or if PIL differs."""
    if preprocess.resize_mode == "longest":
        return None
    try:
        from dive_fast.data.loaders import pil_resize  # only this file needs numba
    except ImportError:
        return None
    return pil_resize.view_pixels if pil_resize.equals_pil() else None
