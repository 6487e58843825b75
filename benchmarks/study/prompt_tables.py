"""The tables and the chart of prompts after an update of the model, from the file of results alone."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from dive_fast.evaluation import compatibility, plots
from dive_fast.evaluation.compatibility import Accuracies
from study.prompt_runs import (
    COARSE,
    EVALUATED,
    FINE,
    LEARNERS,
    NEW,
    OLD,
    TUNED,
    UNREAD,
    WITHOUT_RESIDUAL,
    ZERO_SHOT,
    Row,
    accuracy,
    choice,
    run_of,
    trials,
)
from study.summary import spread

TITLES = {FINE: "25 fine classes", COARSE: "20 superclasses", UNREAD: "CIFAR-10"}
SETS = {
    "id": "the target's classes",
    "unseen": "classes that both models have read and no prompt was trained on",
    "update": "classes that only the new model has read",
}
LABELS = {name: label for name, (label, _) in plots.method_styles().items()} | {
    WITHOUT_RESIDUAL: "ContCoOp, no residual"
}
ORDER = (("contcoop", "kgcoop"), ("kgcoop", "coop"))
"""Pairs of methods whose gains the paper orders, the larger one first."""


def of_one_update(rows: Sequence[Row]) -> list[Row]:
    """The rows of the old and of the new weights that most rows have."""
    kept = list(rows)
    for name in (OLD, NEW):
        counts = Counter(
            row[f"{part}_weights"] for row in kept for part in ("trained", "measured") if row[part] == name
        )
        weights = counts.most_common(1)[0][0] if counts else None
        kept = [
            row
            for row in kept
            if all(row[f"{part}_weights"] == weights for part in ("trained", "measured") if row[part] == name)
        ]
    return kept


def accuracies(rows: Sequence[Row], target: str, method: str, name: str) -> dict[int, Accuracies]:
    """Accuracies on a set by seed, at the chosen learning rate; seeds may lack the retrained one."""
    values: dict[tuple[str, str, int], float] = {}
    plain: dict[str, float] = {}
    chosen = choice(rows, target, "contcoop" if method == WITHOUT_RESIDUAL else method)
    for row in rows:
        run = run_of(row)
        if run.target == target and run.method == ZERO_SHOT:
            plain[run.measured] = accuracy(row, name)
        is_chosen = chosen is not None and run.learning_rate == chosen.learning_rate
        if run.target == target and run.method == method and is_chosen:
            values[run.trained, run.measured, run.seed] = accuracy(row, name)
    return {
        seed: Accuracies(plain[OLD], values[OLD, OLD, seed], plain[NEW], value, values.get((NEW, NEW, seed)))
        for (trained, measured, seed), value in sorted(values.items())
        if (trained, measured) == (OLD, NEW) and (OLD, OLD, seed) in values and plain.keys() >= {OLD, NEW}
    }


def table(rows: Sequence[Row], target: str, name: str) -> list[str]:
    """Methods on a set, in Markdown; gains in points."""
    lines = [
        "| method | learning rate | seeds | old, zero-shot | old, prompts | new, zero-shot | new, old prompts "
        "| new, retrained | gain | share, % |",
        "|---" * 10 + "|",
    ]
    for method in (*LEARNERS, WITHOUT_RESIDUAL):
        measured = list(accuracies(rows, target, method, name).values())
        chosen = choice(rows, target, "contcoop" if method == WITHOUT_RESIDUAL else method)
        if not measured or chosen is None:
            continue
        first = measured[0]
        retrained = [each.retrained for each in measured if each.retrained is not None]
        cells = [
            LABELS[method],
            f"{chosen.learning_rate:g}",
            str(len(measured)),
            f"{100 * first.old_zero_shot:.1f}",
            spread([each.old for each in measured]).percent(),
            f"{100 * first.new_zero_shot:.1f}",
            spread([each.new for each in measured]).percent(),
            spread(retrained).percent() if retrained else "",
            spread([100 * each.gain for each in measured]).signed(".1f"),
            _share(measured),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _share(measured: Sequence[Accuracies]) -> str:
    """The share of the mean gain: shares of single seeds divide by differences that may be near zero."""
    share = compatibility.mean(measured).share
    return "-" if share is None else f"{100 * share:.0f}"


def gains(rows: Sequence[Row], target: str, name: str) -> dict[str, dict[int, float]]:
    """Gain of each method by seed, in points."""
    return {
        method: {seed: 100 * each.gain for seed, each in accuracies(rows, target, method, name).items()}
        for method in (*LEARNERS, WITHOUT_RESIDUAL)
    }


def difference_table(rows: Sequence[Row]) -> list[str]:
    """Differences of gains within seeds, in points, in Markdown."""
    cases = [(target, name) for target in TITLES for name in EVALUATED[target] if name in SETS]
    heads = [f"{TITLES[target]}, {name}" for target, name in cases]
    lines = [f"| difference of gains | {' | '.join(heads)} |", "|---" * (len(cases) + 1) + "|"]
    for larger, smaller in ORDER:
        cells = []
        for target, name in cases:
            known = gains(rows, target, name)
            seeds = sorted(known[larger].keys() & known[smaller].keys())
            differences = [known[larger][seed] - known[smaller][seed] for seed in seeds]
            cells.append(spread(differences).signed(".1f") if differences else "")
        lines.append(f"| {LABELS[larger]} - {LABELS[smaller]} | {' | '.join(cells)} |")
    return lines


def half_table(rows: Sequence[Row]) -> list[str]:
    """Base and new classes of the fine target and their harmonic mean, by models and prompts, in Markdown."""
    cases: dict[str, Callable[[Accuracies], float | None]] = {
        "old, prompts": lambda each: each.old,
        "new, old prompts": lambda each: each.new,
        "new, retrained": lambda each: each.retrained,
    }
    heads = [f"{case}: base, unseen, harmonic mean" for case in ("zero-shot: old", "new", *cases)]
    lines = [f"| method | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for method in (*LEARNERS, WITHOUT_RESIDUAL):
        base, unseen = (accuracies(rows, FINE, method, name) for name in ("id", "unseen"))
        if not base:
            continue
        plain: list[Callable[[Accuracies], float | None]] = [
            lambda each: each.old_zero_shot,
            lambda each: each.new_zero_shot,
        ]
        cells = []
        for of in (*plain, *cases.values()):
            pairs = [
                (first, second)
                for seed in base
                if (first := of(base[seed])) is not None and (second := of(unseen[seed])) is not None
            ]
            columns = [*zip(*pairs, strict=True), [compatibility.harmonic(*pair) for pair in pairs]]
            cells.append(", ".join(f"{100 * spread(column).mean:.1f}" for column in columns) if pairs else "")
        lines.append(f"| {LABELS[method]} | {' | '.join(cells)} |")
    return lines


def tuning_table(rows: Sequence[Row]) -> list[str]:
    """Fine-tuning of all weights, and prompts, on the model that they were trained with, in Markdown."""
    lines = [
        "| method | model | seeds | the target's classes | unseen | read by new | CPU seconds of training |",
        "|---" * 7 + "|",
    ]
    for model in (OLD, NEW):
        for method in (ZERO_SHOT, *LEARNERS, TUNED):
            chosen = choice(rows, FINE, method) if method != ZERO_SHOT else None
            runs = [
                row
                for row in rows
                if (row["target"], row["method"], row["trained"], row["measured"]) == (FINE, method, model, model)
                and (chosen is None or row["learning_rate"] == chosen.learning_rate)
            ]
            if not runs or (method != ZERO_SHOT and chosen is None):
                continue
            cells = [LABELS.get(method, method), model, "" if method == ZERO_SHOT else str(len(runs))]
            cells += [spread([accuracy(row, name) for row in runs]).percent() for name in SETS]
            cells.append("" if method == ZERO_SHOT else spread([row["cpu_seconds"] for row in runs]).plain(".0f"))
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def trial_table(rows: Sequence[Row]) -> list[str]:
    """Validation accuracy of all learning rates by the old model, seed 0, in Markdown."""
    lines = ["| target | method | learning rate | validation |", "|---" * 4 + "|"]
    known = {run_of(row): accuracy(row, "validation") for row in rows}
    for target in TITLES:
        for method in (*LEARNERS, TUNED):
            for run in (run for run in trials(target, method) if run in known):
                cells = [TITLES[target], LABELS[method], f"{run.learning_rate:g}", f"{100 * known[run]:.1f}"]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def message(rows: Sequence[Row]) -> str:
    """The title of the chart: mean gains on the target's classes."""
    parts = []
    for target, title in TITLES.items():
        known = gains(rows, target, "id")
        means = [
            f"{LABELS[method]} {spread(list(known[method].values())).mean:+.1f}"
            for method in LEARNERS
            if known[method]
        ]
        parts += [f"{title}: {', '.join(means)}"] if means else []
    return f"Gain of old prompts on the new model, points. {'; '.join(parts)}"


