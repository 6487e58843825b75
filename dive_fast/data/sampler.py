"""The samples of each rank at each step, as a pure function of (seed, step)."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dive_fast.data.random_streams import Draw, stream
from dive_fast.errors import DataError

_REPEAT = 1 << 32
"""Added to the epoch in a sample's key for each earlier draw in the same epoch; more than any run's epochs."""


class StepOrder(ABC):
    """The order of a data set: the samples of each step on this rank."""

    @abstractmethod
    def keys_of_steps(self, steps: range) -> Iterator[list[tuple[int, int]]]:
        """The keys of this rank's samples of each step: the epoch and the number of the sample."""

    def close(self) -> None:  # noqa: B027 - most have nothing to do
        """Called when no batch is read any more."""


def check_equal_shares(batch_size: int, world_size: int, key: str) -> None:
    """Checks that all ranks can have equal shares of a batch.

    Args:
        key: config key of ``batch_size``, for the message.

    Raises:
        DataError: the batch is not divisible by the number of ranks.
    """
    if batch_size % world_size:
        raise DataError(f"{key} {batch_size} is not divisible by the {world_size} ranks")


@dataclass(frozen=True)
class Order(StepOrder):
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
    held_out: tuple[int, ...] = ()
    """Samples that no step has, in ascending order; all steps shuffle the others."""
    classes: "Classes | None" = field(default=None, compare=False)
    """None: each sample once per epoch. Otherwise, each class equally often, in epochs of the same length; without
    the samples that are held out."""

    def __post_init__(self) -> None:
        """Validates that every step has a full batch and equal shares.

        Raises:
            DataError: the batch is larger than the data set, or not divisible by the number of ranks.
        """
        check_equal_shares(self.batch_size, self.world_size, self.key)
        if self.batch_size > self.num_trained:
            raise DataError(
                f"{self.key} {self.batch_size} exceeds the {self.num_trained} samples of the data set; "
                f"set it to at most {self.num_trained}"
            )

    @property
    def num_trained(self) -> int:
        """Number of samples that are not held out."""
        return self.num_samples - len(self.held_out)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches per epoch; the incomplete last batch of a shuffle is dropped."""
        return self.num_trained // self.batch_size

    def at(self, step: int) -> tuple[int, NDArray[np.int64]]:
        """The epoch and this rank's samples, ``(batch_size / world_size,)``, of a step (counted from 0)."""
        epoch, samples, _ = self._at(step)
        return epoch, samples

    def keys_of_steps(self, steps: range) -> Iterator[list[tuple[int, int]]]:
        return map(self.sample_keys, steps)

    def sample_keys(self, step: int) -> list[tuple[int, int]]:
        """The keys of this rank's samples of a step: the epoch and the sample.

        A sample that a balanced epoch draws again has another number instead of the epoch, so that its crop and
        its text are drawn again too.
        """
        epoch, samples, repeats = self._at(step)
        numbers = [epoch] * len(samples) if repeats is None else (epoch + repeats * _REPEAT).tolist()
        return list(zip(numbers, samples.tolist(), strict=True))

    def _at(self, step: int) -> tuple[int, NDArray[np.int64], NDArray[np.int64] | None]:
        """The epoch, this rank's samples, and the number of earlier draws of each in the epoch; None: all 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        size = self.batch_size // self.world_size
        first = position * self.batch_size + self.rank * size
        share = slice(first, first + size)
        if self.classes is not None:
            samples, repeats = _balanced(self.classes, self.num_trained, self.seed, epoch)
            return epoch, samples[share], repeats[share]
        return epoch, skip(shuffle(self.num_trained, self.seed, epoch)[share], self.held_out), None


def skip(positions: NDArray[np.int64], held_out: Sequence[int]) -> NDArray[np.int64]:
    """The samples at positions that count only the samples not held out.

    Args:
        held_out: samples in ascending order.
    """
    if not held_out:
        return positions
    # The number of counted samples in front of each held-out one.
    ahead = np.asarray(held_out) - np.arange(len(held_out))
    return positions + np.searchsorted(ahead, positions, side="right")


@lru_cache(maxsize=4)
def shuffle(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The samples of an epoch in a random order."""
    return stream(seed, Draw.ORDER, epoch).permutation(num_samples)


@dataclass(frozen=True, eq=False)
class Classes:
    """The samples of each class, for class-balanced epochs."""

    samples: tuple[NDArray[np.int64], ...]
    """Indices of the samples of each class that has any."""

    @classmethod
    def of(cls, labels: Sequence[int] | NDArray[np.int64], held_out: Sequence[int] = ()) -> "Classes":
        """Groups the samples that are not held out by their labels.

        Raises:
            DataError: a sample has no label.
        """
        array = np.asarray(labels, np.int64)
        if len(array) and array.min() < 0:
            raise DataError(
                "balance = class needs labelled samples; this set has prompts and no classes; set balance=none"
            )
        order = np.argsort(array, kind="stable")
        order = order[~np.isin(order, held_out)]
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
