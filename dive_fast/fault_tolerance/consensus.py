"""Decisions that all ranks make together between steps, in addition to the collectives of the step."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dive_fast.distributed import COLLECTIVE_TIMEOUT, Ranks


class Votes(NamedTuple):
    """The votes of one rank, or the decision of all ranks, which is the maximum of each field."""

    stop: int = 0
    """1: the run has to save and stop."""
    nonfinite: int = 0
    """1: ``train.nonfinite_limit`` is reached."""
    failed: int = 0
    """Number of the save that could not be written; 0: none."""
    unwritten: int = 0
    """Minus the number of the last written save, so that the decision is the progress of the slowest rank."""
    committed: int = 0
    """Number of the last save that has its final name; known to the first rank."""


class Consensus:
    """Takes the votes of all ranks at every step and returns the decision one step later.

    No rank waits for another one's device: the votes go over gloo, from host to host, while the step runs.
    """

    def __init__(self, ranks: Ranks) -> None:
        """Creates the process group for votes; all ranks call it together."""
        self._group: Any = None
        if ranks.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        self._in_progress: tuple[torch.Tensor, Any] | None = None

    def __call__(self, votes: Votes) -> Votes:
        """Sends this step's votes; returns the decision on those of the previous call, equal on all ranks."""
        decision = self.settle()
        reduced = torch.tensor(votes)
        work = None
        if self._group is not None:
            work = dist.all_reduce(reduced, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._in_progress = reduced, work
        return decision

    def settle(self) -> Votes:
        """Waits for the votes in progress and returns the decision; all ranks call it after the last step."""
        if self._in_progress is None:
            return Votes()
        reduced, work = self._in_progress
        self._in_progress = None
        if work is not None:
            work.wait()
        return Votes(*reduced.tolist())
