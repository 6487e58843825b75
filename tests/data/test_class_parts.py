"""Base and new classes, and few shots of each class: which samples are chosen, and what refuses the choice."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny

from dive_fast.config.schema import EvaluationSet, TargetConfig
from dive_fast.data.classes import target_names
from dive_fast.data.open_dataset import open_target
from dive_fast.errors import DataError
from dive_fast.evaluation.datasets.evaluation_set import Labelled
from dive_fast.evaluation.datasets.resolve import open_evaluation
from dive_fast.methods.run_config import RunConfig


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny.write_target(tmp_path_factory.mktemp("target"), count=24, classes=5)


def keys(section: dict[str, Any], **options: Any) -> list[tuple[str, int]]:
    source = open_target(TargetConfig.model_validate(section | options))
    return [(sample.key, sample.label) for sample in source.samples]


def test_shots_are_chosen_by_seed_and_in_every_class(section: dict[str, Any]) -> None:
    chosen = keys(section, shots=3)
    assert Counter(label for _, label in chosen) == dict.fromkeys(range(5), 3)
    assert chosen == sorted(chosen)
    assert keys(section, shots=3) == chosen
    assert keys(section, shots=3, shots_seed=2) != chosen
    # More shots keep the ones before, and a class with fewer images has all of them.
    assert set(chosen) < set(keys(section, shots=4))
    assert keys(section, shots=9) == keys(section)


def test_base_and_new_classes_are_the_halves_of_all(section: dict[str, Any]) -> None:
    everything, base, new = (keys(section, classes=part) for part in ("all", "base", "new"))
    assert [each for each in everything if each[1] < 3] == base
    assert [(key, label - 3) for key, label in everything if label >= 3] == new
    config = TargetConfig.model_validate(section | {"classes": "new", "shots": 2, "holdout": 0.25})
    source = open_target(config)
    assert target_names(source, config.class_names, config.classes) == ("class number 3", "class number 4")
    assert Counter(sample.label for sample in source.samples) == {0: 2, 1: 2}
    assert source.held_out.count(";") == 2
    assert {sample.key for sample in source.samples}.isdisjoint(
        {key for key, _ in everything} - {key for key, _ in keys(section, holdout=0.25)}
    )
    assert source.digest() != open_target(config.model_copy(update={"shots_seed": 3})).digest()


def test_evaluation_set_has_the_same_parts(section: dict[str, Any]) -> None:
    described = {key: section[key] for key in tiny.EVALUATION}
    for part, names in (("base", (0, 1, 2)), ("new", (3, 4))):
        opened = open_evaluation(EvaluationSet.model_validate(described | {"classes": part}))
        assert isinstance(opened, Labelled)
        assert opened.class_names == tuple(f"class number {name}" for name in names)
        trained = open_target(TargetConfig.model_validate(section | {"classes": part}))
        assert list(opened.source.samples.labels) == list(trained.samples.labels)


def test_missing_classes_and_prompts_are_refused(section: dict[str, Any], tmp_path: Path) -> None:
    tiny.write_tar(tmp_path / "t.tar", {"a": {"jpg": tiny.jpeg(0), "cls": b"0"}, "b": {"jpg": tiny.jpeg(1)}})
    single = section | {"path": str(tmp_path)}
    with pytest.raises(DataError, match="no images of the 2 new classes"):
        keys(single, classes="new")
    model = {"name": "demo"}
    for option in ({"shots": 2}, {"classes": "new"}):
        data = {"target": {"format": "csv", "path": "a.csv"} | option}
        with pytest.raises(ValueError, match=f"data.target.{next(iter(option))}: csv data has prompts"):
            RunConfig.model_validate({"model": model, "data": data, "objective": {"name": "flyp"}})
    retrieval = {"format": "folder", "path": "a", "task": "retrieval", "classes": "base"}
    with pytest.raises(ValueError, match="classes: retrieval has no classes"):
        RunConfig.model_validate(
            {
                "model": model,
                "data": {"target": section},
                "objective": {"name": "flyp"},
                "evaluate": {"sets": {"x": retrieval}},
            }
        )
