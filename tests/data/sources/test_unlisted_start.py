"""A start that does not list a raw set again: each change of a file is noticed then, or when the file is read."""

# mypy: disable-error-code="func-returns-value"

import errno
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distributed import run_ranks

from dive_fast import distributed
from dive_fast.config.schema import EvaluateConfig
from dive_fast.data import content_hashes
from dive_fast.data.prepared.convert import Options as PrepareOptions
from dive_fast.data.prepared.raw import RawSource
from dive_fast.data.prepared.write import prepare
from dive_fast.data.samples import EvaluationSamples, ReferenceSamples
from dive_fast.data.sources import csv_table, node_index, watched
from dive_fast.data.sources.captioned_folder import CaptionedFolder, open_captioned_folder
from dive_fast.data.sources.csv_table import CsvSet, open_csv
from dive_fast.data.sources.folder import ClassFolders, open_folder
from dive_fast.data.sources.source import Source
from dive_fast.data.spread import spread
from dive_fast.data.transforms import Preprocess
from dive_fast.data.workers import in_workers
from dive_fast.distributed import Ranks
from dive_fast.errors import ChangedDataError, DataError
from dive_fast.evaluation.datasets.strict_samples import StrictSamples
from dive_fast.training.forgetting_probe import PairMeasure

TICK = 0.02
"""Seconds in which a file system's clock advances: two changes so far apart have two times."""


def folder(root: Path, ranks: Ranks | None = None) -> Source:
    return open_folder(str(root / "set"), ranks)


def pairs(root: Path, ranks: Ranks | None = None) -> Source:
    return open_captioned_folder(str(root / "set"), ranks)


def grouped(root: Path, ranks: Ranks | None = None) -> Source:
    return open_csv(str(root / "list.csv"), str(root / "set"), group=True, ranks=ranks)


def rows(root: Path, ranks: Ranks | None = None) -> Source:
    return open_csv(str(root / "list.csv"), str(root / "set"), group=False, ranks=ranks)


def foreign(root: Path, ranks: Ranks | None = None) -> Source:
    """A table whose paths begin with folders of another machine."""
    return open_csv(str(root / "foreign.csv"), str(root / "set"), group=True, ranks=ranks)


SETS = [folder, pairs, grouped, rows, foreign]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A set that counts as large, in folders, linked folders and linked files."""
    monkeypatch.setenv("DIVE_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(node_index, "SMALL_FILES", 0)
    monkeypatch.setattr(watched, "RACY_SECONDS", TICK / 2)
    write_set(tmp_path)
    return tmp_path


def write_set(root: Path) -> None:
    names = [f"{name}/{number}" for name in ("cat", "cat/deep", "dog") for number in range(3)]
    for number, name in enumerate([*names, "../far/eel", "../other/0", "../other/1", "../other/2"]):
        path = root / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".jpg").write_bytes(tiny.jpeg(number))
        path.with_suffix(".txt").write_text(f"caption {number}")
    (root / "set/eel").mkdir()
    for suffix in (".jpg", ".txt"):
        (root / f"set/eel/linked{suffix}").symlink_to(f"../../far/eel{suffix}")
    (root / "set/fox").symlink_to("../other")
    (root / "set/cat/blank.jpg").write_bytes(tiny.jpeg(50))
    (root / "set/cat/blank.txt").write_text("  ")
    (root / "set/cat/unknown").write_bytes(b"no image at all")
    (root / "set/cat/later").symlink_to("../../nowhere")
    (root / "set/cat/wait.jpg").write_bytes(tiny.jpeg(51))
    (root / "set/cat/wait.txt").symlink_to("../../nowhere.txt")
    named = [*names, "eel/linked", "fox/1", "cat/missing", "ant/1", "cat/1"]
    lines = [f"title of {name}\t{name}.jpg" for name in [*named, "cat/later.x/1"]]
    (root / "list.csv").write_text("\n".join(["title\tfilepath", *lines]))
    lines = [f"title of {name}\tsome/where/{name}.jpg" for name in named]
    (root / "foreign.csv").write_text("\n".join(["title\tfilepath", *lines]))
    for path in [*root.rglob("*.jpg"), *root.rglob("*.txt"), root / "list.csv", root / "foreign.csv"]:
        if path.exists():
            os.utime(path, (1e9, 1e9))
    time.sleep(TICK)


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of all sets that are listed."""
    kinds: list[str] = []
    for kind in (ClassFolders, CaptionedFolder, CsvSet):

        def list_files(raw: Any, kind: Any = kind, listed: Any = kind.list_files) -> Any:
            kinds.append(kind.__name__)
            return listed(raw)

        monkeypatch.setattr(kind, "list_files", list_files)
    return kinds


