"""Figures of methods, weight ensembles and projections, and the style shared with the figures of geometry."""

import io
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dive_fast.evaluation.calibration import ECE_BATCH, METRICS
from dive_fast.io.atomic_files import write_atomic
from dive_fast.methods import method_list

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

GREY, BLUE, ORANGE, GREEN = "#9aa0a6", "#2f6fb0", "#d98c3f", "#1b7f4c"
OTHERS = ("#7b5ea7", "#b5485d", "#4a9ba8", "#8a7a3d", "#3d3d3d", "#d67fb0", "#6fae5a")
PRETRAINED = "pretrained"
WIDTH = 8.3
"""Inches of a figure: on GitHub's page of 830 pixels its text of 10 points is as large as that of the page."""
MEASURES = {"ood": "OOD accuracy, %", "zs": "zero-shot accuracy, %", "rsa": "RSA to the pre-trained model"}
"""Panels of :func:`tradeoff`, with their titles."""


def method_styles() -> dict[str, tuple[str, str]]:
    """Label and colour of the pre-trained model and of each method, by name."""
    return {PRETRAINED: ("pre-trained", GREY)} | method_list.styles()


def tradeoff(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    title: str = "",
    *,
    highlighted: Collection[str] = (),
    measures: Mapping[str, str] = MEASURES,
) -> None:
    """Plots each method's OOD and zero-shot accuracy, and its RSA if all rows have it, over its ID accuracy.

    Args:
        rows: ``method`` (a name from the config, ``pretrained`` or any other name), ``id``, ``ood`` and ``zs`` in
            [0, 1], and optionally ``rsa``. Several rows of one method, such as seeds, are faint points with their
            mean and standard deviation.
        highlighted: methods in their colours, all others in grey; none: all in their colours.
        measures: titles of the panels by the rows' names.
    """
    shown = [name for name in measures if all(name in row for row in rows)]
    figure = new_figure(WIDTH, 3.9)
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        runs.setdefault(row["method"], []).append(row)
    colours = itertools.cycle(OTHERS)
    known_styles = method_styles()
    styles = {name: known_styles.get(name) or (name, next(colours)) for name in runs}
    for axis, measure in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        scale = 1 if measure == "rsa" else 100
        labels: list[Label] = []
        level = None
        for name, (label, colour) in styles.items():
            points = np.array([[100 * row["id"], scale * row[measure]] for row in runs[name]])
            x, y = points.mean(0).tolist()
            if name == PRETRAINED:
                # A line, since its ID accuracy would squeeze all other points into one corner.
                level = (y, f"{label}, ID {x:.1f}")
                continue
            is_grey = bool(highlighted) and name not in highlighted
            shade = "#8b9097" if is_grey else colour
            if len(points) > 1:
                axis.plot(*points.T, "o", color=shade, markersize=3, alpha=0.4, markeredgewidth=0)
                x_error, y_error = points.std(0, ddof=1).tolist()
                axis.errorbar(x, y, y_error, x_error, color=shade, linewidth=1)
            axis.plot(x, y, "o", color=shade, markersize=7, markeredgecolor="white")
            labels.append(Label(x, y, label, "#4a4f57" if is_grey else colour, not is_grey and bool(highlighted)))
        axis.margins(0.16)
        axis.set_xlabel("ID accuracy, %")
        axis.set_title(measures[measure], loc="left", fontsize=10)
        axis.grid(alpha=0.25)
        style_axes(axis)
        if level is not None:
            _draw_level(axis, *level, [label.y for label in labels])
        place_labels(axis, labels)
    if title:
        add_title(figure, title)
    save_figure(figure, path)


class Label(NamedTuple):
    """The name of a point in a panel."""

    x: float
    y: float
    text: str
    colour: str = "#333333"
    is_bold: bool = False


def place_labels(axis: "Axes", labels: Sequence[Label], size: float = 9, avoided: "Sequence[Text]" = ()) -> None:
    """Writes names next to their points, moved so that they overlap neither each other nor the points.

    Args:
        avoided: other texts that they do not overlap either.
    """
    from adjustText import adjust_text
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    if not labels:
        return
    figure = axis.get_figure(root=True)
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # the layout's final size, which the positions depend on
    texts = [
        axis.text(
            *(label.x, label.y, label.text),
            color=label.colour,
            fontsize=size,
            fontweight="bold" if label.is_bold else "normal",
            parse_math=False,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )
        for label in labels
    ]
    adjust_text(
        texts,
        x=[label.x for label in labels],
        y=[label.y for label in labels],
        objects=list(avoided) or None,
        ax=axis,
        expand=(1.15, 1.35),
        iter_lim=300,
        arrowprops={"arrowstyle": "-", "color": "#9aa0a6", "linewidth": 0.6},
    )


