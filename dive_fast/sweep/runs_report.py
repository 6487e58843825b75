"""The files of ``dive-fast report``: report.md, report.json, report.png and report.html."""

import itertools
import json
from pathlib import Path
from typing import Any

from dive_fast.errors import UserError
from dive_fast.evaluation.plots import OTHERS, method_styles
from dive_fast.io.atomic_files import write_atomic
from dive_fast.sweep.choice import Spread
from dive_fast.sweep.html_page import page
from dive_fast.sweep.run_results import CONFIG
from dive_fast.sweep.runs_table import (
    MARKDOWN_GAP,
    Axes,
    RunsTable,
    as_cells,
    before_of,
    kept_of,
    notes_of,
    table_text,
)
from dive_fast.sweep.tradeoff_chart import Dot, draw_tradeoff, headline

TEXT, DATA, FIGURE, PAGE = "report.md", "report.json", "report.png", "report.html"
"""Names of the files."""
TITLE = "Comparison of runs"


def write_runs_report(table: RunsTable, axes: Axes | None, folder: Path, with_page: bool) -> list[str]:
    """Writes the files; returns their names.

    Args:
        with_page: write the HTML page too.

    Raises:
        UserError: the folder is a run folder, whose report would be replaced, or cannot be written.
    """
    if (folder / CONFIG).exists():
        raise UserError(
            f"--output {folder}: a run folder, whose own report would be replaced; name another folder"
        )
    try:
        return _write(table, axes, folder, with_page)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot write the report: {error}") from error


def _write(table: RunsTable, axes: Axes | None, folder: Path, with_page: bool) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    written, caption, image = [TEXT, DATA], "", None
    if axes is not None and axes.kept and len(axes.runs) > 1:
        column = table.columns[axes.id]
        before = before_of(table, axes)[1]
        dots = _dots(table, axes)
        draw_tradeoff(dots, folder / FIGURE, column.title, headline(dots, column.title), before)
        caption = headline(dots, column.title).replace("[", "(").replace("]", ")")
        image = (folder / FIGURE).read_bytes()
        written.append(FIGURE)
    figure = f"\n![{caption}]({FIGURE})\n" if image is not None else ""
    write_atomic(folder / TEXT, f"# {TITLE}\n\n{table_text('Runs', table, axes, MARKDOWN_GAP)}\n{figure}".encode())
    write_atomic(folder / DATA, (json.dumps(as_json(table, axes), indent=2, allow_nan=False) + "\n").encode())
    if with_page:
        html = page(TITLE, as_cells(table, axes), notes_of(table, axes), image, caption)
        write_atomic(folder / PAGE, html.encode(errors="replace"))
        written.append(PAGE)
    for name in {FIGURE, PAGE} - set(written):
        (folder / name).unlink(missing_ok=True)
    return written


def _dots(table: RunsTable, axes: Axes) -> list[Dot]:
    styles, colours = method_styles(), itertools.cycle(OTHERS)
    methods = dict.fromkeys(table.runs[run].method for run in axes.runs)
    colour_of = {name: styles[name][1] if name in styles else next(colours) for name in methods}
    dots = []
    for index in axes.runs:
        run, id_accuracy, kept = table.runs[index], table.after(index, axes.id), kept_of(table, axes, index)
        if id_accuracy is not None and kept is not None:
            spreads = Spread(id_accuracy, 0.0, 1), Spread(kept, 0.0, 1)
            dots.append(Dot(run.name, *spreads, colour_of[run.method]))
    return dots


def as_json(table: RunsTable, axes: Axes | None) -> dict[str, Any]:
    """The table as JSON values; shares are in [0, 1]."""
    runs = []
    for index, run in enumerate(table.runs):
        values = {
            table.columns[place].title: {
                "metric": measure.metric,
                "kind": table.columns[place].kind,
                "before": measure.before,
                "after": measure.after,
                "samples": measure.samples,
                "left_out": measure.left_out,
            }
            for place, measure in table.values[index].items()
        }
        is_compared = axes is not None and index in axes.runs
        runs.append(
            {
                "name": run.name,
                "folder": str(run.folder),
                "method": run.method,
                "weight": run.weight,
                "seed": run.seed,
                "weights_step": run.weights_step,
                "steps": run.steps,
                "problem": run.problem or None,
                "kept": kept_of(table, axes, index) if axes is not None and is_compared else None,
                "sets": values,
            }
        )
    return {
        "id": None if axes is None else table.columns[axes.id].title,
        "kept": [] if axes is None else [table.columns[place].title for place in axes.kept],
        "runs": runs,
        "notes": notes_of(table, axes),
    }
