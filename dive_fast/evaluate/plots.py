"""Figures of methods and of weight ensembles, and the style shared with the figures of geometry."""

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dive_fast.evaluate.calibration import ECE_BATCH, METRICS
from dive_fast.io.atomic_files import write_atomic
from dive_fast.methods import registry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY, BLUE, ORANGE, GREEN = "#9aa0a6", "#2f6fb0", "#d98c3f", "#1b7f4c"
OTHERS = ("#7b5ea7", "#b5485d", "#4a9ba8", "#8a7a3d", "#3d3d3d", "#d67fb0", "#6fae5a")
PRETRAINED = "pretrained"


def method_styles() -> dict[str, tuple[str, str]]:
    """Label and colour of the pre-trained model and of each method, by name."""
    presets = registry.table().presets
    return {PRETRAINED: ("pre-trained", GREY)} | {
        name: (each.title, each.colour) for name, each in presets.items()
    }


def tradeoff(rows: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Plots each method's OOD and zero-shot accuracy, and its RSA if all rows have it, over its ID accuracy.

    Args:
        rows: ``method`` (a name from the config, ``pretrained`` or any other name), ``id``, ``ood`` and ``zs`` in
            [0, 1], and optionally ``rsa``. Several rows of one method, such as seeds, are faint points with their
            mean and standard deviation.
    """
    panels = {"ood": "out of distribution, %", "zs": "zero-shot, %"}
    if all("rsa" in row for row in rows):
        panels["rsa"] = "RSA to the pre-trained model"
    figure = new_figure(3.9 * len(panels), 3.8)
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        runs.setdefault(row["method"], []).append(row)
    colours = itertools.cycle(OTHERS)
    known_styles = method_styles()
    styles = {name: known_styles.get(name) or (name, next(colours)) for name in runs}
    for axis, (measure, label) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        scale = 1 if measure == "rsa" else 100
        for name, (legend, colour) in styles.items():
            points = torch.tensor(
                [[100 * row["id"], scale * row[measure]] for row in runs[name]], dtype=torch.float64
            )
            x, y = points.mean(0).tolist()
            if name == PRETRAINED:
                # A line, since its ID accuracy would squeeze all other points into one corner.
                axis.axhline(y, color=colour, linewidth=1.5, linestyle="--", label=f"{legend} (ID {x:.1f} %)")
                continue
            if len(points) > 1:
                axis.plot(*points.T.numpy(), "o", color=colour, markersize=4, alpha=0.4, markeredgewidth=0)
                x_error, y_error = points.std(0).tolist()
                axis.errorbar(x, y, y_error, x_error, color=colour, linewidth=1.2)
            axis.plot(x, y, "o", color=colour, markersize=9, markeredgecolor="white", label=legend)
        axis.set_xlabel("in distribution (ID), %")
        axis.set_ylabel(label, labelpad=8)
        axis.margins(0.15)
        axis.grid(alpha=0.25)
        style_axes(axis)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    if title:
        figure.suptitle(title, fontsize=12)
    save_figure(figure, path)


def ensemble(report: Mapping[str, Any], path: Path) -> None:
    """Plots each set's accuracy over that of the set on which alpha was chosen, for alpha from 0 to 1.

    Args:
        report: the report of :func:`dive_fast.evaluate.weight_ensemble.ensemble`.
    """
    rows, chosen_on = report["accuracies"], report["chosen_on"]
    others = [name for name in rows[0] if name not in ("alpha", chosen_on)] or [chosen_on]
    figure = new_figure(4.2 * len(others), 3.6)
    for axis, name in zip(figure.subplots(1, len(others), squeeze=False)[0], others, strict=True):
        x, y = ([100 * row[key] for row in rows] for key in (chosen_on, name))
        axis.plot(x, y, "o-", color=BLUE, markersize=4)
        for index, label, colour in ((0, "pre-trained", GREY), (-1, "fine-tuned", ORANGE)):
            axis.plot(x[index], y[index], "o", color=colour, markersize=9, label=label)
        best = next(i for i, row in enumerate(rows) if row["alpha"] == report["alpha"])
        label = f"alpha = {report['alpha']:g}"
        axis.plot(x[best], y[best], "*", color=GREEN, markersize=14, label=label)
        axis.set_xlabel(f"{chosen_on}, %")
        axis.set_ylabel(f"{name}, %")
        style_axes(axis)
        axis.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def reliability(rows: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> bool:
    """Draws a reliability diagram of each set: accuracy over confidence, and the samples in each bin below.

    Args:
        rows: rows of results; those without calibration (retrieval, older versions) are left out.

    Returns:
        Whether there was anything to draw.
    """
    rows = [row for row in rows if {"top1", "reliability", *METRICS} <= row.keys()]
    if not rows:
        return False
    titles = [row["title"] for row in rows]
    across = min(4, len(rows))
    down = -(-len(rows) // across)
    figure = new_figure(3.1 * across + 0.2, 4.1 * down + 0.6)
    panels = figure.subplots(2 * down, across, squeeze=False, gridspec_kw={"height_ratios": [3, 1] * down})
    for index in range(across * down):
        above, below = (panels[2 * (index // across) + part][index % across] for part in range(2))
        if index >= len(rows):
            above.axis("off")
            below.axis("off")
            continue
        row = rows[index]
        title_of_set = f"{row['title']} ({row['set']})" if titles.count(row["title"]) > 1 else row["title"]
        above.set_title(title_of_set, loc="left", fontsize=11, pad=28)
        _reliability_panel(above, below, row)
        if index % across == 0:
            above.set_ylabel("accuracy")
            below.set_ylabel("samples")
    handles, labels = panels[0][0].get_legend_handles_labels()
    columns = len(labels) if across > 2 else across
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=12)
    save_figure(figure, path)
    return True


def _reliability_panel(above: "Axes", below: "Axes", row: Mapping[str, Any]) -> None:
    bins = row["reliability"]
    count = len(bins["samples"])
    centers = [(index + 0.5) / count for index in range(count)]
    filled = [index for index in range(count) if bins["samples"][index]]
    x, accuracy, confidence = (
        [values[index] for index in filled] for values in (centers, bins["accuracy"], bins["confidence"])
    )
    width = 0.94 / count
    lower = [min(pair) for pair in zip(accuracy, confidence, strict=True)]
    above.bar(x, lower, width, color=BLUE, label="accuracy")
    for sign, colour, label in (
        (1, ORANGE, "confidence above accuracy"),
        (-1, GREEN, "accuracy above confidence"),
    ):
        gaps = [max(0.0, sign * (c - a)) for a, c in zip(accuracy, confidence, strict=True)]
        above.bar(x, gaps, width, lower, color=colour, alpha=0.75, label=label)
    above.plot([0, 1], [0, 1], "--", color="#3d3d3d", linewidth=1, label="calibrated")
    text = (
        f"ECE {row['ece']:.3f} ({row['ece_batched']:.3f} in batches of {ECE_BATCH})\n"
        f"accuracy {100 * row['top1']:.1f} %, mean confidence {100 * row['confidence']:.1f} %"
    )
    above.text(0, 1.03, text, fontsize=8, va="bottom", transform=above.transAxes)
    above.set(xlim=(0, 1), ylim=(0, 1), xticks=[])
    style_axes(above)
    below.bar(centers, bins["samples"], width, color=GREY)
    below.set(xlim=(0, 1), xlabel="confidence")
    below.ticklabel_format(axis="y", style="plain")
    below.locator_params(axis="y", nbins=2, integer=True)
    style_axes(below)


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in inches."""
    from matplotlib.figure import Figure  # takes a second to import

    return Figure(figsize=(width, height), layout="constrained")


def style_axes(axis: "Axes") -> None:
    """Applies the common style to a panel."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a figure as PNG, atomically."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    write_atomic(path, content.getvalue())
