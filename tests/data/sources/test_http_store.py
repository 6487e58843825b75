"""Streams of tars from a web server that is busy, breaks off, refuses, or loses an object."""

import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
import torch

from dive_fast.data.loaders.loader import Options, training_batches
from dive_fast.data.samples import ReferenceSamples
from dive_fast.data.sources import object_store, tar_stream
from dive_fast.data.sources.tar_stream import TarStream, open_tar_stream
from dive_fast.data.stream_order import TARS_AHEAD, WINDOWS, StreamOrder
from dive_fast.data.transforms import Preprocess
from dive_fast.errors import DataError, TarError

pytest.importorskip("aiohttp")
PREPROCESS = Preprocess((24, 24), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), "bicubic", "shortest")
TARS, SAMPLES, WINDOW = 8, 5, 8
TARS_OF_A_WINDOW = 2


class Store(ThreadingHTTPServer):
    """A web server of files in a folder, with ranges, tags, and failures that a test sets."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.statuses: dict[str, list[int]] = {}
        """Statuses of the next answers for a file, instead of the file."""
        self.broken: Counter[str] = Counter()
        """Number of next downloads of a file that end after half of it."""
        self.downloads: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/set"


class _Handler(BaseHTTPRequestHandler):
    server: Store
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(None)

    def do_GET(self) -> None:
        self._answer(self.path.rpartition("/")[2])

    def _answer(self, downloaded: str | None) -> None:
        name = self.path.rpartition("/")[2]
        statuses, file = self.server.statuses.get(name, []), self.server.folder / name
        if statuses:
            self._send(statuses.pop(0), b"", {})
        elif name in ("", "set"):
            names = sorted(path.name for path in self.server.folder.iterdir())
            page = "".join(f'<a href="{name}">{name}</a>\n' for name in names).encode()
            self._send(200, page, {"Content-Type": "text/html"})
        elif not file.is_file():
            self._send(404, b"", {})
        else:
            self._send_file(file, downloaded)

    def _send_file(self, file: Path, downloaded: str | None) -> None:
        data, status = file.read_bytes(), 200
        headers = {"ETag": f'"{hash(data)}"', "Accept-Ranges": "bytes", "Content-Type": "application/x-tar"}
        if (requested := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) is not None:
            first, last = int(requested[1]), int(requested[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        breaks_off = downloaded is not None and self.server.broken[file.name] > 0
        if downloaded is not None:
            self.server.downloads[file.name] += 1
            self.server.broken[file.name] -= breaks_off
        self._send(status, data, headers, breaks_off)

    def _send(self, status: int, data: bytes, headers: dict[str, str], breaks_off: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if breaks_off else data)
        if breaks_off:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("DIVE_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(object_store, "PAUSE_SECONDS", 0.0)
    tiny.write_shards(tmp_path / "disk", TARS * SAMPLES, shard=SAMPLES)
    with Store(tmp_path / "disk") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def kept(tmp_path: Path) -> list[str]:
    """Names of the files in the cache."""
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


def opened(store: Store) -> TarStream:
    return open_tar_stream(f"{store.url}/{{0..{TARS - 1}}}.tar", WINDOW)


@cache
def tokenizer() -> Any:
    return open_clip.get_tokenizer("ViT-B-32")


def batches(tars: TarStream, steps: range, workers: int) -> list[Any]:
    samples = ReferenceSamples(tars, tokenizer(), PREPROCESS, "argmax", 3)
    return list(training_batches(samples, StreamOrder(tars, 4, seed=3), steps, Options(workers=workers)))


def require_equal(expected: list[Any], batches: list[Any]) -> None:
    for one, other in zip(expected, batches, strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.text.tokens, other.text.tokens)


def test_batches_are_those_of_a_disk_with_workers_and_after_a_resume(store: Store, tmp_path: Path) -> None:
    complete = batches(open_tar_stream(str(tmp_path / "disk"), WINDOW), range(24), 0)
    for start, workers in ((0, 0), (0, 1), (13, 1)):
        require_equal(complete[start:], batches(opened(store), range(start, 24), workers))
        assert not kept(tmp_path), "the end removes all tars"


def test_folder_is_a_page_of_links(store: Store) -> None:
    assert open_tar_stream(f"{store.url}/", WINDOW).digest() == opened(store).digest()


# Failures of the store


@pytest.mark.parametrize("statuses", [[500, 500], [503, 429], [502]])
def test_busy_store_is_asked_again(store: Store, statuses: list[int], caplog: pytest.LogCaptureFixture) -> None:
    tars, data = opened(store), (store.folder / "0.tar").read_bytes()
    store.statuses["0.tar"] = list(statuses)  # fsspec asks twice for the size, by HEAD and by GET
    with caplog.at_level(logging.WARNING):
        assert len(tars.scan(0)[0]) == SAMPLES
    assert tars.tars[0].path.read_bytes() == data
    assert ("tried again" in caplog.text) == (len(statuses) == 2)


def test_busy_store_is_asked_again_at_the_start(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.statuses["3.tar"] = [500, 500]
    with caplog.at_level(logging.WARNING):
        assert len(opened(store).tars) == TARS
    assert "/set/3.tar: 500" in caplog.text


def test_download_that_breaks_off_is_repeated(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tars = opened(store)
    store.broken["0.tar"] = 2
    with caplog.at_level(logging.WARNING):
        assert len(tars.scan(0)[0]) == SAMPLES
    assert caplog.text.count("tried again") == 2
    store.broken["1.tar"] = 99
    with pytest.raises(TarError, match=r"/set/1\.tar: the store failed: "):
        tars.scan(1)
    assert store.downloads["1.tar"] == object_store.ATTEMPTS
    assert kept(tmp_path) == ["0.tar"], "no part remains"


FINAL = {404: "it does not exist, or these credentials", 403: "permission denied .*check your credentials"}
FINAL |= {400: "the store failed: 400", 503: "the store failed: 503"}


@pytest.mark.parametrize("status", FINAL)
def test_refusal_ends_the_run_and_replaces_no_sample(
    store: Store, tmp_path: Path, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    tars = opened(store)
    samples = ReferenceSamples(tars, tokenizer(), PREPROCESS, "argmax", 3)
    store.statuses["0.tar"] = [status] * 99
    with caplog.at_level(logging.WARNING), pytest.raises(TarError, match=rf"/set/0\.tar: {FINAL[status]}"):
        samples.read_usable((0, 0), lambda key: tars.image(key[1]))
    assert "replaces it" not in caplog.text
    assert caplog.text.count("tried again") == (object_store.ATTEMPTS - 1 if status == 503 else 0)
    assert not kept(tmp_path)


def test_worker_that_cannot_fetch_ends_the_run(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tars, owner, scan, fetch = opened(store), os.getpid(), TarStream._scan, tar_stream.fetch

    def lose(self: TarStream, tar: int) -> Any:
        """In a worker, the tar is gone: here, and in the store."""
        if os.getpid() != owner:
            self.tars[tar].path.unlink(missing_ok=True)
        return scan(self, tar)

    def fail(remote: Any, path: Path, **options: Any) -> None:
        gone = remote if os.getpid() == owner else remote._replace(url=f"{store.url}/gone.tar")
        fetch(gone, path, **options)

    monkeypatch.setattr(TarStream, "_scan", lose)
    monkeypatch.setattr(tar_stream, "fetch", fail)
    with pytest.raises(TarError, match=r"^http\S+/set/gone\.tar: it does not exist"):
        batches(tars, range(9), 1)
    assert "replaces it" not in caplog.text


def test_object_that_vanishes_or_changes_ends_the_run(store: Store, tmp_path: Path) -> None:
    tars = opened(store)
    (store.folder / "0.tar").unlink()
    with pytest.raises(TarError, match=r"/set/0\.tar: it does not exist"):
        tars.scan(0)
    data = bytearray((store.folder / "1.tar").read_bytes())
    data[600] ^= 1
    (store.folder / "1.tar").write_bytes(data)  # of equal size
    with pytest.raises(TarError, match=r"/set/1\.tar: changed since it was listed"):
        tars.scan(1)
    assert not kept(tmp_path)


def test_full_disk_is_reported_as_such(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    tars, calls = opened(store), []

    def full(*arguments: Any) -> None:
        calls.append(arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(object_store, "_fetch", full)
    with pytest.raises(TarError, match=r"the disk that it is fetched to is full; set DIVE_FAST_CACHE"):
        tars.scan(0)
    assert len(calls) == 1


def test_server_that_is_down_is_one_line(store: Store) -> None:
    with pytest.raises(DataError, match=r"^http://127\.0\.0\.1:1/0\.tar: the store failed: [^\n]*$"):
        open_tar_stream("http://127.0.0.1:1/0.tar", WINDOW)


# Fetching ahead


def test_next_tars_are_fetched_while_a_window_is_read(store: Store, tmp_path: Path) -> None:
    tars = opened(store)
    steps = StreamOrder(tars, 2).keys_of_steps(range(999))
    next(steps)
    assert sum(store.downloads.values()) == TARS_OF_A_WINDOW, "no thread before the first batch: loaders fork then"
    for _ in range(TARS_AHEAD + 1):
        next(steps)
        ahead = tars._ahead
        assert ahead is not None
        ahead[1].join()
    assert sum(store.downloads.values()) == TARS_OF_A_WINDOW + TARS_AHEAD
    store.statuses = {f"{tar}.tar": [404] * 99 for tar in range(TARS)}
    next(steps)
    next(steps)  # of the next window: its tars are here
    assert sum(store.downloads.values()) == TARS_OF_A_WINDOW + TARS_AHEAD
    tars.close()
    assert not kept(tmp_path)


def test_failure_ahead_is_not_reported_and_the_tar_fetched_again(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    tars = opened(store)
    store.broken["5.tar"] = 1
    with caplog.at_level(logging.WARNING):
        tars.fetch_ahead(5)
        assert tars._ahead is not None
        tars._ahead[1].join()
        assert store.downloads["5.tar"] == 1
        assert len(tars.scan(5)[0]) == SAMPLES
    assert not caplog.text


def held_fetch(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Makes each fetch wait for the event that it returns."""
    fetch, may_end = tar_stream.fetch, threading.Event()

    def slow(*arguments: Any, **options: Any) -> None:
        may_end.wait()
        fetch(*arguments, **options)

    monkeypatch.setattr(tar_stream, "fetch", slow)
    return may_end


