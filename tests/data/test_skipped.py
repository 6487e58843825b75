"""Tests that every sample a reader leaves out is counted and reported with its reason."""

import os
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
import tiny
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from dive_fast.config.schema import ReferenceConfig, TargetConfig
from dive_fast.data.decode import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES
from dive_fast.data.open_dataset import open_reference, open_target
from dive_fast.data.sources.csv_table import open_csv
from dive_fast.data.sources.folder import open_folder
from dive_fast.data.sources.sample_table import Sample, SampleTable
from dive_fast.data.sources.source import Skipped, SkippedEntries, Source
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.errors import DataError

JPEG = tiny.jpeg(0, (12, 10))
FORK = b"\0\5\x16\7" + bytes(30)
"""Resource fork that macOS stores next to x.jpg as ._x.jpg."""


def write(path: Path, data: bytes = JPEG) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_tar(path: Path, files: dict[str, bytes | str]) -> Path:
    """Writes files in this order; a # and what follows are cut off names; a string is the target of a link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name.partition("#")[0])
            if isinstance(data, str):
                member.type, member.linkname = tarfile.LNKTYPE, data
                tar.addfile(member)
            else:
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
    return path


# Image folders: files below a class, number of samples, number of skipped samples, and the reported reason

FOLDER: dict[str, tuple[dict[str, bytes], int, int, str]] = {
    "torchvision's suffixes": ({f"{i}{suffix}": JPEG for i, suffix in enumerate(IMG_EXTENSIONS)}, 9, 0, ""),
    "upper case": ({"a.JPG": JPEG, "b.TiF": JPEG}, 2, 0, ""),
    "other images": ({"a.heic": JPEG, "b.HEIC": b"", "c.avif": b""}, 3, 3, "images of suffix .heic are not read"),
    "no suffix": ({"image_0001": JPEG, "b.jpg_": JPEG}, 2, 2, "an image by its content, but not by its suffix"),
    "part of a download": ({"a.jpg.part": JPEG}, 1, 1, "an image by its content, but not by its suffix"),
    "hidden": ({".a.jpg": JPEG}, 1, 1, "a hidden file; rename it"),
    "resource forks": ({"._a.jpg": FORK, "Thumbs.db": b"x", ".DS_Store": b"x", "sub/._b.png": FORK}, 0, 0, ""),
    "notebooks": ({".ipynb_checkpoints/a-checkpoint.jpg": JPEG, "__MACOSX/._a.jpg": FORK}, 0, 0, ""),
    "side files": ({"a.txt": b"x", "a.json": b"{}", "model.bin": b"x"}, 0, 0, ""),
    "nested": ({"x/y/a.jpg": JPEG, "x/y/b.heif": JPEG}, 2, 1, "images of suffix .heif are not read"),
}


@pytest.mark.parametrize("case", FOLDER)
def test_open_folder_counts_all_skipped(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    files, count, num_skipped, reason = FOLDER[case]
    write(tmp_path / "cat/good.jpg")
    for name, data in files.items():
        write(tmp_path / "cat" / name, data)
    source = open_folder(str(tmp_path))
    assert (len(source) + len(source.skipped), len(source.skipped)) == (1 + count, num_skipped)
    source.report_skipped("data.target")
    reports = [message for message in caplog.messages if " left out: " in message]
    assert sum(int(message.split()[1]) for message in reports) == num_skipped
    assert not reason or any(reason in message for message in reports)
    # Files that are neither samples nor side files are counted as ignored.
    side_files = {name for name in files if Path(name).suffix in (".txt", ".json")}
    assert len(source.ignored) == (0 if count else len(files) - len(side_files))


def test_image_suffixes_include_those_of_torchvision(tmp_path: Path) -> None:
    assert set(IMG_EXTENSIONS) <= IMAGE_SUFFIXES
    assert not IMAGE_SUFFIXES & OTHER_IMAGE_SUFFIXES
    for row, suffix in enumerate((*IMG_EXTENSIONS, ".gif", ".TIFF", ".Jpeg")):
        write(tmp_path / "ab"[row % 2] / f"{row}{suffix}")
    write(tmp_path / "a/deeper/x.ppm")
    (tmp_path / "b/link").symlink_to(write(tmp_path.with_name("other") / "y.jpg").parent)
    source = open_folder(str(tmp_path))
    gif = 1  # which torchvision does not read
    assert len(source) == len(ImageFolder(str(tmp_path))) + gif == 14
    assert [sample.key for sample in source.samples if "link" in sample.key] == ["b/link/y.jpg"]


def test_open_folder_ignores_system_folders(tmp_path: Path) -> None:
    for name in ("cat", "dog", "__MACOSX", ".ipynb_checkpoints", "@eaDir", "__pycache__"):
        write(tmp_path / name / "a.jpg")
    write(tmp_path / "loose.jpg")
    source = open_folder(str(tmp_path))
    assert (source.class_names, len(source), source.skipped) == (("cat", "dog"), 2, [])
    assert len(source.ignored) == 5


def test_open_folder_error_for_class_of_unread_suffixes(tmp_path: Path) -> None:
    write(tmp_path / "a/1.jpg")
    write(tmp_path / "b/1.heic")
    write(tmp_path / "b/2.heic")
    message = (
        r"b: no readable image below, but it would be class 1: 2 images of suffix \.heic are not read; "
        r"the first: b/1\.heic$"
    )
    with pytest.raises(DataError, match=message):
        open_folder(str(tmp_path))


def test_open_folder_refuses_link_to_a_parent(tmp_path: Path) -> None:
    write(tmp_path / "a/1.jpg")
    (tmp_path / "a/loop").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"a/loop/a: a link to a folder above it"):
        open_folder(str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_open_folder_error_for_unreadable_folder(tmp_path: Path) -> None:
    write(tmp_path / "a/1.jpg")
    write(tmp_path / "a/closed/2.jpg").parent.chmod(0)
    with pytest.raises(DataError, match=r"cannot list its images: .*closed"):
        open_folder(str(tmp_path))


def test_open_folder_warns_of_path_one_level_too_high(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("photo/cat", "photo/dog", "sketch/cat"):
        write(tmp_path / name / "1.jpg")
    open_folder(str(tmp_path))
    assert (
        "all images lie in subfolders of the class folders (photo/cat/1.jpg); the classes are photo, sketch"
        in caplog.text
    )
    caplog.clear()
    write(tmp_path / "photo/2.jpg")
    open_folder(str(tmp_path))
    assert not caplog.messages


# Tars: files, number of samples, number of skipped samples, and a reported reason

WEBDATASET: dict[str, tuple[dict[str, bytes | str], int, int, str]] = {
    "unread suffix": ({"a.heic": JPEG, "a.txt": b"x"}, 1, 1, "images of suffix .heic are not read"),
    "tif": ({"a.tif": JPEG, "a.txt": b"x"}, 1, 0, ""),
    "dotted": ({"v1.0.jpg": JPEG, "v1.0.txt": b"x", "v1.1.jpg": JPEG, "v1.1.txt": b"x"}, 2, 2, "a dot before"),
    "dotted next to a complete one": (
        {"v1.jpg": JPEG, "v1.txt": b"x", "v1.0.jpg": JPEG, "v1.0.txt": b"x"},
        *(2, 1, "a dot before the suffix"),
    ),
    "dotted image alone": ({"x.input.jpg": JPEG, "x.txt": b"x"}, 1, 1, "no image; a dot before the suffix"),
    "compound side file": ({"y.jpg": JPEG, "y.seg.png": JPEG, "y.txt": b"x"}, 1, 0, ""),
    "duplicate": (
        {"a.jpg": JPEG, "a.txt": b"x", "a.jpg#": JPEG, "a.txt#": b"y", "a.JPG": JPEG, "a.TXT": b"z"},
        *(3, 2, "duplicate name"),
    ),
    "empty caption": ({"a.jpg": JPEG, "a.txt": b" \n\t"}, 1, 1, "its caption is empty"),
    "byte order mark alone": ({"a.jpg": JPEG, "a.txt": b"\xef\xbb\xbf"}, 1, 1, "its caption is empty"),
    "latin caption": ({"a.jpg": JPEG, "a.txt": b"\xe4"}, 1, 1, "its caption is not UTF-8"),
    "no caption": ({"a.jpg": JPEG, "b.txt": b"x"}, 2, 2, "no image"),
    "link inside": ({"a.jpg": JPEG, "a.txt": b"x", "b.jpg": "a.jpg", "b.txt": b"y"}, 2, 0, ""),
    "link outside": ({"b.jpg": "other/a.jpg", "b.txt": b"y"}, 1, 1, "a link or a sparse file"),
    "hidden": ({".b.jpg": JPEG}, 1, 1, "a hidden file"),
    "resource forks": ({"._a.jpg": FORK, "__MACOSX/a.jpg": FORK, ".DS_Store": b"", "README.md": b""}, 0, 0, ""),
    "second image": ({"a.jpg": JPEG, "a.png": JPEG, "a.txt": b"x"}, 1, 0, ""),
    "own folders": ({"./d/a.jpg": JPEG, "./d/a.txt": b"x", "a.b/c.jpg": JPEG, "a.b/c.txt": b"x"}, 2, 0, ""),
}


@pytest.mark.parametrize("case", WEBDATASET)
def test_open_webdataset_counts_all_skipped(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    files, count, num_skipped, reason = WEBDATASET[case]
    write_tar(tmp_path / "0.tar", {"good.jpg": JPEG, "good.txt": b"x", **files})
    source = open_webdataset(str(tmp_path), ".txt")
    assert (len(source) + len(source.skipped), len(source.skipped)) == (1 + count, num_skipped), source.skipped
    source.report_skipped("data.reference")
    reports = [message for message in caplog.messages if " left out: " in message]
    assert sum(int(message.split()[1]) for message in reports) == num_skipped
    assert not reason or any(reason in message for message in reports), reports
    for index in range(len(source)):
        assert source.read(index) == JPEG


def test_open_webdataset_compressed_tars_are_skipped_or_refused(tmp_path: Path) -> None:
    import gzip

    plain = write_tar(tmp_path / "0.tar", {"a.jpg": JPEG, "a.txt": b"x"})
    packed = write(tmp_path / "1.tar.gz", gzip.compress(plain.read_bytes()))
    write(tmp_path / "._0.tar", FORK)
    plain.rename(tmp_path / "0.TAR")
    source = open_webdataset(str(tmp_path), ".txt")
    assert (len(source), source.skipped) == (1, [("1.tar.gz", "a compressed tar; unpack it to a plain .tar")])
    assert [key for key, _ in source.ignored] == ["._0.tar"]
    with pytest.raises(DataError, match=r"1\.tar\.gz: not a complete tar: it is compressed by gzip; unpack it to"):
        open_webdataset(str(packed), ".txt")
    (tmp_path / "0.TAR").unlink()
    (tmp_path / "._0.tar").unlink()
    with pytest.raises(
        DataError, match=r": no tar in this folder; 1\.tar\.gz is compressed: unpack it to a plain \.tar$"
    ):
        open_webdataset(str(tmp_path), ".txt")


def test_open_webdataset_without_samples_gives_reasons(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"img_v1.0.jpg": JPEG, "img_v1.0.txt": b"x"})
    with pytest.raises(
        DataError, match=r"both an image and a \.txt file \(1 a dot before the suffix: .*a\.tar/img_v1\.0"
    ):
        open_webdataset(str(path), ".txt")


def test_open_webdataset_refuses_tar_named_twice(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", {"a.jpg": JPEG, "a.txt": b"x"})
    with pytest.raises(DataError, match=rf"names {path} twice"):
        open_webdataset(f"{tmp_path}/{{0,?}}.tar", ".txt")


@pytest.mark.parametrize("label", ["1_0", "٣", "0x1", "1e3", "1 2"])
def test_open_webdataset_labels_are_decimal_digits(tmp_path: Path, label: str) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.jpg": JPEG, "a.cls": label.encode()})
    with pytest.raises(DataError, match=r"a\.cls: .* is not an integer"):
        open_webdataset(str(path), ".cls")
    write_tar(path, {"a.jpg": JPEG, "a.cls": b"\xef\xbb\xbf+7\r\n"})
    assert open_webdataset(str(path), ".cls").samples[0].label == 7


@pytest.mark.timeout(60)
def test_readers_do_not_block_on_pipes(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    for name in ("list.csv", "0.tar", "cat/model.bin", "cat/a.heic"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=r"list\.csv: cannot read it: it is a pipe or device$"):
        open_csv(str(tmp_path / "list.csv"), None, group=False)
    for path, message in (
        (tmp_path, "named like a tar, but not a regular file"),
        (tmp_path / "0.tar", "no such tar"),
    ):
        with pytest.raises(DataError, match=rf"0\.tar.*{message}|{message}.*0\.tar"):
            open_webdataset(str(path), ".txt")
    write(tmp_path / "cat/1.jpg")
    source = open_folder(str(tmp_path))
    assert (len(source), len(source.skipped), len(source.ignored)) == (1, 1, 1)


# CSV


def csv(folder: Path, text: str | bytes) -> str:
    for name in "abcd":
        write(folder / f"{name}.jpg")
    return str(write(folder / "list.csv", text if isinstance(text, bytes) else text.encode()))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('a.jpg\t"the quick cat\nb.jpg\ta dog\nc.jpg\tthe end" sign\n', "expected after .* in row 1 "),
        ('a.jpg\ta\nb.jpg\t"open to the end\nc.jpg\tx\n', r"unexpected end of data in row 2 \(line 3\)"),
        (
            'a.jpg\t"one\nb.jpg\tof two"\nc.jpg\tx\n',
            r"row 1 \(line 2\) opens a quote that is closed in a later row",
        ),
        ("a.jpg\tone\nb.jpg\ta\ttab\n", r"row 2 \(line 3\) has 3 tab-separated cells, the header has 2; quote a"),
        ("a.jpg\tone\n\nb.jpg\n", r"row 2 \(line 4\) has 1 tab-separated cells"),
        ("a.jpg\tone\n\ttwo\n", r"row 2 \(line 3\): invalid file name ''"),
    ],
)
def test_open_csv_is_strict(tmp_path: Path, rows: str, message: str) -> None:
    path = csv(tmp_path, f"filepath\ttitle\n{rows}")
    for group in (False, True):
        with pytest.raises(DataError, match=message):
            open_csv(path, None, group=group)


@pytest.mark.parametrize(
    "text",
    [
        "filepath\ttitle\ra.jpg\tone\rb.jpg\ttwo\r",
        "\tfilepath\ttitle\n0\ta.jpg\tone\n1\tb.jpg\ttwo\n",
        "filepath\ttitle\n\na.jpg\tone\n\n\nb.jpg\ttwo\n\n",
        "\ufefftitle\tlabel\tfilepath\r\none\t3\ta.jpg\r\n two \t4\tb.jpg",
    ],
)
def test_open_csv_reads_files_of_other_tools(tmp_path: Path, text: str) -> None:
    source = open_csv(csv(tmp_path, text), None, group=False)
    assert [(sample.path.name, sample.texts) for sample in source.samples] == [
        ("a.jpg", ("one",)),
        ("b.jpg", ("two",)),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filepath\ttitle\na.jpg\tone\n".encode("utf-16"), "cannot read it: 'utf-8' codec"),
        ("a.jpg\tone\nb.jpg\ttwo\n", "no column filepath and title in its tab-separated header"),
        ("filepath,title\na.jpg,one\n", "no column filepath and title .*; separate its cells by tabs"),
        ("filepath\ttitle\timage\ttitle\n", "duplicate column title in its header"),
        (
            "filepath\ttitle\nimg\\a.jpg\tone\n",
            "does not exist; .*paths are Windows paths: replace each backslash",
        ),
        ("filepath\ttitle\na.jpg\t \n", "no rows below its header: all 1 titles are empty"),
    ],
)
def test_open_csv_error_gives_reason(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_csv(csv(tmp_path, text), None, group=False)


@pytest.mark.parametrize("group", [False, True])
def test_open_csv_counts_all_skipped(tmp_path: Path, group: bool) -> None:
    (tmp_path / "folder.jpg").mkdir(parents=True)
    rows = ["a.jpg\tone", "gone.jpg\ttwo", "b.jpg\t", "c.jpg\tthree", "folder.jpg\tfour", "d.jpg\t  "]
    source = open_csv(csv(tmp_path, "filepath\ttitle\n" + "\n".join(rows)), None, group=group)
    assert [sample.path.name for sample in source.samples] == ["a.jpg", "c.jpg"]
    assert all(sample.size == len(JPEG) for sample in source.samples)
    mark = ("", "") if group else ("#1", "#4")
    assert source.skipped == [
        ("b.jpg#2", "its caption is empty"),
        ("d.jpg#5", "its caption is empty"),
        (f"gone.jpg{mark[0]}", "no such file"),
        (f"folder.jpg{mark[1]}", "no such file"),
    ]


@pytest.mark.parametrize("root", ["iwildcam_v2.0/train", "iwildcam_v2.0", "", "datasets/data"])
def test_open_csv_reads_flyp_files_by_the_documented_recipe(
    tmp_path: Path, root: str, caplog: pytest.LogCaptureFixture
) -> None:
    """FLYP's paths begin with ./datasets/data, wherever the images lie."""
    base = tmp_path / "data"
    images = base / root if root == "datasets/data" else base
    for name in "ab":
        write(images / f"iwildcam_v2.0/train/{name}.jpg")
    rows = [f"a photo of a {name}.\t./datasets/data/iwildcam_v2.0/train/{name}.jpg" for name in "ab"]
    rows.append("a photo of a c.\t./datasets/data/iwildcam_v2.0/train/c.jpg")
    path = write(tmp_path / "train.csv", "\n".join(["title\tfilepath", *rows]).encode())
    source = open_csv(str(path), str(base if root == "datasets/data" else base / root), group=True)
    assert [sample.path for sample in source.samples] == [
        images / f"iwildcam_v2.0/train/{name}.jpg" for name in "ab"
    ]
    assert [reason for _, reason in source.skipped] == ["no such file"]
    assert ("its paths begin with datasets/data" in caplog.text) == (root != "datasets/data")


