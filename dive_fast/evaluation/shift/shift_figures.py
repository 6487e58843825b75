"""Figures of shift: distributions of distances by set, and accuracy over shift."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dive_fast.evaluation.plots import (
    BLUE,
    GREY,
    ORANGE,
    WIDTH,
    Label,
    add_title,
    new_figure,
    new_grid,
    place_labels,
    save_figure,
    style_axes,
)
from dive_fast.evaluation.shift.correlations import pearson
from dive_fast.evaluation.shift.measure_shift import PRETRAINED, TUNED, UNIMODAL, ModelShift

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {"image": "images", "text": "texts", "joint": "image and text"}
BINS = 80
COLOURS = {PRETRAINED: GREY, TUNED: BLUE, UNIMODAL: ORANGE}


def draw_distributions(models: Sequence[ModelShift], path: Path) -> None:
    """Draws the density of D / sqrt(r) of each set as a strip, for each concept a panel.

    All models share an axis: the pre-trained one is above the line of a set, the tuned one below it, and unimodal
    encoders are an outline above it. Dashed lines are the means of held-out samples.
    """
    concepts = list(models[0].gaussians)
    names = [part.name for part in (models[0].held_out, *models[0].sets)]
    figure = new_figure(WIDTH, 1.5 + 0.55 * len(names))
    panels = figure.subplots(1, len(concepts), sharey=True, squeeze=False)[0]
    for axis, concept in zip(panels, concepts, strict=True):
        measured = [model for model in models if concept in model.gaussians]
        roots = [np.sqrt(model.gaussians[concept].rank) for model in measured]
        parts = [
            [part.distance[concept] / root if concept in part.distance else None for part in _parts(model)]
            for model, root in zip(measured, roots, strict=True)
        ]
        values = np.concatenate([each for of_model in parts for each in of_model if each is not None])
        low, high = (float(np.quantile(values, share)) for share in (0.001, 0.999))
        room = 0.03 * (high - low) + 1e-9
        edges = np.linspace(low - room, high + room, BINS + 1)
        for of_model, model in zip(parts, measured, strict=True):
            colour, sign = COLOURS[model.label], -1 if model.label == TUNED else 1
            look: dict[str, Any] = {"facecolor": colour, "alpha": 0.75, "linewidth": 0}
            if model.label == UNIMODAL:
                look = {"facecolor": "none", "edgecolor": colour, "linewidth": 1.2}
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
                    label=label,
                    **look,
                )
                mean = colour if model.label == UNIMODAL else "black"
                axis.plot([each.mean()] * 2, [level, level + sign * 0.42], color=mean, linewidth=1.3)
            held_out = of_model[0]
            assert held_out is not None
            axis.axvline(float(held_out.mean()), color=colour, linewidth=1, linestyle="--", zorder=0)
        axis.set_xlim(edges[0], edges[-1])
        axis.set_title(TITLES[concept], fontsize=10, loc="left")
        axis.set_xlabel("D / √r")
        style_axes(axis)
    panels[0].set_yticks(range(len(names)), list(reversed(names)))
    if len(models) > 1:
        _add_legend(figure)
    add_title(figure, f"Distance from {models[0].fitted.name}; dashed: mean of held-out samples")
    save_figure(figure, path)


def _parts(model: ModelShift) -> list[Any]:
    return [model.held_out, *model.sets]


def draw_accuracy(rows: Sequence[Mapping[str, Any]], over_sets: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws accuracy over shift, relative to held-out samples: a panel for each concept, a point for each set."""
    known = [row for row in rows if row["accuracy"] is not None and row["role"] != "fitted"]
    concepts = list(dict.fromkeys(row["concept"] for row in known))
    models = list(dict.fromkeys(row["model"] for row in known))
    colours = {model: COLOURS[model] if len(models) > 1 else BLUE for model in models}
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
        _add_legend(figure)
    add_title(figure, "Accuracy and shift of each set")
    save_figure(figure, path)


def has_joint(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether :func:`draw_joint` has anything to draw: sets whose images or texts, and pairs, were measured."""
    return bool(_joint_panels(rows))


def draw_joint(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the shift of pairs over that of images and of texts, relative to held-out samples.

    A panel for each concept of the model itself, and for each of unimodal encoders; a point for each set, and a
    dotted line where both shifts are equal.
    """
    panels = _joint_panels(rows)
    figure, axes = new_grid(len(panels), 2, 3.4, 0.5)
    for axis, ((source, concept), by_model) in zip(axes, panels.items(), strict=True):
        labels: list[Label] = []
        for model, points in by_model.items():
            x, y, names = zip(*points, strict=True)
            axis.plot(x, y, "o", color=COLOURS[model], markersize=6, markeredgecolor="white", label=model)
            labels = [Label(*each) for each in zip(x, y, names, strict=True)]
        axis.margins(0.14)
        low, high = (pick(pick(axis.get_xlim()), pick(axis.get_ylim())) for pick in (min, max))
        limits = axis.get_xlim(), axis.get_ylim()
        axis.plot([low, high], [low, high], ":", color="#6b7280", linewidth=1, zorder=0)
        axis.set_xlim(*limits[0])
        axis.set_ylim(*limits[1])
        whose = "unimodal encoder" if source == UNIMODAL else "same model"
        axis.set_xlabel(f"shift of {TITLES[concept]} / held-out ({whose})")
        axis.grid(alpha=0.25)
        style_axes(axis)
        place_labels(axis, labels, 8)
    for axis in axes[::2]:
        axis.set_ylabel("shift of pairs / held-out")
    if len({model for by_model in panels.values() for model in by_model}) > 1:
        _add_legend(figure)
    add_title(figure, "Shift of pairs and of their images and texts")
    save_figure(figure, path)


Points = list[tuple[float, float, str]]
"""Shift of a concept, shift of pairs, and name of each set."""


def _joint_panels(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, Points]]:
    """The points of each model by the encoder (empty: the model's) and the concept of the horizontal axis."""
    ratios = {(row["model"], row["concept"], row["set"]): row["ratio"] for row in rows if row["role"] != "fitted"}
    panels: dict[tuple[str, str], dict[str, Points]] = {}
    for source in ("", UNIMODAL):
        for concept in ("image", "text"):
            by_model: dict[str, Points] = {}
            for (model, kind, name), ratio in ratios.items():
                x = ratios.get((source or model, concept, name))
                if kind == "joint" and x is not None:
                    by_model.setdefault(model, []).append((x, ratio, name))
            if by_model:
                panels[source, concept] = by_model
    return panels


def _add_legend(figure: "Figure") -> None:
    """Writes the names of models once, below all panels."""
    handles: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9
    )
