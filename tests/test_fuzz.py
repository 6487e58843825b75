"""Fuzzing of readers: any file or override gives a value or one clear line, and no file is changed.

``DIVE_FUZZ=20`` runs twenty times as many examples.
"""

import copy
import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_checkpoints import RUN, VALIDATION, seal, write_checkpoint

from dive_fast.checkpoint import lineage, manifest, resume
from dive_fast.checkpoint.load_weights import load_into
from dive_fast.checkpoint.zero_state import MOMENTS
from dive_fast.config.schema import ModelConfig
from dive_fast.data.prepared.convert import Options
from dive_fast.data.prepared.raw import RawSource
from dive_fast.data.prepared.read import open_prepared, verify
from dive_fast.data.prepared.write import prepare
from dive_fast.data.prompt_files import read_class_names, read_templates
from dive_fast.data.sources.csv_table import open_csv
from dive_fast.data.sources.source import Source
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.distributed import Ranks
from dive_fast.errors import MAX_LENGTH, ConfigError, DataError
from dive_fast.evaluation import results, tables
from dive_fast.evaluation.datasets import layouts
from dive_fast.methods.run_config import RunConfig, load_run_config
from dive_fast.model import head as heads
from dive_fast.model import towers
from dive_fast.teacher import cache_files as store
from dive_fast.teacher import clip_retrieval as retrieval
from dive_fast.teacher import write_cache as write
from dive_fast.teacher.teacher import CachedTeacher

CONFIGS = Path(__file__).parents[1] / "launch" / "configs"
SHIPPED: list[dict[str, Any]] = [json.loads(path.read_text()) for path in sorted(CONFIGS.glob("*.json"))]
for tree in SHIPPED:
    if "base" in tree:
        tree["base"] = str(CONFIGS / tree["base"])
# As large as the complete ones, which most of the files are not.
SHIPPED += [
    load_run_config(name, folder=CONFIGS).model_dump(mode="json")
    for name in ("vitb16_flyp", "vitb16_lp_ft", "vitb16_cosine")
]
ALONE = Ranks(0, 1, torch.device("cpu"))
TIMES = int(os.environ.get("DIVE_FUZZ", "1"))


def fuzzed(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs the same examples in every run; the deadline catches readers that never end."""
    return settings(
        max_examples=examples * TIMES,
        derandomize=True,
        deadline=timedelta(seconds=30),
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def contents(folder: Path) -> dict[str, str]:
    """Digests of all files in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def check_reader(read: Callable[[], Any], folder: Path) -> None:
    """Reads; the result is a value or a one-line error, and the folder is unchanged."""
    before = contents(folder)
    try:
        read()
    except (ConfigError, DataError) as error:
        message = str(error)
        assert message.isprintable(), message
        assert 10 < len(message) <= MAX_LENGTH + 5
    assert contents(folder) == before


# Changes of valid content

NUMBERS: list[Any] = [
    *(0, -1, 1, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 10**4000),
    *(0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), float("-inf")),
]
TEXTS = [
    "",
    "\0",
    "a\0b",
    "\ud800",
    "\udfff\ud800",
    "\n\x1b[2J",
    "../x",
    "/etc/passwd",
    "é" * 300,
    "x" * 5000,
    "NaN",
]
OTHERS: list[Any] = [None, True, False, [], {}, [[]], [None], {"": None}, {"\ud800": 1}, [1, "a", {}]]
VALUES = st.one_of(st.sampled_from([*NUMBERS, *TEXTS, *OTHERS]), st.integers(), st.floats(), st.text(max_size=8))
TREES = st.recursive(
    VALUES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)


def dumped(tree: Any) -> str:
    """JSON, including non-finite numbers."""
    return json.dumps(tree)


