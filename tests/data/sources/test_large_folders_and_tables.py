"""Folders and tables as columns: equal to a plain reading, kept between runs, read again when a file changes."""

import csv
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from dive_fast.data.decode import IMAGE_SUFFIXES
from dive_fast.data.sources import captioned_folder, csv_table, image_files, node_index, sample_table
from dive_fast.data.sources.captioned_folder import open_captioned_folder
from dive_fast.data.sources.csv_table import open_csv
from dive_fast.data.sources.file_rules import HIDDEN, is_hidden, lower_suffix, reason_to_skip
from dive_fast.data.sources.folder import open_folder
from dive_fast.data.sources.source import Skipped, Source

NAMES = (
    *(
        "a.jpg",
        "b.JPG",
        "c.jpeg",
        "B.TXT",
        "a.txt",
        "b.txt",
        "c.txt",
        ".h.jpg",
        "._f.jpg",
        "n.heic",
        "m.bin",
        "z..jpg",
    ),
    *(
        "notes.md",
        "ä.png",
        "q.",
        "noext",
        "w.tar.jpg",
        "w.tar.txt",
        "v.gif",
        "v.txt",
        "Thumbs.db",
        "two words.bmp",
    ),
)
CONTENTS = (tiny.jpeg(0), b"", b"text\r\nline\rtwo\n", "\ufeffmark ä \0 z".encode(), b"\xff\xfe", b" \n", b"words")
CONTENTS += b"\0", b" \0x \0"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which small sets take all ways of large ones."""
    monkeypatch.setattr(image_files, "CHUNK", 2)
    monkeypatch.setattr(captioned_folder, "CHUNK", 3)
    monkeypatch.setattr(csv_table, "CHUNK", 3)


def write_tree(folder: Path, random: random.Random, depth: int = 0) -> None:
    folder.mkdir(parents=True)
    (folder / "0.jpg").write_bytes(CONTENTS[0])
    for name in random.sample(NAMES, random.randint(0, len(NAMES))):
        (folder / name).write_bytes(random.choice(CONTENTS))
    (folder / "side").symlink_to("0.jpg")
    for name in random.sample(["cat", "10", "__MACOSX", ".git", "ü"], 0 if depth == 3 else random.randint(0, 3)):
        write_tree(folder / name, random, depth + 1)


def plain_images(folder: Path, root: Path, skipped: list[Skipped], ignored: list[Skipped]) -> Iterator[Path]:
    """The images below a folder, by the rules written as simply as possible."""
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        key = str(file.relative_to(root))
        if file.is_dir():
            if is_hidden(file.name):
                ignored.append(Skipped(key, HIDDEN))
            else:
                yield from plain_images(file, root, skipped, ignored)
        elif (reason := reason_to_skip(file.name)) is not None:
            (ignored if reason == HIDDEN else skipped).append(Skipped(key, reason))
        elif file.suffix.lower() in IMAGE_SUFFIXES:
            yield file
        elif file.suffix.lower() not in image_files.SIDE_SUFFIXES:
            is_image = file.read_bytes() == CONTENTS[0]
            reason = (
                "an image by its content, but not by its suffix"
                if is_image
                else "not an image by suffix or content"
            )
            (skipped if is_image else ignored).append(Skipped(key, reason))


def plain_text(file: Path) -> tuple[str, str]:
    try:
        text = file.with_suffix(".txt").read_text("utf-8-sig").replace("\0", " ").strip()
    except FileNotFoundError:
        return "", "no .txt of the same name"
    except UnicodeDecodeError:
        return "", "its caption is not UTF-8"
    return text, "" if text else "its caption is empty"


@pytest.mark.parametrize("seed", range(25))
def test_folders_equal_a_plain_reading(tmp_path: Path, seed: int) -> None:
    root = tmp_path / "set"
    for name in ("cat", "dog", "eel"):
        write_tree(root / name, random.Random(f"{seed} {name}"))
    skipped: list[Skipped] = []
    ignored: list[Skipped] = []
    files = list(plain_images(root, root, skipped, ignored))
    source = open_folder(str(root))
    assert [(sample.path, sample.size, sample.label) for sample in source.samples] == [
        (file, file.stat().st_size, ["cat", "dog", "eel"].index(file.relative_to(root).parts[0])) for file in files
    ]
    assert (list(source.skipped), list(source.ignored)) == (skipped, ignored)
    texts = [plain_text(file) for file in files]
    keys = [str(file.relative_to(root)) for file in files]
    source = open_captioned_folder(str(root))
    assert [(sample.key, sample.texts) for sample in source.samples] == [
        (key, (text,)) for key, (text, reason) in zip(keys, texts, strict=True) if not reason
    ]
    skipped += [Skipped(key, reason) for key, (_, reason) in zip(keys, texts, strict=True) if reason]
    assert (list(source.skipped), list(source.ignored)) == (skipped, ignored)


@pytest.mark.parametrize("name", [*NAMES, ".x", "x.", "..jpg", ".", "a.b.c", "A.JpG", ".x.jpg"])
def test_lower_suffix_is_that_of_a_path(name: str) -> None:
    # Since Python 3.14, the suffix of "x." is a dot.
    assert lower_suffix(name) == Path(name).suffix.lower().rstrip(".")


def write_table(folder: Path, rows: list[tuple[str, str]]) -> Path:
    for name in "abcdef":
        (folder / f"{name}.jpg").write_bytes(name.encode())
    with (folder / "list.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t").writerows([("title", "filepath"), *rows])
    return folder / "list.csv"


@pytest.mark.parametrize("seed", range(25))
def test_tables_equal_a_plain_grouping(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a file need not be next to each other, whatever is remembered to store equal texts once."""
    drawn = random.Random(seed)
    for module in (sample_table, csv_table):
        monkeypatch.setattr(module, "MAX_SHARED", drawn.choice([0, 1, 3, 1 << 18]))
    titles = ["a cat", " a cat ", "two\nlines", "tab\tin", 'quo"te', "", " ", "\0", "\0x\0"]
    rows = [
        (drawn.choice(titles), name)
        for name in (f"{drawn.choice('abcdefxy')}.jpg" for _ in range(drawn.randint(20, 40)))
        for _ in range(drawn.choice([1, 1, 3]))
    ]
    path = str(write_table(tmp_path, rows))
    titled = [(number, title.replace("\0", " ").strip(), name) for number, (title, name) in enumerate(rows)]
    kept = [row for row in titled if row[1]]
    exists = [row for row in kept if (tmp_path / row[2]).exists()]
    grouped: dict[str, list[str]] = {}
    for _, title, name in exists:
        grouped.setdefault(name, []).append(title)
    source = open_csv(path, None, group=True)
    assert [(sample.key, sample.texts) for sample in source.samples] == [
        (name, tuple(texts)) for name, texts in grouped.items()
    ]
    source = open_csv(path, None, group=False)
    assert [(sample.key, sample.texts, sample.path, sample.size) for sample in source.samples] == [
        (f"{name}#{number}", (title,), tmp_path / name, 1) for number, title, name in exists
    ]
    assert len(source.skipped) == len(rows) - len(exists)


