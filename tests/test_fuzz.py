"""Whatever a file or an override holds: a value or one clear line, and no file is touched.

``DIVE_FUZZ=20`` tries twenty times as much.
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
from safetensors.torch import save_file

from dive_fast.checkpoint import lineage, resume
from dive_fast.checkpoint import manifest as checkpoint
from dive_fast.checkpoint.load_weights import load_into
from dive_fast.checkpoint.zero_state import MOMENTS
from dive_fast.config.schema import ModelConfig
from dive_fast.data.prepared.convert import Options
from dive_fast.data.prepared.raw import RawSource
from dive_fast.data.prepared.read import open_prepared, verify
from dive_fast.data.prepared.write import prepare
from dive_fast.data.prompts import read_class_names, read_templates
from dive_fast.data.sources.csv_table import open_csv
from dive_fast.data.sources.source import Source
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.distributed import Ranks
from dive_fast.engine.update import LossScale
from dive_fast.errors import MAX_LENGTH, ConfigError, DataError
from dive_fast.evaluate import results
from dive_fast.evaluate.datasets import layouts
from dive_fast.methods.run_config import RunConfig, load_run_config
from dive_fast.model import head as heads
from dive_fast.model import towers
from dive_fast.teacher import cache_files as store
from dive_fast.teacher import clip_retrieval as retrieval
from dive_fast.teacher import write_cache as write
from dive_fast.teacher.teacher import CachedTeacher

CONFIGS = Path(__file__).parents[1] / "launch" / "configs"
SHIPPED = [json.loads(path.read_text()) for path in sorted(CONFIGS.glob("*.json"))]
ALONE = Ranks(0, 1, torch.device("cpu"))
TIMES = int(os.environ.get("DIVE_FUZZ", "1"))


def fuzzed(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The same examples in every run; the deadline is there for what never ends."""
    return settings(
        max_examples=examples * TIMES,
        derandomize=True,
        deadline=timedelta(seconds=30),
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def contents(folder: Path) -> dict[str, str]:
    """What a folder holds, to the byte."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def held(read: Callable[[], Any], folder: Path) -> None:
    """Reads; a value or the house's error in one line, and nothing in the folder is another thing than before."""
    before = contents(folder)
    try:
        read()
    except (ConfigError, DataError) as error:
        message = str(error)
        assert message.isprintable(), message
        assert 10 < len(message) <= MAX_LENGTH + 5
    assert contents(folder) == before


# What is done to what is right

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
    VALUES, lambda held: st.lists(held, max_size=4) | st.dictionaries(st.text(max_size=6), held, max_size=4)
)


def dumped(tree: Any) -> str:
    """JSON, with the numbers that it does not have."""
    return json.dumps(tree)


def doubled(text: str) -> str:
    """With the first key of the outermost object once more."""
    tree = json.loads(text)
    if not isinstance(tree, dict) or not tree:
        return text
    key = next(iter(tree))
    return f"{{{json.dumps(key)}: {json.dumps(tree[key])}, {text[text.index('{') + 1 :]}"


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@st.composite
def changed(draw: Callable[[Any], Any], trees: list[Any]) -> str:
    """JSON of one of the trees, with some of its places deleted, renamed, retyped or exchanged."""
    tree = json.loads(json.dumps(draw(st.sampled_from(trees))))
    for _ in range(draw(st.integers(1, 3))):
        holder, key = None, None
        place = tree
        while isinstance(place, dict | list) and place and (holder is None or draw(st.integers(0, 3))):
            keys = list(place) if isinstance(place, dict) else range(len(place))
            holder, key = place, draw(st.sampled_from(list(keys)))
            place = holder[key]
        if holder is None:
            break
        what = draw(st.sampled_from(["delete", "rename", "value", "value", "tree", "twin"]))
        if what == "delete":
            del holder[key]
        elif what == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from([f"{key}s", key[:-1], key.upper(), "\ud800", "", "a.b"]))] = holder.pop(
                key
            )
        elif what == "value":
            holder[key] = copy.deepcopy(draw(VALUES))
        elif what == "tree":
            holder[key] = copy.deepcopy(draw(TREES))
        else:
            holder[key] = json.loads(json.dumps(holder))
    text = dumped(tree)
    return draw(st.sampled_from([text, text, text, doubled(text), text.replace("null", nested(2000), 1)]))