def with_duplicate_key(text: str) -> str:
    """JSON with the first key of the outermost object duplicated."""
    tree = json.loads(text)
    if not isinstance(tree, dict) or not tree:
        return text
    key = next(iter(tree))
    return f"{{{json.dumps(key)}: {json.dumps(tree[key])}, {text[text.index('{') + 1 :]}"


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@st.composite
def changed(draw: Callable[[Any], Any], trees: list[Any]) -> str:
    """JSON of one of the trees, with some values deleted, renamed, retyped or exchanged."""
    tree = json.loads(json.dumps(draw(st.sampled_from(trees))))
    for _ in range(draw(st.integers(1, 3))):
        holder, key = None, None
        value = tree
        while isinstance(value, dict | list) and value and (holder is None or draw(st.integers(0, 3))):
            keys = list(value) if isinstance(value, dict) else range(len(value))
            holder, key = value, draw(st.sampled_from(list(keys)))
            value = holder[key]
        if holder is None:
            break
        action = draw(st.sampled_from(["delete", "rename", "value", "value", "tree", "twin"]))
        if action == "delete":
            del holder[key]
        elif action == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from([f"{key}s", key[:-1], key.upper(), "\ud800", "", "a.b"]))] = holder.pop(
                key
            )
        elif action == "value":
            holder[key] = copy.deepcopy(draw(VALUES))
        elif action == "tree":
            holder[key] = copy.deepcopy(draw(TREES))
        else:
            holder[key] = json.loads(json.dumps(holder))
    text = dumped(tree)
    return draw(
        st.sampled_from([text, text, text, with_duplicate_key(text), text.replace("null", nested(2000), 1)])
    )


@st.composite
def damaged(draw: Callable[[Any], Any], data: bytes) -> bytes:
    """Bytes of a file, some flipped, truncated, exchanged, repeated or overwritten; mostly near the beginning."""
    content = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        if not content:
            break
        end = len(content) if draw(st.booleans()) else min(len(content), 400)
        at = draw(st.integers(0, end - 1))
        size = draw(st.integers(1, 16))
        action = draw(st.sampled_from(["flip", "flip", "cut", "exchange", "repeat", "fill", "number", "insert"]))
        if action == "flip":
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "cut":
            del content[at:]
        elif action == "exchange":
            other = draw(st.integers(0, end - 1))
            content[at], content[other] = content[other], content[at]
        elif action == "repeat":
            content[at:at] = content[at : at + size]
        elif action == "fill":
            content[at : at + size] = bytes([draw(st.sampled_from([0, 0x20, 0x39, 0x5B, 0x80, 0xFF]))]) * size
        elif action == "number":
            content[at : at + 8] = struct.pack("<Q", draw(st.sampled_from([0, 1, 2**31, 2**62, 2**64 - 1])))
        else:
            content[at:at] = draw(st.binary(max_size=8))
    return bytes(content)


# The config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config")


def load_bytes(folder: Path, data: bytes, *overrides: str) -> None:
    path = folder / "config.json"
    path.write_bytes(data)

    def read() -> None:
        config = load_run_config(str(path), overrides)
        # A valid config can be written and read again.
        assert RunConfig.model_validate_json(config.model_dump_json()) == config

    check_reader(read, folder)


@fuzzed(150)
@given(data=st.binary(max_size=200) | st.text(max_size=100).map(str.encode) | TREES.map(dumped).map(str.encode))
def test_config_of_random_content(folder: Path, data: bytes) -> None:
    load_bytes(folder, data)


@fuzzed(500)
@given(text=changed(SHIPPED))
def test_config_with_changed_values(folder: Path, text: str) -> None:
    load_bytes(folder, text.encode())


@fuzzed(100)
@given(data=st.sampled_from(SHIPPED).map(dumped).map(str.encode).flatmap(damaged))
def test_config_with_changed_bytes(folder: Path, data: bytes) -> None:
    load_bytes(folder, data)


