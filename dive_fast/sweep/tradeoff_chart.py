"""The trade-off chart: ID accuracy against what is kept, a labelled point for each run or setting."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dive_fast.evaluation.plots import (
    BLUE,
    GREEN,
    GREY,
    WIDTH,
    Label,
    new_figure,
    place_labels,
    save_figure,
    style_axes,
)
from dive_fast.sweep.choice import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

HEIGHT, FONT = 5.2, 10
"""Height in inches and font size in points."""
MAX_LABELS = 20
"""Names in a chart: more overlap, and the time of placing them grows with their square."""
MAX_LABEL = 32
"""Characters of a label."""


class Dot(NamedTuple):
    """A point of the chart."""

    label: str
    id: Spread
    kept: Spread
    colour: str = BLUE
    is_chosen: bool = False


def draw_tradeoff(
    dots: Sequence[Dot],
    path: Path,
    id_label: str,
    title: str,
    kept_before: float | None = None,
    lowest_id: float | None = None,
) -> None:
    """Draws the chart as PNG.

    Args:
        id_label: name of the ID set.
        kept_before: what the pre-trained model has, a horizontal line.
        lowest_id: lowest ID accuracy within the margin of the best one, from which on the background is green.
    """
    figure = new_figure(WIDTH, HEIGHT)
    axis = figure.subplots()
    front = _front(dots)
    if len(front) > 1:
        axis.plot(*zip(*front), "--", color=GREY, linewidth=1, zorder=1)
    for dot in dots:
        x, y = 100 * dot.id.mean, 100 * dot.kept.mean
        errors = [100 * dot.kept.deviation], [100 * dot.id.deviation]
        if dot.id.seeds > 1:
            axis.errorbar(x, y, *errors, color=dot.colour, linewidth=1, zorder=2)
        marker, size, colour = ("*", 17, GREEN) if dot.is_chosen else ("o", 8, dot.colour)
        axis.plot(x, y, marker, color=colour, markersize=size, markeredgecolor="white", zorder=3)
    avoided = [] if kept_before is None else [_draw_level(axis, 100 * kept_before)]
    axis.margins(0.14)
    if lowest_id is not None:
        limits = axis.get_xlim()
        axis.axvspan(100 * lowest_id, max(limits[1], 100 * lowest_id), color=GREEN, alpha=0.08, linewidth=0)
        axis.set_xlim(limits)
    green = "" if lowest_id is None else "; green: within the margin of the best"
    labelled = _labelled(dots, front)
    named = "" if len(labelled) == len(dots) else f"; the best {len(labelled)} of {len(dots)} are named"
    axis.set_xlabel(f"{id_label}, % (the tuned task{green}{named})", fontsize=FONT, parse_math=False)
    axis.set_ylabel("kept, % (mean of what is not tuned)", fontsize=FONT)
    axis.grid(alpha=0.25)
    style_axes(axis)
    axis.tick_params(labelsize=FONT)
    axis.set_title(title, parse_math=False, fontsize=FONT + 1, loc="left", fontweight="bold", wrap=True)
    labels = [
        Label(100 * dot.id.mean, 100 * dot.kept.mean, _shortened(dot.label), is_bold=dot.is_chosen)
        for dot in labelled
    ]
    place_labels(axis, labels, FONT, avoided)
    save_figure(figure, path)


def _labelled(dots: Sequence[Dot], front: Sequence[tuple[float, float]]) -> list[Dot]:
    """The dots with a name: all, or the chosen one, those of the front, and those with the largest sums."""

    def rank(number: int) -> tuple[bool, bool, float]:
        dot = dots[number]
        is_in_front = (100 * dot.id.mean, 100 * dot.kept.mean) in front
        return dot.is_chosen, is_in_front, dot.id.mean + dot.kept.mean

    numbers = sorted(range(len(dots)), key=rank, reverse=True)[:MAX_LABELS]
    return [dots[number] for number in sorted(numbers)]


def _front(dots: Sequence[Dot]) -> list[tuple[float, float]]:
    """The points that no other one beats in both accuracies, in percent, by rising ID accuracy."""
    front: list[tuple[float, float]] = []
    for x, y in sorted({(100 * dot.id.mean, 100 * dot.kept.mean) for dot in dots}, reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front[::-1]


def headline(dots: Sequence[Dot], id_label: str) -> str:
    """The points of the best ID accuracy and of what is kept, as a title."""
    best = max(dots, key=lambda dot: (dot.id.mean, dot.kept.mean))
    most = max(dots, key=lambda dot: (dot.kept.mean, dot.id.mean))
    figures = f"{id_label} {100 * best.id.mean:.1f} %", f"kept {100 * most.kept.mean:.1f}"
    if best is most:
        return f"{_shortened(best.label)} is best in both: {', '.join(figures)}"
    return f"Best: {_shortened(best.label)}, {figures[0]}; most kept: {_shortened(most.label)}, {figures[1]}"


def _draw_level(axis: "Axes", kept: float) -> "Text":
    """Draws the line of the pre-trained model; returns its label."""
    axis.axhline(kept, color=GREY, linewidth=1.5)
    at = axis.get_yaxis_transform()
    text = f"before training: {kept:.1f}"
    return axis.text(0.01, kept, text, fontsize=FONT, color="#5f6368", ha="left", va="bottom", transform=at)


def _shortened(label: str) -> str:
    return label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}…"
