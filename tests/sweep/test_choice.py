"""The rule of a sweep on numbers made by hand."""

import math
from typing import Any

import pytest

from dive_fast.sweep.choice import (
    Choice,
    Point,
    caveats,
    choose,
    edges,
    next_outside,
    recommendation,
    spread,
    strength_key,
)
from dive_fast.sweep.grid import Value, parse_over

WEIGHT, RATE = "objective.weight", "train.learning_rate"


def point(weight: str, id_: float | None, kept: float | None = None, rate: str = "1e-5", **fields: Any) -> Point:
    return Point({WEIGHT: Value(weight), RATE: Value(rate)}, spread([id_]), spread([kept]), **fields)


def chosen(points: list[Point], strength: str | None = WEIGHT, within: float = 0.01) -> Choice:
    choice = choose(points, strength, within)
    assert choice is not None
    return choice


def test_largest_weight_within_the_margin_is_chosen() -> None:
    points = [point("10", 0.85, 0.5), point("100", 0.842, 0.6), point("1000", 0.80, 0.7)]
    choice = chosen(points)
    assert choice.point is points[1]
    assert choice.best is points[0]
    assert choice.enough == (points[0], points[1])
    sentence = recommendation(choice, "val", 0.65)
    assert (
        "objective.weight=100, train.learning_rate=1e-5, the largest weight within 1 point of the best" in sentence
    )
    assert "val 84.2 % (best: 85.0 % at objective.weight=10, train.learning_rate=1e-5)" in sentence
    assert "kept 60.0 (before training 65.0)" in sentence


def test_margin_includes_its_end() -> None:
    points = [point("1", 0.9), point("2", 0.89)]
    assert chosen(points).point is points[1]
    assert chosen(points, within=0.0099).point is points[0]
    assert chosen(points, within=0.0).point is points[0]


def test_ties_of_the_weight_go_to_the_higher_id_then_to_the_first() -> None:
    points = [point("10", 0.9), point("10", 0.905, rate="1e-4"), point("10", 0.905, rate="1e-3")]
    assert chosen(points).point is points[1]


def test_without_a_weight_the_setting_that_keeps_most_is_chosen() -> None:
    points = [point("1", 0.9, 0.5), point("2", 0.895, 0.7), point("3", 0.8, 0.9)]
    choice = chosen(points, strength=None)
    assert choice.point is points[1]
    assert "keeps most within 1 point" in choice.rule


def test_without_kept_values_the_best_id_is_chosen() -> None:
    points = [point("1", 0.9), point("2", 0.905), point("3", 0.8)]
    choice = chosen(points, strength=None)
    assert choice.point is points[1]
    sentences = caveats(choice, points, None, 0.01, "top1", None)
    assert any("only ID validation was compared" in sentence for sentence in sentences)


def test_incomplete_and_unknown_points_are_not_considered() -> None:
    points = [point("1", 0.9), point("2", 0.9, is_complete=False), point("3", None), point("4", math.nan)]
    assert chosen(points).point is points[0]
    assert any("3 of 4 settings" in each for each in caveats(chosen(points), points, WEIGHT, 0.01, "top1", 1000))
    assert choose(points[1:], WEIGHT, 0.01) is None
    assert choose([], WEIGHT, 0.01) is None


def test_a_single_run_is_chosen_without_remarks_on_a_grid() -> None:
    points = [point("10", 0.9, 0.5)]
    choice = chosen(points)
    assert choice.point is points[0]
    assert caveats(choice, points, WEIGHT, 0.01, "top1", 1000) == []


def test_seeds_are_averaged_and_a_missing_one_makes_no_mean() -> None:
    both = spread([0.8, 0.9])
    assert both is not None
    assert both.mean == pytest.approx(0.85)
    assert both.deviation == pytest.approx(0.0707, abs=1e-4)
    assert both.percent() == "85.0 ± 7.1"
    assert spread([0.8, None]) is None
    assert spread([0.8, math.nan]) is None


def test_edges_of_the_grid_are_named_with_the_next_value() -> None:
    considered = [
        {WEIGHT: Value(weight), RATE: Value(rate)} for weight in ("100", "1000") for rate in ("1e-5", "3e-5")
    ]
    assert edges(considered[2], considered) == [
        "1000 is the largest weight tried; try 3000 too.",
        "1e-5 is the smallest learning rate tried; try 3e-6 too.",
    ]
    middle = [{WEIGHT: Value(weight)} for weight in ("10", "100", "1000")]
    assert edges(middle[1], middle) == []
    names = [{"objective.name": Value(name), "train.epochs": Value("2")} for name in ("dive", "flyp")]
    assert edges(names[0], names) == []


@pytest.mark.parametrize(
    ("number", "above", "below"),
    [(1000, 3000, 300), (3e-5, 1e-4, 1e-5), (0.1, 0.3, 0.03), (25, 100, 10), (9, 30, 3), (0.5, 1, 0.3)],
)
def test_next_value_is_one_or_three_times_a_power_of_ten(number: float, above: float, below: float) -> None:
    assert next_outside(number, True) == above
    assert next_outside(number, False) == below


def test_differences_within_the_sampling_error_are_named() -> None:
    points = [point("1", 0.84), point("2", 0.85)]
    few = caveats(chosen(points), points, WEIGHT, 0.01, "top1", 1000)
    assert any("within twice its standard error of 1.1 points, at 1000 samples" in each for each in few)
    assert not any(
        "standard error" in each for each in caveats(chosen(points), points, WEIGHT, 0.01, "top1", 100000)
    )
    wide = [point("1", 0.5), point("2", 0.9)]
    assert any("may be one of chance" in each for each in caveats(chosen(wide), wide, WEIGHT, 0.01, "top1", 500))
    assert not any("standard" in each for each in caveats(chosen(wide), wide, WEIGHT, 0.01, "macro_f1", 500))


def test_more_kept_at_a_smaller_weight_is_named() -> None:
    points = [point("1", 0.9, 0.7), point("2", 0.9, 0.6)]
    sentences = caveats(chosen(points), points, WEIGHT, 0.01, "top1", None)
    assert "Within the margin, objective.weight=1, train.learning_rate=1e-5 keeps more: 70.0." in sentences


@pytest.mark.parametrize(
    ("over", "key"),
    [
        (["objective.weight=1,2"], WEIGHT),
        (["objective.weight=1,2", "train.learning_rate=1,2"], WEIGHT),
        (["objective.distillation_weight=1,2"], "objective.distillation_weight"),
        (["train.learning_rate=1,2"], None),
        (["objective.weight=1", "train.learning_rate=1,2"], None),
        (["objective.weight=1,null"], None),
        (["objective.weight=1,2", "objective.name=dive,snd"], None),
        (["objective.weight=1,2", "objective.reference_every=1,2"], None),
        (["objective.weight=1,2", "objective.name=dive"], WEIGHT),
    ],
)
def test_weights_are_compared_only_where_they_mean_the_same(over: list[str], key: str | None) -> None:
    assert strength_key(parse_over(over)) == key