KEYS = [
    *(
        "model.name",
        "data.target.path",
        "data.target.batch_size",
        "train.epochs",
        "train.betas",
        "train.learning_rate",
    ),
    *("objective.decay", "evaluate.sets.x", "evaluate.sets.x.path", "deepspeed.x.y", "teacher", "data.reference"),
    *("data", "data.reference.views", ""),
]
OVERRIDES = st.one_of(
    st.text(max_size=30),
    st.builds("{}={}".format, st.sampled_from(KEYS), VALUES.map(dumped) | st.text(max_size=20)),
    st.builds("{}={}".format, st.sampled_from(KEYS), TREES.map(dumped)),
    st.builds("{}={}".format, st.text(".ab", max_size=12), st.sampled_from(TEXTS)),
    st.sampled_from(
        [
            f"train.epochs={nested(100_000)}",
            f"deepspeed={nested(500)}",
            f"{'a.' * 100_000}b=1",
            f"{'deepspeed.' * 300}b=1",
            f"train.epochs={'9' * 5000}",
            'deepspeed={"a": 1, "a": 2}',
            'deepspeed=[{"a": {"b": 1, "b": 2}}]',
            "deepspeed.x=1e999",
            "train.output=\udcff",
            "\udcff=1",
        ]
    ),
)


@fuzzed(400)
@given(tree=st.sampled_from(SHIPPED), overrides=st.lists(OVERRIDES, min_size=1, max_size=3))
def test_overrides_of_random_content(folder: Path, tree: dict[str, Any], overrides: list[str]) -> None:
    load_bytes(folder, dumped(tree).encode(), *overrides)


# The teacher's cache


LAYOUT = store.Layout(5, 2, 4, "float32")
FINGERPRINT = {"of": "tests", "views": 2}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete cache and an unfinished one."""
    folder = tmp_path_factory.mktemp("cache")
    for name in ("complete", "unfinished"):
        store.create(folder / name, LAYOUT, FINGERPRINT)
        writer = store.Writer(folder / name, LAYOUT, 0)
        for block in LAYOUT.blocks:
            rows = {half: np.eye(5, 4, dtype=np.float32) for half in store.HALVES}
            writer.write(block, rows if block == 0 else rows | {"text": rows["text"][:0]})
        writer.close()
    store.seal(folder / "complete", LAYOUT)
    return folder


def read_cache(folder: Path) -> None:
    opened = CachedTeacher(folder, FINGERPRINT).store
    layout = opened.layout
    every = np.arange(layout.samples)
    for view in range(layout.views):
        for half in store.HALVES:
            out = np.empty((layout.samples, layout.width), layout.dtype)
            opened.read(half, every, np.full_like(every, view), out)
            # By its checksums, the content is what was written.
            assert np.array_equal(out, np.eye(5, 4, dtype=np.float32))
    opened.check_all()


def resume_cache(folder: Path) -> None:
    if write.begin(folder, LAYOUT, FINGERPRINT, store.COMPUTED, ALONE) is not None:
        store.Writer(folder, LAYOUT, 1).close()
        (folder / "journal-1").unlink()


def with_file(folder: Path, name: str, data: bytes, read: Callable[[], Any]) -> None:
    """Reads with a changed file, and restores the file."""
    path = folder / name
    before = path.read_bytes()
    try:
        path.write_bytes(data)
        check_reader(read, folder)
    finally:
        path.write_bytes(before)


@fuzzed(150)
@given(data=st.data())
def test_teacher_cache_with_changed_bytes(cache: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["cache.json", "image.npy", "text.npy", "checksums.npy"]))
    changed_bytes = data.draw(damaged((cache / "complete" / name).read_bytes()))
    with_file(cache / "complete", name, changed_bytes, lambda: read_cache(cache / "complete"))


@fuzzed(200)
@given(data=st.data())
def test_teacher_cache_with_changed_manifest(cache: Path, data: st.DataObject) -> None:
    text = data.draw(changed([json.loads((cache / "complete/cache.json").read_text())]))
    with_file(cache / "complete", "cache.json", text.encode(), lambda: read_cache(cache / "complete"))
    with_file(cache / "unfinished", "cache.json", text.encode(), lambda: resume_cache(cache / "unfinished"))


@fuzzed(60)
@given(data=st.data())
def test_unfinished_cache_with_changed_bytes(cache: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["image.npy", "journal-0"]))
    changed_bytes = data.draw(damaged((cache / "unfinished" / name).read_bytes()))
    with_file(cache / "unfinished", name, changed_bytes, lambda: resume_cache(cache / "unfinished"))


def test_unchanged_cache_is_read(cache: Path) -> None:
    read_cache(cache / "complete")
    assert store.finished_blocks(cache / "unfinished").keys() == {0, 1}


# The prepared set and what it is made of


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared set, and the tar that it was prepared from."""
    folder = tmp_path_factory.mktemp("ready")
    samples = {
        f"{i}": {"jpg": tiny.jpeg(i, (12, 10)), "cls": str(i).encode(), "txt": f"größe {i}".encode()}
        for i in range(4)
    }
    tiny.write_tar(folder / "raw/a.tar", samples)
    raw = RawSource(open_webdataset(str(folder / "raw/a.tar"), ".txt"))
    prepare(raw, folder / "set", Options(), 1)
    return folder


