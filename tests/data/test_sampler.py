"""The samples of each rank at each step."""

import numpy as np
import pytest

from dive_fast.data.sampler import Order, skip
from dive_fast.errors import DataError


def epoch_of(order: Order, epoch: int) -> list[int]:
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    batches = [order.at(step) for step in steps]
    assert {batch_epoch for batch_epoch, _ in batches} == {epoch}
    return [int(sample) for _, samples in batches for sample in samples]


@pytest.mark.parametrize(("count", "batch"), [(24, 8), (25, 8), (31, 8), (8, 8), (9, 1), (1000, 7)])
def test_order_has_no_duplicates_and_drops_less_than_a_batch(count: int, batch: int) -> None:
    order = Order(count, batch, seed=3)
    assert order.steps_per_epoch == count // batch
    for epoch in range(4):
        samples = epoch_of(order, epoch)
        assert len(samples) == len(set(samples)) == count // batch * batch
        assert set(samples) <= set(range(count))
        if count % batch == 0:
            assert sorted(samples) == list(range(count))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("count", [24, 31])
def test_order_shares_of_ranks_concatenate_to_the_full_batch(world_size: int, count: int) -> None:
    single = Order(count, 8, seed=5)
    ranks = [Order(count, 8, rank, world_size, seed=5) for rank in range(world_size)]
    assert {order.steps_per_epoch for order in ranks} == {single.steps_per_epoch}
    for step in range(3 * single.steps_per_epoch):
        epoch, batch = single.at(step)
        shares = [order.at(step) for order in ranks]
        assert {share_epoch for share_epoch, _ in shares} == {epoch}
        assert [len(share) for _, share in shares] == [8 // world_size] * world_size
        assert np.concatenate([share for _, share in shares]).tolist() == batch.tolist()


def test_order_shuffles_differ_between_epochs_and_seeds() -> None:
    epochs = {tuple(epoch_of(Order(24, 8, seed=seed), epoch)) for seed in range(5) for epoch in range(5)}
    assert len(epochs) == 25
    assert tuple(range(24)) not in epochs


def test_order_uses_every_sample_over_epochs() -> None:
    used = {sample for epoch in range(20) for sample in epoch_of(Order(15, 8), epoch)}
    assert used == set(range(15))


def test_order_is_a_pure_function_of_seed_and_step() -> None:
    steps = range(30)
    forwards = [Order(31, 8, seed=2).at(step)[1].tolist() for step in steps]
    backwards = [Order(31, 8, seed=2).at(step)[1].tolist() for step in reversed(steps)]
    assert forwards == backwards[::-1]


def test_order_rejects_indivisible_and_oversized_batches() -> None:
    with pytest.raises(DataError, match=r"^batch_size 8 is not divisible by the 3 ranks$"):
        Order(24, 8, 0, 3)
    with pytest.raises(
        DataError, match=r"^batch_size 8 exceeds the 7 samples of the data set; set it to at most 7$"
    ):
        Order(7, 8)


@pytest.mark.parametrize(("count", "held"), [(24, ()), (24, (0,)), (24, (23,)), (24, (0, 1, 2)), (31, (4, 5, 30))])
def test_order_never_has_held_out_samples_and_has_all_others(count: int, held: tuple[int, ...]) -> None:
    order = Order(count, 1, seed=3, held_out=held)
    for epoch in range(3):
        assert sorted(epoch_of(order, epoch)) == sorted(set(range(count)) - set(held))
    assert order.steps_per_epoch == count - len(held)


def test_order_with_evenly_held_out_samples_is_complete_for_any_size() -> None:
    for count in range(2, 40):
        for number in range(1, count):
            held = tuple(index * count // number for index in range(number))
            kept = skip(np.arange(count - number), held)
            assert sorted([*kept.tolist(), *held]) == list(range(count))
            assert (np.diff(kept) > 0).all()


def test_order_with_held_out_samples_drops_less_than_a_batch() -> None:
    order = Order(33, 8, 1, 2, seed=3, held_out=(5, 20))
    assert order.steps_per_epoch == 3
    with pytest.raises(DataError, match=r"^batch_size 32 exceeds the 31 samples"):
        Order(33, 32, held_out=(5, 20))
