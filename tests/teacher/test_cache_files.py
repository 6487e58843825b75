"""Files of a teacher cache: positions of rows, journals of written blocks, checksums."""

import errno
import itertools
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dive_fast.teacher import cache_files as store
from dive_fast.teacher.cache_files import CacheError, Layout, Store, Writer

FINGERPRINT = {"model": "tiny"}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BLOCK", 4)


def rows_of(layout: Layout) -> dict[str, np.ndarray[Any, Any]]:
    """All rows of a cache, numbered so that no two are equal."""
    return {
        half: np.arange(np.prod(layout.shape(half))).reshape(layout.shape(half)).astype(layout.dtype)
        for half in store.HALVES
    }


def write(folder: Path, layout: Layout, blocks: list[int], rank: int = 0) -> None:
    rows, writer = rows_of(layout), Writer(folder, layout, rank)
    for block in blocks:
        ranges = {half: layout.rows(half, block) for half in store.HALVES}
        writer.write(block, {half: rows[half][part.start : part.stop] for half, part in ranges.items()})
    writer.close()


def make(folder: Path, layout: Layout) -> Path:
    partial = store.partial_name(folder)
    store.create(partial, layout, FINGERPRINT)
    write(partial, layout, list(layout.blocks))
    store.finish(partial, folder, layout)
    return folder


def read(opened: Store, sample: list[int], view: list[int]) -> dict[str, np.ndarray[Any, Any]]:
    rows = {}
    for half in store.HALVES:
        out = np.empty((len(sample), opened.layout.width), opened.layout.dtype)
        opened.read(half, np.array(sample, np.int64), np.array(view, np.int64), out)
        rows[half] = out
    return rows


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("samples", "views"), [(0, 1), (1, 1), (3, 2), (4, 1), (9, 3)])
def test_store_reads_every_row_as_written(tmp_path: Path, samples: int, views: int, dtype: str) -> None:
    layout = Layout(samples, views, 5, dtype)
    opened = Store(make(tmp_path / "cache", layout))
    assert opened.layout == layout
    assert opened.fingerprint == FINGERPRINT
    expected = rows_of(layout)
    keys = list(itertools.product(range(samples), range(views)))
    np.random.default_rng(0).shuffle(keys)
    rows = read(opened, [sample for sample, _ in keys], [view for _, view in keys])
    for row, (sample, view) in enumerate(keys):
        assert np.array_equal(rows["image"][row], expected["image"][view * samples + sample])
        assert np.array_equal(rows["text"][row], expected["text"][sample])
    opened.check_all()
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        "cache.json",
        "checksums.npy",
        "image.npy",
        "text.npy",
    ]


def test_finished_blocks_of_all_ranks_without_torn_records(tmp_path: Path) -> None:
    layout = Layout(18, 2, 3, "float32")
    store.create(tmp_path, layout, FINGERPRINT)
    assert store.finished_blocks(tmp_path) == {}
    write(tmp_path, layout, [0, 3], rank=0)
    write(tmp_path, layout, [1, 9], rank=1)
    assert set(store.finished_blocks(tmp_path)) == {0, 1, 3, 9}
    rows = rows_of(layout)["image"][12:16].tobytes()
    assert store.finished_blocks(tmp_path)[3][0] == zlib.crc32(rows)
    journal = tmp_path / "journal-1"
    content = journal.read_bytes()
    for cut in range(len(content)):
        journal.write_bytes(content[:cut])
        assert set(store.finished_blocks(tmp_path)) == ({0, 3} | ({1} if cut >= len(content) // 2 else set()))
    # A torn record is dropped, and the next one follows the last complete record.
    write(tmp_path, layout, [5], rank=1)
    assert set(store.finished_blocks(tmp_path)) == {0, 1, 3, 5}
    # A record of full length with a changed byte.
    journal.write_bytes(content[:3] + b"\xff" + content[4:])
    assert set(store.finished_blocks(tmp_path)) == {0, 3, 9}


def test_unfinished_cache_has_another_name(tmp_path: Path) -> None:
    layout = Layout(5, 1, 3, "float32")
    folder = tmp_path / "cache"
    partial = store.partial_name(folder)
    store.create(partial, layout, FINGERPRINT)
    write(partial, layout, [0])
    assert store.is_there(partial)
    assert not store.is_there(folder)
    with pytest.raises(AssertionError, match="not all blocks"):
        store.finish(partial, folder, layout)
    write(partial, layout, [1])
    store.finish(partial, folder, layout)
    assert not partial.exists()


def test_create_allocates_all_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(1000, 1, 100, "float32")
    store.create(tmp_path / "allocated", layout, FINGERPRINT)
    image = (tmp_path / "allocated" / "image.npy").stat()
    assert image.st_size >= 400_000
    assert image.st_blocks * 512 >= 400_000  # not a sparse file

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        store.create(tmp_path / "cache", layout, FINGERPRINT)
    assert not store.is_there(tmp_path / "cache")


@pytest.mark.parametrize("half", store.HALVES)
def test_read_detects_flipped_bit(tmp_path: Path, half: str) -> None:
    layout = Layout(10, 2, 3, "float32")
    folder = make(tmp_path / "cache", layout)
    rows = layout.rows(half, 1)
    data = bytearray((folder / f"{half}.npy").read_bytes())
    start = len(data) - 4 * layout.shape(half)[0] * layout.width
    data[start + 4 * layout.width * rows.start + 7] ^= 16
    (folder / f"{half}.npy").write_bytes(data)
    opened = Store(folder)
    read(opened, [0, 9, 3], [0, 0, 0])  # other blocks
    for _ in range(2):
        with pytest.raises(CacheError, match=rf"{half}.npy: rows {rows.start} to {rows.stop - 1} have changed"):
            read(opened, [0, 5], [0, 0])
    with pytest.raises(CacheError, match="have changed"):
        opened.check_all()
    read(Store(folder, verify=False), [5], [0])


def test_read_checks_each_block_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Store(make(tmp_path / "cache", Layout(10, 2, 3, "float32")))
    checked = []
    check = opened._check
    monkeypatch.setattr(opened, "_check", lambda half, block: (checked.append((half, block)), check(half, block)))
    for _ in range(3):
        read(opened, [0, 1, 9, 0], [0, 1, 1, 0])
    assert checked == [("image", 0), ("image", 3), ("image", 5), ("text", 0), ("text", 2)]


@pytest.mark.parametrize("name", ["image.npy", "text.npy", "checksums.npy", "cache.json"])
def test_store_rejects_truncated_or_missing_file(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "cache", Layout(10, 1, 3, "float32"))
    content = (folder / name).read_bytes()
    for size in (0, 10, len(content) - 4, None):
        (folder / name).unlink()
        if size is not None:
            (folder / name).write_bytes(content[:size])
        with pytest.raises(CacheError, match=str(folder)):
            Store(folder)
    (folder / name).write_bytes(content)
    Store(folder).check_all()


def test_store_rejects_other_format_or_shape(tmp_path: Path) -> None:
    folder = make(tmp_path / "cache", Layout(10, 1, 3, "float32"))
    manifest = (folder / "cache.json").read_text()
    (folder / "cache.json").write_text(manifest.replace('"samples": 10', '"samples": 9'))
    with pytest.raises(CacheError, match="its arrays do not match"):
        Store(folder)
    (folder / "cache.json").write_text(manifest.replace('"format": 4', '"format": 2'))
    with pytest.raises(CacheError, match="of format 2, this version has 4"):
        Store(folder)