def read_all(source: Source) -> None:
    for row in range(len(source)):
        assert isinstance(source.samples[row].key, str)
        assert isinstance(source.samples[row].texts, tuple)
        source.read(row)
    source.digest()


def read_set(folder: Path) -> None:
    read_all(open_prepared(str(folder), ".txt"))


@fuzzed(200)
@given(data=st.data())
def test_prepared_set_with_changed_bytes(ready: Path, data: st.DataObject) -> None:
    folder = ready / "set"
    name = data.draw(st.sampled_from(["manifest.json", "index.safetensors", "000000.tar"]))
    changed_bytes = data.draw(damaged((folder / name).read_bytes()))
    read = data.draw(st.sampled_from([lambda: read_set(folder), lambda: verify(str(folder))]))
    with_file(folder, name, changed_bytes, read)


@fuzzed(200)
@given(data=st.data())
def test_prepared_set_with_changed_manifest(ready: Path, data: st.DataObject) -> None:
    folder = ready / "set"
    text = data.draw(changed([json.loads((folder / "manifest.json").read_text())]))
    with_file(folder, "manifest.json", text.encode(), lambda: read_set(folder))


@fuzzed(100)
@given(data=st.data())
def test_index_with_changed_numbers(ready: Path, data: st.DataObject) -> None:
    """Only behind the header, which changed bytes mostly invalidate."""
    path = ready / "set/index.safetensors"
    original = path.read_bytes()
    start = 8 + struct.unpack("<Q", original[:8])[0]
    body = data.draw(damaged(original[start:]))
    with_file(
        ready / "set",
        path.name,
        original[:start] + body[: len(original) - start].ljust(len(original) - start),
        lambda: read_set(ready / "set"),
    )


@fuzzed(150)
@given(data=st.data())
def test_tar_with_changed_bytes(ready: Path, data: st.DataObject) -> None:
    folder = ready / "raw"
    at = 512 * data.draw(st.integers(0, 20))
    original = (folder / "a.tar").read_bytes()
    changed_bytes = original[:at] + data.draw(damaged(original[at:]))
    strict = data.draw(st.booleans())
    read = lambda: read_all(open_webdataset(str(folder / "a.tar"), ".txt", strict=strict))  # noqa: E731
    with_file(folder, "a.tar", changed_bytes, read)


@fuzzed(100)
@given(
    data=st.binary(max_size=60) | st.text("\t\n\r\0ab\"'{}titlefph", max_size=60).map(str.encode),
    head=st.booleans(),
)
def test_lists_of_random_content(folder: Path, data: bytes, head: bool) -> None:
    (folder / "list.txt").write_bytes((b"title\tfilepath\n" if head else b"") + data)
    path = str(folder / "list.txt")
    check_reader(lambda: read_all(open_csv(path, None, group=False)), folder)
    check_reader(lambda: read_class_names(path), folder)
    check_reader(lambda: read_templates(path), folder)
    (folder / "list.txt").unlink()


