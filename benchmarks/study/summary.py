"""Tables and charts of a study, from its file of results alone."""

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dive_fast.evaluation import plots
from dive_fast.io.atomic_files import write_atomic
from dive_fast.projections import rules as projections
from study import sets
from study.experiments import LEARNING_RATES, MARGIN, SEEDS, chosen, grids, run_of
from study.methods import (
    AVERAGE_ALONE,
    BASELINE,
    COLOURS,
    COMBINED,
    DISTILLED,
    ENSEMBLE,
    HEADS,
    IN_WEIGHT_SPACE,
    LABELS,
    MAIN,
    PAPER,
    PROJECTIONS,
    SELF_DISTILLING,
    STUDIED,
)
from study.results import of_one_model
from study.runs import PRETRAINED, REFERENCE, SIZES, Run

Row = dict[str, Any]
WORLDS = {"cifar10": "CIFAR-10", "pacs": "PACS photo"}
RULES = {
    "equal": f"Largest strength that costs at most {100 * MARGIN:g} point of FLYP's ID validation",
    "best": "Strength and learning rate of the best ID validation",
}


class Group(NamedTuple):
    """Methods that share tables and charts."""

    ending: str
    """Ending of the charts' names."""
    methods: tuple[str, ...]
    others: tuple[str, ...] = ()
    """Methods of other groups that these are compared with."""
    highlighted: tuple[str, ...] = (STUDIED,)
    """Methods in their colours in figures, all others in grey."""
    has_levels: bool = True
    """Whether grids have all learning rates, so that methods are compared at FLYP's ID."""
    curves: str = "a larger weight (numbers) keeps more and learns less"
    """The message of the figure of curves."""

    @property
    def order(self) -> tuple[str, ...]:
        """Order in tables and figures."""
        return (*self.others, *self.methods)


GROUPS = (
    Group("", PAPER),
    Group(
        "-distilling", SELF_DISTILLING, tuple(method for method in PAPER if method in MAIN), (STUDIED, COMBINED)
    ),
    Group(
        *("-weights", IN_WEIGHT_SPACE, (BASELINE, STUDIED), (STUDIED, *PROJECTIONS, ENSEMBLE)),
        has_levels=False,
        curves="all rules but DiGraP keep more with strength (numbers)",
    ),
)
_KEPT = {"zs": "zero-shot (mean of two sets), %", "rsa": plots.MEASURES["rsa"]}
# CIFAR-10's OOD, corruptions, does not distinguish the methods; PACS' is a shift.
MEASURES = {"cifar10": _KEPT, "pacs": {"ood": plots.MEASURES["ood"], **_KEPT, "rsa": "RSA"}}
"""Panels of the figures of methods, with their titles."""
LEVELS = (0.0, 0.01, 0.02)
"""ID accuracy given up against FLYP's best, at which zero-shot accuracies are compared."""


class Figure(NamedTuple):
    """Mean and standard deviation over seeds."""

    mean: float
    deviation: float
    count: int

    def percent(self) -> str:
        """As a share of 100."""
        return f"{100 * self.mean:.1f}" + (f" ± {100 * self.deviation:.1f}" if self.count > 1 else "")

    def plain(self, digits: str = ".3f") -> str:
        """As it is."""
        return f"{self.mean:{digits}}" + (f" ± {self.deviation:{digits}}" if self.count > 1 else "")

    def signed(self, digits: str) -> str:
        """With the sign of the mean, as a difference."""
        return f"{self.mean:+{digits}}" + (f" ± {self.deviation:{digits}}" if self.count > 1 else "")


def figure(rows: Sequence[Row], of: Callable[[Row], float]) -> Figure:
    """Mean and standard deviation of a measure over runs that differ in their seeds."""
    return spread([of(row) for row in rows])


