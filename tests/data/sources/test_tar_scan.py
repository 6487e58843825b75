"""Tests that the fast reader of plain tars returns what the careful reader of any tar returns."""

import io
import os
import tarfile
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dive_fast.data.sources import tar_index, tar_scan
from dive_fast.data.sources.source import EMPTY_CAPTION
from dive_fast.data.sources.tar_scan import MAX_TEXT_BYTES, scan_carefully, scan_tar
from dive_fast.errors import DataError

FUZZ = int(os.environ.get("DIVE_FUZZ", "1"))
FORMATS = tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT
BLOCK = tarfile.BLOCKSIZE


class File(NamedTuple):
    """A member of a tar to write."""

    name: str
    data: bytes = b"x"
    kind: bytes = tarfile.REGTYPE
    mtime: float = 0
    records: dict[str, str] = {}  # noqa: RUF012 - never changed
    """Records of the PAX header."""


def tar_bytes(files: list[File], form: int = tarfile.USTAR_FORMAT) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=form) as tar:
        for file in files:
            member = tarfile.TarInfo(file.name)
            member.type, member.mtime, member.linkname = file.kind, file.mtime, "d/a.jpg"
            member.pax_headers = file.records
            if member.isreg() or file.kind == tarfile.CONTTYPE:
                member.size = len(file.data)
            try:
                tar.addfile(member, io.BytesIO(file.data) if member.size else None)
            except (ValueError, UnicodeError):
                continue  # a name that the format cannot hold
    return content.getvalue()


def outcome(scan: Any, tar: Path, text: str, strict: bool) -> Any:
    """All results of a reader, or its error."""
    try:
        table, skipped, ignored = scan(tar, text, strict)
    except DataError as error:
        return str(error)
    return list(table), skipped, ignored, table.digest()


def assert_same(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder, "a.tar")
        tar.write_bytes(data)
        for text, strict in ((".txt", True), (".txt", False), (".cls", True), (".cls", False)):
            assert outcome(scan_tar, tar, text, strict) == outcome(scan_carefully, tar, text, strict)


def is_read_fast(tar: Path) -> bool:
    descriptor = os.open(tar, os.O_RDONLY)
    try:
        return tar_index.read_plain_members(descriptor, ".txt", MAX_TEXT_BYTES) is not None
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("caption", [b"\0", b" \0 \n"])
def test_captions_of_zero_bytes_are_empty(tmp_path: Path, caption: bytes) -> None:
    files = [File("a.jpg", b"x"), File("a.txt", caption), File("b.jpg", b"x"), File("b.txt", b"\0b\0")]
    (tmp_path / "a.tar").write_bytes(tar_bytes(files, tarfile.PAX_FORMAT))
    for scan in (scan_tar, scan_carefully):
        table, skipped, _ = scan(tmp_path / "a.tar", ".txt", True)
        assert [sample.texts for sample in table] == [("b",)]
        assert skipped == [("a.tar/a", EMPTY_CAPTION)]


# Any tar

FOLDERS = "", "d/", "./d/", "/d/", "../", ".h/", "__MACOSX/", "a.b/", "d//", "é/", "long" * 30 + "/"
STEMS = "a", "b", "a b", "", "é", "\udce9", "thumbs", "desktop", ".", "y" * 90, "\u212a"
SUFFIXES = (
    *(".jpg", ".JPG", ".png", ".txt", ".TXT", ".cls", ".json", ".heic", ".db", ".ini", ".seg.png", ".1.jpg"),
    *(".1.txt", "", ".", ".jp\u212ag", ".tx\udce9", ".x/a.jpg"),
)
CONTENTS = (
    b"",
    b"3",
    b" a cat \r\n",
    b"\xef\xbb\xbfx",
    b"\xe4",
    b"a\0b",
    b"-1",
    b"x" * 700,
    b"y" * 9000,
    b"7\xc2\xa0",
)
KINDS = (
    *(tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE),
    *(tarfile.CONTTYPE, tarfile.CHRTYPE),
)
RECORDS = {"path": "d/b.jpg"}, {"comment": "x"}, {"size": "700"}, {"mtime": "1.5"}, {"mtime": "x"}, {"atime": "7"}