def in_place(path: Path, content: bytes) -> None:
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()


def flipped(path: Path) -> bytes:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    return bytes(content)


def replace_equal(path: Path) -> None:
    """By a file of equal size and modification time."""
    status, copy = path.stat(), path.with_suffix(".partial")
    copy.write_bytes(flipped(path))
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.replace(path)


def retarget(link: Path, target: str) -> None:
    link.unlink()
    link.symlink_to(target)


def exchange(root: Path) -> None:
    (root / "set/cat").rename(root / "set/aside")
    (root / "set/dog").rename(root / "set/cat")
    (root / "set/aside").rename(root / "set/dog")


def tables(root: Path) -> list[Path]:
    return [root / "list.csv", root / "foreign.csv"]


CHANGES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda root: None,
    "image in place": lambda root: in_place(root / "set/cat/1.jpg", flipped(root / "set/cat/1.jpg")),
    "image in place, other size": lambda root: in_place(root / "set/cat/deep/1.jpg", tiny.jpeg(3, (50, 50))),
    "last image in place, shorter": lambda root: in_place(root / "set/fox/1.jpg", b"cut"),
    "image touched": lambda root: os.utime(root / "set/dog/1.jpg"),
    "image replaced": lambda root: replace_equal(root / "set/cat/1.jpg"),
    "image added": lambda root: (root / "set/cat/9.jpg").write_bytes(tiny.jpeg(9)),
    "pair added": lambda root: [(root / f"set/dog/9.{each}").write_bytes(tiny.jpeg(9)) for each in ("jpg", "txt")],
    "image removed": lambda root: (root / "set/cat/deep/1.jpg").unlink(),
    "image renamed": lambda root: (root / "set/cat/1.jpg").rename(root / "set/cat/10.jpg"),
    "image moved": lambda root: (root / "set/cat/1.jpg").rename(root / "set/dog/10.jpg"),
    "image becomes a folder": lambda root: (
        (root / "set/cat/1.jpg").unlink(),
        (root / "set/cat/1.jpg").mkdir(),
    ),
    "image named by a table only": lambda root: (root / "set/cat/missing.jpg").write_bytes(tiny.jpeg(1)),
    "folder renamed": lambda root: (root / "set/cat/deep").rename(root / "set/cat/deeper"),
    "folder moved": lambda root: (root / "set/cat/deep").rename(root / "set/dog/deep"),
    "folders exchanged": exchange,
    "class added": lambda root: (
        (root / "set/ant").mkdir(),
        (root / "set/ant/1.jpg").write_bytes(tiny.jpeg(2)),
    ),
    "former folder appears": lambda root: (
        (root / "set/some/where/cat").mkdir(parents=True),
        (root / "set/some/where/cat/1.jpg").write_bytes(tiny.jpeg(2)),
        (root / "set/some/x.jpg").write_bytes(tiny.jpeg(2)),
    ),
    "linked folder, other target": lambda root: retarget(root / "set/fox", "../far"),
    "linked folder, target replaced": lambda root: (
        (root / "other").rename(root / "former"),
        (root / "far").rename(root / "other"),
    ),
    "linked folder, image added": lambda root: (root / "other/7.jpg").write_bytes(tiny.jpeg(7)),
    "linked folder, image replaced": lambda root: replace_equal(root / "other/1.jpg"),
    "linked image, other target": lambda root: retarget(root / "set/eel/linked.jpg", "../../other/1.jpg"),
    "linked image in place": lambda root: in_place(root / "far/eel.jpg", flipped(root / "far/eel.jpg")),
    "linked image, target removed": lambda root: (root / "far/eel.jpg").unlink(),
    "link gets a target": lambda root: (
        (root / "nowhere").mkdir(),
        (root / "nowhere/1.jpg").write_bytes(tiny.jpeg(7)),
    ),
    "linked text gets a target": lambda root: (root / "nowhere.txt").write_text("words"),
    "text in place": lambda root: in_place(root / "set/cat/1.txt", b"Caption 1"),
    "text in place, other size": lambda root: in_place(root / "set/dog/1.txt", b"another caption"),
    "text in place, empty": lambda root: in_place(root / "set/dog/1.txt", b""),
    "text replaced": lambda root: replace_equal(root / "set/cat/1.txt"),
    "text removed": lambda root: (root / "set/cat/1.txt").unlink(),
    "linked text in place": lambda root: in_place(root / "far/eel.txt", b"words"),
    "linked text, target removed": lambda root: (root / "far/eel.txt").unlink(),
    "blank text filled": lambda root: in_place(root / "set/cat/blank.txt", b"words"),
    "unknown file becomes an image": lambda root: in_place(root / "set/cat/unknown", tiny.jpeg(1)),
    "table in place": lambda root: [
        in_place(root / name, (root / name).read_bytes().replace(b"title of cat/1", b"words on cat/1"))
        for name in ("list.csv", "foreign.csv")
    ],
    "table replaced": lambda root: list(map(replace_equal, tables(root))),
    "table touched": lambda root: list(map(os.utime, tables(root))),
}


