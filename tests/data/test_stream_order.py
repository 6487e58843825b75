"""The order of a stream of tars, and the batches that are read in it."""

import logging
import shutil
from collections import Counter
from functools import cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import tiny
import torch

from dive_fast.data.loaders.loader import Options, training_batches
from dive_fast.data.samples import MAX_REPLACEMENTS, ReferenceSamples
from dive_fast.data.sources import tar_stream
from dive_fast.data.sources.tar_stream import POSITION_BITS, TarStream, open_tar_stream
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.data.stream_order import StreamOrder
from dive_fast.data.transforms import Preprocess
from dive_fast.errors import DataError

PREPROCESS = Preprocess((24, 24), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), "bicubic", "shortest")
SIZES = (5, 1, 9, 3, 7, 4, 6)
"""Samples of each tar."""
TOTAL, WINDOW = sum(SIZES), 8


@cache
def tokenizer() -> Any:
    return open_clip.get_tokenizer("ViT-B-32")


def write(folder: Path, sizes: tuple[int, ...] = SIZES) -> Path:
    number = 0
    for tar, size in enumerate(sizes):
        samples = {}
        for _ in range(size):
            samples[f"{number:03d}"] = {"jpg": tiny.jpeg(number), "txt": f"caption {number}".encode()}
            number += 1
        tiny.write_tar(folder / f"{tar:05d}.tar", samples)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("shards"))


def order_of(shards: Path, batch: int = 4, rank: int = 0, ranks: int = 1, seed: int = 3) -> StreamOrder:
    return StreamOrder(open_tar_stream(str(shards), WINDOW), batch, rank, ranks, seed)


def keys(order: StreamOrder, steps: range) -> list[list[tuple[int, int]]]:
    return list(order.keys_of_steps(steps))