# Weights, heads, results


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few kilobytes, its weights in every file format, and a head."""
    folder = tmp_path_factory.mktemp("model")
    small = {"layers": 1, "width": 16}
    config = {
        "embed_dim": 8,
        "vision_cfg": tiny.VISION | small,
        "text_cfg": tiny.TEXT | small | {"vocab_size": 32, "context_length": 8},
    }
    tiny.write_model(folder / "model", config)
    built = towers.create(ModelConfig(name=f"local-dir:{folder / 'model'}"))
    (folder / "files").mkdir()
    state = built.export(built.state_dict())
    towers.save(state, folder / "files/model.safetensors")
    torch.save(state, folder / "files/model.pt")
    (folder / "files/step1").mkdir()
    torch.save({"module": built.state_dict()}, folder / "files/step1/mp_rank_00_model_states.pt")
    heads.save(
        heads.Head(torch.zeros(3, 4), torch.zeros(3), ("a", "größe", "c")), folder / "files/head.safetensors"
    )
    return folder


@fuzzed(60)
@given(data=st.data())
def test_weights_with_changed_bytes(model: Path, data: st.DataObject) -> None:
    config = ModelConfig(name=f"local-dir:{model / 'model'}")
    name = data.draw(st.sampled_from(["model.safetensors", "model.pt", "step1/mp_rank_00_model_states.pt"]))
    changed_bytes = data.draw(damaged((model / "files" / name).read_bytes()))
    path = model / "files" / name
    built = towers.create(config, weights=False)
    read = lambda: load_into(built, config, path.parent if "/" in name else path)  # noqa: E731
    with_file(model / "files", name, changed_bytes, read)


CHECKPOINT_JSON = (
    *(manifest.MANIFEST, manifest.TRAINER, manifest.IDENTITY, manifest.EVALUATION),
    lineage.FILE,
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoint that has an evaluation."""
    folder = tmp_path_factory.mktemp("checkpoints")
    path = write_checkpoint(folder)
    manifest.write_evaluation(path, manifest.Evaluation(VALIDATION, {"accuracy/a set": 0.5}))
    (folder / lineage.FILE).write_text(json.dumps(lineage.Lineage(RUN)._asdict()))
    return folder


def read_checkpoint(folder: Path) -> None:
    path = resume.find_checkpoint("auto", folder, ALONE)
    if path is not None:
        manifest.read_trainer(path)
        manifest.read_identity(path)
        manifest.read_evaluation(path)
        stored = manifest.Tensors(path)
        for kind in (manifest.WEIGHTS, *MOMENTS, manifest.RANDOM):
            for name in stored.shapes(kind):
                stored.read(kind, name, torch.device("cpu"))