def content(source: Source) -> tuple[Any, ...]:
    samples = source.samples
    return list(samples), source.class_names, list(source.skipped), list(source.ignored)


def listed_now(opened: Callable[[Path], Source], root: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """The set as a start without any index sees it."""
    with monkeypatch.context() as patch:
        patch.setattr(node_index, "SMALL_FILES", 1000)
        patch.setattr(node_index, "_open_unlisted", lambda raw: None)
        return opened(root)


def refusal_of(opens: Callable[[], Source]) -> str:
    """The message of the error that opening a set raises; empty if it raises none."""
    try:
        opens()
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("opened", "probes"), [(pairs, 4096), *((opened, 0) for opened in SETS)])
@pytest.mark.parametrize("change", CHANGES)
def test_change_is_noticed_at_the_start_or_at_reading(
    root: Path,
    listings: list[str],
    monkeypatch: pytest.MonkeyPatch,
    opened: Callable[[Path], Source],
    change: str,
    probes: int,
) -> None:
    monkeypatch.setattr(node_index, "NUM_PROBES", probes)
    before = content(opened(root))
    assert len(listings) == 1
    unlisted = opened(root)
    assert len(listings) == 1
    assert content(unlisted) == before
    assert [unlisted.read(row) for row in range(len(unlisted))] == [
        sample.path.read_bytes() for sample in unlisted.samples
    ]
    time.sleep(TICK)
    CHANGES[change](root)
    time.sleep(TICK)

    images: list[bytes] = []
    refusal = refusal_of(lambda: listed_now(opened, root, monkeypatch))
    if len(listings) == 2:
        listings.pop()
    try:
        source = opened(root)
        if len(listings) == 1:
            images = [source.read(row) for row in range(len(source))]
    except ChangedDataError:
        assert probes == 0
        if not refusal:
            source = opened(root)
            assert len(listings) == 2, "the start after a change was noticed lists"
    except DataError:
        pass
    if refusal:
        assert refusal_of(lambda: opened(root)) == refusal
        return
    assert change != "nothing" or len(listings) == 1
    truth = listed_now(opened, root, monkeypatch)
    assert content(source) == content(truth)
    if images:
        assert images == [sample.path.read_bytes() for sample in truth.samples]
    assert (source.digest(), source.modified()) == (truth.digest(), truth.modified())


@pytest.mark.parametrize(("opened", "file"), [(folder, "cat/1.jpg"), (rows, "dog/1.jpg"), (pairs, "cat/1.txt")])
def test_file_in_place_with_its_size_and_modification_time_is_noticed_at_a_start(
    root: Path, listings: list[str], monkeypatch: pytest.MonkeyPatch, opened: Callable[[Path], Source], file: str
) -> None:
    opened(root)
    time.sleep(TICK)
    path = root / "set" / file
    in_place(path, flipped(path))
    os.utime(path, (1e9, 1e9))
    time.sleep(TICK)
    source = opened(root)
    assert len(listings) == 2
    assert content(source) == content(listed_now(opened, root, monkeypatch))
    listings.clear()
    opened(root)
    assert listings == [], "the listing after a change is kept"


