"""The report of a run: each set before and after training, as text, Markdown, JSON and a figure."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dive_fast.config.schema import EvaluateConfig, EvaluationSet
from dive_fast.evaluate.datasets.catalog import find_dataset
from dive_fast.evaluate.datasets.resolve import metric_of
from dive_fast.evaluate.tables import METRICS, aligned
from dive_fast.evaluate.zero_shot import Measured
from dive_fast.io.atomic_files import write_atomic
from dive_fast.methods import registry
from dive_fast.train.forgetting_probe import BEFORE, PAIRS, PROBE
from dive_fast.train.report_figure import draw
from dive_fast.train.run_evaluation import Results
from dive_fast.train.setup import Run

logger = logging.getLogger(__name__)

TEXT, FIGURE, DATA = "report.md", "report.png", "report.json"
"""Names of the report's files in the run folder."""
Kind = Literal["id", "ood", "zero_shot", "probe", "other"]
KINDS: dict[Kind, str] = {"id": "ID", "ood": "OOD", "zero_shot": "zero-shot", "other": "", "probe": "probe"}
"""Kinds of sets in the order of the table, and their names."""
SIMILARITIES = {"rsa": "RSA", "cka": "CKA"}
"""Metrics that compare with the pre-trained model, for which they are 1."""
RECALLS = {"image_to_text_r1": "image to text R@1", "text_to_image_r1": "text to image R@1"}


@dataclass(frozen=True)
class Row:
    """One metric before and after training."""

    name: str
    kind: Kind
    metric: str
    before: float | None
    """A share in [0, 1], or a similarity; None: not measured."""
    after: float
    samples: int
    left_out: int = 0

    @property
    def is_similarity(self) -> bool:
        """Whether the value is a similarity to the pre-trained model, instead of a share."""
        return self.metric in SIMILARITIES

    @property
    def change(self) -> float | None:
        """The change, in percentage points of a share."""
        if self.before is None:
            return None
        return (self.after - self.before) * (1 if self.is_similarity else 100)

    @property
    def title(self) -> str:
        """The set's name, with its metric unless that is top-1."""
        name = self.name.partition("/")[0] if self.kind == "probe" else self.name
        metric = (SIMILARITIES | RECALLS | METRICS).get(self.metric, self.metric.replace("_", " "))
        return name if self.metric == "top1" else f"{name} ({metric})"

    def shown(self, value: float | None) -> str:
        """A value as text: percent with one decimal, or a similarity with three."""
        if value is None:
            return "-"
        return f"{value:.3f}" if self.is_similarity else f"{100 * value:.1f}"

    def shown_change(self) -> str:
        """The change as text with its sign."""
        if self.change is None:
            return "-"
        text = f"{self.change:+.3f}" if self.is_similarity else f"{self.change:+.1f}"
        return text if float(text) else text.replace("-", "+")


@dataclass(frozen=True)
class Report:
    """The result of a run."""

    run: str
    """Name of the run folder."""
    weights_step: int
    """Step of the exported weights."""
    steps: int
    """Steps of the complete run."""
    method: str
    """Name of the method, or of its two parts."""
    weight: float | None
    """Weight of the reference loss; None without one."""
    seed: int
    rows: tuple[Row, ...]
    title: str = ""
    """Name of the method in tables and figures."""
    selected_on: str | None = None
    """The set that the weights were selected on; None: the last weights."""
    notes: tuple[str, ...] = ()
    """Sentences below the table."""

    def message(self) -> str:
        """The main result in words: the change of the tuned task, and the largest loss."""
        if not self.rows:
            return ""
        shares = [row for row in self.rows if not row.is_similarity] or list(self.rows)
        first, *others = shares
        parts = [f"{first.title} {_short(first)}"]
        if changed := [row for row in others if row.change is not None]:
            lowest = min(changed, key=lambda row: row.change or 0.0)
            parts.append(f"{lowest.title} {_short(lowest)}")
        unit = " points" if first.change is not None and not first.is_similarity else ""
        return ", ".join(parts) + unit

    def weights(self) -> str:
        """The step of the exported weights in words."""
        chosen = "the last" if self.selected_on is None else f"best on {self.selected_on}"
        return f"weights of step {self.weights_step} of {self.steps}, {chosen}"

    def table(self) -> str:
        """The rows as a Markdown table that is aligned for a terminal."""
        cells = [["set", "before", "after", "change", "samples", "kind"]]
        for row in self.rows:
            samples = f"{row.samples} ({row.left_out} left out)" if row.left_out else str(row.samples)
            values = row.shown(row.before), row.shown(row.after), row.shown_change()
            cells.append([row.title, *values, samples, KINDS[row.kind]])
        return aligned(f"{self.title}: {self.weights()}", cells)

    def text(self) -> str:
        """The table, or a line without one, and the notes."""
        table = self.table() if self.rows else f"{self.title}: {self.weights()}; nothing is measured without sets."
        return "\n".join([table, *self.notes])

    def markdown(self) -> str:
        """As :meth:`text`, with a paragraph for each note."""
        first, *others = self.text().rsplit("\n", len(self.notes)) if self.notes else [self.text()]
        return "\n\n".join([first.rstrip("\n"), *others]) + "\n"

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def _short(row: Row) -> str:
    return row.shown_change() if row.change is not None else row.shown(row.after) + " %" * (not row.is_similarity)


