"""The plain loader: PIL in torch DataLoader workers. Runs everywhere, and says what the fast ones must equal."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from dive_fast.data.loaders.loader import Options
from dive_fast.data.samples import Batch, SampleKey, Samples
from dive_fast.data.workers import in_workers


def load(samples: Samples[Batch], batches: Iterable[list[SampleKey]], options: Options) -> Iterator[Batch]:
    """The batches of these places, as ``dive_fast.data.loaders.loader`` describes them, but on the CPU."""
    return in_workers(_Decode(samples, options), batches, options.workers, options.device.type == "cuda")


class _Decode:
    """Decodes a batch, in a worker."""

    def __init__(self, samples: Samples[Any], options: Options) -> None:
        self.samples, self.dtype, self.layout = samples, options.dtype, options.layout

    def __call__(self, places: list[SampleKey]) -> Any:
        found = [self.samples.read_usable(place, self._image) for place in places]
        images = torch.stack([image for _, image in found])
        return self.samples.batch([place for place, _ in found], images.to(self.dtype, memory_format=self.layout))

    def _image(self, place: SampleKey) -> Tensor:
        return self.samples.preprocess.to_tensor(
            self.samples.transform(place, self.samples.source.image(place[1]))
        )