def lines(rows: Sequence[Row], size: str, folder: Path) -> list[str]:
    """The section of the report, and its chart; none without measured updates."""
    rows = of_one_update(rows)
    means: dict[str, Accuracies] = {
        f"{LABELS[method]}, {TITLES[target]}": compatibility.mean(list(measured.values()))
        for target in TITLES
        for method in LEARNERS
        if (measured := accuracies(rows, target, method, "id"))
    }
    if not means:
        return []
    weights = {row[part]: row[f"{part}_weights"] for row in rows for part in ("trained", "measured")}
    written = ["", "## Prompts after an update of the model", ""]
    written.append(f"Old model {weights[OLD]}, new model {weights[NEW]}. Accuracies in %, gains in points.")
    for target, title in TITLES.items():
        for name in EVALUATED[target]:
            if name in SETS and len(rest := table(rows, target, name)) > 2:
                written += ["", f"### Target: {title}. Measured on: {SETS[name]}", "", *rest]
    name, alt = f"study-{size}-prompts.png", message(rows)
    helped = sum(each.gain > 0 for each in means.values())
    title = f"Prompts of the old model help the new one in {helped} of {len(means)} cases"
    compatibility.draw(compatibility.Update(means, {}), folder / name, title)
    written += ["", f"![{alt}]({name})"]
    for heading, rest in {
        "Differences of gains within seeds, in points": difference_table(rows),
        "Base and unseen classes, %": half_table(rows),
        "Next to fine-tuning of all weights": tuning_table(rows),
        "Learning rates, old model, seed 0": trial_table(rows),
    }.items():
        if len(rest) > 2:
            written += ["", f"### {heading}", "", *rest]
    return written
