"""Memory for the pixels of batches that worker processes write and this process reads, used in turn."""

import logging
import math
import mmap
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

logger = logging.getLogger(__name__)

Task = TypeVar("Task")


class PixelRing:
    """Slots for batches of pixels, in memory that processes forked later share.

    A batch is written where it is read: a step neither stacks images nor copies, allocates or frees their memory.
    Slot ``n % slots`` holds batch ``n``. The memory is anonymous, so that its size is not limited by ``/dev/shm``.
    """

    def __init__(self, slots: int, shape: tuple[int, ...]) -> None:
        """Reserves the slots; pages take memory once they are written.

        Args:
            shape: ``(B, H, W, 3)`` of the largest batch.
        """
        memory = np.frombuffer(mmap.mmap(-1, slots * max(1, math.prod(shape))), np.uint8)
        self._memory = memory
        self._slots: NDArray[np.uint8] = memory[: slots * math.prod(shape)].reshape(slots, *shape)
        self._copied: list[torch.cuda.Event | None] = [None] * slots
        self._num_read = 0
        self._is_pinned = False

    def slot(self, number: int) -> NDArray[np.uint8]:
        """The pixels of batch ``number``, ``(B, H, W, 3)``."""
        pixels: NDArray[np.uint8] = self._slots[number % len(self._slots)]
        return pixels

    def numbered(self, tasks: Iterable[Task]) -> Iterator[tuple[int, Task]]:
        """The tasks with the numbers of their batches, each once its slot is free."""
        for number, task in enumerate(tasks):
            assert number < self._num_read + len(self._slots), "a worker would overwrite pixels in use"
            copied = self._copied[number % len(self._slots)]
            if copied is not None:
                copied.synchronize()
            yield number, task

    def read(self, number: int, count: int, device: torch.device) -> Iterator[Tensor]:
        """Yields the ``count`` images of batch ``number`` once, and frees its slot.

        The slot is written again when the copies have finished that the caller has started on its stream of
        ``device``.
        """
        yield torch.from_numpy(self.slot(number)[:count])
        if device.type == "cuda":
            self._copied[number % len(self._slots)] = torch.cuda.current_stream(device).record_event()
        self._num_read += 1

    def pin(self, device: torch.device) -> None:
        """Locks the pages, for asynchronous copies to a GPU; call it when the processes have been forked."""
        with torch.cuda.device(device):
            error = torch.cuda.cudart().cudaHostRegister(self._memory.ctypes.data, self._memory.nbytes, 0)
        self._is_pinned = int(error) == 0
        if not self._is_pinned:
            logger.warning("the memory of batches cannot be page-locked (%s): copies to the GPU wait", error)

    def close(self) -> None:
        """Waits for copies and unlocks the pages; processes keep the memory until they end."""
        for copied in self._copied:
            if copied is not None:
                copied.synchronize()
        if self._is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self._memory.ctypes.data)
            self._is_pinned = False
