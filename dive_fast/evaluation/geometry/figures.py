"""Figures of geometry: distances before and after, difference vectors, and their curves over training."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dive_fast.data.spread import spread
from dive_fast.evaluation.geometry import measures
from dive_fast.evaluation.plots import BLUE, GREEN, ORANGE, WIDTH, add_title, new_figure, save_figure, style_axes
from dive_fast.model.features import Pairs

SHOWN_ROWS = 1200
"""Number of embeddings whose distances are drawn; their pairs outnumber the pixels of a figure."""

GEOMETRY = "geometry/"
"""Prefix of the names of :func:`dive_fast.evaluation.geometry.measures.compare` in ``metrics.jsonl``."""


def draw_rsa(before: Pairs, after: Pairs, metrics: Mapping[str, float], path: Path) -> None:
    """Plots distances of the same pairs of embeddings before and after: images, captions, and both pooled.

    All panels have the same axes and colours.

    Args:
        metrics: ``rsa_image``, ``rsa_text`` and ``rsa`` of all embeddings, of which some are drawn.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    halves = (
        ("rsa_image", "images", before.image, after.image),
        ("rsa_text", "captions", before.text, after.text),
        ("rsa", "both pooled", torch.cat(before), torch.cat(after)),
    )
    drawn = []
    for _, _, *rows in halves:
        kept = spread(len(rows[0]), SHOWN_ROWS)
        drawn.append([_distances(half[kept]) for half in rows])
    low, high = (
        min(each.min() for both in drawn for each in both),
        max(each.max() for both in drawn for each in both),
    )
    room = 0.02 * float(high - low) + 1e-9
    limits = (float(low) - room, float(high) + room)
    figure = new_figure(WIDTH, 3.1)
    axes = figure.subplots(1, 3, sharex=True, sharey=True)
    panels = []
    for axis, (score, title, *_), (x, y) in zip(axes, halves, drawn, strict=True):
        cells = axis.hexbin(x, y, gridsize=50, mincnt=1, extent=limits * 2, cmap="viridis", linewidths=0.1)
        panels.append(cells)
        axis.plot(limits, limits, color="black", linewidth=1, linestyle="--")
        axis.set_aspect("equal")
        axis.set_xlim(*limits)
        axis.set_ylim(*limits)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.yaxis.set_major_locator(MaxNLocator(4))
        axis.set_title(f"{title}: RSA {metrics[score]:.3f}", fontsize=10, loc="left")
        style_axes(axis)
    colours = LogNorm(1, max(2.0, *(float(cells.get_array().max()) for cells in panels)))
    for cells in panels:
        cells.set_norm(colours)
    figure.colorbar(panels[0], ax=axes, shrink=0.72, label="pairs of embeddings")
    axes[1].set_xlabel("cosine distance before fine-tuning")
    axes[0].set_ylabel("after fine-tuning")
    add_title(figure, "Distances between embeddings: on the dashed line, a distance is unchanged")
    save_figure(figure, path)


