"""The figure of accuracy against the size of an attack."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dive_fast.evaluation.plots import (
    BLUE,
    GREEN,
    ORANGE,
    OTHERS,
    add_title,
    new_grid,
    save_figure,
    style_axes,
)
from dive_fast.evaluation.tables import ATTACKS, NORMS, AttackedLine, attacked_lines

COLOURS = (BLUE, ORANGE, GREEN, *OTHERS)
ACROSS = 3
"""Panels in a row."""


def draw(rows: Sequence[Mapping[str, Any]], path: Path, attack: str, norm: str) -> bool:
    """Draws accuracy against eps, a panel for each set and a line for each model; clean accuracy is at 0.

    Args:
        rows: rows of results; those of other attacks and norms are left out.

    Returns:
        Whether there was anything to draw.
    """
    chosen = [dict(row) for row in rows if (row.get("attack"), row.get("norm")) == (attack, norm)]
    lines = attacked_lines(chosen)
    if not lines:
        return False
    titles = list(dict.fromkeys(line.title for line in lines))
    names = list(dict.fromkeys(_name(line, lines) for line in lines))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    figure, panels = new_grid(len(titles), ACROSS, 2.9, 0.3 * -(-len(names) // 2) + 0.5)
    for index, panel in enumerate(panels):
        for line in (line for line in lines if line.title == titles[index]):
            name = _name(line, lines)
            distances = [0.0, *(eps for eps in line.rows if eps)]
            clean = next(reversed(line.rows.values()))["clean"]
            values = [100 * clean, *(100 * line.rows[eps]["value"] for eps in distances[1:])]
            panel.plot(distances, values, "o-", color=colours[name], markersize=4, label=name, clip_on=False)
        panel.set_title(titles[index], loc="left", fontsize=10)
        panel.set_ylim(bottom=0)
        panel.set_xlim(left=0)
        panel.grid(alpha=0.25)
        style_axes(panel)
        panel.set_xlabel(f"eps, 255ths ({NORMS.get(norm, norm)})")
        if index % ACROSS == 0:
            panel.set_ylabel("accuracy, %")
    handles = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    add_title(figure, f"Accuracy under {ATTACKS.get(attack, attack)}")
    save_figure(figure, path)
    return True


def _name(line: AttackedLine, lines: Sequence[AttackedLine]) -> str:
    """The label of a line, with its attack if the lines differ in steps, samples or seed."""
    return line.label if len({each.attack for each in lines}) == 1 else f"{line.label}: {line.attack}"
