"""Adoption of clip-retrieval's files as caches and export of caches: exact rows, or an error in one line."""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pytest
import tiny
import torch
from distributed import context, run_ranks, run_script
from numpy.typing import NDArray
from pyarrow import parquet

from dive_fast.config.schema import Config
from dive_fast.data.open_dataset import open_reference
from dive_fast.distributed import Ranks, join
from dive_fast.methods.run_config import RunConfig
from dive_fast.model.towers import Towers, create
from dive_fast.teacher import build
from dive_fast.teacher import cache_files as store
from dive_fast.teacher import clip_retrieval as retrieval
from dive_fast.teacher.audit import Audit
from dive_fast.teacher.cache_files import CacheError, StaleCacheError
from dive_fast.teacher.clip_retrieval import Embeddings

ROOT = Path(__file__).parents[2]
ALONE = Ranks(0, 1, torch.device("cpu"))
COUNT = 11


class Rows(NamedTuple):
    """Content of a folder of clip-retrieval's files, in the order of the data set."""

    image: NDArray[Any]
    text: NDArray[Any]
    names: list[str]
    captions: list[str]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BLOCK", 4)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("retrieval")
    tree = tiny.write_config(path)
    tree["data"]["reference"] = tiny.write_reference(path / "captioned", COUNT)
    return tree


@pytest.fixture(scope="module")
def towers(tree: dict[str, Any]) -> Towers:
    return create(config(tree).model)