@pytest.mark.parametrize(("opened", "file"), [(folder, "cat/1.jpg"), (grouped, "cat/1.jpg"), (pairs, "cat/1.txt")])
def test_changed_file_is_an_error_with_a_remedy(
    root: Path, monkeypatch: pytest.MonkeyPatch, opened: Callable[[Path], Source], file: str
) -> None:
    monkeypatch.setattr(node_index, "NUM_PROBES", 0)
    opened(root)
    os.utime(root / "set" / file)
    source = opened(root)
    (row,) = [row for row, sample in enumerate(source.samples) if sample.path == root / "set/cat/1.jpg"]
    message = (
        f"{root}/set/{file}: changed since the data set was listed; start again: the set is then listed again"
    )
    preprocess = Preprocess((8, 8), (0,) * 3, (1,) * 3, "bicubic", "squash")
    readers: list[Callable[[], object]] = [
        lambda: source.image(row),
        lambda: EvaluationSamples(source, preprocess).read_usable((0, row), lambda key: source.image(key[1])),
        lambda: StrictSamples(source, preprocess, 0, True).read_usable((0, row), lambda key: source.image(key[1])),
        lambda: RawSource(source).read(row),
        lambda: list(in_workers(source.read, [row], 1)),
        source.image_ids,
    ]
    for read in readers:
        with pytest.raises(ChangedDataError) as error:
            read()
        assert str(error.value) == message


def test_removed_file_is_not_replaced_by_another_sample(root: Path) -> None:
    folder(root)
    source = folder(root)
    source.samples.path(2).unlink()
    with pytest.raises(ChangedDataError, match="removed since the data set was listed"):
        source.read(2)


def test_unreadable_file_that_did_not_change_is_unusable(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(root)
    source = folder(root)

    def refuse(*args: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    # Within the block alone: pytest opens files too.
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuse)
        with pytest.raises(DataError, match="cannot read the image") as error:
            source.read(0)
    assert not isinstance(error.value, ChangedDataError)


def test_record_that_cannot_be_removed_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_index, "NUM_PROBES", 0)
    folder(root)
    os.utime(root / "set/cat/0.jpg")
    source = folder(root)

    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(ChangedDataError, match=r"remove .*\.watched \(Permission denied\) and start again"):
        source.read(0)


@pytest.mark.parametrize("damage", ["cut", "remove", "noise", "index"])
def test_damaged_record_leads_to_a_listing(root: Path, listings: list[str], damage: str) -> None:
    expected = content(pairs(root))
    (record,) = (root / "cache/indexes").glob("*.watched")
    file = record / ("index.json" if damage == "index" else "states.npy")
    data = file.read_bytes()
    file.unlink()
    if damage != "remove":
        file.write_bytes({"cut": data[:-3], "noise": b"\xff" * len(data), "index": b"{}"}[damage])
    for _ in range(2):
        assert content(pairs(root)) == expected
    assert len(listings) == 2


def test_set_without_its_index_is_listed(root: Path, listings: list[str]) -> None:
    expected = content(rows(root))
    for index in (root / "cache/indexes").glob("*-*"):
        (index / "index.json").unlink()
    assert content(rows(root)) == expected
    assert len(listings) == 2


@pytest.mark.parametrize("opened", SETS)
def test_folder_changed_a_moment_before_the_listing_is_listed_again(
    root: Path, listings: list[str], monkeypatch: pytest.MonkeyPatch, opened: Callable[[Path], Source]
) -> None:
    monkeypatch.setattr(watched, "RACY_SECONDS", 60.0)
    for count in (1, 2):
        opened(root)
        assert len(listings) == count
    monkeypatch.setattr(watched, "RACY_SECONDS", TICK / 2)
    for _ in range(2):
        opened(root)
        assert len(listings) == 3


