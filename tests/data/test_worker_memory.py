"""Memory of the batches of worker processes: shares of loaders, limits of containers, and slots of pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dive_fast.data import worker_memory
from dive_fast.data.loaders.pixel_ring import PixelRing
from dive_fast.data.worker_memory import Bytes, batches_ahead, largest_batch, loader_bytes

CPU = torch.device("cpu")


def test_a_loader_takes_its_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Bytes(pixels=10, shared=1)
    needed = loader_bytes(batch, 2, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    shares = 4 * worker_memory.LOADERS
    for name, size in (("available_memory", needed.pixels), ("free_shared_memory", needed.shared)):
        with monkeypatch.context() as patch:
            patch.setattr(worker_memory, name, lambda size=size: shares * size)
            assert batches_ahead(batch, 2) == 2
            patch.setattr(worker_memory, name, lambda size=size: shares * size - 1)
            assert batches_ahead(batch, 2) == 1


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_memory, "_CGROUP", tmp_path)
    machine = worker_memory.available_memory()
    assert 2**20 < machine < 2**50
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert worker_memory.available_memory() > 2**20
    (tmp_path / "memory.max").write_text("1000\n")
    assert worker_memory.available_memory() == 300
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 100\n")
    assert worker_memory.available_memory() == 400


def test_largest_batch_leaves_all_batches() -> None:
    for batches in ([[1], [2, 3]], []):
        size, same = largest_batch(batches)
        assert (size, list(same)) == (max(map(len, batches), default=0), batches)
        size, same = largest_batch(iter(batches))
        assert (size, list(same)) == (len(batches[0]) if batches else 0, batches)


def test_a_slot_is_written_again_when_its_batch_was_read() -> None:
    ring = PixelRing(3, (2, 4, 4, 3))
    tasks = ring.numbered("abcdefghi")
    assert [next(tasks) for _ in range(3)] == [(0, "a"), (1, "b"), (2, "c")]
    for number in range(5):
        ring.slot(number)[:] = number
        for pixels in ring.read(number, 1, CPU):
            assert pixels.shape == (1, 4, 4, 3)
            assert (pixels == number).all()
        assert next(tasks)[0] == number + 3
    with pytest.raises(AssertionError, match="overwrite pixels in use"):
        next(tasks)
    assert np.shares_memory(ring.slot(0), ring.slot(3))
    ring.close()