def test_digest_of_a_table_does_not_depend_on_rows_without_file(tmp_path: Path) -> None:
    rows = [("b", "b.jpg"), ("x", "x.jpg"), ("a", "a.jpg"), ("b", "c.jpg")]
    for group in (True, False):
        digests = set()
        for number, part in enumerate((rows, [row for row in rows if row[1] != "x.jpg"])):
            folder = tmp_path / f"{group} {number}"
            folder.mkdir()
            if not group:  # keys are numbers of rows
                part = [("x", "x.jpg") if row not in part else row for row in rows]
                part[1] = ("x" * (1 + number), "x.jpg")
            source = open_csv(str(write_table(folder, part)), None, group=group)
            digests.add(source.digest())
        assert len(digests) == 1


# The kept index


def folder(root: Path) -> Source:
    return open_folder(str(root))


def pairs(root: Path) -> Source:
    return open_captioned_folder(str(root))


def grouped(root: Path) -> Source:
    return open_csv(str(root / "list.csv"), None, group=True)


def rows(root: Path) -> Source:
    return open_csv(str(root / "list.csv"), None, group=False)


def write_set(root: Path) -> None:
    for name in ("cat/1", "cat/2", "dog/1", "dog/2"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.jpg").write_bytes(tiny.jpeg(len(name)))
        (root / f"{name}.txt").write_text(f"caption {name}")
    lines = [f"title of {name}\t{name}.jpg" for name in ("cat/1", "cat/2", "dog/1", "missing", "cat/1")]
    (root / "list.csv").write_text("\n".join(["title\tfilepath", *lines, " \tdog/2.jpg"]))
    age(root)


def age(root: Path) -> None:
    """Files of which all changed a while ago; the index of others is not kept."""
    for file in root.rglob("*"):
        if file.stat().st_mtime > 1.5e9:
            os.utime(file, ns=(10**18, 10**18 + hash(file.read_bytes() if file.is_file() else 0) % 10**9))


def content(source: Source) -> tuple[Any, ...]:
    return list(source.samples), source.class_names, list(source.skipped), list(source.ignored)


def add_image(root: Path) -> None:
    (root / "dog/3.jpg").write_bytes(tiny.jpeg(3))
    (root / "dog/3.txt").write_text("caption dog/3")
    with (root / "list.csv").open("a") as file:
        file.write("\nmore\tdog/3.jpg")


CHANGES: dict[str, Callable[[Path], object]] = {
    "image": lambda root: (root / "cat/1.jpg").write_bytes(tiny.jpeg(9, (50, 50))),
    "text": lambda root: ((root / "cat/1.txt").write_text("another"), write_title(root)),
    "added": add_image,
    "removed": lambda root: (root / "cat/2.jpg").unlink(),
    "hidden": lambda root: ((root / "cat/.x.jpg").write_bytes(b""), write_title(root)),
    "appears": lambda root: (
        (root / "missing.jpg").write_bytes(b"1"),
        (root / "cat/missing.jpg").write_bytes(b"1"),
    ),
}


def write_title(root: Path) -> None:
    (root / "list.csv").write_text((root / "list.csv").read_text().replace("title of", "words on"))


@pytest.mark.parametrize("opened", [folder, pairs, grouped, rows])
def test_kept_index_equals_the_set_until_a_file_changes(
    tmp_path: Path, opened: Callable[[Path], Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIVE_FAST_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "set"
    write_set(root)
    expected = content(opened(root))
    monkeypatch.setattr(node_index, "SMALL_FILES", 0)
    assert content(opened(root)) == expected
    with monkeypatch.context() as patch:
        patch.setattr(captioned_folder, "_text", None)  # the index has the texts
        patch.setattr(csv_table, "_runs", None)
        assert content(opened(root)) == expected
    contents = [expected]
    for change in CHANGES.values():
        change(root)
        age(root)
        changed = content(opened(root))
        with monkeypatch.context() as patch:
            patch.setattr(node_index, "SMALL_FILES", 1000)
            assert content(opened(root)) == changed
        contents.append(changed)
    assert len({repr(each) for each in contents}) > len(CHANGES) // 2, "some change another kind of set"
