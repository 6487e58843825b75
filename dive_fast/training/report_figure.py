"""The figure of a run's report: how each metric has changed from the pre-trained model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dive_fast.evaluation.plots import BLUE, GREEN, GREY, ORANGE, new_figure, save_figure, style_axes
from dive_fast.training.run_report import Report, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"id": BLUE, "ood": ORANGE, "zero_shot": GREEN, "probe": "#7b5ea7", "other": GREY}
"""Colours of the kinds of sets."""
NAMES = {"id": "ID", "ood": "OOD", "zero_shot": "zero-shot", "probe": "forgetting", "other": "other"}
WIDTH, ROW, FONT = 8.3, 0.34, 10
"""Width of the figure and height of a row in inches, and font size in points: readable at 830 pixels."""
MAX_NAME = 34
"""Characters of a name on the axis."""


def draw(report: Report, path: Path) -> None:
    """Draws a bar for each metric with a change, and a panel for shares and one for similarities."""
    shown = [row for row in report.rows if row.change is not None]
    panels = [
        (rows, label)
        for rows, label in (
            ([row for row in shown if not row.is_similarity], "change in percentage points"),
            ([row for row in shown if row.is_similarity], "change of similarity (unchanged: 1)"),
        )
        if rows
    ]
    heights = [ROW * len(rows) + 0.75 for rows, _ in panels]
    figure = new_figure(WIDTH, sum(heights) + 0.7)
    grid = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for (axis,), (rows, label) in zip(grid, panels, strict=True):
        _panel(axis, rows, label)
    kinds = [kind for kind in NAMES if any(row.kind == kind for row in shown)]
    if len(kinds) > 1:
        from matplotlib.patches import Patch

        handles = [Patch(color=COLOURS[kind], label=NAMES[kind]) for kind in kinds]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(kinds), frameon=False, fontsize=FONT)
    figure.suptitle(report.message(), fontsize=FONT + 2, fontweight="bold", wrap=True)
    save_figure(figure, path)


def _panel(axis: "Axes", rows: Sequence[Row], label: str) -> None:
    """Horizontal bars from the pre-trained value, each with its values."""
    changes = [row.change or 0.0 for row in rows]
    largest = max(map(abs, changes)) or 1.0
    positions = range(len(rows))
    left, right = min(0.0, *changes), max(0.0, *changes)
    axis.barh(positions, changes, height=0.62, color=[COLOURS[row.kind] for row in rows])
    axis.axvline(0, color="#3d3d3d", linewidth=1)
    for position, row, change in zip(positions, rows, changes, strict=True):
        text = f"{row.shown_change()}  ({row.shown(row.before)} to {row.shown(row.after)})"
        side = 1 if change > 0 or (change == 0 and left == 0) else -1
        axis.annotate(
            text,
            (change, position),
            (4 * side, 0),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="center",
            fontsize=FONT,
        )
    # Labels stand outside of the bars: room for about 25 characters on each side that has bars.
    room, margin = 0.85 * (right - left or largest), 0.08 * largest
    has_left, has_right = left < 0, right > 0 or left == 0
    axis.set_xlim(left - (room if has_left else margin), right + (room if has_right else margin))
    axis.set_yticks(positions, [_shortened(row.title) for row in rows], fontsize=FONT)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel(label, fontsize=FONT)
    style_axes(axis)
    axis.tick_params(axis="both", labelsize=FONT)
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="y", length=0)


def _shortened(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"
