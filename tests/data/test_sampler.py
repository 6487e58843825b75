"""The samples of each rank at each step."""

from collections import Counter

import numpy as np
import pytest

from dive_fast.data.sampler import Classes, Order, skip
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


# Balanced classes

LABELS = [0] * 3 + [5] * 40 + [2] * 1 + [7] * 9
"""Four classes of 1 to 40 images; 1, 3, 4 and 6 have none."""


def balanced(rank: int = 0, world_size: int = 1, seed: int = 0, batch: int = 8) -> Order:
    return Order(len(LABELS), batch, rank, world_size, seed, classes=Classes.of(LABELS))


def keys_of(order: Order, epoch: int) -> list[tuple[int, int]]:
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    return [key for step in steps for key in order.sample_keys(step)]


def test_sample_keys_are_epoch_and_samples() -> None:
    order = Order(24, 8, seed=1)
    for step in range(7):
        epoch, samples = order.at(step)
        assert order.sample_keys(step) == [(epoch, sample) for sample in samples.tolist()]


def test_balanced_epoch_draws_each_class_equally_often() -> None:
    for epoch in range(3):
        samples = epoch_of(balanced(), epoch)
        assert len(samples) == len(LABELS) // 8 * 8
        counts = Counter(LABELS[sample] for sample in samples)
        assert counts.keys() == {0, 2, 5, 7}
        assert max(counts.values()) - min(counts.values()) <= 1
        # Within a class, all samples are drawn equally often.
        for label in counts:
            draws = Counter(sample for sample in samples if LABELS[sample] == label)
            assert max(draws.values()) - min(draws.values()) <= 1
            assert len(draws) == min(LABELS.count(label), counts[label])


def test_balanced_epochs_use_every_sample_of_a_large_class() -> None:
    used = {sample for epoch in range(40) for sample in epoch_of(balanced(), epoch)}
    assert used == set(range(len(LABELS)))


def test_balanced_repeats_have_distinct_keys_that_begin_with_the_epoch() -> None:
    for epoch in range(2):
        keys = keys_of(balanced(), epoch)
        assert len(set(keys)) == len(keys)
        assert [sample for _, sample in keys] == epoch_of(balanced(), epoch)
        only = [number for number, sample in keys if LABELS[sample] == 2]  # a class of one image
        assert sorted(only) == [epoch + (repeat << 32) for repeat in range(len(only))]
        assert len(only) >= 12
    assert not {key for key in keys_of(balanced(), 0)} & {key for key in keys_of(balanced(), 1)}


@pytest.mark.parametrize("world_size", [2, 4])
def test_balanced_shares_of_ranks_concatenate_to_the_full_batch(world_size: int) -> None:
    ranks = [balanced(rank, world_size) for rank in range(world_size)]
    for step in (9, 0, 4, 17):  # in any order
        shares = [key for order in ranks for key in order.sample_keys(step)]
        assert shares == balanced().sample_keys(step)


def test_balanced_order_never_has_held_out_samples() -> None:
    held_out = (0, 5, 43)  # the last is the only one of its class
    order = Order(len(LABELS), 8, held_out=held_out, classes=Classes.of(LABELS, held_out))
    assert order.steps_per_epoch == (len(LABELS) - 3) // 8
    drawn = [sample for epoch in range(30) for sample in epoch_of(order, epoch)]
    assert set(drawn) == set(range(len(LABELS))) - set(held_out)


def test_balanced_epochs_differ_between_epochs_and_seeds() -> None:
    epochs = {tuple(epoch_of(balanced(seed=seed), epoch)) for seed in range(3) for epoch in range(3)}
    assert len(epochs) == 9


def test_balanced_order_of_equal_classes_and_more_classes_than_samples_in_a_batch() -> None:
    order = Order(30, 4, classes=Classes.of(list(range(15)) * 2))
    counts = Counter(sample % 15 for sample in epoch_of(order, 0))
    assert set(counts.values()) <= {1, 2}
    # Fewer than a round of classes: a batch has distinct ones.
    assert len({sample % 15 for _, sample in order.sample_keys(0)}) == 4


def test_classes_describe_their_sizes_and_need_labels() -> None:
    assert Classes.of(LABELS).describe() == "1 to 40 images"
    assert Classes.of([0, 1, 1, 0]).describe() == "2 images each"
    with pytest.raises(DataError, match=r"^balance = class needs labelled samples"):
        Classes.of([0, -1])
