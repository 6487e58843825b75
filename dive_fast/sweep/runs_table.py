"""Runs side by side: a line for each run and a column for each set, never two data sets in one column."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from dive_fast.errors import ConfigError, nearest, one_line
from dive_fast.evaluation.tables import METRICS, aligned
from dive_fast.sweep.grid import number_text
from dive_fast.sweep.run_results import Measure, RunResult
from dive_fast.training.run_report import KINDS, RECALLS, SIMILARITIES

KEPT_KINDS = ("ood", "zero_shot")
KEPT_PROBES = ("image_to_text_r1", "text_to_image_r1", "rsa")
"""Kinds of sets, and metrics of the probe, whose mean is what a run keeps."""
TITLES: Mapping[str, str] = SIMILARITIES | RECALLS | METRICS
"""Names of the metrics; top-1 is not named."""
MARKDOWN_GAP = "\n\n"
"""Between paragraphs."""
SHOWN_VALUES = 40
"""Maximum characters of a value in a remark."""


@dataclass(frozen=True)
class Column:
    """The data set and metric that all values of a column share."""

    name: str
    metric: str
    kind: str
    total: int | None
    """Samples of the set, with those left out; None: unknown."""
    data: Mapping[str, Any]
    variant: int = 0
    """Number of columns of the same name and metric before this one, whose data differ."""

    @property
    def title(self) -> str:
        """The header of the column."""
        metric = TITLES.get(self.metric, self.metric.replace("_", " "))
        name = self.name.partition("/")[0] if self.kind == "probe" else self.name
        title = name if self.metric == "top1" else f"{name} ({metric})"
        return f"{title} [{self.variant + 1}]" if self.variant else title

    @property
    def is_similarity(self) -> bool:
        """Whether values are similarities to the pre-trained model instead of shares."""
        return self.metric in SIMILARITIES

    def shown(self, value: float | None) -> str:
        """A value as text: percent with one decimal, or a similarity with three."""
        if value is None:
            return ""
        return f"{value:.3f}" if self.is_similarity else f"{100 * value:.1f}"

    def is_named(self, name: str) -> bool:
        """Whether a name of the command line means this column: its name, or the part before a slash."""
        return name in (self.name, self.name.partition("/")[0])


@dataclass(frozen=True)
class RunsTable:
    """Runs with their values by column."""

    runs: tuple[RunResult, ...]
    """All runs, also those without results."""
    columns: tuple[Column, ...]
    values: tuple[Mapping[int, Measure], ...]
    """The measures of each run, by the index of their column."""
    remarks: tuple[str, ...]
    """Sentences on columns and runs."""

    def after(self, run: int, column: int) -> float | None:
        """A run's value in a column; None without one."""
        measure = self.values[run].get(column)
        return None if measure is None else measure.after

    def measured_in(self, column: int) -> list[int]:
        """The runs that have a value in a column."""
        return [run for run in range(len(self.runs)) if self.after(run, column) is not None]


def compare_runs(runs: Sequence[RunResult]) -> RunsTable:
    """Sorts the measures of runs into columns; runs with a problem have none."""
    columns: list[Column] = []
    values: list[dict[int, Measure]] = []
    for run in runs:
        row: dict[int, Measure] = {}
        for measure in () if run.problem else run.measures:
            index = _column_of(measure, columns)
            row[index] = measure
        values.append(row)
    kinds: list[str] = list(KINDS)
    order = sorted(
        range(len(columns)), key=lambda index: (kinds.index(columns[index].kind), _first(columns, index))
    )
    position = {index: place for place, index in enumerate(order)}
    table = RunsTable(
        tuple(runs),
        tuple(columns[index] for index in order),
        tuple({position[index]: measure for index, measure in row.items()} for row in values),
        (),
    )
    remarks = [*_data_remarks(table), *_count_remarks(table), *remarks_on_inputs(runs), *_run_remarks(runs)]
    return replace(table, remarks=tuple(remarks))


def _first(columns: Sequence[Column], index: int) -> int:
    """The index of the first column of the same name, next to which its variants stand."""
    return next(at for at, column in enumerate(columns) if column.name == columns[index].name)


def _column_of(measure: Measure, columns: list[Column]) -> int:
    """The index of the column of a measure; a new one if no column has its data."""
    variants = 0
    total = None if measure.samples is None else measure.samples + measure.left_out
    for index, column in enumerate(columns):
        if (column.name, column.metric) != (measure.name, measure.metric):
            continue
        if not _differences(column, total, measure.data):
            kind = measure.kind if column.kind == "other" else column.kind
            data = {**measure.data, **column.data}
            columns[index] = replace(column, kind=kind, total=column.total or total, data=data)
            return index
        variants += 1
    columns.append(Column(measure.name, measure.metric, measure.kind, total, measure.data, variants))
    return len(columns) - 1


