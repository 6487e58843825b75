"""The study's data are what they are said to be: the right pictures, and no class on both sides."""

import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
from study import model, runs, sets

from dive_fast.config import load
from dive_fast.data.source import open_webdataset
from dive_fast.evaluate.zero_shot import open_set

pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not (sets.DATA / "cifar10").is_dir(), reason=f"no real images in {sets.DATA}"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sets.write(tmp_path_factory.mktemp("study") / "data", target=12, reference=30, tested=7)


def given() -> Any:
    """The loader that comes with the files."""
    spec = importlib.util.spec_from_file_location("tiles", sets.DATA / "tiles.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("file", "split"), [("cifar100/cifar100.npz", "test"), ("cifar10/cifar10_test1k_lossless.npz", "test")]
)
def test_pictures_are_those_of_the_files_own_loader(file: str, split: str) -> None:
    images, labels, names = given().load(sets.DATA / file, split)
    found = sets.load(file, split)
    assert np.array_equal(found.images, images)
    assert np.array_equal(found.labels, labels)
    assert found.names == tuple(name.replace("_", " ").lower() for name in names)


def test_reference_and_zero_shot_set_share_no_class(data: Path) -> None:
    test = sets.load("cifar100/cifar100.npz", "test")
    reference, zero_shot = sets.halves(test)
    assert sorted(reference + zero_shot) == list(range(100))
    kept = sets.of_classes(test, zero_shot)
    assert len(kept.images) == 5000
    rows = np.flatnonzero(np.isin(test.labels, zero_shot))
    for row in range(0, 5000, 501):
        assert kept.names[kept.labels[row]] == test.names[test.labels[rows[row]]]
        assert np.array_equal(kept.images[row], test.images[rows[row]])
    coarse = sets.names("cifar100/cifar100.npz", "coarse")
    samples = open_webdataset(str(data / "reference"), ".txt").samples
    said = [text for sample in samples for text in sample.texts]
    allowed = [*(test.names[one] for one in reference), *coarse]
    assert len(said) == 30
    assert all(any(name in text for name in allowed) for text in said)


def test_the_engine_reads_every_set(data: Path) -> None:
    tree = runs.tree(data, data / "no-model")
    for name, count in {"validation": 7, "id": 7, "ood": 7 * len(sets.CORRUPTIONS), "zs": 7}.items():
        settings: Any = type("Set", (), tree["evaluate"]["sets"][name])
        source, names, templates = open_set(settings)
        assert len(source) == count
        assert len(names) == (50 if name == "zs" else 10)
        assert len(templates) == len(sets.TEMPLATES)
    assert len(open_webdataset(str(data / "target"), ".cls")) == 12


def test_corruptions_change_pictures_the_same_way_again() -> None:
    pictures = sets.cut(sets.load("cifar10/cifar10.npz", "test"), 0, 3)
    once, again = sets.corrupted(pictures), sets.corrupted(pictures)
    assert np.array_equal(once.images, again.images)
    parts = [pictures.images, *np.split(once.images, len(sets.CORRUPTIONS))]
    assert once.labels.tolist() == pictures.labels.tolist() * len(sets.CORRUPTIONS)
    assert all(not np.array_equal(one, other) for one, other in itertools.combinations(parts, 2))
    # Changed, not destroyed.
    assert all(np.abs(part.astype(float) - pictures.images).mean() < 70 for part in parts)


def test_the_tokenizer_knows_every_word(tmp_path: Path) -> None:
    model.write_shape(tmp_path, "small")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    unknown = tokenizer(["zyzzyva"])[0, 1]
    random = np.random.default_rng(0)
    fine, coarse = (sets.names("cifar100/cifar100.npz", kind) for kind in ("class", "coarse"))
    texts = [sets.caption(one, coarse[place // 5], random) for place, one in enumerate(fine) for _ in range(5)]
    texts += [form.format(name) for form in sets.TEMPLATES for name in sets.names("cifar10/cifar10.npz")]
    tokens = tokenizer(texts)
    assert not (tokens == unknown).any()
    # The end of text is there: nothing was cut.
    assert (tokens.max(1).values == tokens.max()).all()


def test_a_config_of_the_study_is_one(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "cifar10.json"
    path.write_text(json.dumps(runs.tree(data, tmp_path / "model")))
    config = load(str(path), ["objective.weight=3"], tmp_path)
    assert set(config.evaluate.sets) == set(runs.EVALUATED)
    assert config.objective.weight == 3
