"""The plain loader: PIL in torch DataLoader workers. It runs everywhere and is the reference for fast loaders."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from dive_fast.data.loaders.loader import Options
from dive_fast.data.samples import Batch, SampleKey, Samples
from dive_fast.data.workers import in_workers


def load(samples: Samples[Batch], batches: Iterable[list[SampleKey]], options: Options) -> Iterator[Batch]:
    """The batches of these sample keys, with images on the CPU."""
    return in_workers(_Decode(samples, options), batches, options.workers, options.device.type == "cuda")


class _Decode:
    """Decodes a batch in a worker."""

    def __init__(self, samples: Samples[Any], options: Options) -> None:
        self.samples, self.dtype, self.layout = samples, options.dtype, options.layout

    def __call__(self, sample_keys: list[SampleKey]) -> Any:
        keys, images = zip(*(self.samples.read_usable(key, self._image) for key in sample_keys), strict=True)
        return self.samples.batch(keys, torch.stack(images).to(self.dtype, memory_format=self.layout))

    def _image(self, sample_key: SampleKey) -> Tensor:
        image = self.samples.source.image(sample_key[1])
        return self.samples.preprocess.to_tensor(self.samples.transform(sample_key, image))