PLAIN_NAMES = st.builds(
    "{}{}{}".format, st.sampled_from(["", "d/"]), st.sampled_from("ab"), st.sampled_from(SUFFIXES)
)
NAMES = st.builds("{}{}{}".format, *(st.sampled_from(parts) for parts in (FOLDERS, STEMS, SUFFIXES)))
FILES = st.builds(
    File,
    st.one_of(PLAIN_NAMES, NAMES),
    st.sampled_from(CONTENTS),
    st.one_of(st.just(tarfile.REGTYPE), st.just(tarfile.REGTYPE), st.sampled_from(KINDS)),
    st.sampled_from([0, 1.7e9, 1.7e9 + 0.25]),
    st.one_of(st.just({}), st.just({}), st.just({}), st.sampled_from(RECORDS)),
)
PLAIN_FILES = st.builds(File, PLAIN_NAMES, st.sampled_from(CONTENTS), mtime=st.sampled_from([0, 1.5]))


@settings(max_examples=30 * FUZZ, deadline=None, suppress_health_check=list(HealthCheck))
@example(files=[File("d/", kind=tarfile.AREGTYPE), File("a.jpg"), File("a.txt")], form=tarfile.GNU_FORMAT)
@example(files=[File("a.jpg/"), File("a.txt"), File("b.jpg"), File("b.txt")], form=tarfile.USTAR_FORMAT)
@given(files=st.lists(st.one_of(PLAIN_FILES, FILES), max_size=9), form=st.sampled_from(FORMATS))
def test_scan_tar_equals_careful_scan(files: list[File], form: int) -> None:
    assert_same(tar_bytes(files, form))


@settings(max_examples=30 * FUZZ, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    files=st.lists(PLAIN_FILES, min_size=1, max_size=4),
    form=st.sampled_from(FORMATS),
    changes=st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, BLOCK - 1), st.sampled_from(b"\0 079/._x\x80\xff")), max_size=4
    ),
    valid=st.booleans(),
    cut=st.one_of(st.just(0), st.integers(0, 12_000)),
)
def test_scan_tar_equals_careful_scan_of_damaged_headers(
    files: list[File], form: int, changes: list[tuple[int, int, int]], valid: bool, cut: int
) -> None:
    """Changes bytes of the first blocks, with checksums that are still right or not, and cuts the tar."""
    data = bytearray(tar_bytes(files, form))
    for row, column, value in changes:
        start = row * BLOCK
        data[start + column] = value
        if valid:
            data[start + 148 : start + 156] = b" " * 8
            data[start + 148 : start + 155] = b"%06o\0" % sum(data[start : start + BLOCK])
    assert_same(bytes(data[: len(data) - cut]))


COLUMNS = [0, 4, 99, *range(148, 158), 257, 262, 263, 264, 265, 345, 346, 499, 500, 511]
"""Bytes of a header: the name and its end, checksum, type, magic, first bytes of owner and prefix, the end."""
COLUMNS += [
    at for first, size in tar_index._NUMBERS for at in {first, first + 1, first + size - 2, first + size - 1}
]


@pytest.mark.parametrize("valid", [True, False])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_scan_tar_equals_careful_scan_for_each_byte_of_a_header(tmp_path: Path, form: int, valid: bool) -> None:
    """Each byte of the second header has several values, with a checksum that is right or not."""
    files = [File("a.txt"), *(File(name, b"7" * 600) for name in ("a.jpg", "b.jpg", "b.txt"))]
    original = tar_bytes(files, form)[: 14 * BLOCK]
    start, tar, num_fast = 2 * BLOCK, tmp_path / "a.tar", 0
    for column in sorted(set(COLUMNS)):
        for value in b"\0 019/_x\xff":
            data = bytearray(original)
            data[start + column] = value
            if valid and not 148 <= column < 156:
                data[start + 148 : start + 156] = b" " * 8
                data[start + 148 : start + 155] = b"%06o\0" % sum(data[start : start + BLOCK])
            tar.write_bytes(data)
            fast = outcome(scan_tar, tar, ".txt", False)
            assert fast == outcome(scan_carefully, tar, ".txt", False), (column, value)
            num_fast += is_read_fast(tar)
    assert num_fast > (150 if valid else 15)


