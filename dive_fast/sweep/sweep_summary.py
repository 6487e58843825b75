"""The result of a sweep: its runs and settings, the choice among them, and the files sweep.md, .json and .png."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dive_fast.config.schema import EvaluateConfig
from dive_fast.errors import ConfigError, nearest
from dive_fast.evaluation.tables import aligned
from dive_fast.io.atomic_files import write_atomic
from dive_fast.sweep.choice import (
    Choice,
    Point,
    caveats,
    choose,
    recommendation,
    spread,
    strength_key,
)
from dive_fast.sweep.grid import CACHE, SEED, Planned, Value, describe
from dive_fast.sweep.run_results import RunResult, read_report
from dive_fast.sweep.runner import Outcome
from dive_fast.sweep.runs_table import (
    MARKDOWN_GAP,
    Axes,
    RunsTable,
    before_of,
    compare_runs,
    find_axes,
    kept_of,
    notes_of,
    remarks_on_inputs,
    table_text,
)
from dive_fast.sweep.tradeoff_chart import Dot, draw_tradeoff

TEXT, DATA, FIGURE = "sweep.md", "sweep.json", "sweep.png"
"""Names of the files in the sweep's folder."""


@dataclass(frozen=True)
class Selection:
    """What a sweep chooses by."""

    id_name: str
    """The set of the ID validation."""
    kept: tuple[str, ...]
    """Names of the sets whose mean is what is kept; empty: by their kinds."""
    within: float
    """Margin of the ID validation, a share."""


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep, and what it chooses by."""

    folder: Path
    over: Mapping[str, Sequence[Value]]
    planned: tuple[Planned, ...]
    selection: Selection
    full_command: tuple[str, ...]
    """The command line that trains in full, without the chosen values."""


Outcomes = Sequence[Outcome | None]
"""The end of each run; None: not started or interrupted."""


@dataclass(frozen=True)
class Summary:
    """The results of a sweep, and the choice among its settings."""

    sweep: Sweep
    outcomes: Outcomes
    table: RunsTable
    """A line for each run."""
    axes: Axes | None
    points: tuple[Point, ...]
    choice: Choice | None
    sentences: tuple[str, ...]


def id_validation(options: EvaluateConfig, name: str | None, kept: Sequence[str]) -> str:
    """The set of the ID validation: a name, ``evaluate.select``, or the first set of role ``id``.

    Args:
        name: ``--id``.
        kept: ``--kept``, validated too.

    Raises:
        ConfigError: an unknown name, or no set is known to be in distribution.
    """
    known = list(options.sets)
    for option, chosen in (("--id", [name] if name is not None else []), ("--kept", kept)):
        for each in chosen:
            if each not in known and not (option == "--kept" and each.partition("/")[0] in ("probe", "geometry")):
                names = f"{nearest(each, known)} (sets: {', '.join(known) or 'none'})"
                raise ConfigError(f"{option} {each}: no set of this name in evaluate.sets{names}")
    if name is not None and name in kept:
        raise ConfigError(f"--kept {name}: it is the ID validation too; name other sets")
    if (chosen_set := name or options.select or _first_id(options)) is not None:
        return chosen_set
    raise ConfigError(
        "evaluate: no set is known as ID validation, by which the sweep chooses: set evaluate.select or a set's "
        f"role to id, or name one by --id (sets: {', '.join(known) or 'none'})"
    )


def _first_id(options: EvaluateConfig) -> str | None:
    from dive_fast.evaluation.datasets.catalog import find_dataset

    for name, config in options.sets.items():
        role = config.role
        if role is None and config.dataset is not None:
            role = find_dataset(config.dataset).role
        if role == "id":
            return name
    return None


def run_line(folder: Path, selection: Selection) -> str:
    """The figures of one run: its ID validation, and what it keeps."""
    table = compare_runs([read_report(folder)])
    axes = _axes(table, selection)
    if axes is None:
        return f"no value of {selection.id_name}"
    text = f"{selection.id_name} {100 * (table.after(0, axes.id) or 0.0):.1f} %"
    kept = kept_of(table, axes, 0)
    return text if kept is None else f"{text}, kept {100 * kept:.1f}"


def _axes(table: RunsTable, selection: Selection) -> Axes | None:
    """The columns that runs are compared by; None if no run has measured the ID validation."""
    if not any(column.name == selection.id_name for column in table.columns):
        return None
    kept = [name for name in selection.kept if any(column.is_named(name) for column in table.columns)]
    return find_axes(table, selection.id_name, kept)


def summarize(sweep: Sweep, outcomes: Outcomes) -> Summary:
    """Reads the results of finished runs, groups them by their settings and chooses among these."""
    table, selection = (
        compare_runs([_result(sweep, *pair) for pair in zip(sweep.planned, outcomes)]),
        sweep.selection,
    )
    axes = _axes(table, selection)
    points = _points(sweep, outcomes, table, axes)
    strength = strength_key(sweep.over)
    left = sum(outcome is None for outcome in outcomes)
    choice = None if left else choose(points, strength, selection.within)
    if choice is None or axes is None:
        reason = "No recommendation: no setting has an ID validation in all its runs."
        if left:
            reason = f"No recommendation yet: {left} of {len(outcomes)} runs have not finished."
        return Summary(sweep, outcomes, table, axes, points, None, (reason,))
    column = table.columns[axes.id]
    sentences = [recommendation(choice, selection.id_name, before_of(table, axes)[1])]
    sentences += caveats(choice, points, strength, selection.within, column.metric, column.total)
    if absent := [name for name in selection.kept if not any(each.is_named(name) for each in table.columns)]:
        sentences.append(f"--kept {', '.join(absent)}: not measured.")
    if not axes.kept:
        sentences.append(
            "Nothing that is not tuned was measured by all runs: name sets by --kept, or give them roles."
        )
    sentences += remarks_on_inputs(table.runs)
    sentences.append(f"To train it in full: {full_command(sweep, choice.point)}")
    return Summary(sweep, outcomes, table, axes, points, choice, tuple(sentences))


def _result(sweep: Sweep, run: Planned, outcome: Outcome | None) -> RunResult:
    folder = sweep.folder / run.name
    if outcome is None or not outcome.is_finished:
        return RunResult(run.name, folder, problem=_state(outcome))
    return read_report(folder)


def _points(sweep: Sweep, outcomes: Outcomes, table: RunsTable, axes: Axes | None) -> tuple[Point, ...]:
    groups: dict[Any, list[int]] = {}
    for index, run in enumerate(sweep.planned):
        groups.setdefault(run.point, []).append(index)
    points = []
    for runs in groups.values():
        values = {key: value for key, value in sweep.planned[runs[0]].values.items() if key != SEED}
        is_complete = all((outcome := outcomes[run]) is not None and outcome.is_finished for run in runs)
        ids = [None if axes is None else table.after(run, axes.id) for run in runs]
        kept = [None if axes is None else kept_of(table, axes, run) for run in runs]
        points.append(Point(values, spread(ids), spread(kept), is_complete))
    return tuple(points)


def full_command(sweep: Sweep, point: Point) -> str:
    """The command line that trains a setting in full, with the teacher cache of the sweep."""
    values = [f"{key}={value.text}" for key, value in point.values.items()]
    if SEED not in sweep.over:  # a cache of random crops is that of a seed
        runs = (run for run in sweep.planned if run.values == point.values)
        named = (override for run in runs for override in run.overrides if override.startswith(f"{CACHE}="))
        values += [override for override in named if override not in sweep.full_command]
    return shlex.join([*sweep.full_command, *values])


def points_table(summary: Summary) -> str:
    """The settings with ID validation and what is kept, as a table."""
    sweep, axes = summary.sweep, summary.axes
    keys = [key for key in sweep.over if key != SEED]
    has_seeds = len(sweep.over.get(SEED, ())) > 1
    header = (
        ["setting", *keys[1:], f"{sweep.selection.id_name}, %"] if keys else ["setting", sweep.selection.id_name]
    )
    if keys:
        header[0] = keys[0]
    header += ["kept"] * bool(axes and axes.kept) + ["seeds"] * has_seeds + [""]
    rows = []
    for point in summary.points:
        count = 0 if point.id is None else point.id.seeds
        cells = [str(value) for value in point.values.values()] or ["the config"]
        cells.append("" if point.id is None else point.id.percent())
        if axes and axes.kept:
            cells.append("" if point.kept is None else point.kept.percent())
        cells += [str(count)] * has_seeds
        rows.append([*cells, _mark(summary, point)])
    return aligned("Settings", [header, *rows])


def _mark(summary: Summary, point: Point) -> str:
    if summary.choice is not None and point is summary.choice.point:
        return "recommended"
    if not point.is_complete:
        return "not finished"
    if summary.choice is not None and any(point is other for other in summary.choice.enough):
        return "within the margin"
    return ""


def text_of(summary: Summary) -> str:
    """Sentences and tables, for the terminal and for ``sweep.md``."""
    parts = [points_table(summary), "\n\n".join(summary.sentences) + "\n"]
    return "\n".join(parts)


def write_summary(summary: Summary) -> list[str]:
    """Writes ``sweep.md``, ``sweep.json`` and, for two settings or more, ``sweep.png``; returns the names."""
    sweep, table, axes, folder = summary.sweep, summary.table, summary.axes, summary.sweep.folder
    written, figure = [TEXT, DATA], ""
    dots = _dots(summary)
    if len(dots) > 1 and axes is not None:
        title, best = sweep.selection.id_name, summary.choice.best.id if summary.choice is not None else None
        lowest = None if best is None else best.mean - sweep.selection.within
        headline = (
            "Recommended: " + describe(summary.choice.point.values) if summary.choice else "No recommendation"
        )
        draw_tradeoff(dots, folder / FIGURE, title, headline, before_of(table, axes)[1], lowest)
        written.append(FIGURE)
        figure = f"\n![{headline}]({FIGURE})\n"
    else:
        (folder / FIGURE).unlink(missing_ok=True)
    runs = aligned("Runs", [["run", *sweep.over, "minutes", "state"], *_run_rows(summary)])
    text = f"# Sweep\n\n{text_of(summary)}{figure}\n{runs}\n{table_text('Sets', table, axes, MARKDOWN_GAP)}\n"
    write_atomic(folder / TEXT, text.encode())
    write_atomic(folder / DATA, (json.dumps(as_json(summary), indent=2, allow_nan=False) + "\n").encode())
    return written


def _run_rows(summary: Summary) -> list[list[str]]:
    rows = []
    for run, outcome in zip(summary.sweep.planned, summary.outcomes, strict=True):
        minutes = "" if outcome is None or outcome.seconds is None else f"{outcome.seconds / 60:.1f}"
        values = [str(value) for value in run.values.values()]
        rows.append([run.name, *values, minutes, _state(outcome)])
    return rows


def _state(outcome: Outcome | None) -> str:
    if outcome is None:
        return "not finished"
    return "finished" if outcome.is_finished else f"failed, {outcome.error}"


def _dots(summary: Summary) -> list[Dot]:
    varied = [key for key, values in summary.sweep.over.items() if len(values) > 1 and key != SEED]
    dots = []
    for point in summary.points:
        if point.id is not None and point.kept is not None:
            label = ", ".join(f"{_short(key)} {point.values[key]}" for key in varied) or "the config"
            is_chosen = summary.choice is not None and point is summary.choice.point
            dots.append(Dot(label, point.id, point.kept, is_chosen=is_chosen))
    return dots


def _short(key: str) -> str:
    return {"learning_rate": "lr"}.get(name := key.rpartition(".")[2], name)


def as_json(summary: Summary) -> dict[str, Any]:
    """The sweep as JSON values; shares are in [0, 1]."""
    sweep, axes, choice = summary.sweep, summary.axes, summary.choice
    table = summary.table
    runs = []
    for index, (run, outcome) in enumerate(zip(sweep.planned, summary.outcomes, strict=True)):
        kept = None if axes is None or index not in axes.runs else kept_of(table, axes, index)
        runs.append(
            {
                "name": run.name,
                "values": {key: value.parsed for key, value in run.values.items()},
                "state": "waiting" if outcome is None else "finished" if outcome.is_finished else "failed",
                "error": None if outcome is None else outcome.error or None,
                "seconds": None if outcome is None else outcome.seconds,
                "id": None if axes is None else table.after(index, axes.id),
                "kept": kept,
                "sets": {
                    column.title: {
                        "metric": column.metric,
                        "kind": column.kind,
                        "before": table.values[index][place].before,
                        "after": table.values[index][place].after,
                        "samples": table.values[index][place].samples,
                    }
                    for place, column in enumerate(table.columns)
                    if place in table.values[index]
                },
            }
        )
    return {
        "over": {key: [value.parsed for value in values] for key, values in sweep.over.items()},
        "id": sweep.selection.id_name,
        "kept": [] if axes is None else [table.columns[index].title for index in axes.kept],
        "within": sweep.selection.within,
        "rule": None if choice is None else choice.rule,
        "recommended": None if choice is None else _point_json(choice.point),
        "command": None if choice is None else full_command(sweep, choice.point),
        "sentences": list(summary.sentences),
        "points": [_point_json(point) for point in summary.points],
        "runs": runs,
        "notes": notes_of(table, axes),
    }


def _point_json(point: Point) -> dict[str, Any]:
    return {
        "values": {key: value.parsed for key, value in point.values.items()},
        "id": None if point.id is None else point.id._asdict(),
        "kept": None if point.kept is None else point.kept._asdict(),
        "is_complete": point.is_complete,
    }


def kept_text(kept: Sequence[str]) -> str:
    """The sets whose mean will be what is kept, for the start of a sweep."""
    return ", ".join(kept) if kept else "OOD and zero-shot sets, and of R@1 and RSA of the probe"
