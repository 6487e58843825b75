"""Data of every kind is described, or refused in one line that says what is there and what is expected."""

import csv
import os
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import datasets
import pytest
import tiny

from dive_fast.data.prepared.convert import Options
from dive_fast.data.prepared.raw import RawSource
from dive_fast.data.prepared.write import prepare
from dive_fast.data.sources.folder import open_folder
from dive_fast.errors import DataError
from dive_fast.quickstart.inspect_data import EXPECTED, Target, detect_format, inspect_target, probe
from dive_fast.quickstart.inspect_reference import inspect_reference


def write_photos(root: Path, **classes: int) -> Path:
    for name, count in (classes or {"cat": 3, "dog": 2}).items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (root / name / f"{number}.jpg").write_bytes(tiny.jpeg(number))
    return root


def write_tar(path: Path, count: int, suffix: str, text: Callable[[int], str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            for end, data in ((".jpg", tiny.jpeg(number)), (suffix, text(number).encode())):
                member = tarfile.TarInfo(f"{number:04}{end}")
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
    return path


def write_csv(root: Path, count: int = 3) -> Path:
    write_photos(root, x=count)
    with (root / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["title", "filepath"])
        rows.writerows([[f"a photo {number}", f"x/{number}.jpg"] for number in range(count)])
    return root / "list.csv"


def seen(target: Target) -> tuple[str, int, int | None, int | None]:
    sizes = [None if data is None else len(data.source) for data in (target.val, target.test)]
    return target.train.format, len(target.train.source), sizes[0], sizes[1]


def test_inspect_class_folders(tmp_path: Path) -> None:
    target = inspect_target(f"{write_photos(tmp_path / 'my photos')}/")
    assert seen(target) == ("folder", 5, None, None)
    assert target.name == "my_photos"
    assert target.train.path == str(tmp_path / "my photos")
    assert target.train.class_sizes() == [3, 2]


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("train", "val", "test"), (3, 2)),
        (("training", "valid"), (3, None)),
        (("train", "Validation"), (3, None)),
        (("train", "test"), (None, 2)),
        (("train",), (None, None)),
    ],
)
def test_inspect_folder_of_splits(
    tmp_path: Path, folders: tuple[str, ...], expected: tuple[int | None, ...]
) -> None:
    counts = {"train": 5, "val": 3, "test": 2}
    for folder in folders:
        split = next(split for split in counts if folder.lower().startswith(split))
        write_photos(tmp_path / folder, cat=counts[split] - 1, dog=1)
    (tmp_path / ".cache").mkdir()
    assert seen(inspect_target(str(tmp_path))) == ("folder", 5, *expected)


def test_inspect_reports_folders_that_are_no_splits(tmp_path: Path) -> None:
    for name in ("train", "val", "notes"):
        write_photos(tmp_path / name)
    assert inspect_target(str(tmp_path)).remarks == (f"only train, val of {tmp_path} are read, not notes",)
    (remark,) = inspect_target(str(tmp_path / "train")).remarks
    assert remark == f"{tmp_path}/val lies next to it: --target {tmp_path} measures on it"


def test_inspect_class_named_train(tmp_path: Path) -> None:
    write_photos(tmp_path, train=2, plane=2)
    assert inspect_target(str(tmp_path)).train.source.class_names == ("plane", "train")


def test_inspect_tars(tmp_path: Path) -> None:
    write_tar(tmp_path / "set/0.tar", 4, ".cls", lambda number: str(number % 2))
    for path in (tmp_path / "set", tmp_path / "set/0.tar", tmp_path / "set/{0..0}.tar", tmp_path / "set/*.tar"):
        target = inspect_target(str(path))
        assert seen(target) == ("webdataset", 4, None, None)
        assert target.train.class_sizes() == [2, 2]
        assert target.class_file is None
    (tmp_path / "set/classes.txt").write_text("a\nb\n")
    assert inspect_target(str(tmp_path / "set")).class_file == tmp_path / "set/classes.txt"


