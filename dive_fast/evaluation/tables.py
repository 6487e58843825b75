"""Tables of results: CSV with all fields, and Markdown with the paper's tables and those of calibration."""

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dive_fast.evaluation import calibration
from dive_fast.evaluation.datasets.catalog import IMAGENET_OOD, IMAGENET_OOD_4, KNOWN, SUITES, ZERO_SHOT_10

Row = dict[str, Any]
"""Metrics of one model on one set, with the fields that describe both."""
REQUIRED = ("label", "set", "title", "role", "metric", "value")
"""Fields of every row; the first columns of the table."""
RECALLS = [(direction, k) for direction in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
"""Directions and cut-offs of retrieval."""
QUESTIONS = ("soft_accuracy", "upper_bound", "unanswerable")
"""Metrics of visual questions."""
Lines = dict[str, dict[str, Row]]
"""For each model, its newest row for each column: a known data set by its metric, or one of the user's sets."""
OOD_AVERAGES: dict[str, Sequence[str]] = {"OOD-4 avg.": IMAGENET_OOD_4, "OOD-5 avg.": IMAGENET_OOD}
"""The averages that papers report: without and with ObjectNet."""
METRICS = {
    "top5": "top-5",
    "mean_class_recall": "mean class recall",
    "macro_f1": "macro F1",
    "worst_region": "worst region",
}
"""Metrics that the header of a column names, and how; top-1 is not named."""
ADVERSARIAL = "adversarial"
"""Metric of the rows under attack: the share of samples that stay rightly classified."""
ATTACKS = {"apgd-ce": "APGD-CE", "pgd": "PGD", "autoattack": "AutoAttack"}
NORMS = {"linf": "L-infinity", "l2": "L2"}


def as_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV, without the identity and the bins of the reliability diagram."""
    names = [
        name
        for name in dict.fromkeys([*REQUIRED, *(name for row in rows for name in row)])
        if name not in ("identity", "reliability")
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: Sequence[Row]) -> str:
    """Tables 2 to 4 of the paper, retrieval, visual questions, other sets, calibration, under attack, as Markdown.

    A line is one model at one precision; if several share a label, digest and precision are appended to it. An
    average over only part of its sets is marked, e.g. ``(2 of 5)``, and a line below the table names the others.
    """
    lines = lines_of(rows)
    imagenet = [("imagenet1k", "ImageNet (ID)"), *((name, KNOWN[name].title) for name in IMAGENET_OOD)]
    zero_shot = [(name, KNOWN[name].title) for name in ZERO_SHOT_10]
    wilds = [(name, KNOWN[name].title) for name in SUITES["wilds"]]
    parts = [
        _table("ImageNet and its shifts", lines, imagenet, OOD_AVERAGES),
        _table("Zero-shot", lines, zero_shot, {"ZS avg.": ZERO_SHOT_10}),
        _table(
            "iWildCam (macro F1) and FMoW (accuracy; OOD of the worst region)",
            lines,
            wilds,
            {"ZS avg.": ZERO_SHOT_10},
        ),
        _retrieval(lines),
        _questions(lines),
        _others(lines, {name for name, _ in (*imagenet, *zero_shot, *wilds)}),
        _calibration(lines),
        *(
            _table(f"ECE on ImageNet and its shifts, {batches}", lines, imagenet, OOD_AVERAGES, field, _decimal)
            for field, batches in (
                ("ece", "all samples"),
                ("ece_batched", f"batches of {calibration.ECE_BATCH}, as published for CaRot"),
            )
        ),
        _under_attack(rows),
    ]
    return "\n".join(part for part in parts if part)


def is_adversarial(row: Row) -> bool:
    """Whether a row was measured under attack."""
    return bool(row["metric"] == ADVERSARIAL)


def lines_of(rows: Sequence[Row]) -> Lines:
    """The rows by model and column, without those under attack."""
    rows = [row for row in rows if not is_adversarial(row)]
    lines: Lines = {}
    for name, row in zip(_line_names(rows), rows, strict=True):
        line = lines.setdefault(name, {})
        column = _known_column(row)
        if column is None:
            line[_separate_column(row)] = row
            continue
        other = line.get(column)
        if other is None or other["set"] == row["set"]:
            line[column] = row
        elif row["set"] == column:
            line[_separate_column(other)], line[column] = other, row
        else:  # the same data set from two folders: both are shown
            line[_separate_column(row)] = row
    return lines


def _line_names(rows: Sequence[Row]) -> list[str]:
    """For each row the name of its line: its label, with digest and precision where several share a label."""
    variants: dict[str, set[tuple[str, str]]] = {}
    keys = [(str(row.get("weights_digest", "")), str(row.get("precision", ""))) for row in rows]
    for row, key in zip(rows, keys, strict=True):
        variants.setdefault(row["label"], set()).add(key)
    return [
        f"{row['label']} ({digest[:8]}, {precision})" if len(variants[row["label"]]) > 1 else row["label"]
        for row, (digest, precision) in zip(rows, keys, strict=True)
    ]


class AttackedLine(NamedTuple):
    """The results of one model on one set under one attack."""

    label: str
    """Label of the model, as in the other tables."""
    title: str
    """Title of the set."""
    attack: str
    """Attack, norm, steps and number of samples."""
    rows: dict[float, Row]
    """The newest row for each eps, in rising order."""


def attacked_lines(rows: Sequence[Row]) -> list[AttackedLine]:
    """The rows under attack by model, set and attack; rows of other settings are lines of their own."""
    rows = [row for row in rows if is_adversarial(row)]
    lines: dict[tuple[Any, ...], AttackedLine] = {}
    for name, row in zip(_line_names(rows), rows, strict=True):
        settings = (row["attack"], row["norm"], *(row.get(field) for field in ("steps", "subset", "seed")))
        line = lines.setdefault(
            (name, row["set"], *settings), AttackedLine(name, _title_under_attack(row), attack_name(row), {})
        )
        line.rows[row["eps"]] = row
    return [line._replace(rows=dict(sorted(line.rows.items()))) for line in lines.values()]


def _title_under_attack(row: Row) -> str:
    is_copy = row.get("dataset") is not None and row["set"] != row["dataset"]
    return str(row["title"]) + (f" ({row['set']})" if is_copy else "")


def attack_name(row: Row) -> str:
    """The attack of a row: its name, norm, steps, and the number of samples of a subset."""
    attack, norm = str(row["attack"]), str(row["norm"])
    parts = [ATTACKS.get(attack, attack), NORMS.get(norm, norm)]
    parts += [f"{row['steps']} steps"] if row.get("steps") else []
    parts += [f"{row['subset']} samples"] if row.get("subset") else []
    parts += [f"seed {row['seed']}"] if row.get("seed") else []
    return ", ".join(parts)


def _under_attack(rows: Sequence[Row]) -> str:
    """Accuracy of the same samples clean and under each attack."""
    lines = attacked_lines(rows)
    distances = sorted({eps for line in lines for eps in line.rows})
    cells = [["Method", "Set", "Attack", "Clean", *(f"{eps:g}/255" for eps in distances)]]
    for line in lines:
        newest = next(reversed(line.rows.values()))
        values = [_robust(line.rows[eps]) if eps in line.rows else "" for eps in distances]
        cells.append([line.label, line.title + _left_out(newest), line.attack, _percent(newest["clean"]), *values])
    return markdown("Under attack", cells) if lines else ""


def _robust(row: Row) -> str:
    note = f" ({row['not_finite']} not finite)" if row.get("not_finite") else ""
    return _percent(row["value"]) + note


def _known_column(row: Row) -> str | None:
    """The known data set whose column shows this row; None for the user's sets and other metrics."""
    known = KNOWN.get(str(row.get("dataset")))
    return str(row["dataset"]) if known is not None and known.metric == row["metric"] else None


def _separate_column(row: Row) -> str:
    """Key of a column that only rows of this set, metric and data set share."""
    return f"{row['set']}\0{row['metric']}\0{row.get('dataset')}"


def _title(column: str, row: Row) -> str:
    notes = [str(row["set"])] if row.get("dataset") and column not in KNOWN else []
    notes += [METRICS[row["metric"]]] if row["metric"] in METRICS else []
    return str(row["title"]) + (f" ({', '.join(notes)})" if notes else "")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _decimal(value: float) -> str:
    return f"{value:.3f}"


def _table(
    title: str,
    lines: Lines,
    columns: Sequence[tuple[str, str]],
    averages: dict[str, Sequence[str]],
    field: str = "value",
    show: Callable[[float], str] = _percent,
) -> str:
    """A line for each model, a column for each set and average.

    Args:
        columns: names and titles of the sets.
        averages: names of the sets of each average.
        field: field of the rows that is shown.
        show: text of a value.
    """
    titles = dict(columns)
    shown = {
        line: values
        for line, rows in lines.items()
        if (values := {name: rows[name] for name in rows if field in rows[name]}).keys() & titles.keys()
    }
    if not shown:
        return ""
    cells = [["Method", *titles.values(), *averages]]
    partial = []
    for line, rows in shown.items():
        row = [show(rows[name][field]) + _left_out(rows[name]) if name in rows else "" for name in titles]
        for average, members in averages.items():
            row.append(_mean([rows[name][field] for name in members if name in rows], len(members), show))
            missing = [titles.get(name) or KNOWN[name].title for name in members if name not in rows]
            if 0 < len(missing) < len(members):
                partial.append(f"{average} of {line} is without {', '.join(missing)}.")
        cells.append([line, *row])
    return markdown(title, cells) + "".join(f"\n{_one_line(note)}\n" for note in partial)


def _retrieval(lines: Lines) -> str:
    columns = [f"{direction.replace('_', ' ')} R@{k}" for direction, k in RECALLS]
    cells = [["Method", "Set", *columns]]
    for line, rows in lines.items():
        for column, row in rows.items():
            if "image_to_text_r1" in row:
                recalls = [_percent(row[f"{direction}_r{k}"]) for direction, k in RECALLS]
                cells.append([line, _title(column, row) + _left_out(row), *recalls])
    return markdown("Retrieval", cells) if len(cells) > 1 else ""


def _questions(lines: Lines) -> str:
    cells = [["Method", "Set", "Soft accuracy", "Allowed by the candidates", "Without a candidate", "Candidates"]]
    for line, rows in lines.items():
        for column, row in rows.items():
            if "soft_accuracy" in row:
                shares = [_percent(row[name]) for name in QUESTIONS]
                cells.append([line, _title(column, row) + _left_out(row), *shares, str(row["candidates"])])
    return markdown("Visual questions", cells) if len(cells) > 1 else ""


def _calibration(lines: Lines) -> str:
    batched = f"ECE (batches of {calibration.ECE_BATCH})"
    cells = [["Method", "Set", "Top-1", "Mean confidence", "ECE", batched, "NLL", "Brier"]]
    for line, rows in lines.items():
        for column, row in rows.items():
            if calibration.METRICS.keys() & row.keys():
                shares = [_percent(row[name]) if name in row else "" for name in ("top1", "confidence")]
                errors = [
                    _decimal(row[name]) if name in row else "" for name in ("ece", "ece_batched", "nll", "brier")
                ]
                cells.append([line, _title(column, row) + _left_out(row), *shares, *errors])
    return markdown("Calibration", cells) if len(cells) > 1 else ""


def _others(lines: Lines, tabled: set[str]) -> str:
    """Table of the sets that no other table has, with averages by role."""
    titles = {
        name: _title(name, row)
        for rows in lines.values()
        for name, row in rows.items()
        if name not in tabled and not {"image_to_text_r1", "soft_accuracy"} & row.keys()
    }
    if not titles:
        return ""
    roles = {"id": "ID avg.", "ood": "OOD avg.", "zero_shot": "ZS avg."}
    members = {
        column: [name for name in titles if any(rows.get(name, {}).get("role") == role for rows in lines.values())]
        for role, column in roles.items()
    }
    averages: dict[str, Sequence[str]] = {column: names for column, names in members.items() if names}
    return _table("Other sets", lines, list(titles.items()), averages)


def markdown(title: str, cells: list[list[str]]) -> str:
    """A titled table; the first row of cells is its header."""
    header, *body = _escaped(cells)
    return _joined(title, [header, ["---", *("---:" for _ in header[1:])], *body])


def aligned(title: str, cells: list[list[str]]) -> str:
    """As :func:`markdown`, padded for a terminal; the last column is text."""
    cells = _escaped(cells)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:-1]), "-" * widths[-1]]
    rows = []
    for row in (cells[0], rule, *cells[1:]):
        middle = (cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True))
        rows.append([row[0].ljust(widths[0]), *middle, row[-1].ljust(widths[-1])])
    return _joined(title, rows)


def _escaped(cells: list[list[str]]) -> list[list[str]]:
    return [[_one_line(cell).replace("|", r"\|") for cell in row] for row in cells]


def _joined(title: str, rows: list[list[str]]) -> str:
    return f"## {title}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _left_out(row: Row) -> str:
    """A note with the number of samples left out, if any."""
    return f" ({row['left_out']} left out)" if row.get("left_out") else ""


def _mean(values: Sequence[float], expected: int, show: Callable[[float], str]) -> str:
    if not values:
        return ""
    note = "" if len(values) == expected else f" ({len(values)} of {expected})"
    return show(sum(values) / len(values)) + note
