"""The samples of each rank at each step, as a pure function of (seed, step)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dive_fast.data.random_streams import Draw, stream
from dive_fast.errors import DataError

_REPEAT = 1 << 32
"""Added to the epoch in a sample's key for each earlier draw in the same epoch; more than any run's epochs."""


@dataclass(frozen=True)
class Order:
    """Shuffled epochs of full batches, the same number of steps on every rank.

    The concatenated shares of all ranks are the batch that a single rank would take.
    """

    num_samples: int
    batch_size: int
    """Samples per step over all ranks."""
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    key: str = "batch_size"
    """Config key of ``batch_size``, for messages."""
    classes: "Classes | None" = field(default=None, compare=False)
    """None: each sample once per epoch. Otherwise, each class equally often, in epochs of the same length."""

    def __post_init__(self) -> None:
        """Validates that every step has a full batch and equal shares.

        Raises:
            DataError: the batch is larger than the data set, or not divisible by the number of ranks.
        """
        if self.batch_size % self.world_size:
            raise DataError(f"{self.key} {self.batch_size} is not divisible by the {self.world_size} ranks")
        if self.batch_size > self.num_samples:
            raise DataError(
                f"{self.key} {self.batch_size} exceeds the {self.num_samples} samples of the data set; "
                f"set it to at most {self.num_samples}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Full batches per epoch; the incomplete last batch of a shuffle is dropped."""
        return self.num_samples // self.batch_size

    def at(self, step: int) -> tuple[int, NDArray[np.int64]]:
        """The epoch and this rank's samples, ``(batch_size / world_size,)``, of a step (counted from 0)."""
        epoch, share = self._share(step)
        return epoch, self._epoch(epoch)[0][share]

    def sample_keys(self, step: int) -> list[tuple[int, int]]:
        """The keys of this rank's samples of a step: the epoch and the sample.

        A sample that a balanced epoch draws again has another number instead of the epoch, so that its crop and
        its text are drawn again too.
        """
        epoch, share = self._share(step)
        samples, repeats = self._epoch(epoch)
        numbers = [epoch] * len(samples[share]) if repeats is None else (epoch + repeats[share] * _REPEAT).tolist()
        return list(zip(numbers, samples[share].tolist(), strict=True))

    def _share(self, step: int) -> tuple[int, slice]:
        """The epoch of a step, and this rank's part of the epoch's samples."""
        epoch, position = divmod(step, self.steps_per_epoch)
        size = self.batch_size // self.world_size
        first = position * self.batch_size + self.rank * size
        return epoch, slice(first, first + size)

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """All samples of an epoch, and for each the number of its earlier draws in the epoch; None: all 0."""
        if self.classes is None:
            return _shuffle(self.num_samples, self.seed, epoch), None
        return _balanced(self.classes, self.num_samples, self.seed, epoch)


@lru_cache(maxsize=4)
def _shuffle(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return stream(seed, Draw.ORDER, epoch).permutation(num_samples)


@dataclass(frozen=True, eq=False)
class Classes:
    """The samples of each class, for class-balanced epochs."""

    samples: tuple[NDArray[np.int64], ...]
    """Indices of the samples of each class that has any."""

    @classmethod
    def of(cls, labels: Sequence[int]) -> "Classes":
        """Groups samples by their labels.

        Raises:
            DataError: a sample has no label.
        """
        array = np.asarray(labels, np.int64)
        if len(array) and array.min() < 0:
            raise DataError("balance = class needs labelled samples; this set has prompts and no classes")
        order = np.argsort(array, kind="stable")
        return cls(tuple(np.split(order, np.flatnonzero(np.diff(array[order])) + 1)))

    def describe(self) -> str:
        """The sizes of the smallest and the largest class."""
        sizes = [len(group) for group in self.samples]
        return f"{min(sizes)} to {max(sizes)} images" if min(sizes) < max(sizes) else f"{sizes[0]} images each"


@lru_cache(maxsize=4)
def _balanced(classes: Classes, length: int, seed: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The samples of a balanced epoch, and the number of earlier draws of each in the epoch, ``(length,)`` both.

    Classes come in shuffled rounds, so that their counts differ by at most one. Within a class, samples come in
    shuffled rounds too: a small class is repeated, a large one gives other samples in each epoch.
    """
    count = len(classes.samples)
    rounds = np.tile(np.arange(count), (-(-length // count), 1))
    labels = stream(seed, Draw.ORDER, epoch).permuted(rounds, axis=1).ravel()[:length]
    samples, repeats = np.empty(length, np.int64), np.empty(length, np.int64)
    ends = np.cumsum(np.bincount(labels, minlength=count))
    for number, positions in enumerate(np.split(np.argsort(labels, kind="stable"), ends[:-1])):
        group, draws = classes.samples[number], stream(seed, Draw.BALANCE, epoch, number)
        needed = -(-len(positions) // len(group))
        shuffled = np.concatenate([group[:0], *(draws.permutation(group) for _ in range(needed))])
        samples[positions] = shuffled[: len(positions)]
        repeats[positions] = np.arange(len(positions)) // len(group)
    return samples, repeats
