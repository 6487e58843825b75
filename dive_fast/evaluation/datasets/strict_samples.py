"""Samples of an evaluation set as loaders read them, each exactly once."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dive_fast.data.batch import EvaluationBatch
from dive_fast.data.samples import MAX_REPLACEMENTS, EvaluationSamples, Item, SampleKey
from dive_fast.data.sources.source import Source
from dive_fast.data.transforms import Preprocess, View
from dive_fast.distributed import Ranks
from dive_fast.errors import ChangedDataError, DataError

logger = logging.getLogger(__name__)

BROKEN = -2
"""Label of a sample that is left out because its image cannot be decoded; data sets have no negative labels."""
_LEFT_OUT = -1
"""Epoch in the key of such a sample; evaluation has no epochs."""


class StrictSamples(EvaluationSamples):
    """Images in the evaluation view, each exactly once: a broken one is an error, or is left out and counted."""

    def __init__(
        self,
        source: Source,
        preprocess: Preprocess,
        border: int = 0,
        reports_skipped: bool = False,
        remedy: str = "",
    ) -> None:
        """Reads the images of ``source``.

        Args:
            border: pixels at each edge that are not part of the image.
            reports_skipped: label a broken sample :data:`BROKEN` instead of raising its error.
            remedy: advice that such an error ends with.
        """
        super().__init__(source, preprocess)
        self.border, self.reports_skipped, self.remedy = border, reports_skipped, remedy

    def transform(self, key: SampleKey, image: Image.Image) -> Image.Image:
        """The evaluation view of the image inside the border."""
        if self.border:
            inside = self._inside(key, (image.height, image.width))
            image = image.crop((self.border, self.border, self.border + inside[1], self.border + inside[0]))
        return super().transform(key, image)

    def view(self, key: SampleKey, size: tuple[int, int]) -> View:
        """The view of :meth:`transform`."""
        view = super().view(key, self._inside(key, size))
        return replace(view, crop=replace(view.crop, top=self.border, left=self.border))

    def _inside(self, key: SampleKey, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the image inside the border."""
        if self.border and min(size) <= 2 * self.border:
            raise self.source.samples[key[1]].unusable(f"no larger than its border of {self.border} pixels")
        return size[0] - 2 * self.border, size[1] - 2 * self.border

    def read_usable(self, key: SampleKey, read: Callable[[SampleKey], Item]) -> tuple[SampleKey, Item]:
        """The sample that ``read`` returns for a key; for a broken one that is left out, another sample's image.

        Raises:
            DataError: the sample is broken and must not be left out, or too many in a row are broken.
            ChangedDataError: a file changed after the set was listed.
        """
        try:
            return key, read(key)
        except ChangedDataError:
            raise
        except DataError as error:
            if not self.reports_skipped:
                raise DataError(f"{error}; {self.remedy}" if self.remedy else str(error)) from error
            logger.warning("%s; it is left out", error)
            last = error
        count = len(self.source)
        for sample in range(key[1] + 1, key[1] + MAX_REPLACEMENTS):
            try:
                # Fills the row of the batch; the image is not counted.
                return (_LEFT_OUT, key[1]), read((key[0], sample % count))
            except ChangedDataError:
                raise
            except DataError as error:
                last = error
        raise DataError(f"{MAX_REPLACEMENTS} samples in a row are unusable; the last: {last}")

    def batch(self, keys: Sequence[SampleKey], images: Tensor) -> EvaluationBatch:
        """Images and labels; samples that are left out have the label :data:`BROKEN`."""
        batch = super().batch(keys, images)
        left_out = torch.tensor([epoch == _LEFT_OUT for epoch, _ in keys], dtype=torch.bool)
        return replace(batch, labels=batch.labels.masked_fill(left_out, BROKEN))


def progress(ranks: Ranks, total: int, name: str, unit: str, done: int = 0) -> AbstractContextManager["tqdm[Any]"]:
    """A progress bar called ``name`` for this rank's share; disabled if the name is empty."""
    return ranks.progress(total, name, unit, done) if name else tqdm(disable=True)
