"""Tests of the kept index of a raw set: built once a node, mapped by all ranks, and built again after changes."""

import multiprocessing
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tiny
import torch
from distributed import run_ranks

from dive_fast.data.sources import node_index, tar_scan, webdataset
from dive_fast.data.sources.source import Source
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.distributed import Ranks
from dive_fast.errors import DataError


@pytest.fixture
def tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A set of three tars that counts as large and as old."""
    monkeypatch.setenv("DIVE_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(node_index, "SMALL_BYTES", 0)
    folder = tiny.write_shards(tmp_path / "set", 6, shard=2)
    make_old(folder)
    return folder


def make_old(folder: Path) -> None:
    for file in folder.iterdir():
        os.utime(file, (1e9, 1e9))


def indexes() -> list[Path]:
    return sorted(Path(os.environ["DIVE_FAST_CACHE"], "indexes").glob("*-*"))


def contents(source: Source) -> Any:
    return list(source.samples), list(source.skipped), list(source.ignored), source.digest(), source.modified()


def is_mapped(source: Source) -> bool:
    base: Any = source.samples.keys.values
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    return isinstance(base, np.memmap)


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all tars that are scanned."""
    names: list[str] = []

    def scan(tar: Path, text: str, strict: bool) -> tar_scan.TarScan:
        names.append(tar.name)
        return tar_scan.scan_tar(tar, text, strict)

    monkeypatch.setattr(webdataset, "scan_tar", scan)
    return names


# One process


def test_open_raw_maps_a_kept_index(tars: Path, scans: list[str]) -> None:
    first = open_webdataset(str(tars), ".cls")
    assert scans == ["0.tar", "1.tar", "2.tar"]
    second = open_webdataset(str(tars), ".cls")
    assert len(scans) == 3
    assert is_mapped(first)
    assert is_mapped(second)
    assert contents(first) == contents(second)
    assert second.image(5).size == (45, 36)


def test_index_equals_the_set_read_without_one(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tars / "1.tar").open("r+b") as tar:
        tar.truncate(5 * 512)
    make_old(tars)
    options: dict[str, Any] = {"text": ".cls", "strict": False}
    kept = [open_webdataset(str(tars), **options) for _ in range(2)]
    monkeypatch.setattr(node_index, "SMALL_BYTES", 2**30)
    plain = open_webdataset(str(tars), **options)
    assert not is_mapped(plain)
    assert contents(kept[0]) == contents(kept[1]) == contents(plain)
    assert plain.skipped
    assert kept[0].skipped == plain.skipped


def test_open_raw_small_sets_keep_nothing(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_index, "SMALL_BYTES", 2**20)
    open_webdataset(str(tars), ".cls")
    assert not indexes()