# Names


@pytest.mark.parametrize("names", [[str(i) for i in range(12)], [f"{i:03d}" for i in range(12)], ["7", "10", "2"]])
def test_open_folder_sorts_whole_numbers_by_value(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write(tmp_path / name / "a.jpg")
    source = open_folder(str(tmp_path))
    assert list(source.class_names) == sorted(names, key=int)
    assert [source.class_names[sample.label] for sample in source.samples] == [
        sample.key.split("/")[0] for sample in source.samples
    ]


def test_open_folder_refuses_equal_numbers(tmp_path: Path) -> None:
    for name in ("10", "2", "x"):
        write(tmp_path / name / "a.jpg")
    assert open_folder(str(tmp_path)).class_names == ("10", "2", "x")
    (tmp_path / "x").rename(tmp_path / "02")
    with pytest.raises(DataError, match=r"class folders 0?2 and 0?2 are the same number; rename one of them"):
        open_folder(str(tmp_path))


def test_readers_make_names_that_are_not_utf8_printable(tmp_path: Path) -> None:
    write(tmp_path / "cat/good.jpg")
    os.rename(os.fsencode(tmp_path / "cat/good.jpg"), os.fsencode(tmp_path) + b"/cat/caf\xe9.jpg")
    (sample,) = open_folder(str(tmp_path)).samples
    assert sample.key == r"cat/caf\xe9.jpg"
    assert open_folder(str(tmp_path)).read(0) == JPEG
    latin = b"caf\xe9".decode("utf-8", "surrogateescape")
    tar = write_tar(tmp_path / f"{latin}.tar", {f"{latin}.jpg": JPEG, f"{latin}.txt": b"x", "b.txt": b"y"})
    source = open_webdataset(str(tar), ".txt")
    assert [source.samples[0].key, source.skipped[0].key] == [r"caf\xe9.tar/caf\xe9", r"caf\xe9.tar/b"]
    assert source.read(0) == JPEG
    os.rename(os.fsencode(tmp_path) + b"/cat", os.fsencode(tmp_path) + b"/c\xe9")
    with pytest.raises(DataError, match=r"the name of class folder c\\xe9 is not UTF-8; rename it"):
        open_folder(str(tmp_path))


# Messages


@pytest.mark.parametrize("form", ["folder", "webdataset", "csv", "prepared"])
def test_open_dataset_error_names_the_config_section(tmp_path: Path, form: str) -> None:
    section = {"format": form, "path": str(tmp_path / "nothere"), "class_names": "imagenet"}
    with pytest.raises(DataError, match=rf"^data\.target: {tmp_path}/nothere: "):
        open_target(TargetConfig.model_validate(section))
    if form != "folder":
        del section["class_names"]
        with pytest.raises(DataError, match=rf"^data\.reference: {tmp_path}/nothere: "):
            open_reference(ReferenceConfig.model_validate(section))


def test_source_image_error_has_no_python_repr(tmp_path: Path) -> None:
    write(tmp_path / "cat/a.jpg", b"<html>404</html>")
    with pytest.raises(DataError, match=r"cannot decode the image: not an image, or in an unsupported format$"):
        open_folder(str(tmp_path)).image(0)


# Content


def folder(root: Path) -> Source:
    return open_folder(str(root / "set"))


def table(root: Path) -> Source:
    rows = ["title\tfilepath", *(f"a {i % 2}\tset/{'ab'[i % 2]}/{i}.bmp" for i in range(6))]
    write(root / "list.csv", "\n".join(rows).encode())
    return open_csv(str(root / "list.csv"), None, group=False)


def unsized(root: Path) -> Source:
    from dataclasses import replace

    source = open_folder(str(root / "set"))
    return Source.of([replace(sample, size=-1) for sample in source.samples], source.class_names)


def tars(root: Path) -> Source:
    files = {file.stem: {"bmp": file.read_bytes(), "cls": b"0"} for file in sorted((root / "set").rglob("*.bmp"))}
    tiny.write_tar(root / "tars/0.tar", files)
    return open_webdataset(str(root / "tars"), ".cls")


def write_bitmaps(root: Path) -> Path:
    """Writes bitmaps, which have equal sizes whatever their pixels."""
    for i in range(6):
        content = BytesIO()
        Image.new("RGB", (200, 150), (i, 0, 0)).save(content, "BMP")
        write(root / "set" / "ab"[i % 2] / f"{i}.bmp", content.getvalue())
    return root


@pytest.mark.parametrize("open_set", [folder, table, unsized, tars])
@pytest.mark.parametrize("fully_hashed", [True, False])
def test_digest_detects_changed_bytes_of_equal_size(
    tmp_path: Path, open_set: Callable[[Path], Source], fully_hashed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dive_fast.data import content_hashes

    if not fully_hashed:
        monkeypatch.setattr(content_hashes, "MAX_FULL_BYTES", 0)
    root = write_bitmaps(tmp_path / "one")
    original = open_set(root).digest()
    assert open_set(root).digest() == original
    assert open_set(write_bitmaps(tmp_path / "other")).digest() == original
    file = root / "set/a/2.bmp"
    data = file.read_bytes()
    for position in (-1, 100, len(data) // 2):
        file.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position:][1:])
        assert file.stat().st_size == len(data)
        is_probed = fully_hashed or position != len(data) // 2
        assert (open_set(root).digest() != original) == is_probed
    file.write_bytes(data)
    assert open_set(root).digest() == original


def test_digest_depends_on_labels_texts_order_and_class_names(tmp_path: Path) -> None:
    from dataclasses import replace

    source = folder(write_bitmaps(tmp_path))
    first, *others = source.samples

    def with_samples(*samples: Sample) -> str:
        return replace(source, samples=SampleTable.of(samples)).digest()

    digests = {
        source.digest(),
        replace(source, class_names=("b", "a")).digest(),
        with_samples(replace(first, label=1), *others),
        with_samples(replace(first, texts=("x",)), *others),
        with_samples(*source.samples[::-1]),
    }
    assert len(digests) == 5


@pytest.mark.parametrize("open_set", [folder, table, unsized])
def test_modified_detects_new_time_that_digest_ignores(tmp_path: Path, open_set: Callable[[Path], Source]) -> None:
    root = write_bitmaps(tmp_path)
    source = open_set(root)
    before, digest = source.modified(), source.digest()
    assert open_set(root).modified() == before
    os.utime(root / "set/a/2.bmp", ns=(1, 1))
    assert source.modified() == before != open_set(root).modified()
    assert open_set(root).digest() == digest


def test_digest_of_large_sets_probes_some_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dive_fast.data import content_hashes

    monkeypatch.setattr(content_hashes, "NUM_PROBES", 3)
    root = write_bitmaps(tmp_path)
    original = folder(root).digest()
    for name, is_probed in {"a/0": True, "a/2": False, "b/5": True}.items():
        file = root / f"set/{name}.bmp"
        data = file.read_bytes()
        file.write_bytes(data[:-1] + b"\xff")
        assert (folder(root).digest() != original) == is_probed, name
        file.write_bytes(data)
    (root / "set/a/0.bmp").unlink()
    assert unsized(root).digest() != original


def test_image_ids_are_equal_for_equal_images(tmp_path: Path) -> None:
    root = write_bitmaps(tmp_path)
    (root / "set/b/copy.bmp").write_bytes((root / "set/a/2.bmp").read_bytes())
    assert folder(root).image_ids().tolist() == [0, 1, 2, 3, 4, 5, 1]
    assert tars(root).image_ids().tolist() == [0, 1, 2, 3, 4, 5, 1]
    (root / "set/a/0.bmp").write_bytes(b"")
    source = folder(root)
    (root / "set/a/4.bmp").unlink()
    assert source.image_ids().tolist() == [0, 1, 2, 3, 4, 5, 1]


def test_skipped_entries_keep_any_name() -> None:
    entries = [Skipped("a\0b", "no .txt"), Skipped("", "\n"), Skipped("\0", "no image")]
    assert list(SkippedEntries.of(entries)) == entries
