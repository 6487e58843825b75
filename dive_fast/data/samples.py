"""Samples of a data set, independent of the loader: crops, texts, labels and the batches they form."""

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Generic, Literal, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dive_fast.data.batch import EvaluationBatch, ReferenceBatch, TargetBatch, Text
from dive_fast.data.captions import caption_counts
from dive_fast.data.prompts import PooledAt, PromptTable, SecondPrompts, pack
from dive_fast.data.random_streams import Draw, stream
from dive_fast.data.sources.sample_table import Sample
from dive_fast.data.sources.source import Images, Source
from dive_fast.data.text_tokenizer import Tokenizer
from dive_fast.data.token_cache import CaptionTokens, kept_captions
from dive_fast.data.transforms import Augmentation, Crop, Preprocess, View, crop_draws, random_crop
from dive_fast.distributed import Ranks
from dive_fast.errors import ChangedDataError, DataError, TarError

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch", TargetBatch, ReferenceBatch, EvaluationBatch)
Item = TypeVar("Item")
SampleKey = tuple[int, int]
"""(epoch, sample index). With the seed, it determines crop and text of a sample. Repeats of a sample in one epoch
have other numbers instead of the epoch."""
MAX_REPLACEMENTS = 16
"""Consecutive unusable samples after which reading fails."""


class Samples(ABC, Generic[Batch]):
    """A data set as loaders read it: every result is a pure function of the seed and the sample key."""

    def __init__(self, images: Images, preprocess: Preprocess) -> None:
        self.images, self.preprocess = images, preprocess
        self.held_out: frozenset[int] = frozenset()
        """Samples that never replace an unusable one."""
        self._crop_draws: dict[SampleKey, NDArray[np.float64]] = {}

    @property
    def source(self) -> Source:
        """The images as a set whose samples are all known; a stream is not one."""
        assert isinstance(self.images, Source)
        return self.images

    def without(self, held_out: Collection[int]) -> Self:
        """The same samples, of which those held out never replace an unusable one."""
        samples = copy.copy(self)
        samples.held_out = frozenset(held_out)
        return samples

    def draw_crops(self, sample_keys: Sequence[SampleKey]) -> None:
        """Draws the random numbers of the crops of a batch at once, for the next calls of :meth:`crop`."""
        seed_and_views = self._crop_seed_and_views(sample_keys)
        if seed_and_views is not None:
            seed, views = seed_and_views
            draws = crop_draws(seed, [sample for _, sample in sample_keys], views)
            self._crop_draws = dict(zip(sample_keys, draws, strict=True))

    def _crop_seed_and_views(self, sample_keys: Sequence[SampleKey]) -> tuple[int, list[int]] | None:
        """The seed and the views from which crops are drawn; None: no crop is random."""
        return None

    @abstractmethod
    def crop(self, sample_key: SampleKey, size: tuple[int, int]) -> Crop | None:
        """The crop of a sample whose image has ``size`` (height, width); None means the evaluation view."""

    @abstractmethod
    def batch(self, sample_keys: Sequence[SampleKey], images: Tensor) -> Batch:
        """The batch of these samples, from their pixels ``(B, H, W, 3)``."""

    def view(self, sample_key: SampleKey, size: tuple[int, int]) -> View:
        """The view of an image of ``size`` (height, width), for loaders with their own decoder."""
        crop = self.crop(sample_key, size)
        return self.preprocess.eval_view(size) if crop is None else self.preprocess.train_view(crop)

    def transform(self, sample_key: SampleKey, image: Image.Image) -> Image.Image:
        """The view of an image as RGB in the model's size: the reference for every loader's pixels.

        Raises:
            DataError: the image is too narrow for resize mode `longest`.
        """
        try:
            return self.preprocess.transform(image, self.crop(sample_key, (image.height, image.width)))
        except ValueError as error:
            reason = f"cannot resize {image.width} x {image.height} pixels: {error}"
            raise self.images.sample(sample_key[1]).unusable(reason) from error

    def read_usable(self, sample_key: SampleKey, read: Callable[[SampleKey], Item]) -> tuple[SampleKey, Item]:
        """Reads a sample or, if it is unusable, the next usable one; returns the key of the sample that was read.

        Raises:
            TarError: its tar cannot be fetched, of which another attempt may succeed.
            DataError: :data:`MAX_REPLACEMENTS` samples in a row are unusable.
            ChangedDataError: a file changed after the set was listed.
        """
        epoch, number = sample_key
        for attempt in range(MAX_REPLACEMENTS):
            if attempt:
                number = self.images.after(number)
                if number in self.held_out:
                    continue
            candidate = epoch, number
            try:
                return candidate, read(candidate)
            except (ChangedDataError, TarError):
                raise
            except DataError as error:
                last = error
                logger.warning("%s; the next sample replaces it", error)
        raise DataError(f"{MAX_REPLACEMENTS} samples in a row are unusable; the last: {last}")

    def _entries(self, sample_keys: Sequence[SampleKey]) -> list[Sample]:
        return [self.images.sample(number) for _, number in sample_keys]


