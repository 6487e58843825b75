"""Batches made ready while the step before them runs."""

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
"""Items ready or in the making, beside the one that the consumer works on: each takes memory of the device."""
CLOSING = 5.0
"""Seconds that an early end waits for a loader that may never answer; its thread ends with the process."""

GIVES_NONE = "the loader, or the storage that it reads, gives none"

Item = TypeVar("Item")
Ready = TypeVar("Ready")
_Entry = tuple[Ready | None, Any, BaseException | None]
"""An item, the event behind its copies, or what was raised in its place."""


class Prefetcher(Iterator[Ready], Generic[Item, Ready]):
    """Takes items from a loader and makes them ready on a thread and a CUDA stream of its own.

    The consumer's stream waits for the copies, the consumer does not: no host synchronisation.
    """

    def __init__(
        self,
        items: Iterator[Item],
        prepare: Callable[[Item], Ready],
        device: torch.device,
        depth: int = DEPTH,
        limit: float | None = None,
    ) -> None:
        """Starts at once.

        Args:
            prepare: e.g. copies an item to the device and looks up what belongs to it; runs on the thread.
            depth: items ready or in the making at most.
            limit: seconds until the consumer gives up waiting for an item, and says so on the way; None: somebody
                else watches over it.
        """
        self.waited = 0.0
        """Seconds that the consumer has spent waiting for items."""
        self._items, self._prepare, self._device = items, prepare, device
        self._limit = limit
        self._ready: queue.Queue[_Entry[Ready]] = queue.Queue(depth)
        self._taken: _Entry[Ready] | None = None
        self._room = threading.Semaphore(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="data", daemon=True)
        self._thread.start()

    def __next__(self) -> Ready:
        """The next item, ready.

        Raises:
            StalledError: none has come within the limit.
            BaseException: whatever the loader or ``prepare`` raised.
        """
        told, every = 0.0, min(REPORT_SECONDS, self._limit or REPORT_SECONDS)
        while not self.wait(every):
            told += every
            if self._limit is None:
                continue
            if told >= self._limit:
                raise StalledError(f"no batch for {told:.0f} s: {GIVES_NONE}")
            report(f"{rank_name()} has waited {told:.0f} s for a batch: {GIVES_NONE}")
        assert self._taken is not None
        ready, copied, error = self._taken
        if error is not None:
            raise error  # and again, for whoever asks again
        self._taken = None
        self._room.release()
        assert ready is not None
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            for tensor in _tensors(ready):
                if tensor.is_cuda:
                    tensor.record_stream(stream)
        return ready

    def wait(self, seconds: float) -> bool:
        """Waits so long at most; returns whether the next item, or an error in its place, is there."""
        if self._taken is None:
            begin = time.perf_counter()
            try:
                with record_function("load"):
                    self._taken = self._ready.get(timeout=seconds)
            except queue.Empty:
                return False
            finally:
                self.waited += time.perf_counter() - begin
        return True

    def close(self) -> None:
        """Stops the thread and lets the loader's workers go."""
        self._closed.set()
        deadline = time.monotonic() + CLOSING
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
        except BaseException as error:  # raised where the item is asked for
            self._put(None, None, error)

    def _fill(self, stream: Any) -> None:
        for item in self._items:
            while not self._room.acquire(timeout=0.1):
                if self._closed.is_set():
                    return
            ready = self._prepare(item)
            self._put(ready, None if stream is None else stream.record_event(), None)
            del ready
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
    if isinstance(item, Tensor):
        yield item
    elif is_dataclass(item):
        for field in fields(item):
            yield from _tensors(getattr(item, field.name))
    elif isinstance(item, tuple | list):
        for part in item:
            yield from _tensors(part)