@st.composite
def damaged(draw: Callable[[Any], Any], data: bytes) -> bytes:
    """Bytes of a file, some flipped, cut off, exchanged, repeated or overwritten; mostly near the beginning."""
    made = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        if not made:
            break
        end = len(made) if draw(st.booleans()) else min(len(made), 400)
        at = draw(st.integers(0, end - 1))
        size = draw(st.integers(1, 16))
        what = draw(st.sampled_from(["flip", "flip", "cut", "exchange", "repeat", "fill", "number", "insert"]))
        if what == "flip":
            made[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "cut":
            del made[at:]
        elif what == "exchange":
            other = draw(st.integers(0, end - 1))
            made[at], made[other] = made[other], made[at]
        elif what == "repeat":
            made[at:at] = made[at : at + size]
        elif what == "fill":
            made[at : at + size] = bytes([draw(st.sampled_from([0, 0x20, 0x39, 0x5B, 0x80, 0xFF]))]) * size
        elif what == "number":
            made[at : at + 8] = struct.pack("<Q", draw(st.sampled_from([0, 1, 2**31, 2**62, 2**64 - 1])))
        else:
            made[at:at] = draw(st.binary(max_size=8))
    return bytes(made)


# The config


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config")


def load_bytes(place: Path, data: bytes, *overrides: str) -> None:
    path = place / "config.json"
    path.write_bytes(data)

    def read() -> None:
        config = load_run_config(str(path), overrides)
        # What was taken can be written down and read again.
        assert RunConfig.model_validate_json(config.model_dump_json()) == config

    held(read, place)


@fuzzed(150)
@given(data=st.binary(max_size=200) | st.text(max_size=100).map(str.encode) | TREES.map(dumped).map(str.encode))
def test_a_config_of_anything(place: Path, data: bytes) -> None:
    load_bytes(place, data)


@fuzzed(500)
@given(text=changed(SHIPPED))
def test_a_config_that_was_right_once(place: Path, text: str) -> None:
    load_bytes(place, text.encode())


@fuzzed(100)
@given(data=st.sampled_from(SHIPPED).map(dumped).map(str.encode).flatmap(damaged))
def test_a_config_with_bytes_changed(place: Path, data: bytes) -> None:
    load_bytes(place, data)


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
def test_overrides_of_anything(place: Path, tree: dict[str, Any], overrides: list[str]) -> None:
    load_bytes(place, dumped(tree).encode(), *overrides)


# The teacher's cache


LAYOUT = store.Layout(5, 2, 4, "float32")
FINGERPRINT = {"of": "tests", "views": 2}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole cache and one that is not."""
    folder = tmp_path_factory.mktemp("cache")
    for name in ("whole", "begun"):
        store.create(folder / name, LAYOUT, FINGERPRINT)
        writer = store.Writer(folder / name, LAYOUT, 0)
        for block in LAYOUT.blocks:
            rows = {half: np.eye(5, 4, dtype=np.float32) for half in store.HALVES}
            writer.write(block, rows if block == 0 else rows | {"text": rows["text"][:0]})
        writer.close()
    store.seal(folder / "whole", LAYOUT)
    return folder


def read_cache(folder: Path) -> None:
    opened = CachedTeacher(folder, FINGERPRINT).store
    layout = opened.layout
    every = np.arange(layout.samples)
    for view in range(layout.views):
        for half in store.HALVES:
            out = np.empty((layout.samples, layout.width), layout.dtype)
            opened.read(half, every, np.full_like(every, view), out)
            # The checksums have it: what is read is what was written.
            assert np.array_equal(out, np.eye(5, 4, dtype=np.float32))
    opened.check_all()


def go_on_with_cache(folder: Path) -> None:
    if write.begin(folder, LAYOUT, FINGERPRINT, store.COMPUTED, ALONE) is not None:
        store.Writer(folder, LAYOUT, 1).close()
        (folder / "journal-1").unlink()


def with_file(folder: Path, name: str, data: bytes, read: Callable[[], Any]) -> None:
    """Reads with a file changed; puts back what it was."""
    path = folder / name
    before = path.read_bytes()
    try:
        path.write_bytes(data)
        held(read, folder)
    finally:
        path.write_bytes(before)


@fuzzed(150)
@given(data=st.data())
def test_a_teacher_cache_with_bytes_changed(cache: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["cache.json", "image.npy", "text.npy", "checksums.npy"]))
    changed_bytes = data.draw(damaged((cache / "whole" / name).read_bytes()))
    with_file(cache / "whole", name, changed_bytes, lambda: read_cache(cache / "whole"))


@fuzzed(200)
@given(data=st.data())
def test_a_teacher_caches_manifest_that_was_right_once(cache: Path, data: st.DataObject) -> None:
    text = data.draw(changed([json.loads((cache / "whole/cache.json").read_text())]))
    with_file(cache / "whole", "cache.json", text.encode(), lambda: read_cache(cache / "whole"))
    with_file(cache / "begun", "cache.json", text.encode(), lambda: go_on_with_cache(cache / "begun"))


@fuzzed(60)
@given(data=st.data())
def test_a_begun_cache_with_bytes_changed(cache: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["image.npy", "journal-0"]))
    changed_bytes = data.draw(damaged((cache / "begun" / name).read_bytes()))
    with_file(cache / "begun", name, changed_bytes, lambda: go_on_with_cache(cache / "begun"))


def test_the_cache_is_read_where_nothing_is_changed(cache: Path) -> None:
    read_cache(cache / "whole")
    assert store.done(cache / "begun").keys() == {0, 1}


# The prepared set and what it is made of


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared set, and the tar that it was made from."""
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
def test_a_prepared_set_with_bytes_changed(ready: Path, data: st.DataObject) -> None:
    folder = ready / "set"
    name = data.draw(st.sampled_from(["manifest.json", "index.safetensors", "000000.tar"]))
    changed_bytes = data.draw(damaged((folder / name).read_bytes()))
    read = data.draw(st.sampled_from([lambda: read_set(folder), lambda: verify(str(folder))]))
    with_file(folder, name, changed_bytes, read)


@fuzzed(200)
@given(data=st.data())
def test_a_prepared_sets_manifest_that_was_right_once(ready: Path, data: st.DataObject) -> None:
    folder = ready / "set"
    text = data.draw(changed([json.loads((folder / "manifest.json").read_text())]))
    with_file(folder, "manifest.json", text.encode(), lambda: read_set(folder))


@fuzzed(100)
@given(data=st.data())
def test_an_index_whose_numbers_are_changed(ready: Path, data: st.DataObject) -> None:
    """Behind the header, which a change of bytes mostly breaks."""
    path = ready / "set/index.safetensors"
    whole = path.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    body = data.draw(damaged(whole[start:]))
    with_file(
        ready / "set",
        path.name,
        whole[:start] + body[: len(whole) - start].ljust(len(whole) - start),
        lambda: read_set(ready / "set"),
    )


@fuzzed(150)
@given(data=st.data())
def test_a_tar_with_bytes_changed(ready: Path, data: st.DataObject) -> None:
    folder = ready / "raw"
    at = 512 * data.draw(st.integers(0, 20))
    whole = (folder / "a.tar").read_bytes()
    changed_bytes = whole[:at] + data.draw(damaged(whole[at:]))
    strict = data.draw(st.booleans())
    read = lambda: read_all(open_webdataset(str(folder / "a.tar"), ".txt", strict=strict))  # noqa: E731
    with_file(folder, "a.tar", changed_bytes, read)


@fuzzed(100)
@given(
    data=st.binary(max_size=60) | st.text("\t\n\r\0ab\"'{}titlefph", max_size=60).map(str.encode),
    head=st.booleans(),
)
def test_lists_of_anything(place: Path, data: bytes, head: bool) -> None:
    (place / "list.txt").write_bytes((b"title\tfilepath\n" if head else b"") + data)
    path = str(place / "list.txt")
    held(lambda: read_all(open_csv(path, None, group=False)), place)
    held(lambda: read_class_names(path), place)
    held(lambda: read_templates(path), place)
    (place / "list.txt").unlink()


# Weights, heads, results


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few kilobytes, its weights in every kind of file, and a head."""
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
def test_weights_with_bytes_changed(model: Path, data: st.DataObject) -> None:
    config = ModelConfig(name=f"local-dir:{model / 'model'}")
    name = data.draw(st.sampled_from(["model.safetensors", "model.pt", "step1/mp_rank_00_model_states.pt"]))
    changed_bytes = data.draw(damaged((model / "files" / name).read_bytes()))
    path = model / "files" / name
    built = towers.create(config, weights=False)
    read = lambda: load_into(built, config, path.parent if "/" in name else path)  # noqa: E731
    with_file(model / "files", name, changed_bytes, read)


CHECKPOINT_JSON = (
    *(checkpoint.MANIFEST, checkpoint.TRAINER, checkpoint.IDENTITY, checkpoint.EVALUATION),
    lineage.FILE,
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one checkpoint, of a model with two parameters."""
    folder = tmp_path_factory.mktemp("checkpoints")
    path = folder / "step00000002"
    path.mkdir()
    kinds = (checkpoint.WEIGHTS, *MOMENTS)
    rows = {f"{kind}/{name}": torch.rand(3, 2) for kind in kinds for name in "ab"}
    save_file(rows, path / "rank00000.safetensors")
    scale = LossScale("fp16", torch.device("cpu")).state_dict()
    chosen = {"best": 0.5, "best_step": 2, "since_best": 0, "select": "a set"}
    numbers: dict[str, Any] = {"run": "a run", "total_steps": 3, "step": 2, "updates": 2, "loss_scale": scale}
    numbers |= {"validation": chosen, "metrics": {"loss": 0.5}}
    (path / checkpoint.TRAINER).write_text(json.dumps(numbers))
    (path / checkpoint.IDENTITY).write_text(json.dumps({"train": {"seed": 0}}))
    seal(path)
    checkpoint.write_evaluation(path, checkpoint.Evaluation(chosen, {"accuracy/a set": 0.5}))
    (folder / lineage.FILE).write_text(json.dumps(lineage.Lineage("a run")._asdict()))
    return folder


def seal(path: Path) -> None:
    """Writes the manifest of what is there, as a stranger would who has changed something."""
    unlisted = (checkpoint.MANIFEST, checkpoint.EVALUATION)
    files = sorted(file for file in path.iterdir() if file.name not in unlisted)
    found = {file.name: checkpoint.describe_file(file) for file in files}
    manifest = {"format": checkpoint.FORMAT, "ranks": 1, "files": found}
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def read_checkpoint(folder: Path) -> None:
    found = resume.find_checkpoint("auto", folder, ALONE)
    if found is not None:
        checkpoint.read_trainer(found)
        checkpoint.read_identity(found)
        checkpoint.read_evaluation(found)
        stored = checkpoint.Tensors(found)
        for kind in (checkpoint.WEIGHTS, *MOMENTS, checkpoint.RANDOM):
            for name in stored.shapes(kind):
                stored.read(kind, name, torch.device("cpu"))


@fuzzed(150)
@given(data=st.data(), sealed=st.booleans())
def test_a_checkpoint_with_bytes_changed(checkpoints: Path, data: st.DataObject, sealed: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = shutil.copytree(checkpoints, Path(name) / "checkpoints") / "step00000002"
        file = data.draw(st.sampled_from(sorted(path.iterdir())))
        file.write_bytes(data.draw(damaged(file.read_bytes())))
        if sealed and file.name != checkpoint.MANIFEST:
            seal(path)
        held(lambda: read_checkpoint(path.parent), path.parent)


@fuzzed(150)
@given(data=st.data(), kind=st.sampled_from(CHECKPOINT_JSON))
def test_a_checkpoints_json_that_was_right_once(checkpoints: Path, data: st.DataObject, kind: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = shutil.copytree(checkpoints, Path(name) / "checkpoints") / "step00000002"
        file = path.parent / kind if kind == lineage.FILE else path / kind
        text = data.draw(changed([json.loads(file.read_text())]))
        file.write_bytes(text.encode(errors="surrogatepass"))
        if kind in (checkpoint.TRAINER, checkpoint.IDENTITY):
            seal(path)
        held(lambda: read_checkpoint(path.parent), path.parent)


def test_the_checkpoint_is_found_where_nothing_is_changed(checkpoints: Path) -> None:
    assert resume.find_checkpoint("auto", checkpoints, ALONE) == checkpoints / "step00000002"
    read_checkpoint(checkpoints)


def with_header(whole: bytes, text: str) -> bytes:
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    return struct.pack("<Q", len(text.encode())) + text.encode() + whole[start:]


def header_of(whole: bytes) -> Any:
    return json.loads(whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]])


def read_head(path: Path) -> None:
    found = heads.load(path)
    assert all(isinstance(name, str) for name in found.class_names)
    assert len(found.class_names) == len(found.weight) == len(found.bias)


@fuzzed(200)
@given(data=st.data())
def test_a_head_that_was_right_once(model: Path, data: st.DataObject) -> None:
    whole = (model / "files/head.safetensors").read_bytes()
    text = data.draw(changed([header_of(whole)]))
    names = data.draw(changed([["a", "größe", "c"]]))
    tree = header_of(whole)
    tree["__metadata__"]["class_names"] = names
    for data_of in (with_header(whole, text), with_header(whole, json.dumps(tree)), data.draw(damaged(whole))):
        with_file(
            model / "files", "head.safetensors", data_of, lambda: read_head(model / "files/head.safetensors")
        )


@fuzzed(60)
@given(data=st.data())
def test_headers_of_weights_and_indexes_that_were_right_once(
    model: Path, ready: Path, data: st.DataObject
) -> None:
    config = ModelConfig(name=f"local-dir:{model / 'model'}")
    whole = (model / "files/model.safetensors").read_bytes()
    text = data.draw(changed([header_of(whole)]))
    read = lambda: towers.read_weights(config, model / "files/model.safetensors")  # noqa: E731
    with_file(model / "files", "model.safetensors", with_header(whole, text), read)
    index = (ready / "set/index.safetensors").read_bytes()
    text = data.draw(changed([header_of(index)]))
    with_file(ready / "set", "index.safetensors", with_header(index, text), lambda: read_set(ready / "set"))


ROW = {"label": "a", "set": "b", "title": "B", "role": None, "metric": "top1", "value": 0.5, "key": "k"}


@fuzzed(150)
@given(text=changed([ROW]), data=damaged(json.dumps(ROW).encode()))
def test_results_that_were_right_once(place: Path, text: str, data: bytes) -> None:
    for line in (text.encode(), data):
        (place / results.FILE).write_bytes(line + b"\n")
        held(lambda: results.as_markdown(results.Results(place).rows), place)
    (place / results.FILE).unlink()


COCO = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "a cat"}]}