@pytest.fixture(scope="module")
def rows(tree: dict[str, Any], towers: Towers, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Rows of the reference set, embedded by this project."""
    cache = tmp_path_factory.mktemp("computed") / "cache"
    build.open_cache(config(tree), cache, *opened(tree, towers), ALONE)
    samples = open_reference_of(tree).samples
    names, captions = [sample.key.split("/")[1] for sample in samples], [sample.texts[0] for sample in samples]
    assert names[:2] == ["0000", "0001"]
    return Rows(np.load(cache / "image.npy"), np.load(cache / "text.npy"), names, captions)


def config(tree: dict[str, Any], **teacher: Any) -> Config:
    return RunConfig.model_validate(tree | {"teacher": {"batch_size": 4} | teacher})


def open_reference_of(tree: dict[str, Any]) -> Any:
    reference = config(tree).data.reference
    assert reference is not None
    return open_reference(reference)


def opened(tree: dict[str, Any], towers: Towers) -> tuple[Towers, Any]:
    return towers, build.reference_samples(config(tree), open_reference_of(tree), towers)


def adopt(
    tree: dict[str, Any],
    towers: Towers,
    folder: Path,
    cache: Path,
    ranks: Ranks = ALONE,
    rebuild: bool = False,
    **teacher: Any,
) -> Audit:
    adopting = config(tree, **teacher)
    embeddings = Embeddings(folder, adopting.teacher.dtype)
    return build.adopt_cache(adopting, cache, *opened(tree, towers), ranks, embeddings, rebuild)


def shuffled(rows: Rows, extra: int = 0, seed: int = 0) -> Rows:
    """Rows in random order, with ``extra`` entries of no sample: other captions or names."""
    rng = np.random.default_rng(seed)
    more = rng.normal(size=(2, extra, rows.image.shape[1]))
    more /= np.linalg.norm(more, axis=-1, keepdims=True)
    image, text = (np.concatenate([half, other.astype(half.dtype)]) for half, other in zip(rows[:2], more))
    names = [*rows.names, *(rows.names[0] if i % 2 else f"x{i}" for i in range(extra))]
    captions = [*rows.captions, *(f"extra {i}" if i % 2 else rows.captions[0] for i in range(extra))]
    order = rng.permutation(len(names))
    return Rows(image[order], text[order], [names[i] for i in order], [captions[i] for i in order])


def write(
    folder: Path,
    rows: Rows,
    dtype: str = "float32",
    parts: int = 1,
    nested: bool = True,
    columns: tuple[str, ...] = ("image_path", "caption"),
) -> Path:
    """Writes files in the format of clip-retrieval inference."""
    pieces = np.array_split(np.arange(len(rows.names)), parts)
    for number, piece in enumerate(pieces):
        name = str(number).zfill(len(str(parts)))
        table = pyarrow.table([[rows.names[i] for i in piece], [rows.captions[i] for i in piece]], columns)
        for kind in ("img_emb", "text_emb", "metadata"):
            subfolder = folder / kind if nested else folder
            subfolder.mkdir(parents=True, exist_ok=True)
            if kind == "metadata":
                parquet.write_table(table, subfolder / f"{kind}_{name}.parquet")
            else:
                values = rows.image if kind == "img_emb" else rows.text
                np.save(subfolder / f"{kind}_{name}.npy", values[piece].astype(dtype))
    return folder


def nothing_left(cache: Path) -> bool:
    return not cache.exists() and not store.partial_name(cache).exists()


# Adoption


@pytest.mark.parametrize(
    ("dtype", "parts", "nested", "columns", "path"),
    [
        ("float32", 1, True, ("image_path", "caption"), "{}"),
        ("float16", 3, True, ("image_path", "caption"), "/data/set/{}.jpg"),
        ("float32", 3, False, ("key", "caption"), "{}"),
        ("float16", 12, False, ("image_path", "caption"), "00000/{}.tar.jpg"),
    ],
)
def test_adopted_rows_are_exact_in_any_order_and_layout(
    tree: dict[str, Any],
    towers: Towers,
    rows: Rows,
    tmp_path: Path,
    dtype: str,
    parts: int,
    nested: bool,
    columns: tuple[str, ...],
    path: str,
) -> None:
    foreign = shuffled(rows, extra=7)
    foreign = foreign._replace(
        names=[path.format(name) for name in foreign.names],
        captions=[f" {caption}\n" for caption in foreign.captions],
    )
    folder, cache = write(tmp_path / "foreign", foreign, dtype, parts, nested, columns), tmp_path / "cache"
    audit = adopt(tree, towers, folder, cache, dtype=dtype)
    assert audit.pairs == COUNT
    assert audit.image_max < (1e-5 if dtype == "float32" else 1e-3)
    assert len(Embeddings(folder, dtype)) == COUNT + 7
    assert np.load(cache / "image.npy").tobytes() == rows.image.astype(dtype).tobytes()
    assert np.load(cache / "text.npy").tobytes() == rows.text.astype(dtype).tobytes()
    # Only the origin distinguishes it from a computed cache.
    teacher, _ = build.open_cache(config(tree, dtype=dtype), cache, *opened(tree, towers), ALONE)
    teacher.store.check_all()
    assert teacher.store.origin == f"adopted from {folder}"
    assert not store.partial_name(cache).exists()


def test_adopt_rounds_float32_to_float16_but_not_back(
    tree: dict[str, Any], towers: Towers, rows: Rows, tmp_path: Path
) -> None:
    adopt(tree, towers, write(tmp_path / "single", rows), tmp_path / "cache", dtype="float16")
    assert np.array_equal(np.load(tmp_path / "cache/text.npy"), rows.text.astype(np.float16))
    half = write(tmp_path / "half", rows, "float16")
    with pytest.raises(CacheError, match=r"img_emb_0.npy: float16 rows .* set teacher.dtype=float16$"):
        adopt(tree, towers, half, tmp_path / "other")


def test_stem_drops_folders_suffixes_and_csv_row() -> None:
    names = ("000000012", "00000.tar/000000012", "00000/000000012.jpg", "000000012.jpg#7", "a.b/000000012#7")
    assert {retrieval.stem(name) for name in names} == {"000000012"}
    assert retrieval.stem("cats/#1 cat.jpg") == "#1 cat"


# Pairs without a row


def test_adopt_counts_and_names_missing_pairs(
    tree: dict[str, Any], towers: Towers, rows: Rows, tmp_path: Path
) -> None:
    part = Rows(rows.image[3:], rows.text[3:], rows.names[3:], rows.captions[3:])
    message = (
        f"3 of the {COUNT} pairs of data.reference are not among its 8 entries "
        r"\(the first: shard-00000.tar/0000, .*0001, .*0002\); embed the config's data set$"
    )
    with pytest.raises(CacheError, match=message):
        adopt(tree, towers, write(tmp_path / "foreign", part), tmp_path / "cache")
    assert nothing_left(tmp_path / "cache")


def test_adopt_reports_both_captions_if_they_differ(
    tree: dict[str, Any], towers: Towers, rows: Rows, tmp_path: Path
) -> None:
    captions = [*rows.captions[:5], "something\nelse " + "x" * 100, *rows.captions[6:]]
    folder = write(tmp_path / "foreign", rows._replace(captions=captions))
    with pytest.raises(CacheError, match=r": 1 of .* the captions differ: that of .*/0005 is 'something") as error:
        adopt(tree, towers, folder, tmp_path / "cache")
    assert f"{rows.captions[5]!r} here" in str(error.value)
    assert "\n" not in str(error.value)
    assert "x" * 60 not in str(error.value)


def test_adopt_rejects_duplicate_entry(tree: dict[str, Any], towers: Towers, rows: Rows, tmp_path: Path) -> None:
    order = [*range(COUNT), 4]
    repeated = Rows(rows.image[order], rows.text[order], [*rows.names, "0004"], [*rows.captions, rows.captions[4]])
    folder = write(tmp_path / "foreign", repeated, parts=2)
    message = r"two entries for sample .*/0004: row 4 of metadata_0.parquet and row 5 of metadata_1.parquet"
    with pytest.raises(CacheError, match=message):
        adopt(tree, towers, folder, tmp_path / "cache")


def test_adopt_rejects_samples_that_differ_only_by_folder(
    tree: dict[str, Any], towers: Towers, rows: Rows, tmp_path: Path
) -> None:
    images = [tmp_path / "cats/1.jpg", tmp_path / "dogs/1.jpg"]
    for number, image in enumerate(images):
        image.parent.mkdir()
        image.write_bytes(tiny.jpeg(number))
    (tmp_path / "pairs.csv").write_text("title\tfilepath\n" + "".join(f"an animal\t{image}\n" for image in images))
    reference = {"format": "csv", "path": str(tmp_path / "pairs.csv"), "batch_size": 2, "workers": 0}
    other = tree | {"data": tree["data"] | {"reference": reference}}
    with pytest.raises(CacheError, match=r"samples .*cats/1.jpg#0 and .*dogs/1.jpg#1 have the same file name"):
        adopt(other, towers, write(tmp_path / "foreign", rows), tmp_path / "cache")


# Damaged files


def shorten(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 10)


def change(name: str, function: Callable[[NDArray[Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / name, function(np.load(folder / name)))


def put(row: int, value: float) -> Callable[[NDArray[Any]], Any]:
    def changed(rows: NDArray[Any]) -> NDArray[Any]:
        rows[row] *= value
        return rows

    return changed


IMAGE, TEXT, METADATA = "img_emb/img_emb_1.npy", "text_emb/text_emb_1.npy", "metadata/metadata_1.parquet"
BROKEN: list[tuple[Callable[[Path], Any], str]] = [
    (lambda folder: folder.rename(folder.with_name("x")), "foreign: no such folder; name the output folder of"),
    (
        lambda folder: [path.unlink() for path in folder.rglob("*_*.*")],
        "foreign: no img_emb_0.npy; name the output folder",
    ),
    (lambda folder: (folder / TEXT).unlink(), "foreign: text_emb_1.npy is missing; copy it there"),
    (lambda folder: (folder / METADATA).unlink(), "foreign: metadata_1.parquet is missing; copy it there"),
    (shorten(IMAGE), "img_emb_1.npy: cannot read it: .*; copy it again"),
    (shorten(METADATA), "metadata_1.parquet: cannot read it: .*; copy it again"),
    (lambda folder: (folder / TEXT).write_bytes(b""), "text_emb_1.npy: cannot read it: "),
    (
        change(TEXT, lambda rows: rows[1:]),
        "text_emb_1.npy: 4 rows, metadata_1.parquet has 5; copy the files again",
    ),
    (change(IMAGE, lambda rows: rows[:, 1:]), "img_emb_1.npy: embeddings of width 23, the model's have 24; embed"),
    (
        change(TEXT, lambda rows: rows.astype(np.float64)),
        "text_emb_1.npy: an array of float64 with 2 axes; expected",
    ),
    (change(TEXT, lambda rows: rows[0]), "text_emb_1.npy: an array of float32 with 1 axes; expected"),
    (change(TEXT, put(2, 1.02)), "text_emb_1.npy: row 2 has length 1.02, a unit row has 1; copy"),
    (change(IMAGE, put(4, 0.0)), "img_emb_1.npy: row 4 has length 0, a unit row has 1; copy"),
    (change(IMAGE, put(0, np.nan)), "img_emb_1.npy: row 0 has length nan, a unit row has 1; copy"),
    (
        lambda folder: parquet.write_table(pyarrow.table({"image_path": ["a"] * 5}), folder / METADATA),
        "metadata_1.parquet: no column caption, only image_path; embed",
    ),
    (
        lambda folder: parquet.write_table(pyarrow.table({"url": ["a"], "caption": ["b"]}), folder / METADATA),
        "metadata_1.parquet: no column image_path or key, only url, caption; embed",
    ),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_adopt_reports_damaged_file_in_one_line(
    tree: dict[str, Any], towers: Towers, rows: Rows, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    folder = write(tmp_path / "foreign", rows, parts=2)
    damage(folder)
    with pytest.raises(CacheError, match=message) as error:
        adopt(tree, towers, folder, tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert nothing_left(tmp_path / "cache")


def check(checked: Config, adopt: bool) -> None:
    assert checked.data.reference is not None
    retrieval.check(checked.data.reference, checked.teacher, adopt)


def test_check_requires_eval_views_audit_and_pyarrow(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(config(tree), adopt=True)
    reference = tree["data"]["reference"] | {"views": 2}
    views = config(tree | {"data": tree["data"] | {"reference": reference}})
    for is_adopting in (True, False):
        with pytest.raises(CacheError, match=r"^data.reference.views = 2: .*; set data.reference.views=eval$"):
            check(views, is_adopting)
    with pytest.raises(CacheError, match=r"^teacher.audit = 0: "):
        check(config(tree, audit=0), adopt=True)
    check(config(tree, audit=0), adopt=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CacheError, match=r"pip install 'dive_fast\[retrieval\]'$"):
        check(config(tree), adopt=True)


# Rows of another model, and existing caches


def noisy(rows: Rows, length: float) -> Rows:
    """Unit rows that differ from ``rows`` by about ``length``."""
    rng = np.random.default_rng(0)
    image, text = (half + length * rng.normal(size=half.shape) / half.shape[1] ** 0.5 for half in rows[:2])
    return rows._replace(
        image=image / np.linalg.norm(image, axis=1, keepdims=True),
        text=text / np.linalg.norm(text, axis=1, keepdims=True),
    )


def test_adopt_that_fails_audit_keeps_existing_cache(
    tree: dict[str, Any], towers: Towers, rows: Rows, tmp_path: Path
) -> None:
    folder, cache = write(tmp_path / "foreign", noisy(rows, 0.01), "float16"), tmp_path / "cache"
    message = (
        r"differ by at most .*; teacher.tolerance allows 1e-03, nothing is adopted. Most likely other weights"
    )
    with pytest.raises(CacheError, match=message):
        adopt(tree, towers, folder, cache, dtype="float16")
    assert nothing_left(cache)
    build.open_cache(config(tree), cache, *opened(tree, towers), ALONE)
    before = sorted((path.name, path.read_bytes()) for path in cache.iterdir())
    with pytest.raises(CacheError, match="a teacher cache exists; add --rebuild to replace it"):
        adopt(tree, towers, folder, cache, dtype="float16", tolerance=0.05)
    with pytest.raises(CacheError, match="nothing is adopted"):
        adopt(tree, towers, folder, cache, rebuild=True, dtype="float16")
    assert sorted((path.name, path.read_bytes()) for path in cache.iterdir()) == before
    assert not store.partial_name(cache).exists()
    # A larger tolerance accepts them.
    audit = adopt(tree, towers, folder, cache, rebuild=True, dtype="float16", tolerance=0.05)
    assert 1e-3 < audit.image_max < 0.05
    build.open_cache(config(tree, dtype="float16", tolerance=0.05), cache, *opened(tree, towers), ALONE)
    with pytest.raises(StaleCacheError, match=r"teacher.tolerance allows 1e-03"):
        build.open_cache(config(tree, dtype="float16"), cache, *opened(tree, towers), ALONE)


def test_interrupted_adoption_is_discarded_but_embedding_resumes(
    tree: dict[str, Any], towers: Towers, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, write_block, calls = tmp_path / "cache", store.Writer.write, itertools.count()

    def kill(*arguments: Any) -> None:
        write_block(*arguments)
        if next(calls) == 1:
            raise KeyboardInterrupt

    wrong, right = (write(tmp_path / name, content) for name, content in (("a", noisy(rows, 0.01)), ("b", rows)))
    with monkeypatch.context() as patch:
        patch.setattr(store.Writer, "write", kill)
        with pytest.raises(KeyboardInterrupt):
            adopt(tree, towers, wrong, cache)
    assert len(store.finished_blocks(store.partial_name(cache))) == 2
    with pytest.raises(StaleCacheError, match=r'origin: the cache has "adopted from .*, this run "computed"'):
        build.open_cache(config(tree), cache, *opened(tree, towers), ALONE)
    wrong.rename(tmp_path / "c")
    right.rename(wrong)
    adopt(tree, towers, wrong, cache)
    assert np.array_equal(np.load(cache / "image.npy"), rows.image)

    other = tmp_path / "other"
    calls = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(store.Writer, "write", kill)
        with pytest.raises(KeyboardInterrupt):
            build.open_cache(config(tree), other, *opened(tree, towers), ALONE)
    with pytest.raises(
        StaleCacheError, match=r"is unfinished and belongs to another configuration \(origin: .*; rebuild it$"
    ):
        adopt(tree, towers, wrong, other)
    assert len(store.finished_blocks(store.partial_name(other))) == 2
    adopt(tree, towers, wrong, other, rebuild=True)


# Two ranks


def adopt_on_rank(tree: dict[str, Any], intact: Path, broken: Path, output: Path) -> str:
    store.BLOCK = 4
    ranks, towers = join(), create(config(tree).model)
    adopt(tree, towers, intact, output / "cache", ranks)
    try:
        adopt(tree, towers, broken, output / "other", ranks)
    except CacheError as error:
        return str(error)
    return "adopted"


def test_adopt_on_two_ranks_equals_one_and_fails_on_both(
    tree: dict[str, Any], towers: Towers, rows: Rows, tmp_path: Path
) -> None:
    intact = write(tmp_path / "intact", shuffled(rows, 3), parts=2)
    adopt(tree, towers, intact, tmp_path / "one/cache")
    image = rows.image.copy()
    image[5] *= 2  # in the second block, which the second rank copies
    broken = write(tmp_path / "broken", rows._replace(image=image))
    messages = run_ranks(2, adopt_on_rank, tree, intact, broken, tmp_path / "two", init=False)
    for name in ("image.npy", "text.npy", "checksums.npy", "cache.json"):
        one, two = (tmp_path / ranks / "cache" / name for ranks in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), name
    assert "img_emb_0.npy: row 5 has length 2, " in messages[0]
    assert messages[0] == messages[1]
    assert nothing_left(tmp_path / "two/other")


# Export


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_exported_cache_is_adopted_bit_for_bit(
    tree: dict[str, Any],
    towers: Towers,
    rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
) -> None:
    monkeypatch.setattr(retrieval, "EXPORT_ROWS", 1)
    exporting, cache = config(tree, dtype=dtype), tmp_path / "cache"
    build.open_cache(exporting, cache, *opened(tree, towers), ALONE)
    folder = tmp_path / "exported"
    assert build.export_cache(exporting, cache, *opened(tree, towers), ALONE, folder) == COUNT
    numbers = [f"{number:02d}" for number in range(COUNT)]
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == sorted(
        name.format(number)
        for number in numbers
        for name in ("img_emb/img_emb_{}.npy", "text_emb/text_emb_{}.npy", "metadata/metadata_{}.parquet")
    )
    assert np.array_equal(np.load(folder / "img_emb/img_emb_03.npy"), rows.image[3:4].astype(dtype))
    assert np.load(folder / "text_emb/text_emb_10.npy").dtype == dtype
    table = parquet.read_table(folder / "metadata/metadata_03.parquet").to_pydict()
    assert table == {"image_path": ["0003"], "caption": [rows.captions[3]]}

    adopt(tree, towers, folder, tmp_path / "again", dtype=dtype)
    for name in ("image.npy", "text.npy", "checksums.npy"):
        assert (cache / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    manifests = [json.loads((path / "cache.json").read_text()) for path in (cache, tmp_path / "again")]
    assert [manifest.pop("origin") for manifest in manifests] == ["computed", f"adopted from {folder}"]
    assert manifests[0] == manifests[1]

    with pytest.raises(CacheError, match=r"img_emb_00.npy already exists; remove it, or name another folder"):
        build.export_cache(exporting, cache, *opened(tree, towers), ALONE, folder)


def test_export_requires_intact_cache_of_the_config(tree: dict[str, Any], towers: Towers, tmp_path: Path) -> None:
    cache, folder = tmp_path / "cache", tmp_path / "exported"
    with pytest.raises(CacheError, match="no teacher cache to export"):
        build.export_cache(config(tree), cache, *opened(tree, towers), ALONE, folder)
    build.open_cache(config(tree), cache, *opened(tree, towers), ALONE)
    with pytest.raises(StaleCacheError, match='dtype: the cache has "float32", this run "float16"'):
        build.export_cache(config(tree, dtype="float16"), cache, *opened(tree, towers), ALONE, folder)
    data = bytearray((cache / "text.npy").read_bytes())
    data[-1] ^= 1
    (cache / "text.npy").write_bytes(data)
    with pytest.raises(StaleCacheError, match=r"text.npy: rows 8 to 10 have changed"):
        build.export_cache(config(tree), cache, *opened(tree, towers), ALONE, folder)
    assert not folder.exists()


# The commands


def test_the_command_adopts_and_exports(tree: dict[str, Any], rows: Rows, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tree | {"teacher": {"dtype": "float16", "path": str(tmp_path / "cache")}}))
    write(tmp_path / "foreign", shuffled(rows, 5), "float16", parts=2)

    def call(*options: str) -> subprocess.CompletedProcess[str]:
        environment = {"DS_ACCELERATOR": "cpu"}
        return run_script("launch/cache.py", "--config", str(path), *options, cwd=ROOT, environment=environment)

    adopted = call("--adopt", str(tmp_path / "foreign"))
    assert adopted.returncode == 0, adopted.stderr
    told = (
        f"{tmp_path}/cache: {COUNT} pairs of {tmp_path}/foreign, where 5 more are not needed; {COUNT} pairs embedd"
    )
    assert told in adopted.stdout
    assert json.loads((tmp_path / "cache/audit.json").read_text())["image_max"] < 1e-3
    exported = call("--export", str(tmp_path / "exported"))
    assert exported.returncode == 0, exported.stderr
    assert f"{tmp_path}/exported: {COUNT} pairs, partitions: 1" in exported.stdout
    assert np.array_equal(np.load(tmp_path / "exported/text_emb/text_emb_0.npy"), rows.text.astype(np.float16))


def _open_shared(tree: dict[str, Any], cache: Path) -> tuple[int, float]:
    """Number of blocks that this process has written to the cache, and the longest difference of its audit."""
    shared = config(tree)
    assert shared.data.reference is not None
    towers = create(shared.model)
    samples = build.reference_samples(shared, open_reference(shared.data.reference), towers)
    written: list[None] = []
    write_block = store.Writer.write

    def write_slowly(*arguments: Any) -> None:
        time.sleep(0.3)
        written.append(write_block(*arguments))

    store.Writer.write = write_slowly  # type: ignore[method-assign]
    _, audit = build.open_cache(shared, cache, towers, samples, ALONE)
    assert audit is not None
    return len(written), audit.image_max


def test_concurrent_runs_write_shared_cache_once(tree: dict[str, Any], tmp_path: Path) -> None:
    with futures.ProcessPoolExecutor(3, context()) as pool:
        submitted = [pool.submit(_open_shared, tree, tmp_path / "shared") for _ in range(3)]
        results = [future.result(timeout=100) for future in submitted]
    assert sorted(written > 0 for written, _ in results) == [False, False, True]
    assert all(image_max < 1e-5 for _, image_max in results)
    assert not list(tmp_path.glob(".shared.*"))
