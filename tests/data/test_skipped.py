"""Every path by which a sample can be lost: the count that is told is the count that is lost."""

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
from dive_fast.data.sources.source import Source
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.errors import DataError

JPEG = tiny.jpeg(0, (12, 10))
FORK = b"\0\5\x16\7" + bytes(30)
"""What macOS puts beside x.jpg as ._x.jpg."""


def write(path: Path, data: bytes = JPEG) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_tar(path: Path, files: dict[str, bytes | str]) -> Path:
    """A tar of files in this order; what follows a # is no part of a name; a text is where a link leads."""
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


# Image folders: names below a class, how many samples they are, and the reason told

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
def test_folder_count_told_is_count_lost(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    files, count, lost, reason = FOLDER[case]
    write(tmp_path / "cat/good.jpg")
    for name, data in files.items():
        write(tmp_path / "cat" / name, data)
    source = open_folder(str(tmp_path))
    assert (len(source) + len(source.skipped), len(source.skipped)) == (1 + count, lost)
    source.report_skipped("data.target")
    told = [message for message in caplog.messages if " left out: " in message]
    assert sum(int(message.split()[1]) for message in told) == lost
    assert not reason or any(reason in message for message in told)
    # What is neither a sample nor beside one is told as well.
    silent = {name for name in files if Path(name).suffix in (".txt", ".json")}
    assert len(source.ignored) == (0 if count else len(files) - len(silent))


def test_suffixes_are_at_least_torchvisions_and_the_counts_its_own(tmp_path: Path) -> None:
    assert set(IMG_EXTENSIONS) <= IMAGE_SUFFIXES
    assert not IMAGE_SUFFIXES & OTHER_IMAGE_SUFFIXES
    for row, suffix in enumerate((*IMG_EXTENSIONS, ".gif", ".TIFF", ".Jpeg")):
        write(tmp_path / "ab"[row % 2] / f"{row}{suffix}")
    write(tmp_path / "a/deeper/x.ppm")
    (tmp_path / "b/link").symlink_to(write(tmp_path.with_name("else") / "y.jpg").parent)
    source = open_folder(str(tmp_path))
    gif = 1  # which torchvision does not read
    assert len(source) == len(ImageFolder(str(tmp_path))) + gif == 14
    assert [sample.key for sample in source.samples if "link" in sample.key] == ["b/link/y.jpg"]


def test_system_folders_never_become_classes(tmp_path: Path) -> None:
    for name in ("cat", "dog", "__MACOSX", ".ipynb_checkpoints", "@eaDir", "__pycache__"):
        write(tmp_path / name / "a.jpg")
    write(tmp_path / "loose.jpg")
    source = open_folder(str(tmp_path))
    assert (source.class_names, len(source), source.skipped) == (("cat", "dog"), 2, [])
    assert len(source.ignored) == 5


def test_class_of_unread_images_says_which_instead_of_remove_it(tmp_path: Path) -> None:
    write(tmp_path / "a/1.jpg")
    write(tmp_path / "b/1.heic")
    write(tmp_path / "b/2.heic")
    message = (
        r"b: no image below that is read, but it would be class 1: 2 images of suffix \.heic are not read; "
        r"the first: b/1\.heic$"
    )
    with pytest.raises(DataError, match=message):
        open_folder(str(tmp_path))


def test_link_to_a_folder_above_is_an_error_and_not_endless(tmp_path: Path) -> None:
    write(tmp_path / "a/1.jpg")
    (tmp_path / "a/loop").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"a/loop/a: a link to a folder above it"):
        open_folder(str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_folder_that_may_not_be_read_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a/1.jpg")
    write(tmp_path / "a/closed/2.jpg").parent.chmod(0)
    with pytest.raises(DataError, match=r"cannot list its images: .*closed"):
        open_folder(str(tmp_path))


def test_a_path_one_level_too_high_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("photo/cat", "photo/dog", "sketch/cat"):
        write(tmp_path / name / "1.jpg")
    open_folder(str(tmp_path))
    assert (
        "all images lie in folders below those of the classes (photo/cat/1.jpg); the classes are photo, sketch"
        in (caplog.text)
    )
    caplog.clear()
    write(tmp_path / "photo/2.jpg")
    open_folder(str(tmp_path))
    assert not caplog.messages


# Tars: files, how many samples they are, how many are lost, and a reason told

WEBDATASET: dict[str, tuple[dict[str, bytes | str], int, int, str]] = {
    "unread suffix": ({"a.heic": JPEG, "a.txt": b"x"}, 1, 1, "images of suffix .heic are not read"),
    "tif": ({"a.tif": JPEG, "a.txt": b"x"}, 1, 0, ""),
    "dotted": ({"v1.0.jpg": JPEG, "v1.0.txt": b"x", "v1.1.jpg": JPEG, "v1.1.txt": b"x"}, 2, 2, "a dot before"),
    "dotted beside a whole one": (
        {"v1.jpg": JPEG, "v1.txt": b"x", "v1.0.jpg": JPEG, "v1.0.txt": b"x"},
        *(2, 1, "a dot before the suffix"),
    ),
    "dotted image alone": ({"x.input.jpg": JPEG, "x.txt": b"x"}, 1, 1, "no image; a dot before the suffix"),
    "compound side file": ({"y.jpg": JPEG, "y.seg.png": JPEG, "y.txt": b"x"}, 1, 0, ""),
    "taken": (
        {"a.jpg": JPEG, "a.txt": b"x", "a.jpg#": JPEG, "a.txt#": b"y", "a.JPG": JPEG, "a.TXT": b"z"},
        *(3, 2, "its name is taken"),
    ),
    "empty caption": ({"a.jpg": JPEG, "a.txt": b" \n\t"}, 1, 1, "its caption is empty"),
    "byte order mark alone": ({"a.jpg": JPEG, "a.txt": b"\xef\xbb\xbf"}, 1, 1, "its caption is empty"),
    "latin caption": ({"a.jpg": JPEG, "a.txt": b"\xe4"}, 1, 1, "its caption is not UTF-8"),
    "no caption": ({"a.jpg": JPEG, "b.txt": b"x"}, 2, 2, "no image"),
    "link inside": ({"a.jpg": JPEG, "a.txt": b"x", "b.jpg": "a.jpg", "b.txt": b"y"}, 2, 0, ""),
    "link outside": ({"b.jpg": "else/a.jpg", "b.txt": b"y"}, 1, 1, "a link, or in pieces"),
    "hidden": ({".b.jpg": JPEG}, 1, 1, "a hidden file"),
    "resource forks": ({"._a.jpg": FORK, "__MACOSX/a.jpg": FORK, ".DS_Store": b"", "README.md": b""}, 0, 0, ""),
    "second image": ({"a.jpg": JPEG, "a.png": JPEG, "a.txt": b"x"}, 1, 0, ""),
    "own folders": ({"./d/a.jpg": JPEG, "./d/a.txt": b"x", "a.b/c.jpg": JPEG, "a.b/c.txt": b"x"}, 2, 0, ""),
}


@pytest.mark.parametrize("case", WEBDATASET)
def test_webdataset_count_told_is_count_lost(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    files, count, lost, reason = WEBDATASET[case]
    write_tar(tmp_path / "0.tar", {"good.jpg": JPEG, "good.txt": b"x", **files})
    source = open_webdataset(str(tmp_path), ".txt")
    assert (len(source) + len(source.skipped), len(source.skipped)) == (1 + count, lost), source.skipped
    source.report_skipped("data.reference")
    told = [message for message in caplog.messages if " left out: " in message]
    assert sum(int(message.split()[1]) for message in told) == lost
    assert not reason or any(reason in message for message in told), told
    for index in range(len(source)):
        assert source.read(index) == JPEG


def test_compressed_tars_beside_tars_are_told_and_alone_are_an_error(tmp_path: Path) -> None:
    import gzip

    whole = write_tar(tmp_path / "0.tar", {"a.jpg": JPEG, "a.txt": b"x"})
    packed = write(tmp_path / "1.tar.gz", gzip.compress(whole.read_bytes()))
    write(tmp_path / "._0.tar", FORK)
    whole.rename(tmp_path / "0.TAR")
    source = open_webdataset(str(tmp_path), ".txt")
    assert (len(source), source.skipped) == (1, [("1.tar.gz", "a compressed tar; unpack it to a plain .tar")])
    assert [key for key, _ in source.ignored] == ["._0.tar"]
    with pytest.raises(DataError, match=r"1\.tar\.gz: not a whole tar: it is compressed by gzip; unpack it to"):
        open_webdataset(str(packed), ".txt")
    (tmp_path / "0.TAR").unlink()
    (tmp_path / "._0.tar").unlink()
    with pytest.raises(DataError, match=r": no tar there; 1\.tar\.gz is compressed: unpack it to a plain \.tar$"):
        open_webdataset(str(tmp_path), ".txt")


def test_nothing_but_lost_samples_says_why(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"img_v1.0.jpg": JPEG, "img_v1.0.txt": b"x"})
    with pytest.raises(
        DataError, match=r"both an image and a \.txt file \(1 a dot before the suffix: .*a\.tar/img_v1\.0"
    ):
        open_webdataset(str(path), ".txt")


def test_tar_named_twice_is_an_error(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", {"a.jpg": JPEG, "a.txt": b"x"})
    with pytest.raises(DataError, match=rf"names {path} twice"):
        open_webdataset(f"{tmp_path}/{{0,?}}.tar", ".txt")


@pytest.mark.parametrize("label", ["1_0", "٣", "0x1", "1e3", "1 2"])
def test_labels_are_decimal_digits(tmp_path: Path, label: str) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.jpg": JPEG, "a.cls": label.encode()})
    with pytest.raises(DataError, match=r"a\.cls: .* is no integer"):
        open_webdataset(str(path), ".cls")
    write_tar(path, {"a.jpg": JPEG, "a.cls": b"\xef\xbb\xbf+7\r\n"})
    assert open_webdataset(str(path), ".cls").samples[0].label == 7


@pytest.mark.timeout(60)
def test_pipes_are_waited_for_by_no_reader(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    for name in ("list.csv", "0.tar", "cat/model.bin", "cat/a.heic"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=r"list\.csv: cannot read it: a pipe or device$"):
        open_csv(str(tmp_path / "list.csv"), None, group=False)
    for path, message in (
        (tmp_path, "called like a tar, but no regular file"),
        (tmp_path / "0.tar", "no tar there"),
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
        ('a.jpg\t"one\nb.jpg\tof two"\nc.jpg\tx\n', r"row 1 \(line 2\) begins with a quote that ends rows later"),
        ("a.jpg\tone\nb.jpg\ta\ttab\n", r"row 2 \(line 3\) has 3 tab-separated cells, its first line 2; quote a"),
        ("a.jpg\tone\n\nb.jpg\n", r"row 2 \(line 4\) has 1 tab-separated cells"),
        ("a.jpg\tone\n\ttwo\n", r"row 2 \(line 3\) names no file: ''"),
    ],
)
def test_csv_is_read_strictly(tmp_path: Path, rows: str, message: str) -> None:
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
def test_csv_of_other_tools_is_read(tmp_path: Path, text: str) -> None:
    source = open_csv(csv(tmp_path, text), None, group=False)
    assert [(sample.path.name, sample.texts) for sample in source.samples] == [
        ("a.jpg", ("one",)),
        ("b.jpg", ("two",)),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filepath\ttitle\na.jpg\tone\n".encode("utf-16"), "cannot read it: 'utf-8' codec"),
        ("a.jpg\tone\nb.jpg\ttwo\n", "no column filepath and title in its tab-separated first line"),
        ("filepath,title\na.jpg,one\n", "no column filepath and title .*; separate its cells by tabs"),
        ("filepath\ttitle\timage\ttitle\n", "column title is twice in its first line"),
        ("filepath\ttitle\nimg\\a.jpg\tone\n", "does not exist; .*paths are those of Windows: write / for each"),
        ("filepath\ttitle\na.jpg\t \n", "no rows below its first line: all 1 titles are empty"),
    ],
)
def test_csv_that_cannot_be_used_says_why(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_csv(csv(tmp_path, text), None, group=False)


@pytest.mark.parametrize("group", [False, True])
def test_csv_count_told_is_count_lost(tmp_path: Path, group: bool) -> None:
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
def test_flyps_own_csv_is_read_by_the_documented_recipe(
    tmp_path: Path, root: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its paths begin with ./datasets/data, whatever holds the images here."""
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
def test_whole_number_folders_are_in_the_order_of_numbers(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write(tmp_path / name / "a.jpg")
    source = open_folder(str(tmp_path))
    assert list(source.class_names) == sorted(names, key=int)
    assert [source.class_names[sample.label] for sample in source.samples] == [
        sample.key.split("/")[0] for sample in source.samples
    ]


def test_folders_of_one_number_are_an_error_and_other_names_sort_as_text(tmp_path: Path) -> None:
    for name in ("10", "2", "x"):
        write(tmp_path / name / "a.jpg")
    assert open_folder(str(tmp_path)).class_names == ("10", "2", "x")
    (tmp_path / "x").rename(tmp_path / "02")
    with pytest.raises(DataError, match=r"class folders 0?2 and 0?2 are the same number; rename one of them"):
        open_folder(str(tmp_path))


def test_names_that_are_not_utf8_are_read_and_have_printable_keys(tmp_path: Path) -> None:
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
def test_error_names_the_section_of_the_config(tmp_path: Path, form: str) -> None:
    section = {"format": form, "path": str(tmp_path / "nothere"), "class_names": "imagenet"}
    with pytest.raises(DataError, match=rf"^data\.target: {tmp_path}/nothere: "):
        open_target(TargetConfig.model_validate(section))
    if form != "folder":
        del section["class_names"]
        with pytest.raises(DataError, match=rf"^data\.reference: {tmp_path}/nothere: "):
            open_reference(ReferenceConfig.model_validate(section))


def test_error_of_an_undecodable_image_speaks_of_no_python_object(tmp_path: Path) -> None:
    write(tmp_path / "cat/a.jpg", b"<html>404</html>")
    with pytest.raises(
        DataError, match=r"cannot decode the image: it is not an image, or of a format that is not read$"
    ):
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

    found = open_folder(str(root / "set"))
    return Source([replace(sample, size=-1) for sample in found.samples], found.class_names)


def tars(root: Path) -> Source:
    files = {file.stem: {"bmp": file.read_bytes(), "cls": b"0"} for file in sorted((root / "set").rglob("*.bmp"))}
    tiny.write_tar(root / "tars/0.tar", files)
    return open_webdataset(str(root / "tars"), ".cls")


def write_bitmaps(root: Path) -> Path:
    """Bitmaps, which are all of one size whatever they show."""
    for i in range(6):
        content = BytesIO()
        Image.new("RGB", (200, 150), (i, 0, 0)).save(content, "BMP")
        write(root / "set" / "ab"[i % 2] / f"{i}.bmp", content.getvalue())
    return root


@pytest.mark.parametrize("opened", [folder, table, unsized, tars])
@pytest.mark.parametrize("whole", [True, False])
def test_digest_knows_bytes_of_equal_size_wherever_the_files_lie(
    tmp_path: Path, opened: Callable[[Path], Source], whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dive_fast.data import content_hashes as content

    if not whole:
        monkeypatch.setattr(content, "WHOLE", 0)
    root = write_bitmaps(tmp_path / "one")
    original = opened(root).digest()
    assert opened(root).digest() == original
    assert opened(write_bitmaps(tmp_path / "other")).digest() == original
    file = root / "set/a/2.bmp"
    data = file.read_bytes()
    for at in (-1, 100, len(data) // 2):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at:][1:])
        assert file.stat().st_size == len(data)
        is_probed = whole or at != len(data) // 2
        assert (opened(root).digest() != original) == is_probed
    file.write_bytes(data)
    assert opened(root).digest() == original


def test_digest_knows_labels_and_class_names(tmp_path: Path) -> None:
    from dataclasses import replace

    found = folder(write_bitmaps(tmp_path))
    digests = {
        found.digest(),
        replace(found, class_names=("b", "a")).digest(),
        replace(found, samples=[replace(found.samples[0], label=1), *found.samples[1:]]).digest(),
        replace(found, samples=[replace(found.samples[0], texts=("x",)), *found.samples[1:]]).digest(),
        replace(found, samples=found.samples[::-1]).digest(),
    }
    assert len(digests) == 5


@pytest.mark.parametrize("opened", [folder, table, unsized])
def test_modified_knows_a_rewritten_file_and_digest_survives_a_copy(
    tmp_path: Path, opened: Callable[[Path], Source]
) -> None:
    root = write_bitmaps(tmp_path)
    source = opened(root)
    before, digest = source.modified(), source.digest()
    assert opened(root).modified() == before
    os.utime(root / "set/a/2.bmp", ns=(1, 1))
    assert source.modified() == before != opened(root).modified()
    assert opened(root).digest() == digest


def test_digest_of_many_probes_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dive_fast.data import content_hashes as content

    monkeypatch.setattr(content, "PROBES", 3)
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


def test_equal_images_have_equal_ids(tmp_path: Path) -> None:
    root = write_bitmaps(tmp_path)
    (root / "set/b/copy.bmp").write_bytes((root / "set/a/2.bmp").read_bytes())
    assert folder(root).image_ids().tolist() == [0, 1, 2, 3, 4, 5, 1]
    assert tars(root).image_ids().tolist() == [0, 1, 2, 3, 4, 5, 1]
    (root / "set/a/0.bmp").write_bytes(b"")
    source = folder(root)
    (root / "set/a/4.bmp").unlink()
    assert source.image_ids().tolist() == [0, 1, 2, 3, 4, 5, 1]
