"""Which runs a study makes, the most telling first; what is chosen is chosen on ID validation.

The methods that are compared closely have the same grid: three learning rates and three strengths, at seed 0; the
others have one of the learning rates. Two settings of a grid are chosen, and run with the other seeds:

* ``best``: the highest ID validation accuracy, as in the paper. It favours small strengths, which protect little.
* ``equal``: the largest strength whose ID validation, at its best learning rate, is within :data:`MARGIN` of
  FLYP's best: the strongest protection that costs no ID accuracy. For methods in weight space it is FLYP without
  weight decay, at their learning rate.

The runs that ``equal`` chooses are compared with calibration, and those next to methods in weight space with their
distance from the pre-trained weights; results without these are measured again.

Pre-training on another processor gives other weights, and results of different weights are not compared. Settings
are taken over: a method whose grid is complete for earlier weights is run at the settings that it chose there.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from study.methods import (
    ABLATIONS,
    ATTACKED_FIRST,
    AVERAGE_ALONE,
    BASELINE,
    CORE,
    FURTHER_STRENGTHS,
    HEADS,
    IN_WEIGHT_SPACE,
    LAST_UNDER_ATTACK,
    LEARNING_RATES_UNDER_ATTACK,
    LIKE,
    LITERAL_COSINE,
    MAIN,
    NARROW,
    SELF_DISTILLING,
    STRENGTHS,
    STRENGTHS_UNDER_ATTACK,
    STUDIED,
    UNDECAYED,
    grid_of,
)
from study.robustness import is_measured
from study.runs import PRETRAINED, Run, Size

SEEDS = (0, 1, 2)
LEARNING_RATES = (1e-3, 3e-4, 3e-3)
DECAYS = (0.0, 0.5, 0.9)
EVERY = (2, 4, 8)
HEAVY, GENTLE = 1000.0, (3e-4, 1e-4, 3e-5)
"""The paper's lambda at learning rates towards its own: how short difference vectors become."""
MARGIN = 0.01

Rows = Sequence[dict[str, Any]]


def plan(rows: Rows, size: Size, models: Mapping[str, str]) -> list[Run]:
    """All runs that can be named with what is known, in order; more can be once the grids are through.

    Args:
        rows: results so far, of this size.
        models: digest of the weights that the runs of each world start from; rows may have others.
    """
    dive = chosen(rows, "cifar10", STUDIED, "equal")

    def table(world: str, methods: Iterable[str]) -> list[Run]:
        return _searched(rows, models, world, methods) + with_seeds(rows, world, methods)

    runs = table("cifar10", list(dict.fromkeys((*CORE, *SELF_DISTILLING))))
    runs += table("cifar10", MAIN)
    runs += table("cifar10", HEADS)
    runs += curves(rows, [STUDIED])
    runs += [] if dive is None else sweeps(dive, size)
    runs += table("pacs", MAIN)
    runs += table("pacs", CORE)
    runs += curves(rows, FURTHER_STRENGTHS)
    runs += [Run("cifar10", STUDIED, HEAVY, rate) for rate in GENTLE]
    runs += table("cifar10", ABLATIONS)
    runs += in_weight_space(rows, models)
    runs += table("pacs", HEADS) + table("pacs", ABLATIONS) + table("pacs", SELF_DISTILLING)
    if dive is not None:
        for seed in SEEDS[1:]:
            runs += sweeps(replace(dive, seed=seed), size)
    runs += [Run("cifar10", LITERAL_COSINE, strength, LEARNING_RATES[0]) for strength in (1.0, 10.0)]
    return list(dict.fromkeys(runs))


def in_weight_space(rows: Rows, models: Mapping[str, str]) -> list[Run]:
    """Methods in weight space on CIFAR-10, next to FLYP and DiVE at the settings that were chosen: seed 0 first.

    Args:
        rows, models: as of :func:`plan`.
    """
    known = [chosen(rows, "cifar10", method, "equal") for method in (BASELINE, STUDIED)]
    runs = [run for run in known if run is not None] + _searched(rows, models, "cifar10", IN_WEIGHT_SPACE)
    return list(dict.fromkeys(runs + with_seeds(rows, "cifar10", (BASELINE, STUDIED, *IN_WEIGHT_SPACE))))


def under_attack(rows: Rows, models: Mapping[str, str]) -> list[Run]:
    """The methods whose accuracy under attack is compared, on CIFAR-10: seed 0 of all first.

    Methods with a grid have the setting that ``equal`` chose from it; the others the better one of two learning
    rates, by ID validation at seed 0.

    Args:
        rows, models: as of :func:`plan`.
    """
    model = models["cifar10"]
    settings = {method: setting_under_attack(rows, method, model) for method in ATTACKED_FIRST}
    runs = list[Run]()
    for seed in SEEDS:
        for method, setting in settings.items():
            runs += trials(method) if seed == SEEDS[0] else []
            runs += [] if setting is None else [replace(setting, seed=seed)]
    last = setting_under_attack(rows, LAST_UNDER_ATTACK, model)
    return list(dict.fromkeys([*runs, *([] if last is None else [last])]))


def trials(method: str) -> list[Run]:
    """The learning rates that are tried for a method of :func:`under_attack` that has no grid."""
    strength = STRENGTHS_UNDER_ATTACK.get(method)
    return [Run("cifar10", method, strength, rate) for rate in LEARNING_RATES_UNDER_ATTACK.get(method, ())]