def test_file_modified_before_a_long_reading_has_no_index(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = CaptionedFolder.read

    def read_long(*args: Any) -> Any:
        time.sleep(2 * TICK)
        return read(*args)

    monkeypatch.setattr(CaptionedFolder, "read", read_long)
    os.utime(root / "set/cat/1.txt")
    pairs(root)
    assert not list((root / "cache/indexes").glob("*-*"))
    pairs(root)
    assert list((root / "cache/indexes").glob("*-*"))


@pytest.mark.parametrize(("code", "count"), [(errno.EIO, 2), (errno.ESTALE, 2), (errno.ENOENT, 1)])
def test_file_of_a_table_that_a_disk_cannot_examine_for_now_is_examined_again(
    root: Path, listings: list[str], monkeypatch: pytest.MonkeyPatch, code: int, count: int
) -> None:
    examine = watched.state_of
    with monkeypatch.context() as patch:
        patch.setattr(
            csv_table,
            "state_of",
            lambda path: (-code, 0, 0, 0) if os.fsdecode(path).endswith("missing.jpg") else examine(path),
        )
        rows(root)
    rows(root)
    assert len(listings) == count


def test_small_sets_are_listed_and_not_compared(
    root: Path, listings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_index, "SMALL_FILES", 1000)
    for opened in SETS:
        source = opened(root)
        os.utime(source.samples.path(0))
        source.read(0)
        opened(root)
    assert len(listings) == 2 * len(SETS)


def test_listing_of_an_unchanged_set_keeps_its_index(root: Path, listings: list[str]) -> None:
    grouped(root)
    (root / "set/cat/notes.md").write_text("next to the images")
    time.sleep(TICK)
    grouped(root)
    grouped(root)
    assert len(listings) == 2
    assert len(list((root / "cache/indexes").glob("*-*"))) == 2  # of the rows and of their files


def _open_on_nodes(folder: str) -> list[int]:
    rank = torch.distributed.get_rank()
    node_index.SMALL_FILES, watched.RACY_SECONDS = 0, TICK / 2
    os.environ["DIVE_FAST_CACHE"] = f"{folder}/cache {rank}"
    distributed._node = lambda: (str(rank), "")  # type: ignore[assignment]
    ranks, counts = Ranks(rank, 2, torch.device("cpu")), []
    listed, count = CaptionedFolder.list_files, 0

    def list_files(raw: CaptionedFolder) -> Any:
        nonlocal count
        count += 1
        return listed(raw)

    CaptionedFolder.list_files = list_files  # type: ignore[method-assign, assignment]
    for start in range(4):
        pairs(Path(folder), ranks)
        counts.append(count)
        if start == 1 and rank == 0:  # as if a process of this node had noticed a change
            (record,) = Path(folder, "cache 0/indexes").glob("*.watched")
            (record / "index.json").unlink()
    return counts


@pytest.mark.slow
def test_change_noticed_by_one_node_is_listed_by_all(root: Path) -> None:
    assert run_ranks(2, _open_on_nodes, str(root)) == [[1, 1, 2, 2]] * 2


@pytest.mark.parametrize(("opened", "file"), [(folder, "cat/1.jpg"), (rows, "dog/1.jpg"), (pairs, "cat/1.txt")])
def test_results_that_are_not_computed_again_belong_to_the_files_of_now(
    root: Path, monkeypatch: pytest.MonkeyPatch, opened: Callable[[Path], Source], file: str
) -> None:
    monkeypatch.setattr(node_index, "NUM_PROBES", 0)
    monkeypatch.setattr(content_hashes, "NUM_PROBES", 1)
    former = opened(root)
    prepare(RawSource(former), root / "prepared", PrepareOptions(), workers=0)
    in_place(root / "set" / file, b"other words")
    changed = opened(root)
    assert changed.listed_modified() == former.modified(), "the start has not noticed the change"
    with pytest.raises(ChangedDataError, match=f"{file}: changed since the data set was listed"):
        prepare(RawSource(changed), root / "prepared", PrepareOptions(), workers=0)
    assert opened(root).modified() != former.modified()


@pytest.mark.parametrize("number", [0, 5])
def test_measure_of_pairs_compares_their_files_only(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(node_index, "NUM_PROBES", 0)
    pairs(root)
    source = pairs(root)
    preprocess = Preprocess((8, 8), (0,) * 3, (1,) * 3, "bicubic", "squash")
    samples = ReferenceSamples(source, lambda texts: torch.zeros(len(texts), 4).long(), preprocess, "argmax", 0)
    measure = PairMeasure("probe", samples, 3, Ranks(0, 1, torch.device("cpu")), EvaluateConfig())
    assert spread(len(source), 3)[0] == 0
    assert 5 not in spread(len(source), 3)
    in_place(source.samples.path(number).with_suffix(".txt"), b"other words")
    with pytest.raises(ChangedDataError) if number == 0 else nullcontext():
        measure.identity()
