"""A share of a target set that is held out: the parts never overlap, and stay the same wherever they are read."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from config_files import error_of
from config_files import write as write_config
from hypothesis import given, settings
from hypothesis import strategies as st

from dive_fast.config.schema import EvaluationSet, TargetConfig
from dive_fast.data.holdout import held_out, num_held_out
from dive_fast.data.open_dataset import open_target
from dive_fast.data.prepared.convert import Options
from dive_fast.data.prepared.raw import RawSource
from dive_fast.data.prepared.write import prepare
from dive_fast.data.sources.folder import open_folder
from dive_fast.data.sources.sample_table import Sample, SampleTable
from dive_fast.data.sources.source import Source
from dive_fast.errors import DataError
from dive_fast.evaluation.datasets.resolve import open_evaluation

SIZES = {"one": 1, "two": 2, "ten": 10, "many": 37}


def write_photos(root: Path) -> Path:
    for name, count in SIZES.items():
        for number in range(count):
            path = root / name / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tiny.jpeg(number))
    return root


def parts(section: dict[str, Any], share: float) -> tuple[Source, Source]:
    section |= {"holdout": share}
    return open_target(TargetConfig(**section)), open_target(EvaluationSet(**section))


def keys(source: Source) -> list[str]:
    return [sample.key for sample in source.samples]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5])
def test_parts_are_disjoint_and_complete_in_every_format(tmp_path: Path, share: float) -> None:
    photos = write_photos(tmp_path / "photos")
    prepare(RawSource(open_folder(str(photos))), tmp_path / "ready", Options(), 1)
    complete = open_folder(str(photos))
    chosen = []
    for section in (
        {"format": "folder", "path": str(photos)},
        {"format": "prepared", "path": str(tmp_path / "ready")},
    ):
        train, val = parts(section, share)
        assert sorted(keys(train) + keys(val)) == sorted(keys(complete))
        assert not set(keys(train)) & set(keys(val))
        assert train.class_names == val.class_names == complete.class_names
        for label, name in enumerate(complete.class_names):
            counts = [sum(sample.label == label for sample in source.samples) for source in (train, val)]
            assert counts[1] == num_held_out(SIZES[name], share)
            assert sum(counts) == SIZES[name]
            assert counts[0]
        assert train.held_out == f"holds out {len(val)} of 50 images for evaluation, trains on {len(train)}"
        assert val.held_out == f"{len(val)} images, the held-out part of 50"
        assert (
            len({train.digest(), val.digest(), open_target(TargetConfig(**section | {"holdout": None})).digest()})
            == 3
        )
        for source in (train, val):
            for row in (0, len(source) - 1):
                assert source.read(row) == (photos / source.samples[row].key).read_bytes()
        chosen.append(keys(val))
    assert chosen[0] == chosen[1]


def test_parts_of_prepared_set_keep_its_columns(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    prepare(RawSource(open_folder(str(photos))), tmp_path / "ready", Options(shard_samples=7), 1)
    complete = open_target(TargetConfig(format="prepared", path=str(tmp_path / "ready")))
    row_of = {key: row for row, key in enumerate(keys(complete))}
    for source in parts({"format": "prepared", "path": str(tmp_path / "ready")}, 0.2):
        rows = [row_of[key] for key in keys(source)]
        assert source.hashes is not None
        assert complete.hashes is not None
        assert source.sizes is not None
        assert complete.sizes is not None
        assert source.hashes.tolist() == complete.hashes[rows].tolist()
        assert source.sizes.tolist() == complete.sizes[rows].tolist()
        files = [sample.path for sample in source.samples]
        assert set(source.first_rows) >= {files.index(path) for path in set(files)}
        assert [sample.key for sample in source.samples[1:4]] == keys(source)[1:4]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.text(max_size=5)), min_size=1, max_size=60, unique=True),
    st.floats(0.01, 0.5),
)
def test_parts_do_not_depend_on_the_order_of_samples(entries: list[tuple[int, str]], share: float) -> None:
    samples = [Sample(f"{label}/{name}", Path("x"), label=label) for label, name in entries]
    chosen = held_out(SampleTable.of(samples), share)
    backwards = held_out(SampleTable.of(samples[::-1]), share)[::-1]
    assert chosen.tolist() == backwards.tolist()
    for label in {label for label, _ in entries}:
        members = [bool(chosen[row]) for row, sample in enumerate(samples) if sample.label == label]
        assert sum(members) == num_held_out(len(members), share)
        assert not all(members)


def test_split_reports_skipped_samples_with_the_training_part(tmp_path: Path) -> None:
    photos = write_photos(tmp_path)
    (photos / "ten" / "x.heic").write_bytes(b"x")
    train, val = parts({"format": "folder", "path": str(photos)}, 0.2)
    assert [entry.key for entry in train.skipped] == ["ten/x.heic"]
    assert not val.skipped


def test_evaluation_set_measures_the_held_out_part(tmp_path: Path) -> None:
    photos = write_photos(tmp_path)
    data = open_evaluation(
        EvaluationSet(format="folder", path=str(photos), holdout=0.2, templates="a {}"), "evaluate.sets.val"
    )
    assert len(data.source) == 10  # 0 + 1 + 2 + 7
    assert data.remarks[0] == "10 images, the held-out part of 50"


def test_split_refuses_classes_of_one_image(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(tiny.jpeg(1))
    with pytest.raises(
        DataError, match=r"^data.target: holdout = 0.2 holds out none of the 2 images: every class"
    ):
        open_target(TargetConfig(format="folder", path=str(tmp_path), holdout=0.2))


PHOTOS = {"format": "folder", "path": "photos"}


@pytest.mark.parametrize(
    ("target", "val", "message"),
    [
        ({"holdout": 0.2}, {"holdout": 0.1}, "evaluate.sets.val.holdout = 0.1, but data.target.holdout = 0.2"),
        ({}, {"holdout": 0.1}, "evaluate.sets.val.holdout = 0.1, but data.target.holdout = null"),
        ({"holdout": 0.2}, {}, "evaluate.sets.val is the data of data.target, which trains on most of it"),
        (
            {"holdout": 0.2},
            {"holdout": 0.2, "path": "others"},
            "evaluate.sets.val.holdout: the set must have the path",
        ),
        ({"holdout": 0.7}, {"holdout": 0.7}, "data.target.holdout = 0.7: "),
        ({"holdout": 0.2, "format": "csv"}, {"path": "others"}, "data.target.holdout: csv data has prompts"),
        (
            {"holdout": 0.2, "format": "prepared", "loader": "ffcv"},
            {"path": "x"},
            "data.target.holdout: loader ffcv",
        ),
    ],
)
def test_config_refuses_parts_that_could_overlap(
    tmp_path: Path, target: dict[str, Any], val: dict[str, Any], message: str
) -> None:
    tree = {
        "model": {"name": "demo"},
        "data": {"target": PHOTOS | target},
        "objective": {"name": "flyp"},
        "evaluate": {"sets": {"val": PHOTOS | val}},
    }
    error = error_of(write_config(tmp_path, json.dumps(tree)))
    assert error.startswith(message)


def test_held_out_samples_have_the_smallest_hashes_of_their_class() -> None:
    keys = [f"{row % 90}" for row in range(100)]  # the last ten are repeated
    labels = [row % 3 for row in range(100)]
    table = SampleTable.of(Sample(key, Path("a"), label=label) for key, label in zip(keys, labels, strict=True))
    expected = []
    for label in range(3):
        rows = [row for row in range(100) if labels[row] == label]
        rows.sort(key=lambda row: (hashlib.sha256(f"holdout {keys[row]}".encode()).digest(), row))
        expected += rows[: num_held_out(len(rows), 0.6)]
    assert np.flatnonzero(held_out(table, 0.6)).tolist() == sorted(expected)
    order = np.random.default_rng(0).permutation(100)[:50]
    chosen = held_out(table.select(order), 0.6)
    copied = SampleTable.of(table[row] for row in order.tolist())
    assert np.array_equal(chosen, held_out(copied, 0.6))
