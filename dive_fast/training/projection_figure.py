"""The figure of a run with a projection: what the rule does, and how far the weights move, over the steps."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dive_fast.engine.weight_projection import METRICS
from dive_fast.evaluation.plots import BLUE, GREEN, ORANGE, WIDTH, new_figure, save_figure, style_axes
from dive_fast.projections.projection import Projection

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURE = "projection.png"
FONT = 10
LABELS = {
    "omega": "mean omega",
    "decay": "mean share of the deviation removed",
    "cut": "mean share of the rows' lengths removed",
    "triggered": "share of tensors whose gradient triggers the rule",
    "applied": "share of tensors changed",
}
"""Labels of the metrics in [0, 1], in the order of the legend."""
COLOURS = (BLUE, ORANGE, GREEN)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl that have metrics of a projection, without incomplete lines."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError, TypeError):
            line = json.loads(text)
            if line.get(f"{METRICS}distance") is not None:
                lines.append(line)
    return lines


def draw(lines: Sequence[Mapping[str, Any]], rule: Projection, path: Path) -> None:
    """Draws the distance of the weights and, in a second panel, the shares that the rule logs.

    Args:
        lines: from :func:`read_metrics`, at least one.
    """
    names = [name for name in LABELS if any(line.get(METRICS + name) is not None for line in lines)]
    figure = new_figure(WIDTH, 2.6 + 2.6 * bool(names))
    above, *below = figure.subplots(1 + bool(names), 1, squeeze=False, sharex=True)[:, 0]
    last = lines[-1]
    if (moved := last.get(f"{METRICS}relative_distance")) is None:  # anchors of adapters are zero
        _curve(above, lines, "distance", BLUE, "")
        above.set_ylabel("|W - W0|", fontsize=FONT)
        distance = f"{last[f'{METRICS}distance']:.2g}"
    else:
        _curve(above, lines, "relative_distance", BLUE, "", scale=100)
        above.set_ylabel("|W - W0| / |W0|, %", fontsize=FONT)
        distance = f"{100 * moved:.2g} % of their length"
    above.set_ylim(bottom=0)
    for axis in below:
        for name, colour in zip(names, COLOURS, strict=False):
            _curve(axis, lines, name, colour, LABELS[name])
        axis.set_ylabel("share", fontsize=FONT)
        axis.set_ylim(-0.02, 1.02)
    axes = [above, *below]
    for axis in axes:
        style_axes(axis)
        axis.tick_params(axis="both", labelsize=FONT)
    axes[-1].set_xlabel("step", fontsize=FONT)
    if names:
        figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=FONT)
    figure.suptitle(
        f"{rule.title}: the weights are {distance} away from the anchors",
        fontsize=FONT + 2,
        fontweight="bold",
        wrap=True,
    )
    save_figure(figure, path)


def _curve(
    axis: "Axes", lines: Sequence[Mapping[str, Any]], name: str, colour: str, label: str, scale: float = 1.0
) -> None:
    points = [(line["step"], value) for line in lines if (value := line.get(METRICS + name)) is not None]
    steps, values = zip(*points, strict=True)
    style: dict[str, Any] = {"marker": "o", "markersize": 3} if len(points) < 30 else {}
    axis.plot(steps, [scale * value for value in values], color=colour, label=label or None, **style)
