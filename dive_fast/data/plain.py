"""The plain loader: PIL in torch DataLoader workers. Runs everywhere, and says what the fast ones must equal."""

import logging
from collections.abc import Iterable, Iterator
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dive_fast.data.batch import ReferenceBatch, TargetBatch
from dive_fast.data.order import Order
from dive_fast.data.prompts import PooledAt, PromptTable, Tokenizer, pack
from dive_fast.data.source import DataError, Source
from dive_fast.data.views import Preprocess, random_crop

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch")
MAX_REPLACEMENTS = 16


class Item(NamedTuple):
    """One sample on its way into a batch."""

    image: Tensor
    text: Tensor | str
    label: int
    sample: int
    view: int
    key: str


class _Samples(Dataset[Item], Generic[Batch]):
    """Items by (epoch, sample), and how they become a batch; subclasses say both."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, place: tuple[int, int]) -> Item:
        """The item at (epoch, sample); where that image cannot be decoded, the next one that can."""
        epoch, first = place
        for sample in range(first, first + MAX_REPLACEMENTS):
            sample %= len(self.source)
            try:
                return self.item(self.source.image(sample), epoch, sample)
            except DataError as error:
                last = error
                logger.warning("%s; the next sample takes its place", error)
        raise DataError(f"{MAX_REPLACEMENTS} samples in a row are unusable; the last: {last}")

    def item(self, image: Image.Image, epoch: int, sample: int) -> Item:
        raise NotImplementedError

    def collate(self, items: list[Item]) -> Batch:
        raise NotImplementedError


class TargetSamples(_Samples[TargetBatch]):
    """Randomly cropped images, each with a prompt drawn for this epoch."""

    def __init__(
        self, source: Source, prompts: PromptTable, preprocess: Preprocess, pooled_at: PooledAt, seed: int
    ) -> None:
        super().__init__(source)
        self.prompts, self.preprocess, self.pooled_at, self.seed = prompts, preprocess, pooled_at, seed

    def item(self, image: Image.Image, epoch: int, sample: int) -> Item:
        entry = self.source.samples[sample]
        crop = random_crop((image.height, image.width), self.seed, sample, epoch)
        tokens = self.prompts.draw(entry, sample, self.seed, epoch)
        return Item(self.preprocess.train(image, crop), tokens, entry.label, sample, epoch, entry.key)

    def collate(self, items: list[Item]) -> TargetBatch:
        return TargetBatch(
            images=torch.stack([item.image for item in items]),
            text=pack(torch.stack([torch.as_tensor(item.text) for item in items]), self.pooled_at),
            labels=torch.tensor([item.label for item in items]),
            sample=torch.tensor([item.sample for item in items]),
            keys=tuple(item.key for item in items),
        )


class ReferenceSamples(_Samples[ReferenceBatch]):
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
        super().__init__(source)
        self.tokenizer, self.preprocess, self.pooled_at = tokenizer, preprocess, pooled_at
        self.seed, self.views = seed, views

    @property
    def num_views(self) -> int:
        """Views that each sample has; they take turns epoch by epoch."""
        return 1 if self.views == "eval" else self.views

    def item(self, image: Image.Image, epoch: int, sample: int) -> Item:
        entry, view = self.source.samples[sample], epoch % self.num_views
        if self.views == "eval":
            pixels = self.preprocess.eval(image)
        else:
            crop = random_crop((image.height, image.width), self.seed, sample, view)
            pixels = self.preprocess.train(image, crop)
        return Item(pixels, entry.texts[0], entry.label, sample, view, entry.key)

    def collate(self, items: list[Item]) -> ReferenceBatch:
        return ReferenceBatch(
            images=torch.stack([item.image for item in items]),
            text=pack(self.tokenizer([str(item.text) for item in items]), self.pooled_at),
            sample=torch.tensor([item.sample for item in items]),
            view=torch.tensor([item.view for item in items]),
            keys=tuple(item.key for item in items),
        )


class EvaluationSamples(_Samples[tuple[Tensor, Tensor]]):
    """Images in the evaluation view with their labels: batches are ``(B, 3, H, W)`` and ``(B,)``."""

    def __init__(self, source: Source, preprocess: Preprocess) -> None:
        super().__init__(source)
        self.preprocess = preprocess

    def item(self, image: Image.Image, epoch: int, sample: int) -> Item:
        entry = self.source.samples[sample]
        return Item(self.preprocess.eval(image), "", entry.label, sample, epoch, entry.key)

    def collate(self, items: list[Item]) -> tuple[Tensor, Tensor]:
        return torch.stack([item.image for item in items]), torch.tensor([item.label for item in items])


def training_batches(
    samples: _Samples[Batch], order: Order, steps: range, workers: int, pin: bool
) -> Iterator[Batch]:
    """This rank's batches of the given steps of a run, loaded ahead by worker processes.

    Args:
        steps: which steps of the whole run, epochs apart or not; a resumed run begins where it stopped.
        pin: put them into page-locked memory, for asynchronous copies to a GPU.
    """
    return _load(samples, _places(order, steps), workers, pin)


def batches_of(
    samples: _Samples[Batch], places: list[tuple[int, int]], batch_size: int, workers: int
) -> Iterator[Batch]:
    """The given (epoch, sample) places in order, batch by batch; the last batch may be smaller."""
    chunks = [places[first : first + batch_size] for first in range(0, len(places), batch_size)]
    return _load(samples, chunks, workers, pin=False)


def _places(order: Order, steps: range) -> Iterator[list[tuple[int, int]]]:
    for step in steps:
        epoch, samples = order.at(step)
        yield [(epoch, sample) for sample in samples.tolist()]


def _load(
    samples: _Samples[Batch], batches: Iterable[list[tuple[int, int]]], workers: int, pin: bool
) -> Iterator[Batch]:
    options: dict[str, Any] = {"prefetch_factor": 4, "worker_init_fn": _one_thread} if workers else {}
    loader: DataLoader[Item] = DataLoader(
        samples,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=samples.collate,
        pin_memory=pin,
        **options,
    )
    return _errors_in_one_line(iter(loader))


def _errors_in_one_line(batches: Iterator[Batch]) -> Iterator[Batch]:
    try:
        yield from batches
    except DataError as error:
        # What a worker raises arrives with its whole traceback for a message.
        raise DataError(str(error).strip().rpartition(f"{DataError.__name__}: ")[2]) from error


def _one_thread(worker: int) -> None:
    # The workers are the parallelism; more threads in each only get in one another's way.
    torch.set_num_threads(1)
