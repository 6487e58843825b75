"""Memory of the batches that worker processes prepare ahead: how much they need, and how many of them fit.

Pixels lie in anonymous memory that forked processes share, and that no mount limits. Everything else that a worker
sends is in files of ``/dev/shm``, of which Docker gives a container 64 MB.
"""

import os
import shutil
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple, TypeVar

from dive_fast.config.schema import Loader

Item = TypeVar("Item")
SHARED_MEMORY = Path("/dev/shm")
MAX_AHEAD = 2
"""Batches that each process prepares ahead where memory suffices."""
SPARE = 2
"""Batches beyond those: one in use, and one whose copy to the device may not have finished."""
LOADERS = 3
"""Loaders that a rank may run at a time: of the target, of the reference, and of an evaluation."""
READERS = 2
"""Processes of `dali`, which read files; each reads thousands of images per second."""
_TEXT_BYTES = 2048
"""Bytes of a sample besides its image: two texts of 77 tokens, their indices, the label."""
FILE_BYTES = 2**17
"""Bytes of an encoded image where they are unknown."""
_CGROUP = Path("/sys/fs/cgroup")


class Bytes(NamedTuple):
    """Bytes of a batch, or of the batches of a loader."""

    pixels: int
    """In anonymous memory."""
    shared: int
    """In ``/dev/shm``."""


def processes(loader: Loader, workers: int) -> int:
    """Worker processes of a loader; the rest of its workers are threads."""
    return min(workers, {"plain": workers, "dali": READERS, "ffcv": 1}[loader])


def batch_bytes(loader: Loader, images: int, size: tuple[int, int], file_bytes: float = FILE_BYTES) -> Bytes:
    """Bytes of a batch that workers of this loader send.

    Args:
        size: (height, width) of an image.
        file_bytes: mean size of an encoded image.
    """
    height, width = size
    pixels = images * height * width * 3 if loader == "plain" else 0
    return Bytes(pixels, images * (_TEXT_BYTES + (int(file_bytes) if loader == "dali" else 0)))


def loader_bytes(batch: Bytes, processes: int, ahead: int) -> Bytes:
    """The most that a loader keeps at a time, with ``ahead`` batches for each process."""
    return Bytes((ahead * processes + SPARE) * batch.pixels, (ahead * processes + 1) * batch.shared)


def batches_ahead(batch: Bytes, processes: int) -> int:
    """Batches that each process prepares ahead: :data:`MAX_AHEAD`, or fewer where little memory is free.

    A loader takes at most its share: other ranks of the node, and other loaders of a rank, start at the same time.
    """
    shares = local_ranks() * LOADERS
    for ahead in range(MAX_AHEAD, 1, -1):
        needed = loader_bytes(batch, processes, ahead)
        if needed.pixels <= available_memory() / shares and needed.shared <= free_shared_memory() / shares:
            return ahead
    return 1


def largest_batch(batches: Iterable[list[Item]]) -> tuple[int, Iterable[list[Item]]]:
    """The number of samples of the largest batch, and the batches; all batches of an iterator are as the first."""
    if isinstance(batches, Sequence):
        return max(map(len, batches), default=0), batches
    iterator = iter(batches)
    first = list(islice(iterator, 1))
    return sum(map(len, first)), chain(first, iterator)


def local_ranks() -> int:
    """Number of ranks on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def free_shared_memory() -> float:
    """Free bytes of ``/dev/shm``; infinite where there is none, and shared memory lies elsewhere."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else float("inf")


def available_memory() -> float:
    """Bytes of memory that this process and its children can still take, within the limit of their container."""
    return min(_machine_memory(), _container_memory())


def _machine_memory() -> float:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return float("inf")


def _container_memory() -> float:
    limit, used = _read(_CGROUP / "memory.max").strip(), _read(_CGROUP / "memory.current").strip()
    if not limit.isdecimal() or not used.isdecimal():
        return float("inf")  # no limit, or another version of control groups
    statistics = dict(line.split(maxsplit=1) for line in _read(_CGROUP / "memory.stat").splitlines())
    # The kernel drops these pages of files when memory is short.
    return int(limit) - int(used) + int(statistics.get("inactive_file", 0))


def _read(path: Path | str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""