def test_inspect_tars_of_splits(tmp_path: Path) -> None:
    for name, count in (("train-0", 4), ("train-1", 2), ("val-0", 3)):
        write_tar(tmp_path / f"{name}.tar", count, ".cls", lambda number: str(number % 2))
    target = inspect_target(str(tmp_path))
    assert seen(target) == ("webdataset", 6, 3, None)
    assert target.train.path == f"{tmp_path}/train*.tar"


def test_inspect_csv_and_prepared_set(tmp_path: Path) -> None:
    target = inspect_target(str(write_csv(tmp_path / "csv")))
    assert seen(target) == ("csv", 3, None, None)
    assert target.name == "list"
    assert not target.train.has_classes
    prepare(RawSource(open_folder(str(write_photos(tmp_path / "p")))), tmp_path / "ready", Options(), 1)
    assert seen(inspect_target(str(tmp_path / "ready"))) == ("prepared", 5, None, None)


def test_inspect_validation_set_of_the_user(tmp_path: Path) -> None:
    train, val = write_photos(tmp_path / "a"), write_photos(tmp_path / "b", cat=1, dog=3)
    assert seen(inspect_target(str(train), str(val))) == ("folder", 5, 4, None)
    with pytest.raises(DataError, match=r"^--val .*: is the target; remove it"):
        inspect_target(str(train), str(train))


def test_inspect_hostile_names_and_links(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "p", **{"a b": 2, "日本": 2, "line\nbreak": 2, "-x": 2, "'q\"": 2, "*[a]": 2})
    write_photos(root / "deep", inner=2)
    write_photos(root / ".hidden", inner=2)
    elsewhere = write_photos(tmp_path / "elsewhere", e=2)
    (root / "link").symlink_to(elsewhere / "e")
    (root / "stray.jpg").write_bytes(tiny.jpeg(1))
    target = inspect_target(str(root))
    assert target.train.source.class_names == ("'q\"", "*[a]", "-x", "a b", "deep", "line\nbreak", "link", "日本")
    assert target.train.class_sizes() == [2] * 8


def test_inspect_reports_classes_one_level_deeper(tmp_path: Path) -> None:
    for name in ("animals", "plants"):
        write_photos(tmp_path / name)
    (remark,) = inspect_target(str(tmp_path)).remarks
    assert "all images lie in subfolders of the class folders" in remark


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "nowhere", "no such file or folder; expected a folder"),
        (lambda root: root, "an empty folder; expected a folder"),
        (lambda root: write(root / "a.zip").parent, "1 other file; expected a folder"),
        (lambda root: write(root / "a.zip"), "a file with suffix .zip; expected a folder"),
        (
            lambda root: write(root / "a.csv", b"title,filepath\n"),
            "in its tab-separated header; separate its cells by",
        ),
        (
            lambda root: write(root / "1.jpg", tiny.jpeg(1)).parent,
            "1 image without class folders, so nothing says",
        ),
        (lambda root: write_photos(root, train=1, val=1), "train: images without class folders, so nothing says"),
        (lambda root: write_photos(root, cat=3), "only one class, 'cat'; fine-tuning contrasts classes"),
        (lambda root: write_photos(root, cat=3, dog=0), "dog: no image below, but it would be class 1; remove it"),
        (
            lambda root: write(write_photos(root) / "dataset_dict.json").parent,
            "dataset_dict.json does not list its splits",
        ),
        (lambda root: write_tar(root / "a.tar", 2, ".txt", str), "image-caption pairs are named by --reference"),
        (lambda root: write_tar(root / "a.tar", 2, ".cls", lambda _: "0"), "only one class, '0'"),
    ],
)
def test_inspect_refuses_in_one_line(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    path = make(tmp_path)
    with pytest.raises(DataError) as caught:
        inspect_target(str(path))
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert EXPECTED.startswith("expected a folder")


def write(path: Path, data: bytes = b"{}") -> Path:
    path.write_bytes(data)
    return path


def test_inspect_refuses_data_around_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_photos(tmp_path / "photos"))
    for path in (".", str(tmp_path / "photos"), "../photos"):
        with pytest.raises(DataError, match="run this command from outside of the data"):
            inspect_target(path)


def test_detect_format_reports_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r": cannot list it: Permission denied$"):
        detect_format(str(tmp_path))


