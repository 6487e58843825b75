"""A labelled or captioned set, opened: what is measured, and against which prompts."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dive_fast.data.batch import EvaluationBatch
from dive_fast.data.prompts import Template
from dive_fast.data.samples import MAX_REPLACEMENTS, EvaluationSamples, Item, SampleKey
from dive_fast.data.sources.source import Source
from dive_fast.data.transforms import Preprocess
from dive_fast.distributed import Ranks
from dive_fast.errors import DataError
from dive_fast.evaluate.classifier import Members
from dive_fast.evaluate.scores import Regions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labelled:
    """Images with labels, and the classes that compete for them."""

    source: Source
    """Labels count what is predicted: the classes, or where ``members`` are given, these."""
    class_names: tuple[str, ...]
    templates: tuple[Template, ...]
    members: Members | None = None
    """For each label, the classes that stand for it; None: class i for label i."""
    regions: Regions | None = None
    border: int = 0
    """Pixels at each edge that are no part of the picture."""
    layout: str = ""
    """How it lies on the disk, in a word."""
    imagenet_rows: tuple[int, ...] | None = None
    """For each class, which of ImageNet's 1000 it is; None where that is not known."""
    remarks: tuple[str, ...] = ()
    """Lines that a user should read before its figure."""
    reports_skipped: bool = False
    """Whether the set's owner accepts that broken images are left out of its figures and counted."""
    remedy: str = ""
    """What to do about a broken image, for messages."""

    @property
    def num_labels(self) -> int:
        """How many labels compete: the classes, or where ``members`` are given, these."""
        return len(self.class_names if self.members is None else self.members)


@dataclass(frozen=True)
class Captioned:
    """Images with all their captions; no two of the images are equal."""

    source: Source
    layout: str = ""
    remarks: tuple[str, ...] = ()
    """As of :class:`Labelled`."""
    reports_skipped: bool = False
    """As of :class:`Labelled`."""
    remedy: str = ""
    """As of :class:`Labelled`."""
    num_samples: tuple[int, ...] = ()
    """How many samples of the set each image stands for; empty: one each."""

    def captions(self) -> list[tuple[str, ...]]:
        """Of each image."""
        return [sample.texts for sample in self.source.samples]


BROKEN = -2
"""Label of a sample whose image cannot be decoded and which is left out; no label of a data set is."""
_LEFT_OUT = -1
"""Epoch of such a sample's place; evaluation has no epochs."""


class StrictSamples(EvaluationSamples):
    """Images in the evaluation view, each counted once: a broken one is an error, or is left out and counted."""

    def __init__(
        self,
        source: Source,
        preprocess: Preprocess,
        border: int = 0,
        reports_skipped: bool = False,
        remedy: str = "",
    ) -> None:
        """Takes the images of ``source``.

        Args:
            border: pixels at each edge that are not part of the picture.
            reports_skipped: give a broken sample the label :data:`BROKEN`, instead of raising its error.
            remedy: what such an error says to do.
        """
        super().__init__(source, preprocess)
        self.border, self.reports_skipped, self.remedy = border, reports_skipped, remedy

    def transform(self, place: SampleKey, image: Image.Image) -> Image.Image:
        """The evaluation view of what is inside the border."""
        if self.border:
            width, height = image.size
            if min(width, height) <= 2 * self.border:
                raise self.source.samples[place[1]].unusable(f"no larger than its border of {self.border} pixels")
            image = image.crop((self.border, self.border, width - self.border, height - self.border))
        return super().transform(place, image)

    def read_usable(self, place: SampleKey, read: Callable[[SampleKey], Item]) -> tuple[SampleKey, Item]:
        """What ``read`` finds at a place; of a broken sample that is left out, what it finds at another place.

        Raises:
            DataError: the sample is broken, and is not to be left out; or so are many in a row.
        """
        try:
            return place, read(place)
        except DataError as error:
            if not self.reports_skipped:
                raise DataError(f"{error}; {self.remedy}" if self.remedy else str(error)) from error
            logger.warning("%s; it is left out", error)
            last = error
        count = len(self.source)
        for sample in range(place[1] + 1, place[1] + MAX_REPLACEMENTS):
            try:
                # Only so that the batch has an image there: nothing of it is counted.
                return (_LEFT_OUT, place[1]), read((place[0], sample % count))
            except DataError as error:
                last = error
        raise DataError(f"{MAX_REPLACEMENTS} samples in a row are unusable; the last: {last}")

    def batch(self, places: Sequence[SampleKey], images: Tensor) -> EvaluationBatch:
        """Images and labels; of a sample that is left out, :data:`BROKEN`."""
        batch = super().batch(places, images)
        left_out = torch.tensor([epoch == _LEFT_OUT for epoch, _ in places], dtype=torch.bool)
        return replace(batch, labels=batch.labels.masked_fill(left_out, BROKEN))


def plain_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names of folders as words."""
    return tuple(name.replace("_", " ") for name in names)


def progress(ranks: Ranks, total: int, name: str, unit: str) -> AbstractContextManager["tqdm[Any]"]:
    """A bar for this rank's part, called ``name``; none without a name."""
    return ranks.progress(total, name, unit) if name else tqdm(disable=True)
