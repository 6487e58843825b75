"""The choice among the points of a sweep, and the sentences that justify it."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dive_fast.sweep.grid import SEED, Value, Values, describe, number_text

STRENGTHS = ("objective.weight", "objective.distillation_weight", "objective.target.distillation_weight")
"""Keys of a method's strength: the weight of its reference loss, or that of its distillation."""
METHOD = ("objective", "objective.name", "objective.target", "objective.target.name")
REFERENCE = "objective.reference"
"""Keys that change what a weight means, so that weights cannot be compared."""
SCALED = (*STRENGTHS, "train.learning_rate")
"""Keys whose next value outside of the grid is suggested."""
PROPORTIONS = ("top1", "top5")
"""Metrics with a binomial sampling error, besides recalls."""
TOLERANCE = 1e-9
MIN_RATIO = 1.5
"""Smallest ratio between a value and the one that is suggested next to it."""


class Spread(NamedTuple):
    """Mean and standard deviation over seeds."""

    mean: float
    deviation: float
    seeds: int

    def percent(self) -> str:
        """As a share of 100."""
        return f"{100 * self.mean:.1f}" + (f" ± {100 * self.deviation:.1f}" if self.seeds > 1 else "")


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean and standard deviation of values; None if one is missing or not finite."""
    numbers = [value for value in values if value is not None and math.isfinite(value)]
    if not numbers or len(numbers) < len(values):
        return None
    return Spread(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0, len(numbers))


@dataclass(frozen=True)
class Point:
    """The runs of one setting, which differ in their seeds."""

    values: Values
    """The setting, without the seed."""
    id: Spread | None
    """ID validation accuracy; None if a seed has none."""
    kept: Spread | None
    """Mean of what is kept; None if a seed has none."""
    is_complete: bool = True
    """Whether all seeds have finished."""


@dataclass(frozen=True)
class Choice:
    """The recommended point."""

    point: Point
    best: Point
    """The point of the best ID validation."""
    enough: tuple[Point, ...]
    """The points within the margin of the best ID validation."""
    rule: str
    """The rule in words."""


def strength_key(over: Mapping[str, Sequence[Value]]) -> str | None:
    """The key whose largest value is preferred; None if none is swept, or its values cannot be compared."""
    varied = [key for key, values in over.items() if len(values) > 1]
    keys = [key for key in varied if key in STRENGTHS]
    changes_meaning = any(key in METHOD or key.startswith(REFERENCE) for key in varied)
    if len(keys) != 1 or changes_meaning or any(value.number is None for value in over[keys[0]]):
        return None
    return keys[0]


def choose(points: Sequence[Point], strength: str | None, within: float) -> Choice | None:
    """The largest weight, or otherwise the point that keeps most, within a margin of the best ID validation.

    Ties go to the higher ID validation, then to the first point.
    Where no weight is compared and a point within the
    margin lacks the kept value, the best ID validation is chosen.

    Args:
        points: only complete ones with an ID validation are considered.
        strength: the key from :func:`strength_key`.
        within: the margin, a share.

    Returns:
        None if no point can be considered.
    """
    usable = [(point, point.id) for point in points if point.is_complete and point.id is not None]
    if not usable:
        return None
    best, best_id = max(usable, key=lambda pair: pair[1].mean)
    enough = [(point, id_) for point, id_ in usable if id_.mean >= best_id.mean - within - TOLERANCE]
    margin = f"within {_points(within)} of the best ID validation"
    if strength is not None:
        word = strength.rpartition(".")[2].replace("_", " ")
        rule = f"the largest {word} {margin}"
        chosen, _ = max(enough, key=lambda pair: (pair[0].values[strength].number or 0.0, pair[1].mean))
    elif all(point.kept is not None for point, _ in enough):
        rule = f"the setting that keeps most {margin}"
        chosen, _ = max(enough, key=lambda pair: (pair[0].kept.mean if pair[0].kept else 0.0, pair[1].mean))
    else:
        rule, chosen = "the best ID validation", best
    return Choice(chosen, best, tuple(point for point, _ in enough), rule)


def _points(share: float) -> str:
    number = number_text(round(100 * share, 6))
    return f"{number} point{'s' * (number != '1')}"


def recommendation(choice: Choice, id_name: str, kept_before: float | None) -> str:
    """The choice as a sentence with its figures."""
    point, best = choice.point, choice.best
    assert point.id is not None and best.id is not None
    figures = f"{id_name} {point.id.percent()} %"
    if best.id.mean > point.id.mean:
        figures += f" (best: {best.id.percent()} % at {describe(best.values)})"
    if point.kept is not None:
        before = "" if kept_before is None else f" (before training {100 * kept_before:.1f})"
        figures += f", kept {point.kept.percent()}{before}"
    return f"Recommended: {describe(point.values)}, {choice.rule}: {figures}."


def caveats(
    choice: Choice,
    points: Sequence[Point],
    strength: str | None,
    within: float,
    metric: str,
    samples: int | None,
) -> list[str]:
    """Sentences on what limits the choice.

    Args:
        metric: metric of the ID validation.
        samples: samples of the ID validation; None: unknown.
    """
    sentences = []
    if strength is not None and choice.point.kept is not None:
        rivals = [(point.kept.mean, point) for point in choice.enough if point.kept is not None]
        most, rival = max(rivals, key=lambda pair: pair[0])
        if 100 * (most - choice.point.kept.mean) >= 0.05:
            sentences.append(f"Within the margin, {describe(rival.values)} keeps more: {100 * most:.1f}.")
    elif strength is None and choice.point.kept is None and len(points) > 1:
        sentences.append("What is kept is not known for all settings, so only ID validation was compared.")
    considered = [point.values for point in points if point.is_complete and point.id is not None]
    sentences += edges(choice.point.values, considered)
    sentences += _sampling_remarks(choice, points, within, metric, samples)
    ignored = [point for point in points if not point.is_complete or point.id is None]
    if ignored:
        sentences.append(
            f"Not considered, since runs failed, are missing or have no ID validation: {len(ignored)} of "
            f"{len(points)} settings."
        )
    return sentences


def edges(values: Values, considered: Sequence[Values]) -> list[str]:
    """A sentence for each chosen number that is the largest or smallest one of the settings considered."""
    sentences = []
    for key, value in values.items():
        number = value.number
        tried = {each.number for point in considered if (each := point[key]).number is not None}
        if key == SEED or number is None or len(tried) < 2:
            continue
        is_largest = number == max(tried)
        if not is_largest and number != min(tried):
            continue
        word = key.rpartition(".")[2].replace("_", " ")
        text = f"{number_text(number)} is the {'largest' if is_largest else 'smallest'} {word} tried"
        if key in SCALED and number > 0:
            text += f"; try {number_text(next_outside(number, is_largest))} too"
        sentences.append(f"{text}.")
    return sentences


def next_outside(number: float, upwards: bool) -> float:
    """The next of the numbers 1 and 3 times a power of ten above or below a positive number."""
    exponent = math.floor(math.log10(number))
    scale = [float(f"{digit}e{power}") for power in range(exponent - 2, exponent + 3) for digit in (1, 3)]
    if upwards:
        return next(step for step in scale if step >= MIN_RATIO * number)
    return next(step for step in reversed(scale) if step <= number / MIN_RATIO)


def standard_error(share: float, samples: int) -> float:
    """The binomial standard error of a share: ``sqrt(p (1 - p) / n)``."""
    return math.sqrt(share * (1 - share) / samples)


def _sampling_remarks(
    choice: Choice, points: Sequence[Point], within: float, metric: str, samples: int | None
) -> list[str]:
    ids = [point.id.mean for point in points if point.id is not None]
    is_proportion = metric in PROPORTIONS or "_to_" in metric
    if not samples or not is_proportion or len(ids) < 2:
        return []
    assert choice.best.id is not None
    error, difference = standard_error(choice.best.id.mean, samples), max(ids) - min(ids)
    size = f"standard error of {100 * error:.1f} points, at {samples} samples"
    if not difference:
        return ["ID validation is the same for all settings: it does not tell them apart."]
    if difference <= 2 * error:
        return [
            f"ID validation differs by at most {100 * difference:.1f} points between the settings, within twice "
            f"its {size}: it does not tell them apart."
        ]
    if within < error:
        return [f"The margin of {_points(within)} is smaller than the {size}: the choice may be one of chance."]
    return []
