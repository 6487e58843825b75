"""Figures of shift: distributions of distances by set, and accuracy over shift."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dive_fast.evaluation.plots import (
    BLUE,
    GREY,
    WIDTH,
    Label,
    add_title,
    new_figure,
    place_labels,
    save_figure,
    style_axes,
)
from dive_fast.evaluation.shift.correlations import pearson
from dive_fast.evaluation.shift.measure_shift import ModelShift

TITLES = {"image": "images", "text": "texts", "joint": "image and text"}
BINS = 80
COLOURS = (GREY, BLUE)
"""Pre-trained and tuned model."""


def draw_distributions(models: Sequence[ModelShift], path: Path) -> None:
    """Draws the density of D / sqrt(r) of each set as a strip, for each concept a panel.

    Both models share an axis: the pre-trained one is above the line of a set, the tuned one below it. Dashed lines
    are the means of held-out samples.
    """
    concepts = list(models[0].gaussians)
    names = [part.name for part in (models[0].held_out, *models[0].sets)]
    figure = new_figure(WIDTH, 1.5 + 0.55 * len(names))
    panels = figure.subplots(1, len(concepts), sharey=True, squeeze=False)[0]
    for axis, concept in zip(panels, concepts, strict=True):
        roots = [np.sqrt(model.gaussians[concept].rank) for model in models]
        parts = [
            [part.distance[concept] / root if concept in part.distance else None for part in _parts(model)]
            for model, root in zip(models, roots, strict=True)
        ]
        values = np.concatenate([each for of_model in parts for each in of_model if each is not None])
        low, high = (float(np.quantile(values, share)) for share in (0.001, 0.999))
        room = 0.03 * (high - low) + 1e-9
        edges = np.linspace(low - room, high + room, BINS + 1)
        for side, (of_model, model, colour) in enumerate(zip(parts, models, COLOURS, strict=False)):
            sign = (1, -1)[side]
            for place, each in enumerate(of_model):
                if each is None:
                    continue
                density, _ = np.histogram(np.clip(each, edges[0], edges[-1]), edges)
                strip = 0.42 * density / max(int(density.max()), 1)
                level = len(names) - 1 - place
                label = model.label if place == 0 else None
                axis.fill_between(
                    (edges[:-1] + edges[1:]) / 2,
                    level,
                    level + sign * strip,
                    step="mid",
                    color=colour,
                    alpha=0.75,
                    linewidth=0,
                    label=label,
                )
                axis.plot([each.mean()] * 2, [level, level + sign * 0.42], color="black", linewidth=1.3)
            held_out = of_model[0]
            assert held_out is not None
            axis.axvline(float(held_out.mean()), color=colour, linewidth=1, linestyle="--", zorder=0)
        axis.set_xlim(edges[0], edges[-1])
        axis.set_title(TITLES[concept], fontsize=10, loc="left")
        axis.set_xlabel("D / √r")
        style_axes(axis)
    panels[0].set_yticks(range(len(names)), list(reversed(names)))
    if len(models) > 1:
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9
        )
    add_title(figure, f"Distance from {models[0].fitted.name}; dashed: mean of held-out samples")
    save_figure(figure, path)


def _parts(model: ModelShift) -> list[Any]:
    return [model.held_out, *model.sets]


def draw_accuracy(rows: Sequence[Mapping[str, Any]], over_sets: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws accuracy over shift, relative to held-out samples: a panel for each concept, a point for each set."""
    known = [row for row in rows if row["accuracy"] is not None and row["role"] != "fitted"]
    concepts = list(dict.fromkeys(row["concept"] for row in known))
    models = list(dict.fromkeys(row["model"] for row in known))
    colours = dict(zip(models, COLOURS if len(models) > 1 else (BLUE,), strict=True))
    figure = new_figure(WIDTH, 3.9)
    for axis, concept in zip(
        figure.subplots(1, len(concepts), sharey=True, squeeze=False)[0], concepts, strict=True
    ):
        labels, lines = [], []
        for model, colour in colours.items():
            points = [row for row in known if (row["model"], row["concept"]) == (model, concept)]
            x = [row["ratio"] for row in points]
            y = [100 * row["accuracy"] for row in points]
            axis.plot(x, y, "o", color=colour, markersize=6, markeredgecolor="white", label=model)
            if pearson(x, y) is not None:
                slope, level = np.polyfit(x, y, 1)
                ends = np.array([min(x), max(x)])
                axis.plot(ends, slope * ends + level, color=colour, linewidth=1, alpha=0.6, zorder=0)
            if model == models[-1]:
                labels = [Label(*each[:2], each[2]["set"]) for each in zip(x, y, points, strict=True)]
            entry = next(
                (each for each in over_sets if (each["model"], each["concept"]) == (model, concept)), None
            )
            if entry is not None and entry["pearson"] is not None:
                lines.append(
                    f"{model} r = {entry['pearson']:.2f}" if len(models) > 1 else f"r = {entry['pearson']:.2f}"
                )
        axis.margins(0.14)
        axis.set_xlabel("shift / shift of held-out")
        axis.set_title(f"{TITLES[concept]}\n{', '.join(lines)}", fontsize=9.5, loc="left")
        axis.grid(alpha=0.25)
        style_axes(axis)
        place_labels(axis, labels, 8)
    panels = figure.axes
    panels[0].set_ylabel("accuracy, %")
    if len(models) > 1:
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9
        )
    add_title(figure, "Accuracy and shift of each set")
    save_figure(figure, path)