def accuracy_line(accuracies: Mapping[str, float], best: str | None = None) -> str:
    """Accuracies in percent on one line.

    Args:
        best: the set on which these weights are the best so far.
    """
    return ", ".join(
        f"{name} {100 * value:.1f} %{' (best so far)' * (name == best)}" for name, value in accuracies.items()
    )


def make_report(
    run: Run, before: Mapping[str, Measured], after: Results, weights_step: int, selected_on: str | None
) -> Report:
    """The report of a run.

    Args:
        before: metrics of the pre-trained model; empty if it was not measured.
        selected_on: the set that the weights were selected on; None: the last weights.
    """
    objective, options = run.config.objective, run.config.evaluate
    choice = registry.choose(objective)
    names = [part.name for part in (choice.target, choice.reference) if part is not None]
    weight = choice.default_weight if objective.weight is None else objective.weight
    rows = _set_rows(options, before, after.sets) + _pair_rows(after.pairs, len(run.held_out.samples))
    return Report(
        run=run.folder.absolute().name,
        weights_step=weights_step,
        steps=run.total_steps,
        method="+".join(names) if choice.preset is None else choice.preset.name,
        weight=None if choice.reference is None else weight,
        seed=run.config.train.seed,
        rows=tuple(sorted(rows, key=lambda row: list(KINDS).index(row.kind))),
        title=choice.title,
        selected_on=selected_on,
        notes=tuple(_notes(run, rows, before, after)),
    )


def _set_rows(options: EvaluateConfig, before: Mapping[str, Measured], after: Mapping[str, Measured]) -> list[Row]:
    rows = []
    for name, measured in after.items():
        metric = metric_of(options.sets[name])
        start = before[name].scores[metric] if name in before else None
        kind = kind_of(options, name)
        rows.append(Row(name, kind, metric, start, measured.scores[metric], measured.samples, measured.left_out))
    return rows


def kind_of(options: EvaluateConfig, name: str) -> Kind:
    """The kind of a set: its role, that of the known data set, or ID for the set that selects weights."""
    config: EvaluationSet = options.sets[name]
    known = find_dataset(config.dataset).role if config.dataset is not None else None
    return config.role or known or ("id" if name == options.select else "other")


def _pair_rows(pairs: Mapping[str, Mapping[str, float]], num_held_out: int) -> list[Row]:
    """Rows of the pairs: recalls and RSA of the probe, RSA and CKA of ``evaluate.geometry``."""
    rows: list[Row] = []
    for name, metrics in pairs.items():
        count = int(metrics[PAIRS])
        left_out = num_held_out - count if name == PROBE else 0
        for metric in (*RECALLS, *SIMILARITIES):
            if metric in metrics:
                before = 1.0 if metric in SIMILARITIES else metrics[f"{BEFORE}{metric}"]
                rows.append(Row(f"{name}/{metric}", "probe", metric, before, metrics[metric], count, left_out))
    return rows


def _notes(run: Run, rows: Sequence[Row], before: Mapping[str, Measured], after: Results) -> list[str]:
    """Sentences that explain the rows."""
    notes = []
    if any(row.is_similarity for row in rows):
        notes = ["In percent, and change in percentage points; RSA and CKA are 1 where the geometry is unchanged."]
    elif rows:
        notes = ["In percent; change in percentage points."]
    if any(measured.classifier == "head" for measured in after.sets.values()) and before:
        notes.append(
            "Before: zero-shot, by class prompts; after: by the trained head, for sets whose classes it has."
        )
    if after.sets and not before:
        notes.append("Before: not measured (evaluate.baseline = false).")
    if PROBE in after.pairs:
        count = len(run.held_out.samples)
        notes.append(f"Probe: {count} pairs of data.reference, held out of training, show what the model forgets.")
    elif run.held_out.remark:
        notes.append(f"{run.held_out.remark[0].upper()}{run.held_out.remark[1:]}.")
    return notes


def write_report(report: Report, folder: Path) -> None:
    """Writes ``report.json``, ``report.md`` and, if there are changes, ``report.png`` into the run folder."""
    write_atomic(folder / DATA, (json.dumps(report.as_json(), indent=2) + "\n").encode())
    figure = ""
    if any(row.change is not None for row in report.rows):
        draw(report, folder / FIGURE)
        figure = f"\n![{report.message()}]({FIGURE})\n"
    else:
        (folder / FIGURE).unlink(missing_ok=True)
    heading = ": ".join(part for part in (report.run, report.message()) if part)
    write_atomic(folder / TEXT, f"# {heading}\n\n{report.markdown()}{figure}".encode())
