"""The table and the chart of accuracy under attack, from the file of results alone."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dive_fast.evaluation import plots
from study.experiments import SEEDS, run_of, setting_under_attack
from study.methods import (
    ADVERSARIAL,
    ADVERSARIAL_COMBINED,
    ATTACK_EPS,
    ATTACK_STEPS,
    LABELS,
    LAST_UNDER_ATTACK,
    STUDIED,
    UNDER_ATTACK,
)
from study.results import of_one_model
from study.robustness import ATTACK, is_measured
from study.runs import PRETRAINED
from study.summary import figure, ood, spread, style, zero_shot

Row = dict[str, Any]
MEASURES = {
    "attacked": f"ID accuracy under attack, {ATTACK_EPS:g}/255, %",
    "zs": "zero-shot (mean of two sets), %",
}
"""Panels of the chart, with their titles."""
PLAIN = "vanilla_ft"
"""The method whose accuracy under attack decides the size of the attack."""


def accuracy_under_attack(row: Row) -> float:
    """ID accuracy of the subset under the attack of the size that methods train on."""
    return float(row["attacked"]["accuracy"][row["attacked"]["eps"].index(ATTACK_EPS)])


def harmonic_mean(row: Row) -> float:
    """Of ID, OOD and ID under attack; 0 if one is 0."""
    return statistics.harmonic_mean([row["id"], ood(row), accuracy_under_attack(row)])


def selected(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The runs of each method at its setting that were attacked, and of the pre-trained model, of one model."""
    attacked = of_one_model([row for row in rows if is_measured(row)], "cifar10", UNDER_ATTACK)
    of_method = {PRETRAINED: [row for row in attacked if row["method"] == PRETRAINED]}
    for method in UNDER_ATTACK if attacked else ():
        setting = setting_under_attack(rows, method, attacked[0]["model"])
        seeds = {replace(setting, seed=seed) for seed in SEEDS} if setting is not None else set()
        of_method[method] = [row for row in attacked if row["method"] == method and run_of(row) in seeds]
    return {method: runs for method, runs in of_method.items() if runs}


def table(groups: dict[str, list[Row]]) -> list[str]:
    """Methods at their settings, in Markdown."""
    lines = [
        "| method | strength | learning rate | seeds | ID | OOD | under attack | harmonic mean of the three | ZS "
        "| Tiny | RSA | feature shift | lambda_max |",
        "|---" * 13 + "|",
    ]
    percents: tuple[Callable[[Row], float], ...] = (
        lambda row: float(row["id"]), ood, accuracy_under_attack, harmonic_mean,
        lambda row: float(row["zs"]), lambda row: float(row["tiny"]),
    )  # fmt: skip
    for method, runs in groups.items():
        first = runs[0]
        strength = "" if first["strength"] is None else f"{first['strength']:g}"
        rate = f"{first['learning_rate']:g}"
        cells = (
            ["pre-trained", "", "", ""]
            if method == PRETRAINED
            else [LABELS[method], strength, rate, str(len(runs))]
        )
        cells += [figure(runs, of).percent() for of in percents]
        if method == PRETRAINED:
            cells += ["1", "0"]
        else:
            cells += [spread([row[name] for row in runs]).plain() for name in ("rsa", "shift")]
        cells.append(spread([row["sharpness"] for row in runs]).plain(".1f"))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def trial_table(rows: Sequence[Row], groups: dict[str, list[Row]]) -> list[str]:
    """The other learning rates of methods without a grid, seed 0, in Markdown."""
    chosen = {method: run_of(runs[0]).learning_rate for method, runs in groups.items()}
    model = next(iter(groups.values()))[0]["model"]
    lines = ["| method | learning rate | validation | ID | under attack |", "|---" * 5 + "|"]
    for row in rows:
        is_other = row["learning_rate"] != chosen.get(row["method"], row["learning_rate"])
        if is_measured(row) and row["model"] == model and is_other and row["method"] != PRETRAINED:
            values = (row["validation"], row["id"], accuracy_under_attack(row))
            cells = [
                LABELS[row["method"]],
                f"{row['learning_rate']:g}",
                *(f"{100 * value:.1f}" for value in values),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def difference_table(groups: dict[str, list[Row]]) -> list[str]:
    """Differences within seeds from GRACE + DiVE's halves, in points, in Markdown."""
    measures: dict[str, Callable[[Row], float]] = {
        "ID": lambda row: float(row["id"]), "OOD": ood, "under attack": accuracy_under_attack,
        "harmonic mean": harmonic_mean, "ZS": lambda row: float(row["zs"]), "Tiny": lambda row: float(row["tiny"]),
    }  # fmt: skip
    head = f"| {LABELS[ADVERSARIAL_COMBINED]} minus | seeds | {' | '.join(measures)} |"
    lines = [head, "|---" * (len(measures) + 2) + "|"]
    combined = {row["seed"]: row for row in groups.get(ADVERSARIAL_COMBINED, [])}
    for method in ("tecoa", "grace", STUDIED):
        other = {row["seed"]: row for row in groups.get(method, [])}
        if seeds := sorted(combined.keys() & other.keys()):
            cells = [
                spread([100 * (of(combined[seed]) - of(other[seed])) for seed in seeds]).signed(".1f")
                for of in measures.values()
            ]
            lines.append(f"| {LABELS[method]} | {len(seeds)} | {' | '.join(cells)} |")
    return lines


def message(groups: dict[str, list[Row]]) -> str:
    """The title of the chart: accuracies under attack."""
    shown = [
        method for method in (PLAIN, STUDIED, *ADVERSARIAL) if method in groups and method != LAST_UNDER_ATTACK
    ]
    means = [
        f"{LABELS[method]} {100 * figure(groups[method], accuracy_under_attack).mean:.0f} %" for method in shown
    ]
    return f"Under attack: {', '.join(means)}"


def lines(rows: Sequence[Row], size: str, folder: Path) -> list[str]:
    """The section of the report, and its chart; none without runs that were attacked."""
    groups = selected(rows)
    if not groups.keys() - {PRETRAINED}:
        return []
    name, alt = f"study-{size}-cifar10-attacks.png", message(groups)
    shown = [
        row | {"zs": zero_shot(row), "attacked": accuracy_under_attack(row), "method": style(row["method"])}
        for runs in groups.values()
        for row in runs
    ]
    plots.tradeoff(
        *(shown, folder / name, alt),
        highlighted=[style(method) for method in (STUDIED, *ADVERSARIAL)],
        measures=MEASURES,
    )
    tables = ["", "## CIFAR-10. Under attack", ""]
    tables += [
        f"Runs from the pre-trained weights {next(iter(groups.values()))[0]['model']}. Attack: {ATTACK.name}, "
        f"L-infinity, eps {ATTACK_EPS:g}/255, {ATTACK.num_steps} steps, on {ATTACK.samples} pictures of ID; in "
        f"training PGD of the same eps, {ATTACK_STEPS} steps. lambda_max is that of the clean cross-entropy.",
        "",
        *table(groups),
        "",
        f"![{alt}]({name})",
    ]
    for heading, rest in {
        "Differences within seeds, in points": difference_table(groups),
        "Other learning rates, seed 0": trial_table(rows, groups),
    }.items():
        if len(rest) > 2:
            tables += ["", f"## CIFAR-10. Under attack. {heading}", "", *rest]
    return tables
