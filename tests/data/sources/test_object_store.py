"""Streams of tars in an object store: fsspec's memory stands for it."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import tiny
from PIL import Image

from dive_fast.commands import prepare
from dive_fast.config.schema import EvaluationSet, GeometryConfig, ReferenceConfig, TargetConfig
from dive_fast.data.data_paths import check_path
from dive_fast.data.open_dataset import open_reference, open_stream, open_target
from dive_fast.data.sources import object_store, tar_stream
from dive_fast.data.sources.object_store import list_remote, shown
from dive_fast.data.sources.tar_stream import TarStream, open_tar_stream
from dive_fast.data.stream_order import StreamOrder
from dive_fast.errors import DataError
from dive_fast.evaluation.datasets.resolve import open_evaluation

COUNT = 27


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Six tars of pairs at memory://bucket/set, and next to them on the disk."""
    monkeypatch.setenv("DIVE_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(object_store, "PAUSE_SECONDS", 0.0)
    tiny.write_shards(tmp_path / "disk", COUNT, shard=5)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "disk"), "/bucket/set", recursive=True)
    yield memory
    memory.rm("/bucket", recursive=True)


def fetched(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("path", ["{0..5}.tar", "*.tar", ""])
def test_stream_of_a_store_is_that_of_a_disk(store: Any, tmp_path: Path, path: str) -> None:
    local = StreamOrder(open_tar_stream(str(tmp_path / "disk"), 8), 4)
    remote = StreamOrder(open_tar_stream(f"memory://bucket/set/{path}", 8), 4)
    assert remote.tars.digest() == local.tars.digest()
    assert not fetched(tmp_path), "nothing is fetched at the start"
    steps = zip(local.keys_of_steps(range(30)), remote.keys_of_steps(range(30)), strict=True)
    for step, (expected, keys) in enumerate(steps):
        assert keys == expected
        for _, number in keys if step < 8 else ():
            assert remote.tars.sample(number).key == local.tars.sample(number).key
            assert remote.tars.read(number) == local.tars.read(number)
            assert isinstance(remote.tars.image(number), Image.Image)
        assert fetched(tmp_path)
    remote.close()
    assert not list((tmp_path / "cache/streams").iterdir()), "nothing remains"


def test_tar_that_was_removed_is_fetched_again(store: Any, tmp_path: Path) -> None:
    tars = open_tar_stream("memory://bucket/set", 8)
    data = tars.read(0)
    tars.scan(0)
    tars.remove(0)
    assert not fetched(tmp_path)
    assert tars.read(0) == data


def test_tar_that_is_removed_while_it_is_read_is_fetched_again(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars = open_tar_stream("memory://bucket/set", 8)
    key, fetch, removed = tars.sample(1).key, tar_stream.fetch, []

    def fetch_and_lose(tar: Any, file: Path) -> None:
        fetch(tar, file)
        if len(removed) < 3:  # as another process may do
            file.unlink()
            removed.append(file)

    tars.remove(0)
    tars._tables.clear()
    monkeypatch.setattr(tar_stream, "fetch", fetch_and_lose)
    assert tars.sample(1).key == key
    assert len(removed) == 3
    tars.remove(0)
    removed.clear()
    assert tars.read(1)


def test_failed_fetch_is_tried_again_and_leaves_no_part(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tars = open_tar_stream("memory://bucket/set", 8)
    get, attempts = type(store).get_file, []

    def interrupted(self: Any, place: str, file: str, **options: Any) -> None:
        attempts.append(place)
        Path(file).write_bytes(b"part")
        if len(attempts) < 3:
            raise OSError("connection reset")
        get(self, place, file, **options)

    monkeypatch.setattr(type(store), "get_file", interrupted)
    with caplog.at_level(logging.WARNING):
        tars.scan(0)
    assert len(attempts) == 3
    assert caplog.text.count("memory://bucket/set/0.tar: connection reset; tried again") == 2
    attempts.clear()
    monkeypatch.setattr(type(store), "get_file", lambda self, place, file, **options: None)
    with pytest.raises(DataError, match=r"memory://bucket/set/1\.tar: the store failed: 0 of \d+ bytes arrived"):
        tars.scan(1)
    assert [path.name for path in fetched(tmp_path)] == ["0.tar"]


def test_tar_that_changed_in_the_store_is_an_error(store: Any) -> None:
    tars = open_tar_stream("memory://bucket/set", 8)
    store.pipe("/bucket/set/0.tar", store.cat("/bucket/set/0.tar") + bytes(512))
    with pytest.raises(DataError, match=r"memory://bucket/set/0\.tar: changed since it was listed"):
        tars.scan(0)


WRONG = {
    "memory://bucket/set/{0..9}.tar": r"memory://bucket/set/6\.tar: it does not exist, or these credentials",
    "memory://bucket/other/*.tar": r"memory://bucket/other/\*\.tar: no tar there; check the name",
    "https://user:secret@host/0.tar": "https://host/0.tar: the URL contains a user or a query",
    "https://host/0.tar?sig=secret": "https://host/0.tar: the URL contains a user or a query",
    "nosuch://bucket/0.tar": "nosuch://bucket/0.tar: ",
}


@pytest.mark.parametrize("path", WRONG)
def test_url_that_cannot_be_read_is_one_line_without_secrets(store: Any, path: str) -> None:
    with pytest.raises(DataError, match=WRONG[path]) as raised:
        open_stream(ReferenceConfig(format="webdataset", path=path, order="stream"))
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_errors_of_a_store_are_named(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoCredentialsError(Exception):
        """As botocore's."""

    for error, message in (
        (ImportError("Install s3fs to access S3"), r"needs a package that is missing"),
        (PermissionError("Access Denied"), r"permission denied \(Access Denied\)"),
        (NoCredentialsError("Unable to locate credentials"), r"the store failed: Unable to locate credentials"),
    ):
        calls = []

        def fail(url: str, error: Exception = error, calls: list[str] = calls) -> Any:
            calls.append(url)
            raise error

        monkeypatch.setattr(object_store, "_store", fail)
        with pytest.raises(DataError, match=message):
            list_remote("memory://bucket/set/0.tar")
        assert len(calls) == 1, "another attempt would not help"


STORE = "s3://me:secret@bucket/set"
SET = {"format": "webdataset", "path": STORE}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "indexed": (
        lambda: open_reference(ReferenceConfig(**SET)),
        r"^data\.reference: s3://bucket/set: only a stream .*; set data\.reference\.order=stream, or copy the set",
    ),
    "folder": (
        lambda: open_reference(ReferenceConfig(**SET | {"format": "folder"})),
        r"^data\.reference: s3://bucket/set: only data\.reference with order = stream reads .*; copy the set to a",
    ),
    "target": (
        lambda: open_target(TargetConfig(**SET)),
        r"^data\.target: s3://bucket/set: only data\.reference with order = stream .*; copy the set",
    ),
    "early": (
        lambda: check_path(TargetConfig(**SET), "data.target"),
        r"^data\.target: s3://bucket/set: only data\.reference with order = stream .*; copy the set",
    ),
    "geometry": (
        lambda: open_reference(GeometryConfig(**SET)),
        r"^evaluate\.geometry: s3://bucket/set: only data\.reference with order = stream .*; copy the set",
    ),
    "evaluation set": (
        lambda: open_evaluation(EvaluationSet(**SET, class_names="imagenet"), place="evaluate.sets.x"),
        r"^evaluate\.sets\.x: s3://bucket/set: only data\.reference with order = stream .*; copy the set",
    ),
    "known data set": (
        lambda: open_evaluation(EvaluationSet(dataset="imagenet1k", path=STORE), place="evaluate.sets.x"),
        r"^evaluate\.sets\.x: s3://bucket/set: only data\.reference with order = stream .*; copy the set",
    ),
}
"""Functions that open a set in a store, and the message of each."""


@pytest.mark.parametrize("name", REFUSED)
def test_all_but_a_stream_in_a_store_is_refused(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises(DataError, match=message) as raised:
        function()
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("kind", ["webdataset", "folder"])
def test_preparation_of_a_store_is_refused(kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert prepare.main(["--format", kind, "--input", STORE, "--output", str(tmp_path / "set")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --input s3://bucket/set: an object store is not read: ")
    assert "copy the set to a disk" in error


def test_stream_is_checked_before_a_run_without_asking_the_store(tmp_path: Path) -> None:
    check_path(ReferenceConfig(**SET, order="stream"), "data.reference")
    missing = {"format": "webdataset", "path": str(tmp_path / "nowhere.tar")}
    with pytest.raises(DataError, match=r"^data\.reference: .*nowhere\.tar: no such tar"):
        check_path(ReferenceConfig(**missing, order="stream"), "data.reference")


def test_messages_hide_users_and_queries() -> None:
    assert shown("GET https://me:pw@host/a.tar?sig=1 failed") == "GET https://host/a.tar failed"


def test_stream_is_a_stream(store: Any) -> None:
    assert isinstance(open_tar_stream("memory://bucket/set/0.tar", 8), TarStream)
