"""The plain loader: PIL in torch DataLoader workers. It runs everywhere and is the reference for fast loaders."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dive_fast.data.loaders.loader import Options
from dive_fast.data.samples import Batch, SampleKey, Samples
from dive_fast.data.workers import in_workers


def load(samples: Samples[Batch], batches: Iterable[list[SampleKey]], options: Options) -> Iterator[Batch]:
    """The batches of these sample keys, with pixels on the CPU."""
    return in_workers(_Decode(samples), batches, options.workers, options.device.type == "cuda")


class _Decode:
    """Decodes a batch in a worker."""

    def __init__(self, samples: Samples[Any]) -> None:
        self.samples = samples

    def __call__(self, sample_keys: list[SampleKey]) -> Any:
        pixels = torch.empty((len(sample_keys), *self.samples.preprocess.size, 3), dtype=torch.uint8)
        keys = []
        for sample_key, row in zip(sample_keys, pixels.numpy(), strict=True):
            key, row[:] = self.samples.read_usable(sample_key, self._image)
            keys.append(key)
        return self.samples.batch(keys, pixels)

    def _image(self, sample_key: SampleKey) -> NDArray[np.uint8]:
        return np.asarray(self.samples.transform(sample_key, self.samples.source.image(sample_key[1])))