@fuzzed(150)
@given(data=st.data(), sealed=st.booleans())
def test_checkpoint_with_changed_bytes(checkpoints: Path, data: st.DataObject, sealed: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = shutil.copytree(checkpoints, Path(name) / "checkpoints") / "step00000002"
        file = data.draw(st.sampled_from(sorted(path.iterdir())))
        file.write_bytes(data.draw(damaged(file.read_bytes())))
        if sealed and file.name != manifest.MANIFEST:
            seal(path)
        check_reader(lambda: read_checkpoint(path.parent), path.parent)


@fuzzed(150)
@given(data=st.data(), kind=st.sampled_from(CHECKPOINT_JSON))
def test_checkpoint_with_changed_json(checkpoints: Path, data: st.DataObject, kind: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = shutil.copytree(checkpoints, Path(name) / "checkpoints") / "step00000002"
        file = path.parent / kind if kind == lineage.FILE else path / kind
        text = data.draw(changed([json.loads(file.read_text())]))
        file.write_bytes(text.encode(errors="surrogatepass"))
        if kind in (manifest.TRAINER, manifest.IDENTITY):
            seal(path)
        check_reader(lambda: read_checkpoint(path.parent), path.parent)


def test_unchanged_checkpoint_is_found(checkpoints: Path) -> None:
    assert resume.find_checkpoint("auto", checkpoints, ALONE) == checkpoints / "step00000002"
    read_checkpoint(checkpoints)


def with_header(original: bytes, text: str) -> bytes:
    start = 8 + struct.unpack("<Q", original[:8])[0]
    return struct.pack("<Q", len(text.encode())) + text.encode() + original[start:]


def header_of(original: bytes) -> Any:
    return json.loads(original[8 : 8 + struct.unpack("<Q", original[:8])[0]])


def read_head(path: Path) -> None:
    head = heads.load(path)
    assert all(isinstance(name, str) for name in head.class_names)
    assert len(head.class_names) == len(head.weight) == len(head.bias)


@fuzzed(200)
@given(data=st.data())
def test_head_with_changed_content(model: Path, data: st.DataObject) -> None:
    original = (model / "files/head.safetensors").read_bytes()
    text = data.draw(changed([header_of(original)]))
    names = data.draw(changed([["a", "größe", "c"]]))
    tree = header_of(original)
    tree["__metadata__"]["class_names"] = names
    for data_of in (
        with_header(original, text),
        with_header(original, json.dumps(tree)),
        data.draw(damaged(original)),
    ):
        with_file(
            model / "files", "head.safetensors", data_of, lambda: read_head(model / "files/head.safetensors")
        )


@fuzzed(60)
@given(data=st.data())
def test_weights_and_index_with_changed_headers(model: Path, ready: Path, data: st.DataObject) -> None:
    config = ModelConfig(name=f"local-dir:{model / 'model'}")
    original = (model / "files/model.safetensors").read_bytes()
    text = data.draw(changed([header_of(original)]))
    read = lambda: towers.read_weights(config, model / "files/model.safetensors")  # noqa: E731
    with_file(model / "files", "model.safetensors", with_header(original, text), read)
    index = (ready / "set/index.safetensors").read_bytes()
    text = data.draw(changed([header_of(index)]))
    with_file(ready / "set", "index.safetensors", with_header(index, text), lambda: read_set(ready / "set"))


ROW = {"label": "a", "set": "b", "title": "B", "role": None, "metric": "top1", "value": 0.5, "key": "k"}
ROW |= {"ece": 0.1, "nll": 2.5, "reliability": {name: [0] * 10 for name in ("samples", "confidence", "accuracy")}}


@fuzzed(150)
@given(text=changed([ROW]), data=damaged(json.dumps(ROW).encode()))
def test_results_with_changed_rows(folder: Path, text: str, data: bytes) -> None:
    for line in (text.encode(), data):
        (folder / results.FILE).write_bytes(line + b"\n")
        check_reader(lambda: tables.as_markdown(results.Results(folder).rows), folder)
    (folder / results.FILE).unlink()


COCO = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "a cat"}]}


@fuzzed(200)
@given(coco=changed([COCO]), split=changed([{"test": [["a.jpg", 0, "cat"]], "train": [["a.jpg", 1, "dog"]]}]))
def test_evaluation_lists_with_changed_values(folder: Path, coco: str, split: str) -> None:
    (folder / "a.jpg").write_bytes(tiny.jpeg(0, (12, 10)))
    (folder / "coco_test_karpathy.json").write_text(coco)
    (folder / "split.json").write_text(split)
    check_reader(lambda: layouts.karpathy(folder, "mscoco"), folder)
    check_reader(lambda: layouts.coop(folder, "split.json", [""]), folder)
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.fixture(scope="module")
def clip_retrieval(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip-retrieval's files for two pairs."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("clip_retrieval")
    for name in ("img_emb", "text_emb"):
        np.save(folder / f"{name}_0.npy", np.eye(2, 4, dtype=np.float32))
    table = arrow.table({"image_path": ["a", "b"], "caption": ["one", "two"]})
    parquet.write_table(table, folder / "metadata_0.parquet")
    return folder


@fuzzed(150)
@given(data=st.data())
def test_clip_retrieval_files_with_changed_bytes(clip_retrieval: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["img_emb_0.npy", "text_emb_0.npy", "metadata_0.parquet"]))
    changed_bytes = data.draw(damaged((clip_retrieval / name).read_bytes()))

    def read() -> None:
        embeddings = retrieval.Embeddings(clip_retrieval, "float32")
        list(embeddings._entries())
        embeddings.check_width(4)
        for half in store.HALVES:
            embeddings.read(half, np.arange(len(embeddings)), "float32")

    with_file(clip_retrieval, name, changed_bytes, read)