def spread(values: Sequence[float]) -> Figure:
    """Mean and standard deviation of values."""
    return Figure(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


def ood(row: Row) -> float:
    """Accuracy under shift: the mean over domains, where there are several."""
    return statistics.fmean(row[name] for name in shifted(row["world"]))


def shifted(world: str) -> tuple[str, ...]:
    """Names of the OOD sets of a world."""
    return sets.DOMAINS if world == "pacs" else ("ood",)


def over_seeds(rows: Iterable[Row], run: Run) -> list[Row]:
    """Results of a run with each of the seeds that it was made with."""
    wanted = {replace(run, seed=seed) for seed in SEEDS}
    return [row for row in rows if row["method"] == run.method and run_of(row) in wanted]


def main_table(
    rows: Sequence[Row], world: str, rule: str, grid: Sequence[Row], methods: Iterable[str]
) -> list[str]:
    """Methods at the setting that a rule picks, in Markdown.

    Args:
        grid: the rows that it picks from.
    """
    lines = [
        "| method | strength | learning rate | seeds | validation | ID | OOD | ZS | Tiny | RSA | mean u, v |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if (row["world"], row["method"]) == (world, PRETRAINED):
            cells = [
                f"{100 * value:.1f}" for value in (row["validation"], row["id"], ood(row), row["zs"], row["tiny"])
            ]
            lines.append(f"| pre-trained | | | | {' | '.join(cells)} | 1 | |")
    for method in methods:
        run = chosen(grid, world, method, rule)
        selected = over_seeds(rows, run) if run is not None else []
        if run is None or not selected:
            continue
        cells = [
            _label(method, selected, rows),
            _strength(run),
            f"{run.learning_rate:g}",
            str(len(selected)),
            *(
                figure(selected, of).percent()
                for of in (_of("validation"), _of("id"), ood, _of("zs"), _of("tiny"))
            ),
            figure(selected, _of("rsa")).plain(),
            ", ".join(f"{figure(selected, _of(name)).mean:.1e}" for name in ("u", "v") if name in selected[0]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def calibration_table(
    rows: Sequence[Row], world: str, rule: str, grid: Sequence[Row], methods: Iterable[str]
) -> list[str]:
    """Calibration of the methods at the setting that a rule picks, in Markdown; of the runs that have it.

    Args:
        grid: the rows that it picks from.
    """
    lines = [
        "| method | strength | seeds | ECE, ID | ECE, OOD | ECE by 512, ID | ECE by 512, OOD "
        "| confidence - accuracy, ID | the same, OOD |",
        "|---" * 9 + "|",
    ]
    selections: list[tuple[str, str, list[Row]]] = [
        ("pre-trained", "", [row for row in rows if (row["world"], row["method"]) == (world, PRETRAINED)])
    ]
    for method in methods:
        if (run := chosen(grid, world, method, rule)) is not None:
            selected = over_seeds(rows, run)
            selections.append((_label(method, selected, rows), _strength(run), selected))
    for label, strength, selected in selections:
        measured = [row for row in selected if "ece" in row]
        if not measured:
            continue
        cells = [label, strength, str(len(measured))]
        for metric in ("ece", "ece_batched"):
            for names in (("id",), shifted(world)):
                # A set smaller than a batch has one batch.
                is_known = metric == "ece" or world == "cifar10"
                cells.append(figure(measured, _mean_of(metric, names)).plain() if is_known else "")
        for names in (("id",), shifted(world)):
            cells.append(figure(measured, _overconfidence(names)).signed(".3f"))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def distance_table(rows: Sequence[Row], world: str, grid: Sequence[Row], methods: Iterable[str]) -> list[str]:
    """Distances from the pre-trained weights, and how much projections act, in Markdown.

    Args:
        grid: the rows that settings are chosen from, by ``equal``.
    """
    lines = [
        "| method | strength | seeds | \\|W - W0\\| | relative, % | triggered, % | changed, % | the rule's mean |",
        "|---" * 8 + "|",
    ]
    for method in methods:
        run = chosen(grid, world, method, "equal")
        selected = [row for row in over_seeds(rows, run) if "distance" in row] if run is not None else []
        if run is None or not selected:
            continue
        cells = [LABELS[method], _strength(run), str(len(selected))]
        cells.append(figure(selected, _of("distance")).plain(".2f"))
        cells.append(figure(selected, _of("relative_distance")).percent())
        measured = [row["projection"] for row in selected if "projection" in row]
        for name in ("triggered", "applied"):
            known = [each[name] for each in measured if name in each]
            cells.append(spread(known).percent() if known else "")
        name = projections.table()[PROJECTIONS[method]].strength if method in PROJECTIONS else None
        strengths = [each[name] for each in measured if name in each]
        cells.append(f"{name} {spread(strengths).plain('.2g')}" if name is not None and strengths else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def difference_table(rows: Sequence[Row], world: str, grid: Sequence[Row]) -> list[str]:
    """TRACER + DiVE minus each of its halves, in points, seed by seed: methods share batches within a seed.

    Args:
        grid: the rows that settings are chosen from, by ``equal``.
    """
    measures: dict[str, Callable[[Row], float]] = {
        "ID": _of("id"), "OOD": ood, "ZS": _of("zs"), "Tiny": _of("tiny"), "RSA x 100": _of("rsa")
    }  # fmt: skip
    lines = [f"| {LABELS[COMBINED]} minus | seeds | {' | '.join(measures)} |", "|---" * (len(measures) + 2) + "|"]
    combined = chosen(grid, world, COMBINED, "equal")
    for method in (BASELINE, DISTILLED, STUDIED):
        other = chosen(grid, world, method, "equal")
        if combined is None or other is None:
            continue
        first, second = ({row["seed"]: row for row in over_seeds(rows, run)} for run in (combined, other))
        seeds = sorted(first.keys() & second.keys())
        if not seeds:
            continue
        cells = []
        for of in measures.values():
            differences = [100 * (of(first[seed]) - of(second[seed])) for seed in seeds]
            cells.append(spread(differences).signed(".1f"))
        lines.append(f"| {LABELS[method]} | {len(seeds)} | {' | '.join(cells)} |")
    return lines


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those (ID, ZS) that no other one beats in both, by rising ID."""
    best: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best[::-1]


def at_level(points: Iterable[tuple[float, float]], level: float) -> float | None:
    """The highest ZS on the line through the front at an ID of ``level`` or more; None where it does not reach."""
    line = front(points)
    if not line or level > line[-1][0]:
        return None
    return float(np.interp(level, [x for x, _ in line], [y for _, y in line]))


def level_table(rows: Sequence[Row], world: str, methods: Iterable[str]) -> list[str]:
    """Zero-shot accuracy, mean of both sets, and RSA at equal ID accuracy, from the grid's runs."""
    flyp = searched_runs(rows, world, BASELINE)
    if not flyp:
        return []
    reached = max(map(in_domain, flyp))
    heads = [f"FLYP's ID{f' - {100 * less:g}' if less else ''}" for less in LEVELS]
    lines = [f"| method | {' | '.join(heads)} | RSA, the same |", "|---" * (len(LEVELS) + 2) + "|"]
    for method in methods:
        if method in HEADS:
            continue  # their ID is that of another classifier
        # The same grid for every method: who has more runs finds a better one.
        grid = set(grids(world, [method]))
        selected = [row for row in searched_runs(rows, world, method) if run_of(row) in grid]
        if not selected:
            continue
        levels = [reached - less for less in LEVELS]
        kept = [at_level([(in_domain(row), zero_shot(row)) for row in selected], level) for level in levels]
        geometry = [at_level([(in_domain(row), row["rsa"]) for row in selected], level) for level in levels]
        cells = ["-" if value is None else f"{100 * value:.1f}" for value in kept]
        shapes = ", ".join("-" if value is None else f"{value:.3f}" for value in geometry)
        lines.append(f"| {_label(method, selected, flyp)} | {' | '.join(cells)} | {shapes} |")
    return lines


def in_domain(row: Row) -> float:
    """ID accuracy on validation and test pictures together: steadier than either."""
    return (float(row["validation"]) + float(row["id"])) / 2


def zero_shot(row: Row) -> float:
    """Mean of both zero-shot sets."""
    return (float(row["zs"]) + float(row["tiny"])) / 2


def plain_runs(rows: Iterable[Row], world: str, method: str) -> list[Row]:
    """Runs of seed 0 that differ from the default in strength and learning rate alone."""
    selected = [row for row in rows if (row["world"], row["method"], row["seed"]) == (world, method, 0)]
    return [row for row in selected if run_of(row).is_plain()]


def searched_runs(rows: Sequence[Row], world: str, method: str) -> list[Row]:
    """Plain runs from the latest pre-trained weights for which the method's grid is complete; none without it."""
    grid = set(grids(world, [method]))
    selected = plain_runs(rows, world, method)
    for model in dict.fromkeys(row["model"] for row in reversed(selected)):
        runs = [row for row in selected if row["model"] == model]
        if grid <= {run_of(row) for row in runs}:
            return runs
    return []


def sweeps(dive: Run, batch_size: int) -> dict[str, dict[str, Run]]:
    """One thing about DiVE's setting after another: what is swept -> its values as words -> the run at seed 0."""
    alone = replace(dive, method=AVERAGE_ALONE)
    decays = (0.0, 0.5, 0.9, 0.99)
    smaller = {f"B/{part}": replace(dive, reference_batch=batch_size // part) for part in (2, 4, 8)}
    return {
        "reference batch B'": {"B": dive} | smaller,
        "a reference batch at every k-th step, weight x k, decay ^ k": {
            f"k = {every}": replace(dive, every=every) for every in (1, 2, 4, 8)
        },
        "alpha, DiVE": {f"{decay:g}": replace(dive, decay=decay) for decay in decays},
        "alpha, AVL alone": {f"{decay:g}": replace(alone, decay=decay) for decay in decays},
        "pairs in the reference set": {
            f"{count:,}": replace(dive, reference=count) for count in (500, 2500, REFERENCE)
        },
    }


def sweep_tables(rows: Sequence[Row], batch_size: int) -> list[str]:
    """The sweeps in Markdown."""
    run = chosen(rows, "cifar10", STUDIED, "equal")
    lines: list[str] = []
    for title, cases in {} if run is None else sweeps(run, batch_size).items():
        lines += ["", f"| {title} | seeds | ID | OOD | ZS | Tiny | RSA | mean u, v, m |", "|---" * 8 + "|"]
        for name, selected in with_equal_seeds(rows, cases).items():
            cells = [figure(selected, of).percent() for of in (_of("id"), ood, _of("zs"), _of("tiny"))]
            norms = ", ".join(f"{figure(selected, _of(symbol)).mean:.1e}" for symbol in "uvm")
            shape = figure(selected, _of("rsa")).plain()
            lines.append(f"| {name} | {len(selected)} | {' | '.join(cells)} | {shape} | {norms} |")
    return lines


def with_equal_seeds(rows: Sequence[Row], cases: dict[str, Run]) -> dict[str, list[Row]]:
    """Results of the cases that have any, over the seeds that all of these have."""
    known = {name: selected for name, case in cases.items() if (selected := over_seeds(rows, case))}
    seeds = [{row["seed"] for row in selected} for selected in known.values()]
    common = set[int]().union(*seeds[:1]).intersection(*seeds)
    return {name: [row for row in selected if row["seed"] in common] for name, selected in known.items()}


def draw_sweeps(rows: Sequence[Row], batch_size: int, path: Path) -> bool:
    """Change of ID and zero-shot accuracy from DiVE's setting; whether there was anything to draw."""
    run = chosen(rows, "cifar10", STUDIED, "equal")
    if run is None:
        return False
    swept = sweeps(run, batch_size)
    canvas = plots.new_figure(plots.WIDTH, 5.6)
    axes = list(canvas.subplots(2, 3, sharey=True).flat)
    looks = {"ID": (in_domain, "#4a4f57", "s--"), "zero-shot": (zero_shot, COLOURS[STUDIED], "o-")}
    for axis, (title, cases) in zip(axes, swept.items()):
        known = with_equal_seeds(rows, cases)
        # The default is each sweep's case with DiVE's own options; AVL alone is compared with itself.
        default = next((name for name, case in cases.items() if replace(case, method=STUDIED) == run), None)
        axis.axhline(0, color=plots.GREY, linewidth=1)
        for label, (of, colour, line) in looks.items():
            changes = {
                name: _changes(selected, known.get(default or "", []), of) for name, selected in known.items()
            }
            drawn = {name: figure for name, figure in changes.items() if figure is not None}
            axis.errorbar(
                [list(cases).index(name) for name in drawn],
                [each.mean for each in drawn.values()],
                [each.deviation for each in drawn.values()],
                fmt=line, color=colour, markersize=5, capsize=2, label=label,
            )  # fmt: skip
        axis.set_xticks(range(len(cases)), [f"{name}*" if name == default else name for name in cases], fontsize=9)
        axis.set_title(SWEPT.get(title, title), fontsize=10, loc="left")
        axis.margins(x=0.12)
        axis.grid(axis="y", alpha=0.25)
        plots.style_axes(axis)
    for axis in axes[::3]:
        axis.set_ylabel("change, points")
    for axis in axes[len(swept) :]:
        axis.axis("off")
        axis.legend(
            *axes[0].get_legend_handles_labels(), loc="center left", frameon=False,
            title="* DiVE's setting\nbars: deviation of the\nchange over seeds", alignment="left",
        )  # fmt: skip
    plots.add_title(canvas, "DiVE on CIFAR-10: half of the reference pairs costs half a point of ID or less")
    plots.save_figure(canvas, path)
    return True


SWEPT = {
    "reference batch B'": "pairs in a reference batch",
    "a reference batch at every k-th step, weight x k, decay ^ k": "a reference batch every k-th step",
    "alpha, DiVE": "alpha of the running average",
    "alpha, AVL alone": "alpha, AVL alone",
    "pairs in the reference set": "pairs in the reference set",
}
"""Titles of panels."""


def _changes(rows: Sequence[Row], defaults: Sequence[Row], of: Callable[[Row], float]) -> Figure | None:
    """Differences from the default's runs with the same seeds, in points; None without any."""
    started = {row["seed"]: of(row) for row in defaults}
    changes = [100 * (of(row) - started[row["seed"]]) for row in rows if row["seed"] in started]
    return spread(changes) if changes else None


def compared(rows: Sequence[Row], world: str, methods: Iterable[str], grid: Sequence[Row]) -> list[Row]:
    """The pre-trained model and each method's runs at the setting that ``equal`` picks from a grid."""
    selected = [row for row in rows if (row["world"], row["method"]) == (world, PRETRAINED)]
    for method in methods:
        if (run := chosen(grid, world, method, "equal")) is not None:
            selected += over_seeds(rows, run)
    return [row | {"ood": ood(row), "zs": zero_shot(row)} | {"method": style(row["method"])} for row in selected]


def style(method: str) -> str:
    """The name by which figures know a method: its label, where the registry has none of this name."""
    return method if method in plots.method_styles() else LABELS[method]


def _message(rows: Sequence[Row], title: str) -> str:
    """The title of the figure of methods: shares of the pre-trained zero-shot accuracy that are kept."""
    means = {
        name: statistics.fmean(row["zs"] for row in rows if row["method"] == name)
        for name in (PRETRAINED, BASELINE, STUDIED)
        if any(row["method"] == name for row in rows)
    }
    if len(means) < 3:
        return f"{title}: what fine-tuning keeps"
    kept = {name: f"{LABELS[name]} {100 * means[name] / means[PRETRAINED]:.0f} %" for name in (BASELINE, STUDIED)}
    message = f"Tuned on {title}: {kept[STUDIED]} of the zero-shot accuracy kept, {kept[BASELINE]}"
    ruled = {
        name: statistics.fmean(row["zs"] for row in rows if row["method"] == name)
        for name in map(style, PROJECTIONS)
        if any(row["method"] == name for row in rows)
    }
    if ruled:
        best = max(ruled, key=lambda name: ruled[name])
        message += f" ({best}: {100 * ruled[best] / means[PRETRAINED]:.0f} %)"
    return message


def norm_table(rows: Sequence[Row]) -> list[str]:
    """Lengths of the difference vectors at the end of DiVE's runs, over weight and learning rate."""
    selected = sorted(
        plain_runs(rows, "cifar10", STUDIED), key=lambda row: (row["learning_rate"], row["strength"])
    )
    lines = ["| lambda | learning rate | mean u | mean v | m | m over u | ID | ZS | RSA |", "|---" * 9 + "|"]
    for row in selected:
        norms = " | ".join(f"{row[symbol]:.1e}" for symbol in "uvm")
        lines.append(
            f"| {row['strength']:g} | {row['learning_rate']:g} | {norms} | {row['m'] / row['u']:.2f} "
            f"| {100 * row['id']:.1f} | {100 * row['zs']:.1f} | {row['rsa']:.4f} |"
        )
    return lines


def write(
    rows: Sequence[Row], size: str, folder: Path, grid: Sequence[Row] | None = None, further: Sequence[str] = ()
) -> Path:
    """Writes ``study-<size>.md`` and its charts; returns the former.

    Args:
        grid: of another size, where the rows have the settings that it chose: then methods are compared, no more.
        further: lines of other parts of the study.
    """
    path = folder / f"study-{size}.md"
    lines = [f"# Figures of the {size} study", "", f"Written by `python -m study report` from study-{size}.jsonl."]
    for world in WORLDS:
        if any(row["world"] == world for row in rows):
            lines += _about_world(rows, size, world, folder, grid)
    if grid is None:
        lines += _about_dive(of_one_model(rows, "cifar10", PAPER), size, folder)
    lines += further
    write_atomic(path, ("\n".join(lines) + "\n").encode())
    return path


def _about_world(
    rows: Sequence[Row], size: str, world: str, folder: Path, grid: Sequence[Row] | None
) -> list[str]:
    title, settings = WORLDS[world], rows if grid is None else grid
    lines: list[str] = []
    for group in GROUPS:
        group_rows = of_one_model(rows, world, group.methods)
        if not group_rows:
            continue
        # Runs and grids of methods that other groups have may be of earlier weights.
        searched = rows if group.others and group.has_levels else group_rows
        known = {row["method"] for row in group_rows}
        for name in (method for method in group.others if method not in known):
            group_rows += [row for row in of_one_model(rows, world, [name]) if row["method"] == name]
        lines += ["", f"Runs from the pre-trained weights {group_rows[0]['model']}."]
        # Settings from elsewhere are those of one rule.
        for rule in RULES if grid is None else ("equal",):
            tables = {
                RULES[rule]: main_table(group_rows, world, rule, settings, group.order),
                f"Calibration. {RULES[rule]}": calibration_table(group_rows, world, rule, settings, group.order),
            }
            for heading, table in tables.items():
                if len(table) > 3:
                    lines += ["", f"## {title}. {heading}", "", *table]
        selected = compared(group_rows, world, group.order, settings)
        if any(row["method"] in map(style, group.methods) for row in selected):
            name, alt = f"study-{size}-{world}-methods{group.ending}.png", _message(selected, title)
            plots.tradeoff(
                *(selected, folder / name, alt),
                highlighted=[style(method) for method in group.highlighted],
                measures=MEASURES[world],
            )
            lines += ["", f"![{alt}]({name})"]
        if COMBINED in group.methods and len(table := difference_table(group_rows, world, settings)) > 2:
            lines += ["", f"## {title}. {LABELS[COMBINED]}, differences within seeds, in points", "", *table]
        if set(PROJECTIONS) & set(group.methods):
            table = distance_table(group_rows, world, settings, group.order)
            if len(table) > 2:
                lines += ["", f"## {title}. Distance from the pre-trained weights. {RULES['equal']}", "", *table]
        if grid is None:
            if group.has_levels and (table := level_table(searched, world, group.order)):
                heading = f"## {title}. Zero-shot accuracy (mean of both sets) at equal ID, from the grid"
                lines += ["", heading, "", *table]
            name = f"study-{size}-{world}-curves{group.ending}.png"
            drawn = [method for method in group.order if method in (BASELINE, STUDIED, *group.methods)]
            draw_curves(searched, world, drawn, folder / name, group.highlighted, group.curves)
            lines += ["", f"![ID against zero-shot accuracy and RSA, over the weight]({name})"]
    return lines


def _about_dive(rows: Sequence[Row], size: str, folder: Path) -> list[str]:
    lines = ["", "## Sweeps: DiVE on CIFAR-10", *sweep_tables(rows, SIZES[size].batch_size)]
    name = f"study-{size}-sweeps.png"
    if draw_sweeps(rows, SIZES[size].batch_size, folder / name):
        lines += ["", f"![Accuracy over what is swept]({name})"]
    lines += ["", "## Lengths of difference vectors, DiVE on CIFAR-10, seed 0", "", *norm_table(rows)]
    name = f"study-{size}-norms.png"
    if draw_norms(rows, folder / name):
        lines += ["", f"![Lengths of difference vectors along runs]({name})"]
    return lines


def draw_curves(
    rows: Sequence[Row],
    world: str,
    methods: Iterable[str],
    path: Path,
    highlighted: Collection[str] = (STUDIED,),
    message: str = "",
) -> None:
    """ID against zero-shot accuracy and RSA: a line a method over its strengths at its best learning rate."""
    canvas = plots.new_figure(plots.WIDTH, 4.6)
    measures: list[tuple[str, Callable[[Row], float], float]] = [
        ("zero-shot accuracy (mean of two sets), %", zero_shot, 100),
        ("RSA to the pre-trained model", _of("rsa"), 1),
    ]
    for axis, (title, of, factor) in zip(canvas.subplots(1, 2), measures, strict=True):
        labels = []
        for method in (name for name in methods if name not in HEADS):
            line = curve(rows, world, method)
            if not line:
                continue
            is_shown = method in highlighted
            colour = COLOURS[method] if is_shown else GREYS.get(method, "#aab0b8")
            points = [plots.Label(100 * in_domain(row), factor * of(row), "", colour, is_shown) for row in line]
            x, y = [point.x for point in points], [point.y for point in points]
            axis.plot(
                x, y, "o-", color=colour, markersize=5 if is_shown else 3.5, linewidth=2 if is_shown else 1.2
            )
            if is_shown:
                labels += [
                    point._replace(text=_strength(run_of(row)), is_bold=False)
                    for row, point in zip(line, points, strict=True)
                ]
            # The name is written at the left end, where the strength is largest and lines are apart.
            end = min(range(len(points)), key=lambda index: points[index].x)
            strength = _strength(run_of(line[end])) if is_shown else ""
            text = f"{LABELS[method]}, {strength}" if strength else LABELS[method]
            named = points[end]._replace(text=text, colour=colour if is_shown else "#4a4f57")
            labels = [*(label for label in labels if not _overlap(label, named)), named]
        axis.margins(0.12)
        for row in [row for row in rows if (row["world"], row["method"]) == (world, PRETRAINED)][-1:]:
            axis.axhline(factor * of(row), color=plots.GREY, linewidth=1.2, linestyle="--", zorder=0)
            axis.annotate(
                "pre-trained", (0.01, factor * of(row)), (0, -11), xycoords=("axes fraction", "data"),
                textcoords="offset points", fontsize=9, color="#6b7280",
            )  # fmt: skip
        axis.set_xlabel("ID accuracy (validation and test), %")
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(alpha=0.25)
        plots.style_axes(axis)
        plots.place_labels(axis, labels, 8.5)
    plots.add_title(canvas, f"Tuned on {WORLDS[world]}: {message}")
    plots.save_figure(canvas, path)


def _overlap(first: plots.Label, second: plots.Label) -> bool:
    """Whether two labels belong to points that cannot be distinguished in a panel."""
    return math.isclose(first.x, second.x, rel_tol=3e-3) and math.isclose(first.y, second.y, rel_tol=8e-3)


GREYS = {"flyp_replay": "#7d8590", "snd": "#7d8590", BASELINE: "#4a4f57"}
"""Methods in a darker grey than the ablations."""


def curve(rows: Sequence[Row], world: str, method: str) -> list[Row]:
    """Runs of seed 0 at the method's best learning rate, by rising strength."""
    # Those at gentler rates are there for the lengths of difference vectors, and learn little.
    runs = searched_runs(rows, world, method) or plain_runs(rows, world, method)
    selected = [row for row in runs if row["learning_rate"] in LEARNING_RATES]
    if not selected:
        return []
    best = max(selected, key=lambda row: row["validation"])
    line = [row for row in selected if row["learning_rate"] == best["learning_rate"]]
    return sorted(line, key=lambda row: row["strength"] or 0)


def draw_norms(rows: Sequence[Row], path: Path) -> bool:
    """Mean |u|, |v| and |m| along DiVE's runs of one learning rate, a line for each lambda; whether there are."""
    best = chosen(rows, "cifar10", STUDIED, "best")
    if best is None:
        return False
    selected = [row for row in plain_runs(rows, "cifar10", STUDIED) if row["learning_rate"] == best.learning_rate]
    selected.sort(key=lambda row: row["strength"])
    canvas = plots.new_figure(plots.WIDTH, 4.5)
    titles = {"u": "mean |u|, images", "v": "mean |v|, captions", "m": "|m|"}
    for axis, (symbol, title) in zip(canvas.subplots(1, 3, sharey=True), titles.items(), strict=True):
        ends = []
        for place, row in enumerate(selected):
            points = [(point["step"], point[symbol]) for point in row["course"] if point["step"] > 1]
            shade = 0.25 + 0.7 * place / max(1, len(selected) - 1)
            axis.plot(*zip(*points, strict=True), color=(0.1, 0.3, 0.6, shade))
            ends.append((f"{row['strength']:g}", points[-1]))
        for text, point in _joined(ends):
            axis.annotate(text, point, (4, -3), textcoords="offset points", fontsize=9, annotation_clip=False)
        axis.axhspan(*PUBLISHED_LENGTHS, color="#d98c3f", alpha=0.18, linewidth=0)
        axis.set_yscale("log")
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("step")
        axis.set_xlim(right=axis.get_xlim()[1] * 1.28)
        axis.set_xticks(range(0, max(end[0] for _, end in ends) + 1, 50))
        plots.style_axes(axis)
    axis = canvas.axes[0]
    axis.annotate(
        "the paper's CLIP, lambda = 1000", (0.03, PUBLISHED_LENGTHS[0]), (0, 4),
        xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=9, color="#8a5a1e",
    )  # fmt: skip
    longer = f"{min(row['u'] for row in selected) / PUBLISHED_LENGTHS[1]:.0f}x the paper's or more"
    title = f"Learning rate {best.learning_rate:g}: images move {longer}, at any lambda (numbers)"
    plots.add_title(canvas, title)
    plots.save_figure(canvas, path)
    return True


PUBLISHED_LENGTHS = (1e-4, 1e-3)
"""Lengths of difference vectors of CLIP that the paper reports."""


def _joined(ends: Sequence[tuple[str, tuple[float, float]]]) -> list[tuple[str, tuple[float, float]]]:
    """Labels of lines at their ends, on a logarithmic axis; those that would overlap become one."""
    joined: list[tuple[list[str], tuple[float, float]]] = []
    for text, point in sorted(ends, key=lambda end: -end[1][1]):
        if joined and joined[-1][1][1] < 1.42 * point[1]:
            joined[-1][0].append(text)
        else:
            joined.append(([text], point))
    ordered = [(sorted(texts, key=float), point) for texts, point in joined]
    return [
        (f"{texts[0]} to {texts[-1]}" if len(texts) > 2 else ", ".join(texts), point) for texts, point in ordered
    ]


def _mean_of(metric: str, names: Sequence[str]) -> Callable[[Row], float]:
    return lambda row: statistics.fmean(row[metric][name] for name in names)


def _overconfidence(names: Sequence[str]) -> Callable[[Row], float]:
    return lambda row: statistics.fmean(row["confidence"][name] - row[name] for name in names)


def _label(method: str, selected: Sequence[Row], rows: Sequence[Row]) -> str:
    """The method's name, with a remark if the selected runs start from other weights than the first row."""
    is_earlier = bool(selected) and selected[0]["model"] != rows[0]["model"]
    return LABELS[method] + " (earlier weights)" * is_earlier


def _strength(run: Run) -> str:
    return "" if run.strength is None else f"{run.strength:g}"


def _of(name: str) -> Callable[[Row], float]:
    return lambda row: float(row[name])