@pytest.mark.parametrize("change", ["size", "time", "contents", "removed", "added", "renamed"])
def test_open_raw_notices_changed_files(tars: Path, scans: list[str], change: str) -> None:
    before = open_webdataset(str(tars), ".cls")
    match change:
        case "size":
            tiny.write_tar(tars / "1.tar", {f"x{row}": {"jpg": tiny.jpeg(row), "cls": b"1"} for row in range(30)})
        case "time":
            tiny.write_tar(tars / "1.tar", {"x": {"jpg": tiny.jpeg(1), "cls": b"1"}})
        case "contents":  # of equal size and, below, equal modification time
            content = bytearray((tars / "1.tar").read_bytes())
            content[(content.index(b".cls") // 512 + 1) * 512] = ord("7")  # a label
            (tars / "1.tar").write_bytes(content)
        case "removed":
            (tars / "1.tar").unlink()
        case "added":
            tiny.write_tar(tars / "3.tar", {"x": {"jpg": tiny.jpeg(1), "cls": b"1"}})
        case "renamed":
            (tars / "1.tar").rename(tars / "9.tar")
    make_old(tars)
    if change == "time":
        os.utime(tars / "1.tar", ns=(10**18, 10**18 + 1))
    scans.clear()
    after = open_webdataset(str(tars), ".cls")
    assert len(scans) == len(list(tars.iterdir()))
    assert contents(after) != contents(before)
    # A running command may map the former index, until it is a week old.
    assert len(indexes()) == 2
    assert len(before.samples[3].key)


def test_open_raw_notices_files_next_to_the_tars(tars: Path) -> None:
    assert not open_webdataset(str(tars), ".cls").skipped
    (tars / "3.tar.gz").write_bytes(b"")
    for _ in range(2):
        assert [entry.key for entry in open_webdataset(str(tars), ".cls").skipped] == ["3.tar.gz"]


def test_open_raw_removes_former_indexes_after_a_week(tars: Path) -> None:
    for count in range(1, 4):
        open_webdataset(str(tars), ".cls")
        (index,) = indexes()
        os.utime(index, (time.time() - 8 * 86400,) * 2)
        tiny.write_tar(tars / "a.tar", {"x": {"jpg": tiny.jpeg(1) * 999 * count, "cls": b"1"}})
        os.utime(tars / "a.tar", (1e9, 1e9))


def test_open_raw_other_options_and_folders_have_other_indexes(tars: Path, tmp_path: Path) -> None:
    labels = open_webdataset(str(tars), ".cls").samples
    captions = open_webdataset(str(tars), ".txt").samples
    shutil.copytree(tars, tmp_path / "copy")
    copied = open_webdataset(str(tmp_path / "copy"), ".cls").samples
    assert len(indexes()) == 3
    assert (labels.has_texts, captions.has_texts) == (False, True)
    assert {path.parent for path in copied.used_files()} == {tmp_path / "copy"}


def test_open_raw_keeps_no_index_of_files_modified_a_moment_ago(tars: Path, scans: list[str]) -> None:
    os.utime(tars / "2.tar")
    assert not is_mapped(open_webdataset(str(tars), ".cls"))
    assert not indexes()
    os.utime(tars / "2.tar", (time.time() + 9e6,) * 2)  # the clock of another machine
    assert is_mapped(open_webdataset(str(tars), ".cls"))


def test_open_raw_modified_before_a_long_reading(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of whole seconds shows no second change within a second, however long reading takes."""
    os.utime(tars / "2.tar")
    read, start = node_index._read, time.time()

    def slow(*arguments: Any) -> Any:
        result = read(*arguments)
        monkeypatch.setattr(node_index.time, "time", lambda: start + 60)
        return result

    monkeypatch.setattr(node_index, "_read", slow)
    assert len(open_webdataset(str(tars), ".cls")) == 6
    assert not indexes()


# Damage


@pytest.mark.parametrize("file", ["index.json", "size.npy", "keys.npy", "label.npy", "files_ends.npy"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove", "noise"])
def test_open_raw_rebuilds_a_damaged_index(tars: Path, scans: list[str], file: str, damage: str) -> None:
    expected = contents(open_webdataset(str(tars), ".cls"))
    (index,) = indexes()
    path = index / file
    data = path.read_bytes()
    path.unlink()
    if damage != "remove":
        changed = {
            "flip": data[:-2] + bytes([data[-2] ^ 1]) + data[-1:],
            "cut": data[:-3],
            "empty": b"",
            "noise": b"\xff" * len(data),
        }
        path.write_bytes(changed[damage])
    scans.clear()
    assert contents(open_webdataset(str(tars), ".cls")) == expected
    assert len(scans) == 3
    scans.clear()
    assert contents(open_webdataset(str(tars), ".cls")) == expected
    assert not scans


@pytest.mark.parametrize("is_link", [False, True])
def test_open_raw_replaces_a_file_in_the_place_of_an_index(
    tars: Path, tmp_path: Path, scans: list[str], is_link: bool
) -> None:
    open_webdataset(str(tars), ".cls")
    (index,) = indexes()
    index.rename(tmp_path / "aside")
    if is_link:
        (tmp_path / "aside/index.json").unlink()
        index.symlink_to(tmp_path / "aside")
    else:
        index.write_text("no folder")
    for count in (6, 6):
        open_webdataset(str(tars), ".cls")
        assert len(scans) == count
    assert (tmp_path / "aside/size.npy").exists(), "nothing behind a link is removed"


def test_open_raw_without_a_cache_folder_warns(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("DIVE_FAST_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    assert len(open_webdataset(str(tars), ".cls")) == 6
    (message,) = caplog.messages
    assert message.startswith(f"{tars}: its index is not kept: ")


@pytest.mark.parametrize("function", ["numpy.save", "os.pwrite"])
def test_open_raw_with_a_full_disk_warns(
    tars: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, function: str
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(function, full)
    assert len(open_webdataset(str(tars), ".cls")) == 6
    assert "is not kept" in caplog.text
    assert "No space left" in caplog.text
    assert not indexes()


def test_open_raw_interrupted_builder_leaves_nothing(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = np.save

    def interrupt(path: Path, column: Any, **options: Any) -> None:
        if path.name == "size.npy":
            raise KeyboardInterrupt
        save(path, column, **options)

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            open_webdataset(str(tars), ".cls")
    assert not list((tars.parent / "cache/indexes").iterdir())
    assert is_mapped(open_webdataset(str(tars), ".cls"))


# Processes


def _open_counted(folder: str, counted: str) -> None:
    def scan(tar: Path, text: str, strict: bool) -> tar_scan.TarScan:
        with open(counted, "ab", buffering=0) as file:
            file.write(b".")
        time.sleep(0.1)
        return tar_scan.scan_tar(tar, text, strict)

    webdataset.scan_tar = scan  # type: ignore[assignment]
    assert len(open_webdataset(folder, ".cls")) == 6


def test_open_raw_two_processes_build_once(tars: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    arguments = (str(tars), str(tmp_path / "counted"))
    processes = [context.Process(target=_open_counted, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "counted").read_bytes() == b"..."


def test_open_raw_builds_after_a_killed_builder(tars: Path, tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=_open_counted, args=(str(tars), str(tmp_path / "counted"))
    )
    process.start()
    while not (tmp_path / "counted").exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert is_mapped(open_webdataset(str(tars), ".cls"))


def _open_on_ranks(folder: str, counted: str) -> list[Any]:
    node_index.SMALL_BYTES = 0
    ranks = Ranks(torch.distributed.get_rank(), 2, torch.device("cpu"))

    def scan(tar: Path, text: str, strict: bool) -> tar_scan.TarScan:
        with open(counted, "ab", buffering=0) as file:
            file.write(b"%d" % ranks.rank)
        return tar_scan.scan_tar(tar, text, strict)

    webdataset.scan_tar = scan  # type: ignore[assignment]
    outcomes: list[Any] = []
    for text in (".cls", ".txt"):
        source = open_webdataset(folder, text, ranks=ranks)
        outcomes.append((contents(source), is_mapped(source)))
    node_index.SMALL_BYTES = 2**20
    outcomes.append(contents(open_webdataset(folder, ".cls", ranks=ranks)))
    try:
        open_webdataset(f"{folder}/none", ".cls", ranks=ranks)
    except DataError as error:
        outcomes.append(str(error))
    return outcomes


def test_open_raw_first_rank_of_a_node_reads(tars: Path, tmp_path: Path) -> None:
    first, second = run_ranks(2, _open_on_ranks, str(tars), str(tmp_path / "counted"))
    assert first == second
    assert first[0][1]
    assert first[1][1]
    assert first[0][0] == first[2]
    assert "no such tar" in first[3]
    assert (tmp_path / "counted").read_bytes() == b"0" * 9


# Parallel reading


def loader_processes() -> list[str]:
    names = [process.name() for process in psutil.Process().children()]
    return [name for name in names if name == "pt_data_worker"]


@pytest.fixture
def parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "MIN_PARALLEL_BYTES", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})


def test_tars_read_in_processes_equal_those_read_alone(
    tars: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(node_index, "SMALL_BYTES", 2**30)
    tiny.write_tar(tars / "3.tar", {"x": {"jpg": b"1"}, ".y": {"jpg": b"2"}})
    alone = open_webdataset(str(tars), ".cls")
    request.getfixturevalue("parallel")
    together = open_webdataset(str(tars), ".cls")
    assert contents(alone) == contents(together)
    assert [len(together.skipped), len(together.ignored)] == [2, 0]
    assert not loader_processes()


@pytest.mark.usefixtures("parallel")
def test_error_of_the_first_tar_in_order_is_raised(tars: Path) -> None:
    for name in ("1.tar", "2.tar"):
        (tars / name).write_bytes(b"x" * 2000)
    with pytest.raises(DataError, match=rf"^{tars}/1\.tar: not a complete tar: "):
        open_webdataset(str(tars), ".cls")
    assert not loader_processes()
    assert not indexes()


def test_progress_of_short_work_is_not_shown(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from dive_fast import distributed

    for delay, lines in ((3.0, 0), (0.0, 1)):
        monkeypatch.setattr(distributed, "PROGRESS_DELAY", delay)
        with distributed.progress(2, "reading", "tar") as bar:
            bar.update(2)
        assert capsys.readouterr().err.count("\n") == lines
    monkeypatch.setenv("RANK", "1")
    with distributed.progress(2, "reading", "tar") as bar:
        bar.update(2)
    assert not capsys.readouterr().err