def _draw_level(axis: "Axes", y: float, label: str, others: Sequence[float]) -> None:
    """A dashed line at the pre-trained model's value; a note at the edge if it is far from all others."""
    low, high = min(others, default=y), max(others, default=y)
    room = max(high - low, 1e-9)
    style: dict[str, Any] = {"color": "#6b7280", "fontsize": 9}
    if low - 1.5 * room <= y <= high + 1.5 * room:
        axis.axhline(y, color=GREY, linewidth=1.2, linestyle="--", zorder=0)
        axis.annotate(
            *(label, (0.01, y), (0, -11)),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            **style,
        )
        return
    bottom = y < low
    axis.annotate(
        f"{label}: {y:.1f}, {'below' if bottom else 'above'}",
        (0.01, 0.02 if bottom else 0.98),
        xycoords="axes fraction",
        va="bottom" if bottom else "top",
        **style,
    )


def ensemble(report: Mapping[str, Any], path: Path) -> None:
    """Plots each set's accuracy over that of the set on which alpha was chosen, for alpha from 0 to 1.

    Points have their alpha and, where the number of samples is known, bars of one standard error.

    Args:
        report: the report of :func:`dive_fast.evaluation.weight_ensemble.ensemble`.
    """
    rows, chosen_on = report["accuracies"], report["chosen_on"]
    others = [name for name in rows[0] if name not in ("alpha", chosen_on)] or [chosen_on]
    samples = report.get("samples", {})
    figure, panels = new_grid(len(others), 3, 3.1, 0.7)
    for axis, name in zip(panels, others):
        x, y = ([100 * row[key] for row in rows] for key in (chosen_on, name))
        axis.plot(x, y, "-", color=BLUE, linewidth=1, alpha=0.6)
        y_errors, x_errors = (
            [_standard_error(value, samples.get(key)) for value in values]
            for key, values in ((name, y), (chosen_on, x))
        )
        axis.errorbar(
            x, y, y_errors, x_errors, fmt="o", color=BLUE, ecolor="#a7c7e7", elinewidth=0.8, markersize=4
        )
        labels = []
        for place, row in enumerate(rows):
            end = {0: "pre-trained", len(rows) - 1: "fine-tuned"}.get(place)
            colour = {0: "#6b7280", len(rows) - 1: ORANGE}.get(place, "#333333")
            if end:
                axis.plot(x[place], y[place], "o", color=colour, markersize=7)
            labels.append(Label(x[place], y[place], end or f"{row['alpha']:g}", colour))
            if row["alpha"] == report["alpha"]:
                axis.plot(
                    x[place],
                    y[place],
                    "o",
                    markersize=12,
                    color="none",
                    markeredgecolor=GREEN,
                    markeredgewidth=1.8,
                )
                labels[-1] = Label(x[place], y[place], f"alpha = {row['alpha']:g}", GREEN, True)
        axis.margins(0.14)
        axis.set_xlabel(f"{chosen_on}: accuracy, %")
        axis.set_title(f"{name}: accuracy, %", loc="left", fontsize=10)
        axis.grid(alpha=0.25)
        style_axes(axis)
        place_labels(axis, labels, 8.5)
    note = "bars: one standard error; " if samples else ""
    add_title(figure, f"Weights between pre-trained and fine-tuned; {note}ring: best {chosen_on}")
    save_figure(figure, path)


FIRST, LAST = "in", "out"
"""Tensors before and after the blocks of a tower."""
_BLOCK = re.compile(r".*?\b(?:resblocks|blocks|layers?|stages)\.?\d+(?:\.blocks\.\d+)?(?=\.)")
"""The beginning of the name of a tensor in a block of a transformer or a ConvNeXt, or in a stage of a ResNet."""
_ENDS = ("attn_pool", "attnpool", "head", "ln_final", "ln_post", "norm", "proj", "text_projection")
"""Beginnings of the names of layers after the blocks."""


