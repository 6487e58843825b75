"""What every sample of a data set is, whichever loader decodes it: its crop, its text, its place in a batch."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, Literal, TypeVar

import torch
from PIL import Image
from torch import Tensor

from dive_fast.data.batch import EvaluationBatch, ReferenceBatch, TargetBatch, Text
from dive_fast.data.prompts import PooledAt, PromptTable, Tokenizer, pack
from dive_fast.data.sources.source import Sample, Source
from dive_fast.data.transforms import Crop, Preprocess, View, random_crop
from dive_fast.errors import DataError

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch", TargetBatch, ReferenceBatch, EvaluationBatch)
Item = TypeVar("Item")
SampleKey = tuple[int, int]
"""(epoch, sample): all that decides what a sample looks like, given the seed."""
MAX_REPLACEMENTS = 16


class Samples(ABC, Generic[Batch]):
    """A data set as a loader sees it. All of it is a pure function of the place."""

    def __init__(self, source: Source, preprocess: Preprocess) -> None:
        self.source, self.preprocess = source, preprocess

    @abstractmethod
    def crop(self, place: SampleKey, size: tuple[int, int]) -> Crop | None:
        """The crop at a place of an image of ``size`` (height, width); None stands for the evaluation view."""

    @abstractmethod
    def batch(self, places: Sequence[SampleKey], images: Tensor) -> Batch:
        """The batch of these places: their images, ``(B, 3, H, W)``, with all that goes with them."""

    def view(self, place: SampleKey, size: tuple[int, int]) -> View:
        """What to cut out of an image of ``size`` (height, width), for loaders that decode by themselves."""
        crop = self.crop(place, size)
        return self.preprocess.eval_view(size) if crop is None else self.preprocess.train_view(crop)

    def transform(self, place: SampleKey, image: Image.Image) -> Image.Image:
        """The view of an image, as RGB in the model's size: what every loader has to come close to.

        Raises:
            DataError: resize mode `longest` leaves nothing of so narrow an image.
        """
        try:
            return self.preprocess.transform(image, self.crop(place, (image.height, image.width)))
        except ValueError as error:
            why = f"cannot resize {image.width} x {image.height} pixels: {error}"
            raise self.source.samples[place[1]].unusable(why) from error

    def read_usable(self, place: SampleKey, read: Callable[[SampleKey], Item]) -> tuple[SampleKey, Item]:
        """What ``read`` finds at a place; where that sample is broken, at the next one that is not.

        Raises:
            DataError: too many in a row are broken.
        """
        epoch, first = place
        for sample in range(first, first + MAX_REPLACEMENTS):
            place = epoch, sample % len(self.source)
            try:
                return place, read(place)
            except DataError as error:
                last = error
                logger.warning("%s; the next sample takes its place", error)
        raise DataError(f"{MAX_REPLACEMENTS} samples in a row are unusable; the last: {last}")

    def _entries(self, places: Sequence[SampleKey]) -> list[Sample]:
        return [self.source.samples[sample] for _, sample in places]


class TargetSamples(Samples[TargetBatch]):
    """Randomly cropped images, each with a prompt drawn for this epoch."""

    def __init__(
        self, source: Source, prompts: PromptTable, preprocess: Preprocess, pooled_at: PooledAt, seed: int
    ) -> None:
        super().__init__(source, preprocess)
        self.prompts, self.pooled_at, self.seed = prompts, pooled_at, seed

    def crop(self, place: SampleKey, size: tuple[int, int]) -> Crop:
        """A new one each epoch."""
        epoch, sample = place
        return random_crop(size, self.seed, sample, epoch)

    def batch(self, places: Sequence[SampleKey], images: Tensor) -> TargetBatch:
        """Draws the prompts of these places."""
        entries = self._entries(places)
        tokens = [
            self.prompts.draw(entry, sample, self.seed, epoch)
            for entry, (epoch, sample) in zip(entries, places, strict=True)
        ]
        return TargetBatch(
            images=images,
            text=pack(torch.stack(tokens), self.pooled_at),
            labels=torch.tensor([entry.label for entry in entries]),
            sample=torch.tensor([sample for _, sample in places]),
            keys=tuple(entry.key for entry in entries),
        )


class ReferenceSamples(Samples[ReferenceBatch]):
    """Captioned images in the evaluation view, or in one of K fixed crops."""

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        preprocess: Preprocess,
        pooled_at: PooledAt,
        seed: int,
        views: Literal["eval"] | int = "eval",
    ) -> None:
        super().__init__(source, preprocess)
        self.tokenizer, self.pooled_at = tokenizer, pooled_at
        self.seed, self.views = seed, views
        self._tokens = self._prepared_tokens()

    @property
    def num_views(self) -> int:
        """Views that each sample has; they take turns epoch by epoch."""
        return 1 if self.views == "eval" else self.views

    def crop(self, place: SampleKey, size: tuple[int, int]) -> Crop | None:
        """One of the fixed crops, or the evaluation view."""
        epoch, sample = place
        return None if self.views == "eval" else random_crop(size, self.seed, sample, epoch % self.num_views)

    def batch(self, places: Sequence[SampleKey], images: Tensor) -> ReferenceBatch:
        """Tokenises the captions of these places, unless the preparation has."""
        entries = self._entries(places)
        sample = torch.tensor([sample for _, sample in places])
        return ReferenceBatch(
            images=images,
            text=self._text(entries, sample),
            sample=sample,
            view=torch.tensor([epoch % self.num_views for epoch, _ in places]),
            keys=tuple(entry.key for entry in entries),
        )

    def _text(self, entries: Sequence[Sample], sample: Tensor) -> Text:
        if self._tokens is not None:
            return pack(self._tokens[sample].long(), self.pooled_at)
        return pack(self.tokenizer([entry.texts[0] for entry in entries]), self.pooled_at)

    def _prepared_tokens(self) -> Tensor | None:
        """The tokens of a prepared set, if this tokenizer would have made the same ones."""
        tokens = self.source.tokens
        if tokens is None:
            return None
        probe = range(0, len(self.source), max(1, len(self.source) // 64))
        expected = self.tokenizer([self.source.samples[sample].texts[0] for sample in probe])
        if expected.shape[1] == tokens.shape[1] and torch.equal(expected, tokens[list(probe)].long()):
            return tokens
        logger.warning("the tokens prepared with the data are not this model's; captions are tokenised anew")
        return None


class EvaluationSamples(Samples[EvaluationBatch]):
    """Images in the evaluation view with their labels."""

    def crop(self, place: SampleKey, size: tuple[int, int]) -> None:
        """The evaluation view, always."""

    def batch(self, places: Sequence[SampleKey], images: Tensor) -> EvaluationBatch:
        """Images and labels."""
        return EvaluationBatch(images, torch.tensor([entry.label for entry in self._entries(places)]))
