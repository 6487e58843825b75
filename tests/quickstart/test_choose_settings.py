"""Starting values by the size of the data; the tables of the documents are those of the rules."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dive_fast.errors import DataError
from dive_fast.methods.dive import Dive
from dive_fast.quickstart.choose_settings import (
    DEMO_LEARNING_RATE,
    DEMO_WEIGHT,
    MIN_IMAGES,
    WEIGHT,
    choose_settings,
    holdout_share,
    tables,
)

PAGE = Path(__file__).parents[2] / "docs" / "own_data.md"


@given(
    st.integers(MIN_IMAGES, 3_000_000),
    st.one_of(st.none(), st.integers(MIN_IMAGES, 3_000_000)),
    st.integers(1, 300),
)
def test_settings_fit_every_size(images: int, pairs: int | None, cores: int) -> None:
    chosen = choose_settings(images, pairs, cores)
    assert 2 <= chosen.batch_size <= min(512, images / 4)
    assert chosen.batch_size.bit_count() == 1
    assert chosen.total_steps == images // chosen.batch_size * chosen.epochs
    assert chosen.warmup_steps <= min(500, chosen.total_steps / 10)
    assert 10 <= chosen.epochs // chosen.every_epochs <= 25
    assert (chosen.reference_batch_size is None) == (pairs is None)
    if pairs is not None and chosen.reference_batch_size is not None:
        assert 2 <= chosen.reference_batch_size <= min(chosen.batch_size, pairs / 4)
    loaders = 1 if pairs is None else 2
    assert 1 <= chosen.workers <= 8
    assert loaders * chosen.workers <= max(loaders, cores - 1)


def test_settings_of_the_papers_sets() -> None:
    imagenet, fmow, cars = (choose_settings(images, 10**6, 16) for images in (1_281_167, 76_863, 8_144))
    assert imagenet[:2] == (512, 256)
    assert (imagenet.epochs, imagenet.warmup_steps, imagenet.learning_rate) == (10, 500, 1e-5)
    assert (fmow.batch_size, fmow.epochs, fmow.warmup_steps) == (256, 20, 500)
    assert (cars.batch_size, cars.epochs) == (256, 50)


@pytest.mark.parametrize(("images", "pairs"), [(7, None), (0, None), (100, 7)])
def test_settings_refuse_too_little_data(images: int, pairs: int | None) -> None:
    with pytest.raises(DataError, match=r"are too few: at least 8 are needed$"):
        choose_settings(images, pairs, 2)


@pytest.mark.parametrize(
    ("images", "classes", "share"),
    [(100, 5, 0.2), (999, 5, 0.2), (1000, 5, 0.1), (20_000, 10, 0.1), (100_000, 2, 0.02), (1_281_167, 1000, 0.04)],
)
def test_holdout_share_shrinks_with_size(images: int, classes: int, share: float) -> None:
    assert holdout_share(images, classes) == share


def test_constants_are_those_of_the_method_and_of_the_demo() -> None:
    demo = (PAGE.parents[1] / "launch/configs/demo.json").read_text()
    assert Dive.default_weight == WEIGHT
    assert f'"learning_rate": {DEMO_LEARNING_RATE}' in demo
    assert f'"weight": {DEMO_WEIGHT}' in demo


def test_page_has_the_tables_of_the_rules() -> None:
    page = PAGE.read_text(encoding="utf-8")
    lines = list(tables())
    split = lines.index("")
    for table in (lines[:split], lines[split + 1 :]):
        assert "\n".join(table) in page
    assert re.findall(r"at least (\d+)", page)