def alphas(report: Mapping[str, Any], path: Path) -> None:
    """Plots the share of its change that each tensor keeps over the depth of its tower.

    Args:
        report: the report of :func:`dive_fast.evaluation.learned_radii.tpgm`; names of tensors are open_clip's.
    """
    by_tower: dict[str, dict[str, list[float]]] = {}
    shares: dict[str, float] = report["alphas"]
    for name, alpha in shares.items():
        if name == "logit_scale":
            continue
        tower = "image tower" if name.startswith(("visual.", "head.")) else "text tower"
        by_tower.setdefault(tower, {}).setdefault(_depth(name.removeprefix("visual.")), []).append(alpha)
    figure = new_figure(WIDTH, 3.6)
    panels = figure.subplots(1, max(len(by_tower), 1), sharey=True, squeeze=False)[0]
    for axis, (tower, groups) in zip(panels, by_tower.items(), strict=False):
        blocks = [name for name in groups if name not in (FIRST, LAST)]
        order = [name for name in (FIRST, *blocks, LAST) if name in groups]
        for position, name in enumerate(order):
            # Equal values would hide each other.
            values = sorted(groups[name])
            x = [position + 0.3 * ((index + 0.5) / len(values) - 0.5) for index in range(len(values))]
            axis.plot(x, values, "o", color=BLUE, alpha=0.5, markersize=4, markeredgewidth=0)
        means = [sum(groups[name]) / len(groups[name]) for name in order]
        axis.plot(
            range(len(order)), means, "-o", color=ORANGE, linewidth=1.8, markersize=5, label="mean of a block"
        )
        labels = [str(blocks.index(name) + 1) if name in blocks else name for name in order]
        every = max(1, -(-len(blocks) // 12))
        shown = [place for place, name in enumerate(order) if name not in blocks or not blocks.index(name) % every]
        axis.set_xticks(shown, [labels[place] for place in shown])
        axis.set_xlabel("block (line: mean of its tensors)")
        number = sum(map(len, groups.values()))
        axis.set_title(f"{tower}: alpha of {number} tensors", loc="left", fontsize=10)
        axis.axhline(0.5, color=GREY, linewidth=1, linestyle="--", zorder=0)
        axis.grid(alpha=0.25)
        style_axes(axis)
    panels[0].set(ylim=(-0.03, 1.03), ylabel="alpha: 0 pre-trained, 1 tuned")
    means_of = [
        f"{tower} {sum(values) / len(values):.2f}"
        for tower, groups in by_tower.items()
        if (values := [alpha for group in groups.values() for alpha in group])
    ]
    add_title(figure, f"Share of the change that TPGM keeps: {', '.join(means_of)}")
    save_figure(figure, path)


def _depth(name: str) -> str:
    """The block of a tensor, or :data:`FIRST` or :data:`LAST`."""
    block = _BLOCK.match(name)
    if block is not None:
        return block[0]
    return LAST if name.removeprefix("text.").removeprefix("trunk.").startswith(_ENDS) else FIRST


def _standard_error(percent: float, samples: int | None) -> float:
    """The standard error of an accuracy that was measured on so many samples; both in percent."""
    if not samples:
        return 0.0
    share = percent / 100
    return 100 * float((max(share * (1 - share), 0.0) / samples) ** 0.5)


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


def new_grid(count: int, across: int, height: float, margin: float) -> tuple["Figure", "list[Axes]"]:
    """A figure of the common width with panels in rows, and its panels.

    Args:
        count: number of panels, at least 1.
        across: most panels of a row.
        height: inches of a row.
        margin: inches of title and legend.
    """
    across = min(across, count)
    down = -(-count // across)
    figure = new_figure(WIDTH, height * down + margin)
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for axis in panels[count:]:
        axis.axis("off")
    return figure, panels[:count]


def add_title(figure: "Figure", title: str) -> None:
    """Writes the message of a figure at its top left."""
    figure.suptitle(title, fontsize=11.5, fontweight="bold", x=0.01, ha="left")


def style_axes(axis: "Axes") -> None:
    """Applies the common style to a panel."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a figure as PNG with two pixels for each of :data:`WIDTH`'s page, atomically."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=200)
    write_atomic(path, content.getvalue())
