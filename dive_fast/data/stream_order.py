"""The samples of each rank at each step of a stream of tars, as a pure function of (seed, rank, ranks, step)."""

import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dive_fast.data.random_streams import Draw, stream
from dive_fast.data.sampler import StepOrder, check_equal_shares, shuffle
from dive_fast.data.sources.source import Skipped
from dive_fast.data.sources.tar_stream import POSITION_BITS, TarStream
from dive_fast.errors import DataError

logger = logging.getLogger(__name__)

WINDOWS = 2
"""Windows whose fetched tars are kept: workers may still read samples of the window before the current one."""
TARS_AHEAD = 2
"""Tars of an object store that are fetched before their window is reached, one after the other."""


@dataclass(frozen=True)
class StreamOrder(StepOrder):
    """Shuffled epochs of tars, dealt to the ranks in turn; a rank shuffles the samples of a window of its tars.

    A window is the next tars of a rank, within one epoch, that have at least :attr:`TarStream.window` samples
    together. A rank that has used its tars of an epoch begins its next epoch in the same batch, so that all ranks
    have full batches at every step, however many samples their tars have.
    """

    tars: TarStream
    batch_size: int
    """Samples per step over all ranks."""
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    section: str = "data.reference"
    """Config section of the stream, for messages."""
    _counts: dict[int, int] = field(default_factory=dict, compare=False)
    """Number of samples of each tar that was scanned."""
    _reported: Counter[str] = field(default_factory=Counter, compare=False)
    """Number of samples left out so far, by reason."""

    def __post_init__(self) -> None:
        """Validates that ranks have equal shares, and each a tar.

        Raises:
            DataError: the batch is not divisible by the number of ranks, or there are more ranks than tars.
        """
        check_equal_shares(self.batch_size, self.world_size, f"{self.section}.batch_size")
        if self.world_size > len(self.tars.tars):
            raise DataError(
                f"{self.section}.order = stream: {self.world_size} ranks need a tar each, {self.tars.path} has "
                f"{len(self.tars.tars)}; write more tars, or set {self.section}.order=indexed"
            )

    def keys_of_steps(self, steps: range) -> Iterator[list[tuple[int, int]]]:
        """The keys of this rank's samples of each step: the epoch and the number of the sample.

        The tars before the first step are scanned once, without their images, unless this object has read them.
        """
        if not steps:
            return
        size = self.batch_size // self.world_size
        epochs, numbers = np.empty(0, np.int64), np.empty(0, np.int64)
        before = steps.start * size
        recent: deque[list[int]] = deque()
        for first, epoch, tars in self._windows():
            recent.append(tars)
            if len(recent) > WINDOWS:
                for tar in set(recent.popleft()).difference(*recent):
                    self.tars.remove(tar)
            count = sum(self._counts[tar] for tar in tars)
            if before >= count:
                before -= count
                continue
            for tar in tars:
                self.tars.fetch(tar)
            window = self._shuffled(first, tars)[before:]
            epochs = np.concatenate([epochs, np.full(len(window), epoch)])
            numbers, before = np.concatenate([numbers, window]), 0
            full = len(numbers) // size * size
            following = [self.tar_at(first + len(tars) + number)[1] for number in range(TARS_AHEAD)]
            for start in range(0, full, size):
                share = slice(start, start + size)
                yield list(zip(epochs[share].tolist(), numbers[share].tolist(), strict=True))
                steps = steps[1:]
                if not steps:
                    return
                # After the first batch: loaders fork their workers before the second one, and no thread may run.
                for tar in following:
                    self.tars.fetch_ahead(tar)
            epochs, numbers = epochs[full:], numbers[full:]

    def close(self) -> None:
        """Removes the tars that were fetched from an object store."""
        self.tars.close()

    def tar_at(self, turn: int) -> tuple[int, int]:
        """The epoch and the tar of a rank's turn: all ranks together read each tar once in an epoch."""
        epoch, position = divmod(self.rank + turn * self.world_size, len(self.tars.tars))
        return epoch, int(shuffle(len(self.tars.tars), self.seed, epoch)[position])

    def _windows(self) -> Iterator[tuple[int, int, list[int]]]:
        """The first turn, the epoch and the tars of each window, all of which have been scanned.

        Raises:
            DataError: no tar has a sample.
        """
        turn, turns_without_samples = 0, 0
        while True:
            first, (epoch, _) = turn, self.tar_at(turn)
            tars, count = list[int](), 0
            while count < self.tars.window and self.tar_at(turn)[0] == epoch:
                tars.append(self.tar_at(turn)[1])
                count += self._count(tars[-1])
                turn += 1
            turns_without_samples = 0 if count else turns_without_samples + len(tars)
            # A rank may meet none of the few tars with samples in several epochs: then all are scanned, once.
            all_tars = range(len(self.tars.tars))
            if turns_without_samples * self.world_size > 2 * len(all_tars) and not any(map(self._count, all_tars)):
                reasons = ", ".join(f"{count} {reason}" for reason, count in self._reported.most_common(3))
                raise DataError(
                    f"{self.section}: {self.tars.path}: no sample has both an image and a .txt file"
                    + (f" ({reasons})" if reasons else "")
                )
            yield first, epoch, tars

    def _count(self, tar: int) -> int:
        if tar not in self._counts:
            table, skipped = self.tars.scan(tar)
            self._counts[tar] = len(table)
            self._report(tar, skipped)
        return self._counts[tar]

    def _report(self, tar: int, skipped: Sequence[Skipped]) -> None:
        """Logs the samples of a tar that are left out, and how many there are so far."""
        for reason, count in Counter(reason for _, reason in skipped).most_common():
            self._reported[reason] += count
            key = next(key for key, each in skipped if each == reason)
            logger.warning(
                "%s: %s: left out: %s: %d (the first: %s; %d so far on rank %d)",
                *(self.section, self.tars.tars[tar].path, reason, count, key),
                *(self._reported[reason], self.rank),
            )

    def _shuffled(self, first: int, tars: Sequence[int]) -> NDArray[np.int64]:
        """The numbers of the samples of a window, in the order of their use."""
        numbers = [(tar << POSITION_BITS) + np.arange(self._counts[tar], dtype=np.int64) for tar in tars]
        # The turns of all ranks have different numbers.
        draws = stream(self.seed, Draw.WINDOW, self.rank + first * self.world_size)
        return draws.permutation(np.concatenate(numbers))