class TargetSamples(Samples[TargetBatch]):
    """Labelled images; crop and prompts are drawn again for every epoch."""

    def __init__(
        self,
        source: Source,
        prompts: PromptTable,
        preprocess: Preprocess,
        pooled_at: PooledAt,
        seed: int,
        second_prompts: SecondPrompts | None = None,
        augmentation: Augmentation = Augmentation(),  # noqa: B008 - immutable
    ) -> None:
        super().__init__(source, preprocess)
        self.prompts, self.second_prompts = prompts, second_prompts
        self.pooled_at, self.seed, self.augmentation = pooled_at, seed, augmentation

    def crop(self, sample_key: SampleKey, size: tuple[int, int]) -> Crop:
        """The random crop of a sample, which differs between epochs."""
        epoch, sample = sample_key
        return self.augmentation.crop(size, self.seed, sample, epoch, self._crop_draws.get(sample_key))

    def _crop_seed_and_views(self, sample_keys: Sequence[SampleKey]) -> tuple[int, list[int]]:
        return self.seed, [epoch for epoch, _ in sample_keys]

    def batch(self, sample_keys: Sequence[SampleKey], images: Tensor) -> TargetBatch:
        """The batch of these samples; draws their prompts, and second prompts if the method needs them."""
        entries = self._entries(sample_keys)
        second = None
        if self.second_prompts is not None:
            drawn = [(entry, sample, epoch) for entry, (epoch, sample) in zip(entries, sample_keys, strict=True)]
            second = pack(self.second_prompts.draw(drawn, self.seed), self.pooled_at)
        epochs, indices = zip(*sample_keys, strict=True)
        return TargetBatch(
            images=images,
            text=pack(self.prompts.draw(entries, indices, self.seed, epochs), self.pooled_at),
            labels=torch.tensor([entry.label for entry in entries]),
            sample=torch.tensor([sample for _, sample in sample_keys]),
            keys=tuple(entry.key for entry in entries),
            second_text=second,
        )