@pytest.mark.parametrize("form", FORMATS)
def test_plain_tars_are_read_fast(tmp_path: Path, form: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_scan, "scan_carefully", None)
    monkeypatch.setattr(tar_index, "_CHECKED_HEADERS", 8)
    # webdataset's writer has times with fractions, which are PAX records.
    names = [f"d/{row:05d}.{suffix}" for row in range(20) for suffix in ("jpg", "json", "txt")]
    files = [File("d", kind=tarfile.DIRTYPE), *(File(name, name.encode() * 90, mtime=1.5) for name in names)]
    tar = tmp_path / "a.tar"
    tar.write_bytes(tar_bytes(files, form))
    table = scan_tar(tar, ".txt", True).table
    assert [table.key(row) for row in range(20)] == [f"a.tar/d/{row:05d}" for row in range(20)]
    with tarfile.open(tar) as archive:
        expected = [
            (member.offset_data, member.size, name.replace("jpg", "txt") * 90)
            for name, member in zip(names, archive.getmembers()[1:], strict=True)
            if name.endswith("jpg")
        ]
    assert [(sample.offset, sample.size, *sample.texts) for sample in table] == expected
    assert {sample.path for sample in table} == {tar}


@pytest.mark.parametrize("form", FORMATS)
def test_unusual_samples_of_plain_tars_are_read_fast(
    tmp_path: Path, form: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = tmp_path / "a.tar"
    names = [
        "a.txt",
        ".x.jpg",
        "b.jpg",
        "a.jpg",
        "b.txt",
        "b.png",
        "c.json",
        "d.1.txt",
        "d.1.jpg",
        "a.TXT",
        "e.jpg",
    ]
    tar.write_bytes(tar_bytes([File(name) for name in names], form))
    expected = scan_carefully(tar, ".txt", True)
    assert (len(expected.table), len(expected.skipped), len(expected.ignored)) == (2, 4, 2)
    monkeypatch.setattr(tar_scan, "scan_carefully", None)
    scan = scan_tar(tar, ".txt", True)
    assert (list(scan.table), *scan[1:]) == (list(expected.table), *expected[1:])


def test_scan_tar_reads_long_texts_up_to_a_limit(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    texts = {"a": b"x" * 20_000, "b": b"y" * MAX_TEXT_BYTES, "c": b"z" * (MAX_TEXT_BYTES + 1), "d": b"1"}
    samples = {key: {"jpg": tiny.jpeg(0), "txt": text} for key, text in texts.items()}
    tiny.write_tar(tar, samples)
    assert is_read_fast(tar)
    for scan in (scan_tar(tar, ".txt", True), scan_carefully(tar, ".txt", True)):
        assert [sample.texts[0].encode() for sample in scan.table] == [texts[key] for key in "abd"]
        assert scan.skipped == [("a.tar/c", "its caption is longer than 1 MiB")]


def test_scan_tar_of_a_tar_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = tmp_path / "a.tar"
    tiny.write_tar(tar, {f"{row}": {"jpg": b"x" * 9000, "txt": b"y"} for row in range(9)})
    read = os.pread

    def shrink(descriptor: int, count: int, position: int) -> bytes:
        if position > 20_000:
            os.truncate(tar, 30_000)
        return read(descriptor, count, position)

    monkeypatch.setattr(os, "pread", shrink)
    with pytest.raises(DataError, match=rf"^{tar}: not a complete tar: it breaks off"):
        scan_tar(tar, ".txt", True)
