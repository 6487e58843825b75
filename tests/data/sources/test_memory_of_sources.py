"""Memory of loader processes: a forked process that reads the metadata of all samples copies no pages of them.

A list of Python objects fails here: reading one changes its reference count, and with it a page of the parent's.
"""

import gc
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny

from dive_fast.config.schema import ReferenceConfig, TargetConfig
from dive_fast.data.open_dataset import open_reference, open_target
from dive_fast.data.prepared import convert, format
from dive_fast.data.prepared.raw import RawSource
from dive_fast.data.prepared.write import prepare
from dive_fast.data.sources.sample_table import Sample
from dive_fast.data.sources.source import Source

COUNT, CLASSES = 20_000, 50
MAX_GROWTH = 6 * 2**20
"""Bytes by which a worker may grow: the index, a few megabytes, and its own buffers, but no objects of samples."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sets")


@pytest.fixture(scope="module", autouse=True)
def cache(root: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIVE_FAST_CACHE", str(root / "cache"))
        yield


def images(root: Path) -> Path:
    """A folder of classes, with a caption next to each image."""
    folder = root / "images"
    if not folder.exists():
        jpeg, caption = root / "1.jpg", root / "1.txt"
        jpeg.write_bytes(tiny.jpeg(1))
        caption.write_text("a caption of some words, as long as those of pictures in the web are on average\n")
        for file in (jpeg, caption):
            os.utime(file, (1e9, 1e9))  # the index of files that have just changed is not kept
        for row in range(COUNT):
            file = folder / f"class {row % CLASSES}" / f"picture {row:06d}"
            if row < CLASSES:
                file.parent.mkdir(parents=True)
            os.link(jpeg, f"{file}.jpg")
            os.link(caption, f"{file}.txt")
    return folder


def folder(root: Path) -> Source:
    return open_target(TargetConfig(format="folder", path=str(images(root))))


def holdout(root: Path) -> Source:
    return open_target(TargetConfig(format="folder", path=str(images(root)), holdout=0.1))


def pairs(root: Path) -> Source:
    return open_reference(ReferenceConfig(format="folder", path=str(images(root))))


def lines(root: Path) -> Source:
    return open_reference(ReferenceConfig(format="folder", path=str(images(root)), captions="lines"))


def write_csv(root: Path, rows: Callable[[int, str], list[str]]) -> str:
    names = (f"class {row % CLASSES}/picture {row:06d}.jpg" for row in range(COUNT))
    text = "\n".join(f"{title}\t{name}" for row, name in enumerate(names) for title in rows(row, name))
    (images(root) / "list.csv").write_text("title\tfilepath\n" + text)
    return str(images(root) / "list.csv")


def csv_pairs(root: Path) -> Source:
    path = write_csv(root, lambda row, name: [f"caption {row} of {name}, with as many words as captions have"])
    return open_reference(ReferenceConfig(format="csv", path=path))


def csv_prompts(root: Path) -> Source:
    path = write_csv(
        root, lambda row, name: [f"a photo of class {row % CLASSES}", f"art of class {row % CLASSES}"]
    )
    return open_target(TargetConfig(format="csv", path=path))


def tars(root: Path) -> Source:
    samples = {
        f"{row:06d}": {"jpg": b"\xff\xd8", "txt": f"caption {row} of a tar".encode()} for row in range(COUNT)
    }
    path = tiny.write_tar(root / "0.tar", samples)
    return open_reference(ReferenceConfig(format="webdataset", path=str(path)))


def huggingface(root: Path) -> Source:
    datasets = pytest.importorskip("datasets")
    types = {"image": datasets.Image(), "caption": datasets.Value("string")}
    columns = {
        "image": [{"bytes": b"\xff\xd8", "path": None}] * COUNT,
        "caption": [f"caption {row} of an arrow file" for row in range(COUNT)],
    }
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns, features=datasets.Features(types)).save_to_disk(root / "arrow")
    return open_reference(ReferenceConfig(format="huggingface", path=str(root / "arrow")))


def prepared(root: Path, **options: Any) -> Source:
    """A prepared set: ten images are prepared, and their index is repeated."""
    ten = {f"{row}": {"jpg": tiny.jpeg(row), "txt": f"caption {row} of ten".encode()} for row in range(10)}
    first = tiny.write_tar(root / "ten.tar", ten)
    source = open_reference(ReferenceConfig(format="webdataset", path=str(first)))
    output = root / f"prepared {options}"
    manifest = prepare(RawSource(source), output, convert.Options(**options), 1)
    index = format.concatenate_indexes([format.read_index(output, manifest)] * (COUNT // 10))
    index["file"].zero_()
    from safetensors.torch import save

    (output / format.INDEX).write_bytes(save(index))
    content = format.content_hash(index)
    format.write_manifest(output, replace(manifest, samples=COUNT, content=content))
    return open_reference(ReferenceConfig(format="prepared", path=str(output)))


def prepared_with_tokens(root: Path) -> Source:
    source = prepared(root, tokenizer="ViT-B-32")
    assert source.tokens is not None
    return source


SETS = (
    *(folder, csv_prompts, prepared_with_tokens),
    *(
        pytest.param(source, marks=pytest.mark.slow)
        for source in (holdout, pairs, lines, csv_pairs, tars, huggingface, prepared)
    ),
)


def growth(read: Callable[[int], object], count: int) -> int:
    """Bytes by which a forked process grows while it reads the second half of the samples.

    By the first half it has written to the free places of the pages that it shares with this process, whose number
    depends on the tests before.
    """
    receiver, sender = os.pipe()
    gc.freeze()  # as for worker processes: a collection would touch every object of this one
    if (child := os.fork()) == 0:
        try:
            process, rows = psutil.Process(), iter(range(count))
            for row in islice(rows, count // 2):
                read(row)
            before = process.memory_full_info().uss
            for row in rows:
                read(row)
            os.write(sender, pickle.dumps(process.memory_full_info().uss - before))
        finally:
            os._exit(0)
    gc.unfreeze()
    os.close(sender)
    os.waitpid(child, 0)
    with os.fdopen(receiver, "rb") as pipe:
        return int(pickle.load(pipe))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("opened", SETS)
def test_worker_memory_stays_flat(root: Path, opened: Callable[[Path], Source]) -> None:
    source = opened(root)
    tokens = source.tokens
    assert len(source) > 0.8 * COUNT

    def read(row: int) -> object:
        return source.samples[row], tokens if tokens is None else tokens[row].tolist()

    assert growth(read, len(source)) < MAX_GROWTH


def test_worker_memory_of_a_list_of_samples_grows() -> None:
    """The measurement notices objects; twice as many, so that none of the limits is close."""
    count = 2 * COUNT
    samples = [Sample(f"{row}", Path(f"picture {row}"), row, row, 0, (f"caption {row}",)) for row in range(count)]
    assert growth(samples.__getitem__, count) > MAX_GROWTH