class ReferenceSamples(Samples[ReferenceBatch]):
    """Captioned images in the evaluation view, or in one of K fixed crops, each with one of its captions."""

    def __init__(
        self,
        images: Images,
        tokenizer: Tokenizer,
        preprocess: Preprocess,
        pooled_at: PooledAt,
        seed: int,
        views: Literal["eval"] | int = "eval",
        draws_captions: bool = False,
    ) -> None:
        """Reads the pairs of a captioned set.

        Args:
            draws_captions: draw one of an image's captions in each epoch; otherwise the first is used.
        """
        super().__init__(images, preprocess)
        self.tokenizer, self.pooled_at = tokenizer, pooled_at
        self.seed, self.views = seed, views
        self._draws_captions = draws_captions
        self.caption_counts = caption_counts(images) if draws_captions and isinstance(images, Source) else None
        """``(N,)``: the number of captions of each image; None: one each, or a stream."""
        self._packs_all_captions = False
        self._tokens = self._prepared_tokens()
        self._kept_tokens: CaptionTokens | None = None

    @property
    def num_views(self) -> int:
        """Views per sample; epoch ``e`` uses view ``e % num_views``."""
        return 1 if self.views == "eval" else self.views

    def crop(self, sample_key: SampleKey, size: tuple[int, int]) -> Crop | None:
        """The fixed crop of this epoch's view, or None for the evaluation view."""
        epoch, sample = sample_key
        if self.views == "eval":
            return None
        draws = self._crop_draws.get(sample_key)
        return random_crop(size, self.seed, sample, epoch % self.num_views, draws=draws)

    def _crop_seed_and_views(self, sample_keys: Sequence[SampleKey]) -> tuple[int, list[int]] | None:
        if self.views == "eval":
            return None
        return self.seed, [epoch % self.num_views for epoch, _ in sample_keys]

    def with_kept_tokens(self, ranks: Ranks) -> "ReferenceSamples":
        """The same samples with the tokens of all captions from the cache, if there are many; all ranks call it.

        Otherwise captions are tokenised in every epoch, when they are drawn, as those of a stream are.
        """
        if not isinstance(self.images, Source):
            return self
        samples = copy.copy(self)
        table = self.images.samples if self._tokens is None else None
        samples._kept_tokens = kept_captions(table, self.tokenizer, self.caption_counts is None, ranks)
        return samples

    def with_all_captions(self) -> "ReferenceSamples":
        """The same samples with all captions of each image in a batch's text, image by image."""
        samples = copy.copy(self)
        samples._packs_all_captions = True
        return samples

    def caption(self, sample_key: SampleKey) -> int:
        """The number of the caption that is drawn for a sample: a pure function of (seed, sample, epoch)."""
        is_set = isinstance(self.images, Source)
        if not self._draws_captions or (is_set and self.caption_counts is None):
            return 0
        epoch, sample = sample_key
        counts = self.caption_counts
        count = len(self.images.sample(sample).texts) if counts is None else int(counts[sample])
        return int(float(stream(self.seed, Draw.CAPTION, sample, epoch).random()) * count)

    def batch(self, sample_keys: Sequence[SampleKey], images: Tensor) -> ReferenceBatch:
        """The batch of these samples; tokenises their captions unless their tokens are kept or prepared."""
        entries = self._entries(sample_keys)
        sample = torch.tensor([sample for _, sample in sample_keys])
        captions = [self.caption(sample_key) for sample_key in sample_keys]
        return ReferenceBatch(
            images=images,
            text=self._text(entries, sample, captions),
            sample=sample,
            view=torch.tensor([epoch % self.num_views for epoch, _ in sample_keys]),
            keys=tuple(entry.key for entry in entries),
            caption=None if self.caption_counts is None else torch.tensor(captions),
        )

    def _text(self, entries: Sequence[Sample], sample: Tensor, captions: Sequence[int]) -> Text:
        if self._tokens is not None:
            return pack(self._tokens[sample].long(), self.pooled_at)
        packs_all = self._packs_all_captions and self.caption_counts is not None
        if self._kept_tokens is not None:
            kept = self._kept_tokens
            rows = kept.all_rows(sample.numpy()) if packs_all else kept.rows(sample.numpy(), np.array(captions))
            return pack(rows, self.pooled_at)
        if packs_all:
            texts = [text for entry in entries for text in entry.texts]
        else:
            texts = [entry.texts[caption] for entry, caption in zip(entries, captions, strict=True)]
        return pack(self.tokenizer(texts), self.pooled_at)

    def _prepared_tokens(self) -> Tensor | None:
        """The tokens of a prepared set, if this tokenizer gives equal tokens; otherwise None."""
        tokens = self.images.tokens if isinstance(self.images, Source) else None
        if tokens is None:
            return None
        probes = range(0, len(self.source), max(1, len(self.source) // 64))
        expected = self.tokenizer([self.source.samples[sample].texts[0] for sample in probes])
        if expected.shape[1] == tokens.shape[1] and torch.equal(expected, tokens[list(probes)].long()):
            return tokens
        logger.warning("the prepared tokens are not this model's; captions are tokenised again")
        return None


class EvaluationSamples(Samples[EvaluationBatch]):
    """Images in the evaluation view with their labels."""

    def crop(self, sample_key: SampleKey, size: tuple[int, int]) -> None:
        """None: always the evaluation view."""

    def batch(self, sample_keys: Sequence[SampleKey], images: Tensor) -> EvaluationBatch:
        """The batch of these samples: images and labels."""
        return EvaluationBatch(images, torch.tensor([entry.label for entry in self._entries(sample_keys)]))