@fuzzed(200)
@given(coco=changed([COCO]), split=changed([{"test": [["a.jpg", 0, "cat"]], "train": [["a.jpg", 1, "dog"]]}]))
def test_lists_of_evaluation_sets_that_were_right_once(place: Path, coco: str, split: str) -> None:
    (place / "a.jpg").write_bytes(tiny.jpeg(0, (12, 10)))
    (place / "coco_test_karpathy.json").write_text(coco)
    (place / "split.json").write_text(split)
    held(lambda: layouts.karpathy(place, "mscoco"), place)
    held(lambda: layouts.coop(place, "split.json", [""]), place)
    shutil.rmtree(place)
    place.mkdir()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What clip-retrieval leaves of two pairs."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("theirs")
    for name in ("img_emb", "text_emb"):
        np.save(folder / f"{name}_0.npy", np.eye(2, 4, dtype=np.float32))
    table = arrow.table({"image_path": ["a", "b"], "caption": ["one", "two"]})
    parquet.write_table(table, folder / "metadata_0.parquet")
    return folder


@fuzzed(150)
@given(data=st.data())
def test_embeddings_of_others_with_bytes_changed(theirs: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["img_emb_0.npy", "text_emb_0.npy", "metadata_0.parquet"]))
    changed_bytes = data.draw(damaged((theirs / name).read_bytes()))

    def read() -> None:
        embeddings = retrieval.Embeddings(theirs, "float32")
        list(embeddings._entries())
        embeddings.check_width(4)
        for half in store.HALVES:
            embeddings.read(half, np.arange(len(embeddings)), "float32")

    with_file(theirs, name, changed_bytes, read)
