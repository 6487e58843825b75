"""Tests of the prefetcher: order, errors, early close, and the measured waiting time."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dive_fast.data.batch import ReferenceBatch, Text
from dive_fast.data.prefetch import Prefetcher, _tensors

CPU = torch.device("cpu")


def test_prefetcher_prepares_in_order_on_another_thread() -> None:
    threads = set()

    def prepare(item: int) -> int:
        threads.add(threading.current_thread().name)
        return 10 * item

    prefetcher = Prefetcher(iter(range(20)), prepare, CPU)
    assert list(prefetcher) == [10 * item for item in range(20)]
    assert threads == {"data"}
    with pytest.raises(StopIteration):
        next(prefetcher)
    prefetcher.close()


@pytest.mark.parametrize("where", ["loader", "prepare"])
def test_prefetcher_raises_errors_in_next(where: str) -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        if where == "loader":
            raise ValueError("broken")
        yield 3

    def prepare(item: int) -> int:
        if item == 3:
            raise ValueError("broken")
        return item

    prefetcher = Prefetcher(items(), prepare, CPU)
    assert [next(prefetcher) for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            next(prefetcher)


def test_prefetcher_respects_depth_and_stops_on_close() -> None:
    prepared: list[int] = []

    def prepare(item: int) -> int:
        prepared.append(item)
        return item

    prefetcher = Prefetcher(iter(range(1000)), prepare, CPU, depth=2)
    deadline = time.monotonic() + 10
    while len(prepared) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert prepared == [0, 1]
    next(prefetcher)
    while len(prepared) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert prepared == [0, 1, 2]
    prefetcher.close()
    assert not prefetcher._thread.is_alive()
    assert len(prepared) <= 4


def test_prefetcher_waited_excludes_time_of_the_consumer() -> None:
    gate = threading.Event()

    def items() -> Iterator[int]:
        gate.wait()
        yield from range(3)

    prefetcher = Prefetcher(items(), lambda item: item, CPU)
    threading.Timer(0.2, gate.set).start()
    next(prefetcher)
    waited = prefetcher.waited
    assert waited > 0.1
    time.sleep(0.2)  # work of the consumer, while the next items are prepared
    assert list(prefetcher) == [1, 2]
    assert prefetcher.waited - waited < 0.1


def test_tensors_finds_all_tensors_of_a_batch() -> None:
    text = Text(torch.zeros(1, 2), torch.zeros(3), 2)
    batch = ReferenceBatch(torch.zeros(3), text, torch.zeros(3), torch.zeros(3), ("a",))
    tensors: list[Any] = list(_tensors((batch, None, [torch.zeros(1)])))
    assert len(tensors) == 6