def samples_of(shards: Path, has_lines: bool = False) -> ReferenceSamples:
    stream = open_tar_stream(str(shards), WINDOW, has_lines)
    return ReferenceSamples(stream, tokenizer(), PREPROCESS, "argmax", 3, 2, draws_captions=has_lines)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_epochs_have_each_sample_once_over_all_ranks(shards: Path, ranks: int) -> None:
    drawn = Counter(
        key for rank in range(ranks) for step in keys(order_of(shards, 4, rank, ranks), range(200)) for key in step
    )
    assert max(drawn.values()) == 1
    complete = max(epoch for epoch, _ in drawn) // 2
    assert complete > 2
    everything = {(tar << POSITION_BITS) + row for tar, size in enumerate(SIZES) for row in range(size)}
    for epoch in range(complete):
        assert {number for each, number in drawn if each == epoch} == everything


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_all_ranks_have_full_batches_at_every_step(shards: Path, ranks: int) -> None:
    for rank in range(ranks):
        steps = keys(order_of(shards, 8, rank, ranks), range(100))
        assert [len(step) for step in steps] == [8 // ranks] * 100


@pytest.mark.parametrize(("sizes", "ranks"), [((0, 9, 0), 3), ((5, 0, 0, 0), 2), ((0, 0, 7, 0, 0, 3), 6)])
def test_few_tars_with_samples_are_enough_for_all_ranks(
    tmp_path: Path, sizes: tuple[int, ...], ranks: int
) -> None:
    write(tmp_path, sizes)
    for tar, size in enumerate(sizes):
        if not size:
            tiny.write_tar(tmp_path / f"{tar:05d}.tar", {"bare": {"jpg": tiny.jpeg(tar)}})
    for rank in range(ranks):
        steps = keys(order_of(tmp_path, 2 * ranks, rank, ranks), range(30))
        assert [len(step) for step in steps] == [2] * 30
        assert keys(order_of(tmp_path, 2 * ranks, rank, ranks), range(17, 30)) == steps[17:]


@pytest.mark.parametrize("start", [0, 1, 7, 9, 40, 101])
def test_order_from_any_step_is_that_of_the_unbroken_run(shards: Path, start: int) -> None:
    for rank in range(2):
        complete = keys(order_of(shards, 4, rank, 2), range(110))
        assert keys(order_of(shards, 4, rank, 2), range(start, 110)) == complete[start:]


def test_tars_before_the_first_step_are_scanned_once_and_no_image_is_read(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans = Counter[str]()
    scan_tar = tar_stream.scan_tar

    def count(tar: Path, *arguments: Any, **options: Any) -> Any:
        scans[tar.name] += 1
        return scan_tar(tar, *arguments, **options)

    monkeypatch.setattr(tar_stream, "scan_tar", count)
    order = order_of(shards)
    assert not scans, "nothing is scanned at the start"
    monkeypatch.setattr(TarStream, "read", None)
    next(iter(order.keys_of_steps(range(500, 600))))
    assert list(scans.values()) == [1] * len(SIZES)


def test_first_step_scans_one_window(shards: Path) -> None:
    order = order_of(shards)
    next(iter(order.keys_of_steps(range(5))))
    assert sum(order._counts.values()) < WINDOW + max(SIZES)


def test_seeds_epochs_and_positions_shuffle(shards: Path) -> None:
    first = keys(order_of(shards), range(8))
    assert first != keys(order_of(shards, seed=4), range(8))
    numbers = [number for step in keys(order_of(shards, batch=1), range(2 * TOTAL)) for _, number in step[:1]]
    assert numbers[:TOTAL] != numbers[TOTAL:]
    jumps = sum(b != a + 1 for a, b in pairwise(numbers[:TOTAL]))
    assert jumps > TOTAL // 2, "samples of a window are shuffled"


def test_batches_do_not_depend_on_workers_or_a_resume(shards: Path) -> None:
    def batches(start: int, workers: int) -> list[Any]:
        options = Options(workers=workers)
        return list(training_batches(samples_of(shards), order_of(shards), range(start, 12), options))

    complete = batches(0, 0)
    for start, workers in ((0, 2), (5, 0), (5, 1)):
        for one, other in zip(complete[start:], batches(start, workers), strict=True):
            assert one.keys == other.keys
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.text.tokens, other.text.tokens)
            assert torch.equal(one.view, other.view)


def test_pixels_and_captions_are_those_of_the_indexed_set(shards: Path) -> None:
    source = open_webdataset(str(shards), ".txt")
    indexed = {sample.key: (row, sample) for row, sample in enumerate(source.samples)}
    samples = samples_of(shards)
    for step in islice(order_of(shards).keys_of_steps(range(20)), 20):
        for _, number in step:
            row, sample = indexed[samples.images.sample(number).key]
            assert samples.images.sample(number) == sample
            assert np.array_equal(samples.images.image(number), source.image(row))


def test_crop_is_a_function_of_the_sample_and_view(shards: Path) -> None:
    one, other = samples_of(shards), samples_of(shards)
    for number in ((4 << POSITION_BITS) + 1, 1):
        assert one.crop((0, number), (50, 60)) == other.crop((2, number), (50, 60))
        assert one.crop((0, number), (50, 60)) != one.crop((1, number), (50, 60))
    assert one.crop((0, 1), (50, 60)) != one.crop((0, (4 << POSITION_BITS) + 1), (50, 60))


def test_one_of_several_lines_is_drawn_for_each_sample_and_epoch(tmp_path: Path) -> None:
    captions = "\n".join(f"line {n}" for n in range(4)).encode()
    tiny.write_tar(tmp_path / "0.tar", {str(n): {"jpg": tiny.jpeg(n), "txt": captions} for n in range(3)})
    samples = samples_of(tmp_path, has_lines=True)
    drawn = {samples.caption((epoch, number)) for epoch in range(20) for number in range(3)}
    assert drawn == {0, 1, 2, 3}
    batch = samples.batch([(0, 0)], torch.empty(0))
    expected = samples.tokenizer([f"line {samples.caption((0, 0))}"])
    assert torch.equal(batch.text.tokens[0, : batch.text.length], expected[0, : batch.text.length])


# Broken data


def test_samples_left_out_are_counted_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for tar in range(2):
        good = {f"{n}": {"jpg": tiny.jpeg(n), "txt": b"a cat"} for n in range(4)}
        bad = {"empty": {"jpg": tiny.jpeg(9), "txt": b" "}, "alone": {"jpg": tiny.jpeg(9)}}
        tiny.write_tar(tmp_path / f"{tar}.tar", good | bad)
    order = order_of(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert len({number for step in keys(order, range(2)) for _, number in step}) == 8
        keys(order, range(20))
    reports = [record.getMessage() for record in caplog.records]
    assert len(reports) == 4, "each tar is reported once"
    assert sum("its caption is empty: 1 (the first: " in report for report in reports) == 2
    assert sum("2 so far on rank 0" in report for report in reports) == 2


def test_tar_that_breaks_off_has_the_samples_before_that(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path, (6, 6))
    tar = folder / "00000.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    order = order_of(folder)
    keys(order, range(6))
    assert 0 < order._counts[0] < 6
    assert order._counts[1] == 6
    assert "the tar is incomplete: 1 (the first: 00000.tar" in caplog.text


def test_stream_without_a_complete_sample_is_refused(tmp_path: Path) -> None:
    for tar in range(3):
        tiny.write_tar(tmp_path / f"{tar}.tar", {"a": {"jpg": tiny.jpeg(0)}})
    with pytest.raises(DataError, match=r"data\.reference: .*no sample has both an image and a \.txt.*no \.txt"):
        keys(order_of(tmp_path), range(1))


@pytest.mark.parametrize("change", ["removed", "longer"])
def test_tar_that_changes_during_the_run_is_an_error(tmp_path: Path, change: str) -> None:
    order = order_of(write(tmp_path, (6, 6)))
    for tar in tmp_path.glob("*.tar"):
        if change == "removed":
            tar.unlink()
        else:
            tar.write_bytes(tar.read_bytes() + bytes(512))
    with pytest.raises(DataError, match="cannot read it" if change == "removed" else "changed during the run"):
        keys(order, range(1))


def test_broken_image_is_replaced_by_the_next_of_its_tar(tmp_path: Path) -> None:
    parts = {str(n): {"jpg": tiny.jpeg(n), "txt": b"a"} for n in range(4)}
    parts["3"]["jpg"] = b"\xff\xd8broken"
    tiny.write_tar(tmp_path / "0.tar", parts)
    tiny.write_tar(tmp_path / "1.tar", parts)
    samples = samples_of(tmp_path)
    broken = (1 << POSITION_BITS) + 3
    key, _ = samples.read_usable((0, broken), lambda key: samples.images.image(key[1]))
    assert key == (0, 1 << POSITION_BITS)


def test_many_broken_images_in_a_row_are_an_error(tmp_path: Path) -> None:
    tiny.write_tar(tmp_path / "0.tar", {str(n): {"jpg": b"broken", "txt": b"a"} for n in range(3)})
    samples = samples_of(tmp_path)
    with pytest.raises(DataError, match=f"{MAX_REPLACEMENTS} samples in a row"):
        samples.read_usable((0, 0), lambda key: samples.images.image(key[1]))


# Ranks, memory and identity


def test_more_ranks_than_tars_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"order = stream: 4 ranks need a tar each, .* has 2; .*order=indexed"):
        order_of(write(tmp_path, (6, 6)), 4, 0, 4)


def test_batch_that_ranks_cannot_share_is_refused(shards: Path) -> None:
    with pytest.raises(DataError, match=r"data\.reference\.batch_size 5 is not divisible by the 2 ranks"):
        order_of(shards, 5, 0, 2)


def test_process_keeps_the_tables_of_two_windows(shards: Path) -> None:
    order = order_of(shards)
    keys(order, range(300))
    assert sum(map(len, order.tars._tables.values())) <= 2 * WINDOW + max(SIZES)


def test_identity_is_of_names_and_sizes(shards: Path, tmp_path: Path) -> None:
    digest = open_tar_stream(str(shards), WINDOW).digest()
    shutil.copytree(shards, tmp_path / "copy")
    assert open_tar_stream(str(tmp_path / "copy"), WINDOW).digest() == digest
    (tmp_path / "copy/00003.tar").rename(tmp_path / "copy/00009.tar")
    assert open_tar_stream(str(tmp_path / "copy"), WINDOW).digest() != digest