def setting_under_attack(rows: Rows, method: str, model: str) -> Run | None:
    """The setting of a method of :func:`under_attack` at seed 0; None until it is known.

    Args:
        model: digest of the weights that the trials of learning rates start from.
    """
    if method == LAST_UNDER_ATTACK:
        setting = setting_under_attack(rows, LIKE, model)
        return None if setting is None else replace(setting, method=method)
    if not trials(method):
        return chosen(rows, "cifar10", method, "equal")
    tried, rows = trials(method), [row for row in rows if (row["method"], row["model"]) == (method, model)]
    scores = {run_of(row): row["validation"] for row in rows if is_measured(row)}
    return max(tried, key=lambda run: scores[run]) if all(run in scores for run in tried) else None


def _searched(rows: Rows, models: Mapping[str, str], world: str, methods: Iterable[str]) -> list[Run]:
    """The grids of methods that have no setting from earlier weights."""
    earlier = [row for row in rows if row["model"] != models.get(world)]
    return grids(world, [name for name in methods if name == BASELINE or not chosen(earlier, world, name, "best")])


def settled(rows: Rows, worlds: Sequence[str]) -> list[Run]:
    """Every method as another size's grid chose it by ``equal``, seed by seed; without a grid of this size.

    Args:
        rows: results of that size.
    """
    settings = [
        setting for world in worlds for method in STRENGTHS if (setting := chosen(rows, world, method, "equal"))
    ]
    return [replace(setting, seed=seed) for seed in SEEDS for setting in settings]


def grids(world: str, methods: Iterable[str]) -> list[Run]:
    """The methods' grids at seed 0, a learning rate after the other; :data:`NARROW` ones have the first alone."""
    cases = itertools.product(LEARNING_RATES, methods)
    return [
        Run(world, method, strength, rate)
        for rate, method in cases
        if rate == LEARNING_RATES[0] or method not in NARROW
        for strength in grid_of(method)
    ]


def with_seeds(rows: Rows, world: str, methods: Iterable[str]) -> list[Run]:
    """The runs that the grids chose, with each seed: those compared at equal ID first."""
    found = []
    for rule in ("equal", "best"):
        settings = [setting for method in methods if (setting := chosen(rows, world, method, rule)) is not None]
        found += [replace(setting, seed=seed) for seed in SEEDS for setting in settings]
    return found


def sweeps(dive: Run, size: Size) -> list[Run]:
    """One thing about DiVE's chosen setting after another."""
    batch = size.batch_size
    runs = [dive]
    runs += [replace(dive, reference_batch=batch // part) for part in (2, 4, 8)]
    runs += [replace(dive, every=every) for every in EVERY]
    runs += [replace(dive, decay=decay) for decay in DECAYS]
    # Table 6 is of AVL alone.
    runs += [replace(dive, method=AVERAGE_ALONE, decay=decay) for decay in (0.99, *DECAYS)]
    runs += [replace(dive, reference=count) for count in size.references]
    return runs


def curves(rows: Rows, methods: Iterable[str]) -> list[Run]:
    """Further strengths on CIFAR-10 at each method's best learning rate."""
    found = []
    for method in methods:
        best = chosen(rows, "cifar10", method, "best")
        if best is not None:
            found += [replace(best, strength=strength) for strength in FURTHER_STRENGTHS[method]]
    return found


def chosen(rows: Rows, world: str, method: str, rule: str) -> Run | None:
    """The grid's run that a rule picks; None until the method's grid, and for ``equal`` FLYP's, is through.

    Args:
        rows: of the latest pre-trained weights for which the grids are through, where there are several.
        rule: ``best`` or ``equal``, as above. Where no strength is within the margin, ``equal`` is ``best``.
    """
    models = dict.fromkeys(row["model"] for row in reversed(rows) if row["world"] == world)
    choices = (_choose([row for row in rows if row["model"] == model], world, method, rule) for model in models)
    return next((choice for choice in choices if choice is not None), None)


def _choose(rows: Rows, world: str, method: str, rule: str) -> Run | None:
    scores = validated(rows, world, method)
    if scores is None:
        return None
    best = max(scores, key=lambda run: scores[run])
    if rule == "best" or best.strength is None:
        return best
    flyp = validated(rows, world, UNDECAYED if method in IN_WEIGHT_SPACE else BASELINE)
    if flyp is None:
        return None
    enough = [run for run in scores if scores[run] >= max(flyp.values()) - MARGIN]
    return max(enough, key=lambda run: (run.strength or 0, scores[run]), default=best)


def compared_runs(rows: Rows) -> set[Run]:
    """The runs that ``equal`` chooses, with all seeds."""
    worlds = {row["world"] for row in rows}
    settings = [chosen(rows, world, method, "equal") for world in worlds for method in STRENGTHS]
    return {replace(setting, seed=seed) for setting in settings if setting is not None for seed in SEEDS}


def complete(rows: Rows) -> list[dict[str, Any]]:
    """The rows without those of compared runs, or of the pre-trained model, that lack calibration or distance."""
    needed = compared_runs(rows)
    return [
        row
        for row in rows
        if (row["method"] != PRETRAINED and run_of(row) not in needed)
        or ("ece" in row and ("distance" in row or not _has_distance(row)))
    ]


def _has_distance(row: Mapping[str, Any]) -> bool:
    """Whether methods in weight space are compared with a row by their distance from the pre-trained weights."""
    return row["world"] == "cifar10" and row["method"] in (BASELINE, STUDIED, *IN_WEIGHT_SPACE)


def validated(rows: Rows, world: str, method: str) -> dict[Run, float] | None:
    """ID validation accuracy of each run of a method's grid; None until all are there."""
    known = {run_of(row): row["validation"] for row in rows if (row["world"], row["method"]) == (world, method)}
    runs = grids(world, [method])
    return {run: known[run] for run in runs} if all(run in known for run in runs) else None


def run_of(row: dict[str, Any]) -> Run:
    """The run that a line of the results is of."""
    return Run(**{field: row[field] for field in Run.__dataclass_fields__})
