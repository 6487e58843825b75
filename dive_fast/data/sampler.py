"""The samples of each rank at each step, as a pure function of (seed, step)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dive_fast.data.random_streams import Draw, stream
from dive_fast.errors import DataError


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
    held_out: tuple[int, ...] = ()
    """Samples that no step has, in ascending order; all steps shuffle the others."""

    def __post_init__(self) -> None:
        """Validates that every step has a full batch and equal shares.

        Raises:
            DataError: the batch is larger than the data set, or not divisible by the number of ranks.
        """
        if self.batch_size % self.world_size:
            raise DataError(f"{self.key} {self.batch_size} is not divisible by the {self.world_size} ranks")
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
        epoch, position = divmod(step, self.steps_per_epoch)
        share = self.batch_size // self.world_size
        first = position * self.batch_size + self.rank * share
        positions = _shuffle(self.num_trained, self.seed, epoch)[first : first + share]
        return epoch, skip(positions, self.held_out)


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
def _shuffle(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return stream(seed, Draw.ORDER, epoch).permutation(num_samples)