def _differences(column: Column, total: int | None, data: Mapping[str, Any]) -> list[str]:
    """What is known to differ between the data of a column and of a measure."""
    lines = []
    if None not in (column.total, total) and column.total != total:
        lines.append(f"{total} samples, not {column.total}")
    shared = column.data.keys() & data.keys()
    # Equal contents are the same data at any path.
    ignored = {"path", "format"} if "digest" in shared else set()
    for key in sorted(shared - ignored):
        if column.data[key] != data[key]:
            new, old = (one_line(str(value))[:SHOWN_VALUES] for value in (data[key], column.data[key]))
            lines.append("other contents" if key == "digest" else f"{key} {new}, not {old}")
    return lines


def _data_remarks(table: RunsTable) -> list[str]:
    remarks = []
    for column in table.columns:
        if column.variant:
            first = next(
                other
                for other in table.columns
                if (other.name, other.metric, other.variant) == (column.name, column.metric, 0)
            )
            differing = "; ".join(_differences(first, column.total, column.data))
            remarks.append(f"{column.title}: other data than {first.title} of the same name ({differing}).")
    return remarks


def _count_remarks(table: RunsTable) -> list[str]:
    compared = sum(not run.problem for run in table.runs)
    counts = [(column.title, len(table.measured_in(index))) for index, column in enumerate(table.columns)]
    return [f"{title}: measured in {count} of {compared} runs." for title, count in counts if count < compared]


def remarks_on_inputs(runs: Sequence[RunResult]) -> list[str]:
    """A sentence for each of model, target and reference that is not the same in all runs with results."""
    remarks = []
    compared = [run for run in runs if not run.problem]
    for name in dict.fromkeys(name for run in compared for name in run.inputs):
        groups: dict[str, list[str]] = {}
        for run in compared:
            if name in run.inputs:
                groups.setdefault(run.inputs[name], []).append(run.name)
        if len(groups) > 1:
            remarks.append(f"Not the same {name}: {' | '.join(map(', '.join, groups.values()))}.")
    return remarks


def _run_remarks(runs: Sequence[RunResult]) -> list[str]:
    return [f"{run.name}: {remark}." for run in runs for remark in run.remarks]


class Axes(NamedTuple):
    """The columns that runs are compared by, and the runs that have all of them."""

    id: int
    """Column of the ID accuracy."""
    kept: tuple[int, ...]
    """Columns whose mean is what is kept."""
    runs: tuple[int, ...]
    remarks: tuple[str, ...] = ()
    """Sentences on columns and runs that are left out."""


def find_axes(table: RunsTable, id_name: str | None = None, kept: Sequence[str] = ()) -> Axes | None:
    """The columns that runs are compared by: those that most runs have.

    Args:
        id_name: the set of the ID accuracy; None: the first of kind ``id``.
        kept: names of the sets whose mean is what is kept; empty: those of :func:`is_kept`.

    Returns:
        None if no run has an ID accuracy. Without columns of what is kept, ``kept`` is empty.

    Raises:
        ConfigError: a name is unknown.
    """
    for name in (*([] if id_name is None else [id_name]), *kept):
        if table.columns and not any(column.is_named(name) for column in table.columns):
            option = "--id" if name == id_name else "--kept"
            known = list(dict.fromkeys(column.name for column in table.columns))
            raise ConfigError(
                f"{option} {name}: no run has measured it{nearest(name, known)} (sets: {', '.join(known)})"
            )
    columns = list(enumerate(table.columns))
    candidates = [
        index for index, column in columns if (column.name == id_name if id_name else column.kind == "id")
    ]
    measured = {index: len(table.measured_in(index)) for index in candidates}
    if not any(measured.values()):
        return None
    id_column = max(candidates, key=lambda index: measured[index])
    runs = table.measured_in(id_column)
    wanted = [index for index, column in columns if index != id_column and is_kept(column, kept)]
    common = _common(table, wanted, runs)
    remarks = []
    if wanted and not common:
        # No column is shared by all runs: those of the most frequent one are compared.
        most = max(wanted, key=lambda index: len(set(table.measured_in(index)) & set(runs)))
        if with_most := [run for run in runs if run in table.measured_in(most)]:
            left_out = [table.runs[run].name for run in runs if run not in with_most]
            remarks.append(f"Without {table.columns[most].title}, and so not in the chart: {', '.join(left_out)}.")
            runs, common = with_most, _common(table, wanted, with_most)
    if partial := [table.columns[index].title for index in wanted if index not in common]:
        remarks.append(f"Not part of what is kept, since only some runs have it: {', '.join(partial)}.")
    return Axes(id_column, tuple(common), tuple(runs), tuple(remarks))


