"""Votes of all ranks: the maximum of each field, one step later, equal on all ranks."""

import torch
from distributed import run_ranks

from dive_fast.distributed import Ranks, join
from dive_fast.fault_tolerance.consensus import Consensus, Votes


def test_single_rank_decides_one_step_later() -> None:
    consensus = Consensus(Ranks(0, 1, torch.device("cpu")))
    assert consensus(Votes(stop=1)) == Votes()
    assert consensus(Votes(committed=2)) == Votes(stop=1)
    assert consensus.settle() == Votes(committed=2)
    assert consensus.settle() == Votes()


def _vote() -> list[Votes]:
    ranks = join()
    consensus = Consensus(ranks)
    votes = [
        # One rank is asked to stop; one has written its third save, the other only its second.
        (Votes(stop=1, unwritten=-3), Votes(unwritten=-2)),
        (Votes(failed=4, unwritten=-3), Votes(nonfinite=1, unwritten=-3, committed=2)),
    ]
    decisions = [consensus(own[ranks.rank]) for own in votes]
    decisions.append(consensus.settle())
    ranks.leave()
    return decisions


def test_decision_is_the_maximum_on_all_ranks() -> None:
    first, second = run_ranks(2, _vote, init=False)
    assert first == second
    assert first == [
        Votes(),
        Votes(stop=1, unwritten=-2),
        Votes(nonfinite=1, failed=4, unwritten=-3, committed=2),
    ]
