"""Tests of the readers of image folders, webdataset tars and CSV tables."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import tiny
from PIL import Image

from dive_fast.data.sources.csv_table import open_csv
from dive_fast.data.sources.folder import open_folder
from dive_fast.data.sources.source import Source
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.errors import DataError

CAPTIONED = {f"{i:03d}": {"jpg": tiny.jpeg(i), "txt": f"caption {i}".encode()} for i in range(6)}


def content(source: Source, index: int) -> bytes:
    sample = source.samples[index]
    return sample.path.read_bytes()[sample.offset :][: sample.size if sample.size >= 0 else None]


def write(path: Path, data: bytes | str = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def assert_same_picture(image: Image.Image, data: bytes) -> None:
    expected = Image.open(io.BytesIO(data))
    if expected.mode != "L":
        expected = expected.convert("RGB")
    assert (image.mode, image.size) == (expected.mode, expected.size)
    assert image.tobytes() == expected.tobytes()


# Image folder


def test_open_folder_classes_in_order_of_names(tmp_path: Path) -> None:
    files = {
        "b/2.JPG": tiny.jpeg(2),
        "b/deeper/down/1.png": tiny.jpeg(1, kind="PNG"),
        "a/z.jpeg": tiny.jpeg(3),
        "ä b/x.gif": tiny.jpeg(4, kind="GIF"),
    }
    for name, data in files.items():
        write(tmp_path / name, data)
    write(tmp_path / "a" / "notes.txt")
    write(tmp_path / "readme.jpg", tiny.jpeg(5))
    write(tmp_path / ".thumbnails" / "x.jpg", tiny.jpeg(6))
    source = open_folder(str(tmp_path))
    assert source.class_names == ("a", "b", "ä b")
    assert [(sample.key, sample.label) for sample in source.samples] == [
        ("a/z.jpeg", 0),
        ("b/2.JPG", 1),
        ("b/deeper/down/1.png", 1),
        ("ä b/x.gif", 2),
    ]
    for index, sample in enumerate(source.samples):
        assert content(source, index) == files[sample.key]
        assert_same_picture(source.image(index), files[sample.key])


def test_open_folder_refuses_class_without_images(tmp_path: Path) -> None:
    write(tmp_path / "a" / "1.jpg", tiny.jpeg(0))
    write(tmp_path / "b" / "list.txt")
    write(tmp_path / "c" / "1.jpg", tiny.jpeg(0))
    with pytest.raises(DataError, match=rf"^{tmp_path}/b: no image below, but it would be class 1; remove it$"):
        open_folder(str(tmp_path))


def test_open_folder_refuses_missing_empty_or_other_paths(tmp_path: Path) -> None:
    file, loose = write(tmp_path / "file"), write(tmp_path / "loose/1.jpg", tiny.jpeg(0)).parent
    (tmp_path / "empty").mkdir()
    tiny.write_tar(tmp_path / "tars/0.tar", {})
    write(tmp_path / "ready/manifest.json")
    for split in ("train", "val"):
        write(tmp_path / "above" / split / "cat/1.jpg", tiny.jpeg(0))
    for path, message in {
        tmp_path / "missing": "no such folder",
        file: "expected one folder per class with images below, but it is a file",
        tmp_path / "empty": "expected one folder per class with images below, but there is none",
        loose: "expected .* there is none; it holds images outside class folders",
        tmp_path / "tars": "expected .* there is none; it holds tars: use format webdataset",
        tmp_path / "ready": "expected .* there is none; it looks like a prepared set: use format prepared",
        tmp_path / "above": "train, val are splits of a data set, not classes; name one of them",
    }.items():
        with pytest.raises(DataError, match=rf"^{path}: {message}$"):
            open_folder(str(path))


def test_open_folder_refuses_broken_link_to_an_image(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=rf"^{tmp_path}: cannot list its images: .*a/gone\.jpg"):
        open_folder(str(tmp_path))


# Webdataset


def test_open_webdataset_by_tar_brace_range_glob_or_folder(tmp_path: Path) -> None:
    for shard in range(12):
        samples = {f"{shard:02d}{i}": {"jpg": tiny.jpeg(9), "cls": b" 7\n"} for i in range(2)}
        tiny.write_tar(tmp_path / f"{shard:05d}.tar", samples)
    write(tmp_path / "00000_stats.json")

    def keys(path: str) -> list[str]:
        return [sample.key for sample in open_webdataset(path, ".cls").samples]

    def keys_of(shards: range) -> list[str]:
        return [f"{shard:05d}.tar/{shard:02d}{i}" for shard in shards for i in range(2)]

    assert keys(f"{tmp_path}/00003.tar") == keys_of(range(3, 4))
    assert keys(f"{tmp_path}/{{00002..00010}}.tar") == keys_of(range(2, 11))
    assert keys(f"{tmp_path}/0000[12].tar") == keys_of(range(1, 3))
    assert keys(f"{tmp_path}/000{{0?,11}}.tar") == keys_of(range(10)) + keys_of(range(11, 12))
    assert keys(str(tmp_path)) == keys_of(range(12))
    assert {sample.label for sample in open_webdataset(str(tmp_path), ".cls").samples} == {7}


def test_open_webdataset_folder_named_like_a_glob(tmp_path: Path) -> None:
    tiny.write_tar(tmp_path / "v[2]" / "a.tar", CAPTIONED)
    assert len(open_webdataset(str(tmp_path / "v[2]"), ".txt")) == 6


def test_open_webdataset_skips_samples_without_image_or_text(tmp_path: Path) -> None:
    samples = {
        "a": {"jpg": tiny.jpeg(0), "txt": b"one"},
        "b": {"jpg": tiny.jpeg(1), "json": b"{}"},
        "c": {"txt": b"no picture"},
        "d": {"jpg": tiny.jpeg(2)},
        "e": {"png": tiny.jpeg(3, kind="PNG"), "txt": b"  two\n", "json": b"{}"},
    }
    source = open_webdataset(str(tiny.write_tar(tmp_path / "a.tar", samples)), ".txt")
    assert [(sample.key, sample.texts) for sample in source.samples] == [
        ("a.tar/a", ("one",)),
        ("a.tar/e", ("two",)),
    ]
    assert source.skipped == [("a.tar/b", "no .txt"), ("a.tar/c", "no image"), ("a.tar/d", "no .txt")]


def test_open_webdataset_nested_dotted_and_upper_case_names(tmp_path: Path) -> None:
    members = {
        "./train/n01/0.1/x.JPG": tiny.jpeg(0),
        "./train/n02/x.jpeg": tiny.jpeg(1),
        "./train/n02/x.TXT": "größe".encode(),
        "./train/n01/0.1/x.Txt": b"far from its image",
        "y.seg.png": tiny.jpeg(2, kind="PNG"),
        "y.webp": tiny.jpeg(3, kind="WEBP"),
        "y.txt": b"half an eye",
    }
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("./train.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source = open_webdataset(str(tmp_path / "a.tar"), ".txt")
    assert [(sample.key, sample.texts) for sample in source.samples] == [
        ("a.tar/./train/n01/0.1/x", ("far from its image",)),
        ("a.tar/./train/n02/x", ("größe",)),
        ("a.tar/y", ("half an eye",)),
    ]
    assert (source.skipped, source.ignored) == ([], [])
    for index, name in enumerate(["./train/n01/0.1/x.JPG", "./train/n02/x.jpeg", "y.webp"]):
        assert content(source, index) == members[name]
        assert_same_picture(source.image(index), members[name])


def test_open_webdataset_long_names_in_gnu_and_pax_format(tmp_path: Path) -> None:
    name = "/".join(["deep" * 20] * 3) + "/picture"
    for dialect in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=dialect) as tar:
            for suffix, data in {"jpg": tiny.jpeg(0), "txt": b"caption"}.items():
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        source = open_webdataset(str(tmp_path / "a.tar"), ".txt")
        assert source.samples[0].key == f"a.tar/{name}"
        assert content(source, 0) == tiny.jpeg(0)


def test_open_webdataset_refuses_truncated_tar(tmp_path: Path) -> None:
    path = tiny.write_tar(tmp_path / "a.tar", {key: {"jpg": b"x" * 700, "txt": b"y"} for key in "abc"})
    complete = path.read_bytes()
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    for size in range(0, end + 1, 128):
        path.write_bytes(complete[:size])
        with pytest.raises(DataError, match=rf"^{path}: not a complete tar: "):
            open_webdataset(str(path), ".txt")
    # One block of the zeros that pad the last record is enough.
    path.write_bytes(complete[: end + 512])
    assert len(open_webdataset(str(path), ".txt")) == 3


def test_open_webdataset_refuses_broken_header_in_the_middle(tmp_path: Path) -> None:
    path = tiny.write_tar(tmp_path / "a.tar", CAPTIONED)
    with tarfile.open(path) as tar:
        header = tar.getmembers()[6].offset
    data = bytearray(path.read_bytes())
    data[header + 150] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"^{path}: not a complete tar: it breaks off at byte {header}$"):
        open_webdataset(str(tmp_path), ".txt")


@pytest.mark.parametrize("data", [b"", b"not a tar", tiny.jpeg(0) * 3, b"\x1f\x8b\x08\x00" + bytes(600)])
def test_open_webdataset_refuses_files_that_are_not_tars(tmp_path: Path, data: bytes) -> None:
    tiny.write_tar(tmp_path / "a.tar", CAPTIONED)
    path = write(tmp_path / "b.tar", data)
    with pytest.raises(DataError, match=rf"^{path}: not a complete tar: "):
        open_webdataset(str(tmp_path), ".txt")


def test_open_webdataset_empty_tar(tmp_path: Path) -> None:
    empty = tiny.write_tar(tmp_path / "a.tar", {})
    with pytest.raises(DataError, match=rf"^{empty}: no sample has both an image and a \.txt file$"):
        open_webdataset(str(empty), ".txt")
    tiny.write_tar(tmp_path / "b.tar", CAPTIONED)
    assert len(open_webdataset(str(tmp_path), ".txt")) == 6


@pytest.mark.parametrize("label", [b"cat", b"1.5", b"", b"\xff"])
def test_open_webdataset_refuses_labels_that_are_not_integers(tmp_path: Path, label: bytes) -> None:
    samples = {"a": {"jpg": tiny.jpeg(0), "cls": b"3"}, "b": {"jpg": tiny.jpeg(0), "cls": label}}
    path = tiny.write_tar(tmp_path / "a.tar", samples)
    with pytest.raises(DataError, match=rf"^{path}: b\.cls: .*$"):
        open_webdataset(str(path), ".cls")


def test_open_webdataset_refuses_missing_tars(tmp_path: Path) -> None:
    tiny.write_tar(tmp_path / "0.tar", CAPTIONED)
    (tmp_path / "empty").mkdir()
    for name, message in {
        "1.tar": rf"^{tmp_path}/1.tar: no such tar \({tmp_path}/1.tar does not exist\)$",
        "{0..1}.tar": rf"^{tmp_path}/{{0..1}}.tar: no such tar \({tmp_path}/1.tar does not exist\)$",
        "*.tra": rf"^{tmp_path}/\*.tra: no such tar ",
        "empty": rf"^{tmp_path}/empty: no tar in this folder$",
        "{0..1.tar": rf"^{tmp_path}/{{0..1.tar: not a brace range: ",
    }.items():
        with pytest.raises(DataError, match=message):
            open_webdataset(f"{tmp_path}/{name}", ".txt")


# CSV


def write_csv(folder: Path, *rows: str, first: str = "title\tfilepath", name: str = "list.csv") -> str:
    return str(write(folder / name, "".join(f"{row}\n" for row in (first, *rows))))


def test_open_csv_grouped_rows_are_texts_of_one_sample(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / "images" / f"{name}.jpg", tiny.jpeg(ord(name)))
    rows = "a photo of a cat\timages/b.jpg", "a dog\timages/a.jpg", "a cat\timages/b.jpg", "a cat\timages/b.jpg"
    source = open_csv(write_csv(tmp_path, *rows), None, group=True)
    assert [(sample.key, sample.texts, sample.label) for sample in source.samples] == [
        ("images/b.jpg", ("a photo of a cat", "a cat", "a cat"), -1),
        ("images/a.jpg", ("a dog",), -1),
    ]
    assert content(source, 0) == tiny.jpeg(ord("b"))
    assert_same_picture(source.image(0), tiny.jpeg(ord("b")))


def test_open_csv_ungrouped_rows_are_samples(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg", tiny.jpeg(0))
    source = open_csv(write_csv(tmp_path, "one\ta.jpg", "two\ta.jpg", "one\ta.jpg"), None, group=False)
    assert [(sample.key, sample.texts) for sample in source.samples] == [
        ("a.jpg#0", ("one",)),
        ("a.jpg#1", ("two",)),
        ("a.jpg#2", ("one",)),
    ]


def test_open_csv_relative_and_absolute_paths(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    write(there / "a.jpg", tiny.jpeg(0))
    absolute = write(tmp_path / "other" / "b.jpg", tiny.jpeg(1))
    source = open_csv(write_csv(here, "one\ta.jpg", f"two\t{absolute}"), str(there), group=True)
    assert [sample.path for sample in source.samples] == [there / "a.jpg", absolute]
    assert_same_picture(source.image(1), tiny.jpeg(1))


def test_open_csv_quotes_tabs_line_breaks_and_unicode(tmp_path: Path) -> None:
    write(tmp_path / "größe 猫.jpg", tiny.jpeg(0))
    rows = (
        'größe 猫.jpg\t7\tit\'s a "cat"',
        'größe 猫.jpg\t7\t"a ""quoted"" title,\twith a tab"',
        'größe 猫.jpg\t7\t"two\nlines"',
        "größe 猫.jpg\t7\t猫, 猫",
    )
    # As written by pandas; spreadsheets add a byte order mark.
    for mark in ("", "\ufeff"):
        path = write_csv(tmp_path, *rows, first=f"{mark}filepath\tid\ttitle")
        (sample,) = open_csv(path, None, group=True).samples
        assert sample.texts == ('it\'s a "cat"', 'a "quoted" title,\twith a tab', "two\nlines", "猫, 猫")


def test_open_csv_windows_line_ends(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg", tiny.jpeg(0))
    path = write(tmp_path / "list.csv", b"title\tfilepath\r\none\ta.jpg\r\n")
    assert [sample.path for sample in open_csv(str(path), None, group=True).samples] == [tmp_path / "a.jpg"]


@pytest.mark.parametrize(
    ("first", "missing"),
    [
        ("filepath\tcaption", "no column title in its tab-separated header"),
        ("title\tpath", "no column filepath in its tab-separated header"),
        (
            "title,filepath",
            "no column filepath and title in its tab-separated header; separate its cells by tabs",
        ),
    ],
)
def test_open_csv_refuses_missing_column(tmp_path: Path, first: str, missing: str) -> None:
    path = write_csv(tmp_path, "one\ta.jpg", first=first)
    with pytest.raises(DataError, match=rf"^{path}: {missing}$"):
        open_csv(path, None, group=True)


def test_open_csv_refuses_unusable_files(tmp_path: Path) -> None:
    for path, message in {
        str(tmp_path / "missing.csv"): "no such file",
        str(tmp_path): "cannot read it: .*directory",
        write_csv(tmp_path, name="empty.csv"): "no rows below its header",
        str(write(tmp_path / "nothing.csv")): "no column filepath and title",
        str(write(tmp_path / "latin.csv", b"title\tfilepath\n\xe4\ta.jpg\n")): "cannot read it: 'utf-8' codec",
        write_csv(tmp_path, "x" * 200_000 + "\ta.jpg", name="long.csv"): "cannot read it: field larger",
        write_csv(tmp_path, "one\tb.jpg", name="b.csv"): rf"{tmp_path}/b\.jpg does not exist; set image_root to",
    }.items():
        with pytest.raises(DataError, match=rf"^{path}: {message}[^\n]*$"):
            open_csv(path, None, group=False)


# Images and digest


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_source_image_error_names_file_and_sample(tmp_path: Path, kind: str, damage: str) -> None:
    intact = tiny.jpeg(0, kind=kind)
    data = {"cut": intact[: len(intact) // 2], "noise": b"<html>404</html>" * 9, "empty": b""}[damage]
    path = tiny.write_tar(tmp_path / "a.tar", {"k": {"jpg": data, "txt": b"x"}})
    source = open_webdataset(str(path), ".txt")
    with pytest.raises(DataError, match=rf"^{path}: sample a\.tar/k: cannot decode the image: [^\n]+$"):
        source.image(0)


def test_source_image_error_for_removed_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a" / "1.jpg", tiny.jpeg(0))
    source = open_folder(str(tmp_path))
    path.unlink()
    with pytest.raises(DataError, match=rf"^{path}: sample a/1\.jpg: .*No such file"):
        source.image(0)


def test_source_digest_depends_on_samples_only(tmp_path: Path) -> None:
    def digest(samples: dict[str, dict[str, bytes]], name: str = "a.tar") -> str:
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        tiny.write_tar(tmp_path / "set" / name, samples)
        return open_webdataset(str(tmp_path / "set"), ".txt").digest()

    original = digest(CAPTIONED)
    assert digest(CAPTIONED) == original
    first = CAPTIONED["000"]
    for changed in (
        CAPTIONED | {"000": first | {"txt": b"another"}},
        CAPTIONED | {"000": first | {"jpg": first["jpg"] + b"\0"}},
        {key: parts for key, parts in CAPTIONED.items() if key != "003"},
        {("007" if key == "003" else key): parts for key, parts in CAPTIONED.items()},
        dict(reversed(CAPTIONED.items())),
        CAPTIONED | {"006": first},
    ):
        assert digest(changed) != original
    assert digest(CAPTIONED, "b.tar") != original
    # The location of the data and files that are not used for training do not count.
    digest(CAPTIONED)
    os.rename(tmp_path / "set", tmp_path / "moved")
    assert open_webdataset(str(tmp_path / "moved"), ".txt").digest() == original
    assert digest({key: parts | {"json": b"{}"} for key, parts in CAPTIONED.items()}) == original


# Skipped samples


def test_open_webdataset_skips_duplicates_and_non_utf8_texts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tar = tiny.write_tar(
        tmp_path / "a.tar",
        {"a": {"jpg": tiny.jpeg(0), "txt": b"one"}, "b": {"jpg": tiny.jpeg(1), "txt": "größe".encode("latin-1")}},
    )
    with tarfile.open(tar, "a") as members:
        for name, data in {"a.jpg": tiny.jpeg(2), "a.txt": b"two"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            members.addfile(member, io.BytesIO(data))
    source = open_webdataset(str(tar), ".txt")
    assert [sample.texts for sample in source.samples] == [("one",)]
    assert content(source, 0) == tiny.jpeg(0)
    assert source.skipped == [
        ("a.tar/a", "duplicate name"),
        ("a.tar/b", "its caption is not UTF-8"),
    ]
    source.report_skipped("data.reference")
    assert caplog.messages == [
        "data.reference: 1 sample left out: duplicate name (the first: a.tar/a)",
        "data.reference: 1 sample left out: its caption is not UTF-8 (the first: a.tar/b)",
    ]


def test_open_webdataset_keeps_complete_samples_unless_strict(tmp_path: Path) -> None:
    path = tiny.write_tar(tmp_path / "a.tar", {key: {"jpg": b"x" * 700, "cls": b"1"} for key in "abc"})
    labels = tiny.write_tar(tmp_path / "b.tar", {"d": {"jpg": b"x", "cls": b"cat"}})
    complete = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = {member.name: member.offset_data + member.size for member in tar.getmembers()}
    for size in (0, 100, ends["a.cls"], ends["b.jpg"] - 1, ends["b.cls"], ends["c.cls"]):
        path.write_bytes(complete[:size])
        expected = [key for key in "abc" if ends[f"{key}.cls"] <= size]
        if not expected:
            with pytest.raises(DataError, match="no sample has both"):
                open_webdataset(str(path), ".cls", strict=False)
            continue
        source = open_webdataset(f"{tmp_path}/[ab].tar", ".cls", strict=False)
        assert [sample.key for sample in source.samples] == [f"a.tar/{key}" for key in expected]
        assert ("a.tar", "the tar is incomplete") in source.skipped
        assert (f"{labels.name}/d", "its label is not a non-negative integer") in source.skipped


# Links and duplicate names


def test_open_folder_refuses_broken_link_as_class_folder(tmp_path: Path) -> None:
    for name in ("a", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").write_bytes(tiny.jpeg(0))
    (tmp_path / "b").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="b: a broken link"):
        open_folder(str(tmp_path))


def test_open_folder_refuses_two_names_of_one_class_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.jpg").write_bytes(tiny.jpeg(0))
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(DataError, match=r"names .*/a twice, also as .*/b"):
        open_folder(str(tmp_path))


def test_open_webdataset_refuses_two_names_of_one_tar(tmp_path: Path) -> None:
    tiny.write_shards(tmp_path, 3)
    (tmp_path / "latest.tar").symlink_to("0.tar")
    for path in (str(tmp_path), f"{tmp_path}/*.tar", f"{tmp_path}/{{0.tar,../{tmp_path.name}/0.tar}}"):
        with pytest.raises(DataError, match=r"names .*0\.tar twice, also as"):
            open_webdataset(path, ".cls")


def test_open_webdataset_reads_all_depths_of_two_stars(tmp_path: Path) -> None:
    for folder in ("", "a", "a/b"):
        tiny.write_shards(tmp_path / folder, 2)
    assert len(open_webdataset(f"{tmp_path}/**/*.tar", ".cls")) == 6


def test_open_webdataset_refuses_or_skips_negative_labels(tmp_path: Path) -> None:
    samples = {f"{label + 1}": {"jpg": tiny.jpeg(0), "cls": str(label).encode()} for label in (-1, 0)}
    tar = str(tiny.write_tar(tmp_path / "0.tar", samples))
    with pytest.raises(DataError, match="-1 is not a label: classes are counted from 0"):
        open_webdataset(tar, ".cls")
    source = open_webdataset(tar, ".cls", strict=False)
    assert [entry.key for entry in source.skipped] == ["0.tar/0"]
