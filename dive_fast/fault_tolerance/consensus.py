"""What all ranks agree on between steps, beside the step's own collectives."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dive_fast.distributed import COLLECTIVE_TIMEOUT, Ranks


class Votes(NamedTuple):
    """What one rank has to say; agreed on is the largest of each."""

    stop: int = 0
    """1: the run is to be saved and left."""
    nonfinite: int = 0
    """1: ``train.nonfinite_limit`` is reached."""
    failed: int = 0
    """The number of the save that could not be written; 0: none."""
    unwritten: int = 0
    """Minus the number of the last save that is written: agreed on is how far the slowest rank is."""
    committed: int = 0
    """The number of the last save that has its final name; the first rank knows."""


class Consensus:
    """Ranks vote at every step and hear a step later what all agree on; no rank waits for another's device.

    The votes go over gloo, from host to host, while the step runs.
    """

    def __init__(self, ranks: Ranks) -> None:
        """All ranks make one together."""
        self._group: Any = None
        if ranks.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        self._underway: tuple[torch.Tensor, Any] | None = None

    def __call__(self, votes: Votes) -> Votes:
        """Sends off this step's votes; returns what was agreed on at the call before, alike on all ranks."""
        agreed = self.settle()
        sent = torch.tensor(votes)
        work = None
        if self._group is not None:
            work = dist.all_reduce(sent, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._underway = sent, work
        return agreed

    def settle(self) -> Votes:
        """Waits for the votes under way, and returns what they come to; after the last step all ranks call it."""
        if self._underway is None:
            return Votes()
        votes, work = self._underway
        self._underway = None
        if work is not None:
            work.wait()
        return Votes(*votes.tolist())