def test_tar_that_is_being_fetched_is_awaited(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    tars, may_end = opened(store), held_fetch(monkeypatch)
    tars.fetch_ahead(5)
    threading.Timer(0.05, may_end.set).start()
    tars.scan(5)
    assert store.downloads["5.tar"] == 1


def test_tar_that_arrives_after_the_end_is_removed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars, may_end = opened(store), held_fetch(monkeypatch)
    tars.fetch_ahead(5)
    assert tars._ahead is not None
    thread = tars._ahead[1]
    tars.close()
    may_end.set()
    thread.join()
    assert not kept(tmp_path)


def test_later_epochs_keep_the_tars_of_some_windows_alone(store: Store, tmp_path: Path) -> None:
    tars = opened(store)
    steps = StreamOrder(tars, 4).keys_of_steps(range(999))
    most = 0
    for _ in range(5 * TARS * SAMPLES // 4):
        for _, number in next(steps):
            tars.read(number)
        if tars._ahead is not None:
            tars._ahead[1].join()
        most = max(most, len(kept(tmp_path)))
    assert TARS_OF_A_WINDOW < most <= WINDOWS * TARS_OF_A_WINDOW + TARS_AHEAD < TARS
    tars.close()


def test_parts_of_killed_processes_are_removed_after_an_hour(store: Store, tmp_path: Path) -> None:
    tars = opened(store)
    folder = tars.tars[0].path.parent
    folder.mkdir(parents=True)
    for name, age in ((".partial-1-1-0.tar", 7200), (".partial-2-2-0.tar", 60)):
        (folder / name).write_bytes(b"part")
        time = (folder / name).stat().st_mtime - age
        os.utime(folder / name, (time, time))
    tars.scan(0)
    assert kept(tmp_path) == [".partial-2-2-0.tar", "0.tar"]
