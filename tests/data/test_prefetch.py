"""Batches made ready on a thread: order, errors, an early end, and the time that the consumer waits."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dive_fast.data.batch import ReferenceBatch, Text
from dive_fast.data.prefetch import Prefetcher, _tensors

CPU = torch.device("cpu")


def test_items_come_in_order_each_made_ready_on_another_thread() -> None:
    threads = set()

    def ready(item: int) -> int:
        threads.add(threading.current_thread().name)
        return 10 * item

    ahead = Prefetcher(iter(range(20)), ready, CPU)
    assert list(ahead) == [10 * item for item in range(20)]
    assert threads == {"data"}
    with pytest.raises(StopIteration):
        next(ahead)
    ahead.close()


@pytest.mark.parametrize("where", ["loader", "prepare"])
def test_an_error_is_raised_where_the_item_is_asked_for(where: str) -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        if where == "loader":
            raise ValueError("broken")
        yield 3

    def ready(item: int) -> int:
        if item == 3:
            raise ValueError("broken")
        return item

    ahead = Prefetcher(items(), ready, CPU)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            next(ahead)


def test_no_more_is_made_ready_than_asked_and_an_early_end_stops_the_thread() -> None:
    made = []

    def ready(item: int) -> int:
        made.append(item)
        return item

    ahead = Prefetcher(iter(range(1000)), ready, CPU, depth=2)
    deadline = time.monotonic() + 10
    while len(made) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert made == [0, 1]
    next(ahead)
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert made == [0, 1, 2]
    ahead.close()
    assert not ahead._thread.is_alive()
    assert len(made) <= 4


def test_the_time_waited_is_the_loaders_not_the_consumers() -> None:
    gate = threading.Event()

    def items() -> Iterator[int]:
        gate.wait()
        yield from range(3)

    ahead = Prefetcher(items(), lambda item: item, CPU)
    threading.Timer(0.2, gate.set).start()
    next(ahead)
    waited = ahead.waited
    assert waited > 0.1
    time.sleep(0.2)  # the consumer's own work, while the next ones become ready
    assert list(ahead) == [1, 2]
    assert ahead.waited - waited < 0.1


def test_every_tensor_of_a_batch_is_found() -> None:
    text = Text(torch.zeros(1, 2), torch.zeros(3), 2)
    batch = ReferenceBatch(torch.zeros(3), text, torch.zeros(3), torch.zeros(3), ("a",))
    found: list[Any] = list(_tensors((batch, None, [torch.zeros(1)])))
    assert len(found) == 6
