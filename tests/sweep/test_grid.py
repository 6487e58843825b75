"""The grid of a sweep: values, names, the shared teacher cache, and mistakes."""

from pathlib import Path
from typing import Any

import pytest
from config_files import write

from dive_fast.config.load import load_config
from dive_fast.config.schema import Config
from dive_fast.errors import ConfigError
from dive_fast.sweep.grid import MAX_NAME, Planned, Value, parse_over, plan, run_name, short_runs, split_values


def planned(folder: Path, *over: str, overrides: tuple[str, ...] = (), seeds: str | None = None) -> list[Planned]:
    path = write(folder) if not (folder / "config.json").exists() else folder / "config.json"
    grid = parse_over(over, seeds)
    return plan(grid, overrides, Path("out"), lambda each: load_config(str(path), each, None, Config))


def error_of(folder: Path, *over: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        planned(folder, *over, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("10,100", ["10", "100"]),
        ("[0.8,1],[0.9,1]", ["[0.8,1]", "[0.9,1]"]),
        ('"a,b",c', ['"a,b"', "c"]),
        ('{"x": [1, 2]},null', ['{"x": [1, 2]}', "null"]),
        (r'"a\",b",c', [r'"a\",b"', "c"]),
    ],
)
def test_values_are_split_outside_of_brackets_and_quotes(text: str, values: list[str]) -> None:
    assert split_values(text) == values


def test_plan_is_the_product_with_readable_names(tmp_path: Path) -> None:
    over = ("objective.weight=10,1e3", "train.learning_rate=1e-5,0.00003", "train.epochs=2")
    runs = planned(tmp_path, *over, seeds="0,1")
    assert len(runs) == 8
    assert runs[0].name == "weight-10_learning_rate-1e-5_seed-0"
    assert runs[-1].name == "weight-1000_learning_rate-3e-5_seed-1"
    assert runs[0].label == "objective.weight=10, train.learning_rate=1e-5, train.seed=0"
    assert {"train.epochs=2", "objective.weight=10", "train.seed=0"} <= set(runs[0].overrides)
    assert f"train.output=out/{runs[0].name}" in runs[0].overrides
    assert len({run.settings for run in runs}) == 8
    assert len({run.point for run in runs}) == 4


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (["objective.weigth"], "expected section.key=value,value"),
        (["train.epoch=1,2"], "unknown key train.epoch; did you mean train.epochs?"),
        (["train.epochs=1,many"], 'train.epochs = "many"'),
        (["train.epochs=1,,2"], "an empty value"),
        (["train.betas=[0.9,0.99"], "a bracket is not closed"),
        (['model.name="a,b'], "a quote is not closed"),
        (["objective.weight=10,10.0"], "duplicate value 10"),
        (["objective.weight=10", "objective.weight=20"], "named twice"),
        (["train.precision=fp16,\"fp16\""], "are the same settings"),
        (["train.output=a,b"], "the sweep sets this key itself"),
        (["evaluate.probe=0,500"], "cannot be compared"),
        (["evaluate.sets.val.path=a,b"], "cannot be compared"),
    ],
)  # fmt: skip
def test_mistake_in_the_grid_is_one_line(tmp_path: Path, over: list[str], message: str) -> None:
    assert message in error_of(tmp_path, *over)


def test_mistakes_next_to_the_grid_are_one_line(tmp_path: Path) -> None:
    epochs = "train.epochs=1,2"
    assert "in --over and in the override" in error_of(tmp_path, epochs, overrides=("train.epochs=3",))
    assert "sets this key itself" in error_of(tmp_path, epochs, overrides=("train.output=x",))
    assert "resumes its own runs" in error_of(tmp_path, epochs, overrides=("train.resume=never",))
    assert "named twice" in error_of(tmp_path, "train.seed=0,1", seeds="2,3")


def test_names_are_short_safe_and_distinct(tmp_path: Path) -> None:
    long = run_name({"templates": Value("../../x y" * 30)})
    assert len(long) <= MAX_NAME
    assert not set(long) & set("/ ")
    assert run_name({"a": Value("x/y")}) != run_name({"a": Value("x y")})
    message = error_of(tmp_path, "data.target.class_names=names,Names")
    assert "several runs would have the name" in message


def cache_of(run: Planned) -> str | None:
    return next((each.partition("=")[2] for each in run.overrides if "teacher.path" in each), None)


def test_runs_of_one_teacher_share_a_cache(tmp_path: Path) -> None:
    over = ("objective.weight=10,100", "data.reference.batch_size=8,16", "train.learning_rate=1e-5,1e-4")
    assert {cache_of(run) for run in planned(tmp_path, *over, seeds="0,1")} == {"out/teacher"}


@pytest.mark.parametrize(
    ("over", "count"),
    [
        ("model.name=ViT-B-32,ViT-B-16", 2),
        ("data.reference.path=a,b", 2),
        ("data.reference.views=eval,4", 2),
        ("teacher.dtype=float32,float16", 2),
    ],
)
def test_other_teachers_have_other_caches(tmp_path: Path, over: str, count: int) -> None:
    runs = planned(tmp_path, over, "objective.weight=10,100")
    assert len({cache_of(run) for run in runs}) == count
    assert "names one teacher cache" in error_of(tmp_path, over, overrides=("teacher.path=cache",))


def test_random_crops_have_a_cache_for_each_seed(tmp_path: Path) -> None:
    runs = planned(tmp_path, "objective.weight=1,2", overrides=("data.reference.views=4",), seeds="0,1")
    caches = {seed: {cache_of(run) for run in runs if run.values["train.seed"].parsed == seed} for seed in (0, 1)}
    assert [len(names) for names in caches.values()] == [1, 1]
    assert caches[0] != caches[1]


def test_named_or_unused_cache_is_left_as_it_is(tmp_path: Path) -> None:
    runs = planned(tmp_path, "objective.weight=1,2", overrides=("teacher.path=cache",))
    assert {cache_of(run) for run in runs} == {"cache"}
    runs = planned(tmp_path, "objective.weight=1,2", overrides=("teacher.mode=online",))
    assert {cache_of(run) for run in runs} == {None}


def test_short_runs_cut_the_warm_up_unless_it_is_set() -> None:
    assert short_runs(set(), 50, None, lambda: 500) == ["train.max_steps=50", "train.warmup_steps=5"]
    assert short_runs(set(), 50, None, lambda: 10) == ["train.max_steps=50"]
    assert short_runs({"train.warmup_steps"}, 50, 2, lambda: 500) == ["train.max_steps=50", "train.epochs=2"]
    assert short_runs(set(), None, None, lambda: 500) == []
    with pytest.raises(ConfigError, match=r"--steps sets train\.max_steps"):
        short_runs({"train.max_steps"}, 50, None, lambda: 0)