def is_kept(column: Column, names: Sequence[str]) -> bool:
    """Whether a column counts as what is kept: it is named, or without names of a kind that does."""
    if names:
        return any(column.is_named(name) for name in names)
    if column.kind == "probe":
        return column.name.startswith("probe/") and column.metric in KEPT_PROBES
    return column.kind in KEPT_KINDS


def _common(table: RunsTable, columns: Sequence[int], runs: Sequence[int]) -> list[int]:
    return [index for index in columns if all(table.after(run, index) is not None for run in runs)]


def kept_of(table: RunsTable, axes: Axes, run: int) -> float | None:
    """The mean of what a run keeps; None without any of it."""
    return _mean(table.after(run, column) for column in axes.kept)


def before_of(table: RunsTable, axes: Axes) -> tuple[float | None, float | None]:
    """ID accuracy and mean of what is kept of the pre-trained model, if all runs that know it agree."""
    pairs = set()
    for run in axes.runs:
        row = table.values[run]
        befores = [1.0 if table.columns[index].is_similarity else row[index].before for index in axes.kept]
        pair = row[axes.id].before, _mean(befores)
        if any(value is not None for value in pair):
            pairs.add(tuple(None if value is None else round(value, 4) for value in pair))
    if len(pairs) != 1:
        return None, None
    id_accuracy, kept = pairs.pop()
    return id_accuracy, kept


def _mean(values: Any) -> float | None:
    """The mean of values; None if one of them is None, or there is none."""
    numbers = list(values)
    if not numbers or any(number is None or not math.isfinite(number) for number in numbers):
        return None
    return statistics.fmean(numbers)


def as_cells(table: RunsTable, axes: Axes | None) -> list[list[str]]:
    """The table as text: runs with results, each value with its change, and the run's settings."""
    header = ["run", *(column.title for column in table.columns), "kept", "weight", "step", "method"]
    lines = [header]
    for index, run in enumerate(table.runs):
        if run.problem:
            continue
        cells = [_cell(column, table.values[index].get(place)) for place, column in enumerate(table.columns)]
        kept = kept_of(table, axes, index) if axes is not None and index in axes.runs else None
        weight = "" if run.weight is None else number_text(run.weight)
        step = "" if run.weights_step is None else str(run.weights_step)
        lines.append([run.name, *cells, "" if kept is None else f"{100 * kept:.1f}", weight, step, run.title])
    if axes is None or not axes.kept:
        at = header.index("kept", 1 + len(table.columns))
        lines = [line[:at] + line[at + 1 :] for line in lines]
    return lines


def _cell(column: Column, measure: Measure | None) -> str:
    if measure is None:
        return ""
    text = column.shown(measure.after) or "not finite"
    if measure.before is not None and measure.after is not None and not column.is_similarity:
        change = f"{100 * (measure.after - measure.before):+.1f}"
        text += f" ({change if float(change) else '+0.0'})"
    return f"{text}, {measure.left_out} left out" if measure.left_out else text


def table_text(title: str, table: RunsTable, axes: Axes | None, gap: str = "\n") -> str:
    """The table with its notes, for a terminal or with a ``gap`` of an empty line as Markdown."""
    lines = [aligned(title, as_cells(table, axes))] if any(not run.problem for run in table.runs) else []
    return "\n".join([*lines, gap.join(notes_of(table, axes))])


def notes_of(table: RunsTable, axes: Axes | None) -> list[str]:
    """Sentences below the table: units, columns that differ, and runs without results."""
    notes = []
    if table.columns:
        changes = "; in brackets the change by training in points"
        similar = "; RSA and CKA are 1 where the geometry is unchanged"
        has_similar = any(column.is_similarity for column in table.columns)
        notes.append(f"Accuracies and recalls in percent{changes}{similar * has_similar}.")
    if axes is not None and axes.kept:
        notes.append(f"Kept: the mean of {describe_kept(table, axes)}.")
    notes += [*table.remarks, *(() if axes is None else axes.remarks)]
    missing = [run for run in table.runs if run.problem]
    if missing:
        notes.append(f"Without results, {len(missing)} of {len(table.runs)}:")
        notes += [f"- {run.name}: {run.problem}" for run in missing]
    return notes


def describe_kept(table: RunsTable, axes: Axes) -> str:
    """The sets whose mean is what is kept."""
    titles = [table.columns[index].title for index in axes.kept]
    return titles[0] if len(titles) == 1 else f"{', '.join(titles[:-1])} and {titles[-1]}"