def test_probe_counts_broken_images_and_finds_the_typical_size(tmp_path: Path) -> None:
    root = write_photos(tmp_path, cat=4, dog=4)
    whole = (root / "cat/0.jpg").read_bytes()
    (root / "cat/0.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "cat/1.jpg").write_bytes(b"no image")
    (root / "dog/0.jpg").write_bytes(b"")
    images = probe(open_folder(str(root)))
    assert images.checked == 8
    assert images.broken == ["cat/0.jpg: a broken image", "cat/1.jpg: not an image", "dog/0.jpg: not an image"]
    assert images.size == open_folder(str(root)).image(3).size


def test_inspect_reference(tmp_path: Path) -> None:
    for number in range(6):
        write_tar(tmp_path / f"tars/{number}.tar", 3, ".txt", lambda number: f"caption {number}")
    one = inspect_reference(str(tmp_path / "tars/0.tar"))
    assert (one.format, one.pairs, one.is_estimate) == ("webdataset", 3, False)
    assert one.source.samples[0].texts == ("caption 0",)
    estimated = inspect_reference(f"{tmp_path}/tars/")
    assert (estimated.path, estimated.pairs, estimated.is_estimate) == (f"{tmp_path}/tars", 18, True)
    table = inspect_reference(str(write_csv(tmp_path / "csv", 4)))
    assert (table.format, table.pairs) == ("csv", 4)
    prepare(RawSource(table.source), tmp_path / "ready", Options(), 1)
    assert inspect_reference(str(tmp_path / "ready"))[:3] == ("prepared", str(tmp_path / "ready"), 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "nowhere", "no such file or folder; expected tars"),
        (lambda root: write_photos(root), "no image-caption pairs; expected tars"),
        (lambda root: write_tar(root / "a.tar", 2, ".cls", str), "no sample has both an image and a .txt file"),
    ],
)
def test_inspect_reference_refuses_in_one_line(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(DataError) as caught:
        inspect_reference(str(make(tmp_path)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def rows(count: int, captions: bool = False) -> datasets.Dataset:
    """Images of two classes, or with captions."""
    pictures = [{"bytes": tiny.jpeg(number), "path": None} for number in range(count)]
    if captions:
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        return datasets.Dataset.from_dict({"image": pictures, "text": ["a"] * count}, features=features)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["b_1", "a"])})
    labels = [number % 2 for number in range(count)]
    return datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)


def test_inspect_huggingface_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.disable_progress_bars()
    # Parquet files are converted there.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    splits = {"train": rows(6), "validation": rows(4), "test": rows(2)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "dict")
    rows(6).save_to_disk(tmp_path / "single")
    for name, count in (("train", 6), ("test", 2)):
        (tmp_path / "parquet/data").mkdir(parents=True, exist_ok=True)
        rows(count).to_parquet(tmp_path / f"parquet/data/{name}-00000-of-00001.parquet")
    target = inspect_target(str(tmp_path / "dict"))
    assert seen(target) == ("huggingface", 6, 4, 2)
    assert target.train.source.class_names == ("b_1", "a")
    assert target.val is not None
    assert (target.train.keys, target.val.keys) == ({"split": "train"}, {"split": "validation"})
    single = inspect_target(str(tmp_path / "single"))
    assert (seen(single), single.train.keys) == (("huggingface", 6, None, None), {})
    parquet = inspect_target(str(tmp_path / "parquet"))
    assert (seen(parquet), parquet.train.keys) == (("huggingface", 6, None, 2), {"split": "train"})


def test_inspect_reference_of_folder_and_of_huggingface(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "pairs", x=3)
    for number in range(3):
        (root / f"x/{number}.txt").write_text(f"caption {number}")
    assert inspect_reference(str(root))[:3] == ("folder", str(root), 3)
    datasets.DatasetDict({"train": rows(5, captions=True), "test": rows(1, captions=True)}).save_to_disk(
        tmp_path / "hf"
    )
    reference = inspect_reference(str(tmp_path / "hf"))
    assert (reference.format, reference.pairs, reference.keys) == ("huggingface", 5, {"split": "train"})
