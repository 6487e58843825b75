"""Prepares the next batches while the current step runs."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.profiler import record_function

from dive_fast.errors import StalledError
from dive_fast.waiting import REPORT_SECONDS, rank_name, report

DEPTH = 1
"""Number of items prepared ahead, besides the one in use; each takes device memory."""
CLOSE_SECONDS = 5.0
"""Time limit of :meth:`Prefetcher.close` for a loader that hangs; the thread then ends with the process."""
NO_BATCH = "the data loader, or the storage that it reads from, delivers none"
"""Cause of a missing batch, for messages."""

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
_Entry = tuple[Prepared | None, Any, BaseException | None]
"""A prepared item, the CUDA event after its copies, and the exception that was raised instead of it."""


class Prefetcher(Iterator[Prepared], Generic[Item, Prepared]):
    """Iterates over a loader and prepares items ahead, on a separate thread and CUDA stream.

    The consumer's stream waits for the copies, but the host does not.
    """

    def __init__(
        self,
        items: Iterator[Item],
        prepare: Callable[[Item], Prepared],
        device: torch.device,
        depth: int = DEPTH,
        limit: float | None = None,
    ) -> None:
        """Starts the thread.

        Args:
            items: the loader.
            prepare: e.g. copies an item to the device and looks up its teacher embeddings; runs on the thread.
            device: device whose stream copies the items.
            depth: maximum number of items prepared ahead.
            limit: seconds after which waiting for an item is an error, with earlier reports; None: no limit, for
                callers of :meth:`wait`.
        """
        self.waited = 0.0
        """Total seconds that the consumer has waited for items."""
        self._items, self._prepare, self._device = items, prepare, device
        self._limit = limit
        self._ready: queue.Queue[_Entry[Prepared]] = queue.Queue(depth)
        self._next: _Entry[Prepared] | None = None
        self._free_slots = threading.Semaphore(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="data", daemon=True)
        self._thread.start()

    def __next__(self) -> Prepared:
        """The next prepared item.

        Raises:
            StalledError: no item has come within the limit.
            BaseException: the loader or ``prepare`` raised it.
        """
        waited, interval = 0.0, min(REPORT_SECONDS, self._limit or REPORT_SECONDS)
        while not self.wait(interval):
            waited += interval
            if self._limit is None:
                continue
            if waited >= self._limit:
                raise StalledError(f"no batch for {waited:.0f} s: {NO_BATCH}")
            report(f"{rank_name()} has waited {waited:.0f} s for a batch: {NO_BATCH}")
        assert self._next is not None
        prepared, copied, error = self._next
        if error is not None:
            raise error  # again on each further call
        self._next = None
        self._free_slots.release()
        assert prepared is not None
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            for tensor in _tensors(prepared):
                if tensor.is_cuda:
                    tensor.record_stream(stream)
        return prepared

    def wait(self, seconds: float) -> bool:
        """Waits up to ``seconds``; returns whether the next item, or an error instead of it, is available."""
        if self._next is None:
            start = time.perf_counter()
            try:
                with record_function("load"):
                    self._next = self._ready.get(timeout=seconds)
            except queue.Empty:
                return False
            finally:
                self.waited += time.perf_counter() - start
        return True

    def close(self) -> None:
        """Stops the thread and releases the loader with its workers."""
        self._closed.set()
        deadline = time.monotonic() + CLOSE_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue
        self._items = iter(())

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                stream = torch.cuda.Stream(self._device)
                with torch.cuda.device(self._device), torch.cuda.stream(stream):
                    self._fill(stream)
            else:
                self._fill(None)
            self._put(None, None, StopIteration())
        except BaseException as error:  # raised in __next__
            self._put(None, None, error)

    def _fill(self, stream: Any) -> None:
        for item in self._items:
            while not self._free_slots.acquire(timeout=0.1):
                if self._closed.is_set():
                    return
            prepared = self._prepare(item)
            self._put(prepared, None if stream is None else stream.record_event(), None)
            del prepared
            if self._closed.is_set():
                return

    def _put(self, *entry: Any) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(entry, timeout=0.1)
                return
            except queue.Full:
                continue


def _tensors(item: Any) -> Iterator[Tensor]:
    """All tensors in nested dataclasses, tuples and lists."""
    if isinstance(item, Tensor):
        yield item
    elif is_dataclass(item):
        for field in fields(item):
            yield from _tensors(getattr(item, field.name))
    elif isinstance(item, tuple | list):
        for part in item:
            yield from _tensors(part)
