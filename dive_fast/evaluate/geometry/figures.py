"""Figures of geometry: distances before and after, difference vectors, and their curves over training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dive_fast.evaluate.geometry import measures
from dive_fast.evaluate.geometry.embed import spread
from dive_fast.evaluate.plots import BLUE, GREEN, ORANGE, new_figure, save_figure, style_axes
from dive_fast.model.features import Pairs

SHOWN_ROWS = 1200
"""Number of embeddings whose distances are drawn; their pairs outnumber the pixels of a figure."""

GEOMETRY = "geometry/"
"""Prefix of the names of :func:`dive_fast.evaluate.geometry.measures.compare` in ``metrics.jsonl``."""


def draw_rsa(before: Pairs, after: Pairs, metrics: Mapping[str, float], path: Path) -> None:
    """Plots distances of the same pairs of embeddings before and after: images, captions, and both pooled.

    Args:
        metrics: ``rsa_image``, ``rsa_text`` and ``rsa`` of all embeddings, of which some are drawn.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(12, 3.9)
    halves = (
        ("rsa_image", "images", before.image, after.image),
        ("rsa_text", "captions", before.text, after.text),
        ("rsa", "both pooled", torch.cat(before), torch.cat(after)),
    )
    for axis, (score, title, *rows) in zip(figure.subplots(1, 3), halves, strict=True):
        kept = spread(len(rows[0]), SHOWN_ROWS)
        x, y = (_distances(half[kept]) for half in rows)
        low, high = min(float(x.min()), float(y.min())), max(float(x.max()), float(y.max()))
        room = 0.02 * (high - low)
        extent = (low - room, high + room, low - room, high + room)
        cells = axis.hexbin(x, y, gridsize=60, bins="log", mincnt=1, extent=extent, cmap="viridis", linewidths=0.1)
        axis.plot(extent[:2], extent[:2], color="black", linewidth=1, linestyle="--", label="unchanged")
        axis.set_aspect("equal")
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.set_yticks(axis.get_xticks())
        axis.set_xlim(*extent[:2])
        axis.set_ylim(*extent[2:])
        axis.set_title(f"{title}: RSA = {metrics[score]:.4f}", fontsize=11)
        axis.set_xlabel("cosine distance before fine-tuning")
        style_axes(axis)
        bar = figure.colorbar(cells, cax=axis.inset_axes((1.02, 0, 0.04, 1)))
        bar.ax.tick_params(labelsize=8)
    bar.set_label("pairs of embeddings")
    figure.axes[0].set_ylabel("cosine distance after fine-tuning")
    figure.axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    save_figure(figure, path)


def draw_differences(before: Pairs, after: Pairs, path: Path) -> None:
    """Plots difference vectors: on their two principal axes, their lengths, and their cosines to m."""
    differences = measures.differences(before, after)
    halves = (("images, u", differences.image, BLUE), ("captions, v", differences.text, ORANGE))
    m = differences.average
    figure = new_figure(12.5, 4.1)
    plane, lengths, cosines = figure.subplots(1, 3)

    # About zero, not about their mean, so that a shared component shows as a shift of all points.
    axes, shares = _principal_axes(torch.cat([differences.image, differences.text]))
    for label, rows, colour in halves:
        x, y = (rows.double() @ axes).T.cpu().numpy()
        plane.plot(x, y, "o", color=colour, markersize=3, alpha=0.45, markeredgewidth=0, label=label)
    plane.plot(0, 0, "+", color="black", markersize=12, markeredgewidth=1.5, label="no movement")
    x_mean, y_mean = (m @ axes).tolist()
    plane.plot(x_mean, y_mean, "*", color=GREEN, markersize=15, markeredgecolor="white", label="their mean, m")
    plane.set_aspect("equal", adjustable="datalim")
    for name, share, label in zip(("first", "second"), shares, (plane.set_xlabel, plane.set_ylabel), strict=True):
        label(f"{name} main axis ({100 * share:.0f} % of squared length)")
    plane.set_title("projection", fontsize=11)

    measured = [measures.lengths_of(rows).cpu() for _, rows, _ in halves]
    norm = float(m.norm())
    edges = torch.linspace(0, 1.02 * max(*(float(values.max()) for values in measured), norm, 1e-12), 41).numpy()
    for (label, _, colour), values in zip(halves, measured, strict=True):
        lengths.hist(values.numpy(), edges, color=colour, alpha=0.55, label=f"{label}: mean {values.mean():.2g}")
    lengths.axvline(norm, color=GREEN, linewidth=1.5, label=f"|m| = {norm:.2g}")
    lengths.set_xlabel("length of the difference vector")
    lengths.set_ylabel("pairs")
    lengths.set_title("lengths", fontsize=11)

    edges = torch.linspace(-1, 1, 41).numpy()
    for label, rows, colour in halves:
        values = measures.cosines_to(m, rows).cpu()
        cosines.hist(values.numpy(), edges, color=colour, alpha=0.55, label=f"{label}: mean {values.mean():.2f}")
    cosines.set_xticks([-1, -0.5, 0, 0.5, 1])
    cosines.set_xlabel("cosine to m; 1: all vectors point the same way")
    cosines.set_ylabel("pairs")
    cosines.set_title("directions", fontsize=11)
    for axis in (lengths, cosines):
        axis.set_ylim(top=1.2 * axis.get_ylim()[1])  # room for the legend
    figure.suptitle("Difference vectors: embedding after - before fine-tuning", fontsize=12)
    for axis in (plane, lengths, cosines):
        style_axes(axis)
        axis.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


_COURSES = (
    (
        "length",
        "length of difference vectors",
        {"image_norm": ("mean |u|", BLUE), "text_norm": ("mean |v|", ORANGE), "average_norm": ("|m|", GREEN)},
    ),
    ("loss", "squared length", {"average_loss": ("AVL", BLUE), "pairwise_loss": ("PVL", ORANGE)}),
    (
        "similarity",
        "similarity to before (1: unchanged)",
        {"rsa_image": ("RSA, images", BLUE), "rsa_text": ("RSA, captions", ORANGE), "rsa": ("RSA, pooled", GREEN)},
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
    figure = new_figure(4.3 * len(drawn), 3.7)
    for axis, (kind, y_label, names) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        for name, (legend, colour) in names.items():
            for prefix, (style, origin) in _SOURCES.items():
                points = _points(lines, prefix + name)
                if points:
                    steps, values = zip(*points, strict=True)
                    label = legend if kind == "similarity" else legend + origin
                    axis.plot(steps, values, style, color=colour, markersize=5, linewidth=1.5, label=label)
        if kind == "length":
            axis.set_yscale("log")  # m is far shorter than u and v
        if kind == "loss":
            axis.set_ylim(bottom=0)
        axis.set_xlabel("step")
        axis.set_ylabel(y_label)
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.25)
        style_axes(axis)
    save_figure(figure, path)


_SOURCES = {"": ("-", ", reference batch"), GEOMETRY: ("o--", ", measured pairs")}


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


def _principal_axes(rows: Tensor) -> tuple[Tensor, list[float]]:
    """The two directions ``(D, 2)`` with the largest share of the rows' squared length, and these shares."""
    wide = rows.double()
    values, vectors = torch.linalg.eigh(wide.T @ wide)
    largest = values.clamp(min=0).flip(0)
    total = float(largest.sum())
    axes = vectors.flip(1)[:, :2]
    # The sign of an axis is arbitrary: choose the one for which the rows' mean is positive.
    axes = axes * torch.where((wide @ axes).mean(0) < 0, -1.0, 1.0)
    return axes, [float(value) / total if total > 0 else 0.0 for value in largest[:2]]