def draw_differences(before: Pairs, after: Pairs, path: Path) -> None:
    """Plots difference vectors: on their two principal axes, their lengths, and their cosines to m."""
    differences = measures.differences(before, after)
    halves = (("images, u", BLUE, "u"), ("captions, v", ORANGE, "v"))
    m = differences.average
    figure = new_figure(WIDTH, 3.5)
    plane, lengths, cosines = figure.subplots(1, 3)

    # About zero, not about their mean, so that a shared component shows as a shift of all points.
    axes, shares = _principal_axes(differences)
    farthest = 1e-12
    for (label, colour, _), shadows in zip(
        halves, _per_block(differences, lambda rows: rows.double() @ axes), strict=True
    ):
        x, y = shadows.T.numpy()
        plane.plot(x, y, "o", color=colour, markersize=3, alpha=0.45, markeredgewidth=0, label=label)
        farthest = max(farthest, float(abs(x).max()), float(abs(y).max()))
    plane.plot(0, 0, "+", color="black", markersize=12, markeredgewidth=1.5, label="no movement")
    x_mean, y_mean = (m @ axes).tolist()
    plane.plot(x_mean, y_mean, "*", color=GREEN, markersize=13, markeredgecolor="white", label="mean, m")
    # A square of equal axes: a direction in the picture is one in the plane.
    plane.set(xlim=(-1.05 * farthest, 1.05 * farthest), ylim=(-1.05 * farthest, 1.05 * farthest), aspect="equal")
    for name, share, label in zip(("1st", "2nd"), shares, (plane.set_xlabel, plane.set_ylabel), strict=True):
        label(f"{name} axis, {100 * share:.0f} % of length²")
    plane.set_title("projection", fontsize=10, loc="left")

    measured = _per_block(differences, measures.lengths_of)
    norm = float(m.norm())
    edges = torch.linspace(0, 1.02 * max(*(float(values.max()) for values in measured), norm, 1e-12), 41).numpy()
    for (_, colour, symbol), values in zip(halves, measured, strict=True):
        lengths.hist(
            values.numpy(), edges, color=colour, alpha=0.55, label=f"|{symbol}|: mean {values.mean():.2g}"
        )
    lengths.axvline(norm, color=GREEN, linewidth=1.5, label=f"|m| = {norm:.2g}")
    lengths.set_xlabel("length")
    lengths.set_ylabel("pairs")
    lengths.set_title("lengths", fontsize=10, loc="left")

    edges = torch.linspace(-1, 1, 41).numpy()
    measured = _per_block(differences, lambda rows: measures.cosines_to(m, rows))
    for (_, colour, symbol), values in zip(halves, measured, strict=True):
        cosines.hist(values.numpy(), edges, color=colour, alpha=0.55, label=f"{symbol}: mean {values.mean():.2f}")
    cosines.set_xticks([-1, 0, 1])
    cosines.set_xlabel("cosine to m")
    cosines.set_title("directions; 1: all the same", fontsize=10, loc="left")
    for axis in (lengths, cosines):
        axis.set_ylim(top=1.32 * axis.get_ylim()[1])  # room for the legend
        axis.set_box_aspect(1)
    add_title(figure, "Difference vectors, after - before: DiVE's aim is that all are equal")
    for axis in (plane, lengths, cosines):
        style_axes(axis)
    # Long vectors are few, and so are those that point away from m.
    for axis, corner in ((lengths, "upper right"), (cosines, "upper left")):
        axis.legend(frameon=False, fontsize=9, loc=corner, handlelength=1.2, borderaxespad=0.2)
    figure.legend(
        *plane.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    save_figure(figure, path)


_COURSES = (
    (
        "length",
        "lengths",
        {"image_norm": ("mean |u|", BLUE), "text_norm": ("mean |v|", ORANGE), "average_norm": ("|m|", GREEN)},
    ),
    ("loss", "losses", {"average_loss": ("AVL", BLUE), "pairwise_loss": ("PVL", ORANGE)}),
    (
        "similarity",
        "RSA to before (1: unchanged)",
        {"rsa_image": ("images", BLUE), "rsa_text": ("captions", ORANGE), "rsa": ("pooled", GREEN)},
    ),
)


def has_course(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the metrics have anything that :func:`draw_course` draws."""
    return any(_points(lines, prefix + name) for *_, names in _COURSES for name in names for prefix in _SOURCES)


def draw_course(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plots lengths and losses of difference vectors, and RSA, over training.

    Args:
        lines: lines of a run's ``metrics.jsonl``. Solid curves show reference batches, dashed ones the pairs of
            ``evaluate.geometry`` (``geometry/...``).
    """
    drawn = [
        (kind, label, names)
        for kind, label, names in _COURSES
        if any(_points(lines, prefix + name) for name in names for prefix in _SOURCES)
    ]
    from matplotlib.ticker import LogLocator, NullFormatter

    # A third of the page for each panel, so that text has the same size in all.
    figure = new_figure(WIDTH / 3 * len(drawn), 3.6)
    used = [
        prefix
        for prefix in _SOURCES
        if any(_points(lines, prefix + name) for *_, names in drawn for name in names)
    ]
    for axis, (kind, title, names) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        for name, (legend, colour) in names.items():
            labels = iter([legend])
            for prefix in used:
                if points := _points(lines, prefix + name):
                    style = _SOURCES[prefix][0]
                    label = next(labels, None)
                    axis.plot(
                        *zip(*points, strict=True), style, color=colour, markersize=4, linewidth=1.5, label=label
                    )
        if kind == "length":
            axis.set_yscale("log")  # m is far shorter than u and v
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        if kind == "loss":
            axis.set_ylim(bottom=0)
        axis.set_xlabel("step")
        axis.set_title(title, fontsize=10, loc="left")
        axis.legend(frameon=False, fontsize=9)
        axis.grid(alpha=0.25)
        style_axes(axis)
    title = "Geometry over training" if len(drawn) > 1 else "Over training"
    key = ", ".join(f"{_SOURCES[prefix][1]}" for prefix in used)
    add_title(figure, f"{title}: {key}" if len(drawn) > 1 else title)
    save_figure(figure, path)


_SOURCES = {"": ("-", "reference batches (lines)"), GEOMETRY: ("o--", "measured pairs (points)")}


def _points(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """Steps and values of a metric; without the first step for difference vectors, which are rounding there."""
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    if name.removeprefix(GEOMETRY).startswith("rsa"):
        return points
    return [(step, value) for step, value in points if step > 1 and value > 0]


def _distances(rows: Tensor) -> Any:
    """Cosine distances of all pairs i < j of unit rows, as a flat array."""
    similarity = (rows.double() @ rows.double().T).cpu()
    above = torch.ones_like(similarity, dtype=torch.bool).triu(1)
    return 1 - similarity[above].numpy()


def _per_block(differences: measures.Differences, values_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Values of each row of u and of v, computed some rows at a time, on the CPU."""
    parts = [[values_of(rows).cpu() for rows in block] for block in differences.blocks(measures.BLOCK)]
    return [torch.cat(half) for half in zip(*parts, strict=True)]


def _principal_axes(differences: measures.Differences) -> tuple[Tensor, list[float]]:
    """The two directions ``(D, 2)`` with the largest share of the vectors' squared length, and these shares."""
    m = differences.average
    products = m.new_zeros(len(m), len(m))
    for block in differences.blocks(measures.BLOCK):
        for wide in map(Tensor.double, block):
            products.addmm_(wide.T, wide)
    values, vectors = torch.linalg.eigh(products)
    largest = values.clamp(min=0).flip(0)
    total = float(largest.sum())
    axes = vectors.flip(1)[:, :2]
    # The sign of an axis is arbitrary: choose the one for which the mean is positive.
    axes = axes * torch.where(m @ axes < 0, -1.0, 1.0)
    return axes, [float(value) / total if total > 0 else 0.0 for value in largest[:2]]
