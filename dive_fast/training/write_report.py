"""Makes the report of a run from its measurements, and writes it as Markdown, JSON and a figure."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from dive_fast.config.schema import Config, EvaluateConfig, EvaluationSet
from dive_fast.evaluation.datasets.catalog import find_dataset
from dive_fast.evaluation.datasets.resolve import metric_of
from dive_fast.evaluation.zero_shot import Measured
from dive_fast.io.atomic_files import write_atomic
from dive_fast.methods import registry
from dive_fast.projections import rules as projections
from dive_fast.projections.projection import Projection
from dive_fast.training import projection_figure
from dive_fast.training.forgetting_probe import BEFORE, PAIRS, PROBE
from dive_fast.training.report_figure import draw
from dive_fast.training.run_evaluation import Results
from dive_fast.training.run_report import KINDS, RECALLS, SIMILARITIES, Kind, Report, Row
from dive_fast.training.setup import Run

TEXT, FIGURE, DATA = "report.md", "report.png", "report.json"
"""Names of the report's files in the run folder."""


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
    rows = _set_rows(options, before, after) + _pair_rows(after, len(run.held_out.samples))
    return Report(
        run=run.folder.absolute().name,
        weights_step=weights_step,
        steps=run.total_steps,
        method="+".join(names) if choice.preset is None else choice.preset.name,
        weight=None if choice.reference is None else weight,
        seed=run.config.train.seed,
        rows=tuple(sorted(rows, key=lambda row: list(KINDS).index(row.kind))),
        title=title_of(run.config),
        projection=None if run.engine.projection is None else run.engine.projection.rule.name,
        selected_on=selected_on,
        notes=tuple(_notes(run, rows, before, after)),
    )


def title_of(config: Config) -> str:
    """The name of a run's method in tables and figures, with that of its projection."""
    title, projection = registry.title_of(config.objective), projections.title_of(config.projection)
    return title if projection is None else f"{title} + {projection}"


def _set_rows(options: EvaluateConfig, before: Mapping[str, Measured], after: Results) -> list[Row]:
    rows = []
    for name, measured in after.sets.items():
        metric = metric_of(options.sets[name])
        values = before[name].scores[metric] if name in before else None, measured.scores[metric]
        counts = measured.samples, measured.left_out
        rows.append(Row(name, kind_of(options, name), metric, *values, *counts, after.data.get(name)))
    return rows


def kind_of(options: EvaluateConfig, name: str) -> Kind:
    """The kind of a set: its role, that of the known data set, or ID for the set that selects weights."""
    config: EvaluationSet = options.sets[name]
    known = find_dataset(config.dataset).role if config.dataset is not None else None
    return config.role or known or ("id" if name == options.select else "other")


def _pair_rows(after: Results, num_held_out: int) -> list[Row]:
    """Rows of the pairs: recalls and RSA of the probe, RSA and CKA of ``evaluate.geometry``."""
    rows: list[Row] = []
    for name, metrics in after.pairs.items():
        count = int(metrics[PAIRS])
        counts = count, num_held_out - count if name == PROBE else 0
        for metric in (*RECALLS, *SIMILARITIES):
            if metric in metrics:
                before = 1.0 if metric in SIMILARITIES else metrics[f"{BEFORE}{metric}"]
                values = before, metrics[metric]
                rows.append(Row(f"{name}/{metric}", "probe", metric, *values, *counts, after.data.get(name)))
    return rows


def _notes(run: Run, rows: Sequence[Row], before: Mapping[str, Measured], after: Results) -> list[str]:
    """Sentences that explain the rows."""
    notes = []
    if any(row.is_similarity for row in rows):
        notes = ["In percent, and change in percentage points; RSA and CKA are 1 where the geometry is unchanged."]
    elif rows:
        notes = ["In percent; change in percentage points."]
    if run.config.train.export_ema:
        notes.append("After: the moving average of the weights (train.export_ema).")
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


def write_report(report: Report, folder: Path, rule: Projection | None = None) -> None:
    """Writes ``report.json``, ``report.md`` and, if there are changes, ``report.png`` into the run folder.

    Args:
        rule: the run's projection, whose metrics in the folder are drawn as ``projection.png``.
    """
    write_atomic(folder / DATA, (json.dumps(report.as_json(), indent=2) + "\n").encode())
    figure = ""
    if any(row.change is not None for row in report.rows):
        draw(report, folder / FIGURE)
        figure = f"\n![{report.message()}]({FIGURE})\n"
    else:
        (folder / FIGURE).unlink(missing_ok=True)
    figure += _draw_projection(folder, rule)
    heading = ": ".join(part for part in (report.run, report.message()) if part)
    write_atomic(folder / TEXT, f"# {heading}\n\n{report.markdown()}{figure}".encode())


def _draw_projection(folder: Path, rule: Projection | None) -> str:
    """Draws the figure of a projection, if its metrics were logged; returns its line for the report."""
    path = folder / projection_figure.FIGURE
    lines = [] if rule is None else projection_figure.read_metrics(folder / "metrics.jsonl")
    if rule is None or not lines:
        path.unlink(missing_ok=True)
        return ""
    projection_figure.draw(lines, rule, path)
    return f"\n![{rule.title} over the steps]({path.name})\n"
