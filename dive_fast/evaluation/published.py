"""Published results of methods tuned on ImageNet, next to measured rows: accuracies, calibration and averages.

``published.tsv`` has one value a line, as printed, with its source. Averages are computed from the sets wherever a
source has all of them, since papers average over four or five shifts.
"""

import csv
import re
from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal
from importlib import resources
from typing import NamedTuple

from dive_fast.errors import ConfigError, nearest
from dive_fast.evaluation.calibration import ECE_BATCH
from dive_fast.evaluation.datasets.catalog import IMAGENET_OOD, IMAGENET_OOD_4, KNOWN, ZERO_SHOT_10
from dive_fast.evaluation.tables import Row, aligned, lines_of

FILE = "published.tsv"
SUSPECT = "suspect: "
"""Beginning of the note of a value that contradicts its own table; it enters no computed average."""
ABLATION = "ablation"
"""Note of an ablation, which has a separate table."""
CERTAINTY = {
    "P": "read in the paper",
    "C": "read in the authors' code, log or README",
    "S": "from a secondary note on the paper",
}
AVERAGES = {"ood4": IMAGENET_OOD_4, "ood5": IMAGENET_OOD, "zs10": ZERO_SHOT_10}
"""The sets of each average, under the name of its printed value in the file."""
TITLES = {"ood4": "OOD-4", "ood5": "OOD-5", "zs10": "ZS-10"}
COLUMNS = {
    "imagenet1k": "ID",
    "imagenetv2": "V2",
    "imagenet-r": "R",
    "imagenet-a": "A",
    "imagenet_sketch": "Sketch",
    "objectnet": "ObjectNet",
}
"""Short headers of ImageNet and its shifts."""
METRICS = {"top1": "top-1 accuracy, %", "ece_batched": f"ECE in batches of {ECE_BATCH}"}
"""Metrics of the tables, with their titles."""
NOTES = (
    "ID: ImageNet's validation set. OOD-4: the mean over V2, R, A and Sketch. OOD-5: with ObjectNet. ZS-10: the "
    "mean over the ten zero-shot sets. Averages are computed here from the sets; `printed` marks those of sources "
    "that print no sets. `?` marks a suspect value.",
    "ObjectNet: the same pre-trained ViT-B/16 has 55.4 in DiVE's table and 54.17 in TRACER's, so their protocols "
    "differ: compare methods of the two tables by OOD-4, not by OOD-5. Measured rows have the 113 classes that "
    "ObjectNet shares with ImageNet; a label's logit is the largest of its ImageNet classes, or with "
    "CLIP-benchmark's tars that of its one name.",
    f"ECE in batches of {ECE_BATCH} in file order is 0.03 to 0.05 for a calibrated classifier. The ECE over all "
    "samples is smaller and must not be compared with it.",
)
"""Lines below the tables."""


class Published(NamedTuple):
    """One printed value."""

    model: str
    method: str
    set: str
    """Name of a known data set, or of a printed average: one of :data:`AVERAGES`."""
    metric: str
    """``top1`` in percent, or ``ece_batched``."""
    value: Decimal
    """As printed; the number of decimals says how it was rounded."""
    seeds: str
    """Number of seeds of the mean; empty: not known."""
    certainty: str
    """A key of :data:`CERTAINTY`."""
    source: str
    note: str

    @property
    def unit(self) -> Decimal:
        """The last printed digit."""
        return Decimal(1).scaleb(int(self.value.as_tuple().exponent))


def read() -> list[Published]:
    """All published values."""
    text = resources.files("dive_fast.evaluation").joinpath(FILE).read_text("utf-8")
    lines = csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    entries = []
    for line in lines:
        value = Decimal(line.pop("value"))
        entries.append(Published(value=value, **line))
    return entries


def find_model(name: str) -> str:
    """The name of a model in the published tables, from that name or open_clip's, e.g. ``ViT-B-16-quickgelu``.

    Raises:
        ConfigError: there are no published results of this model; the message names the others.
    """
    models = {_bare(entry.model): entry.model for entry in read()}
    if _bare(name) not in models:
        known = ", ".join(models.values())
        raise ConfigError(
            f"there are no published results of {name}{nearest(name, list(models.values()))}; "
            f"name a model by --compare MODEL: {known}"
        )
    return models[_bare(name)]


def _bare(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().removesuffix("-quickgelu"))


def comparison(model: str, rows: Sequence[Row]) -> str:
    """Published results of a model and measured rows, as tables in Markdown with sources and remarks.

    Args:
        model: a result of :func:`find_model`.
        rows: rows of results; those of other data sets than ImageNet, its shifts and the ten zero-shot sets are
            not shown.
    """
    entries = [entry for entry in read() if entry.model == model]
    sources = list(dict.fromkeys(entry.source for entry in entries))
    measured, remarks = _measured(model, rows)
    parts = []
    for metric, title in METRICS.items():
        methods = _by_method([entry for entry in entries if entry.metric == metric and entry.note != ABLATION])
        lines = [line for label, known in measured for line in _measured_cells(label, known, metric)]
        for method, values in methods.items():
            cells, flagged = _cells(values)
            remarks += [f"{method}, {title.partition(',')[0]}: {text}" for text in flagged]
            lines.append([method, *cells, _source(values, sources)])
        if lines:
            table = [["Method", *COLUMNS.values(), *TITLES.values(), "Source"], *lines]
            parts.append(aligned(f"{model} tuned on ImageNet: {title}", _without_empty_columns(table)))
    ablations = _by_method([entry for entry in entries if entry.note == ABLATION])
    if ablations:
        table = [["Method", COLUMNS["imagenet1k"], TITLES["ood5"], "Source"]]
        for method, values in ablations.items():
            shown = (str(values[name].value) for name in ("imagenet1k", "ood5"))
            table.append([method, *shown, _source(values, sources)])
        parts.append(aligned(f"{model} tuned on ImageNet: ablations, {METRICS['top1']}", table))
    parts.append("".join(f"- {note}\n" for note in (*NOTES, *remarks)))
    used = sorted({entry.certainty for entry in entries}, key=list(CERTAINTY).index)
    certainties = "; ".join(f"{letter}: {CERTAINTY[letter]}" for letter in used)
    listed = "".join(f"[{number}] {source}\n" for number, source in enumerate(sources, start=1))
    parts.append(f"Sources ({certainties}):\n\n{listed}")
    return "\n".join(parts)


Values = dict[str, Published]


def _by_method(entries: Sequence[Published]) -> dict[str, Values]:
    methods: dict[str, Values] = {}
    for entry in entries:
        methods.setdefault(entry.method, {})[entry.set] = entry
    return methods


def _without_empty_columns(table: list[list[str]]) -> list[list[str]]:
    kept = [index for index in range(len(table[0])) if any(row[index] for row in table[1:])]
    return [[row[index] for index in kept] for row in table]


def _notes(values: Values) -> list[str]:
    """The notes of a method's values, each once, with the sets that it is about unless these are all."""
    noted: dict[str, list[str]] = {}
    for name, entry in values.items():
        if entry.note:
            noted.setdefault(entry.note, []).append(TITLES.get(name) or COLUMNS.get(name) or KNOWN[name].title)
    return [note if len(names) == len(values) else f"{', '.join(names)}: {note}" for note, names in noted.items()]


def _cells(values: Values) -> tuple[list[str], list[str]]:
    """Cells of a method's sets and averages, and remarks about values that contradict each other."""
    remarks = _notes(values)
    cells = [_printed(values[name]) if name in values else "" for name in COLUMNS]
    for name, members in AVERAGES.items():
        printed = values.get(name)
        mean = computed_average(values, members)
        if mean is None:
            cells.append(f"{_printed(printed)} printed" if printed is not None else "")
            continue
        places = Decimal("0.01") if values[members[0]].metric == "top1" else Decimal("0.001")
        cells.append(str(mean.quantize(places, ROUND_HALF_UP)))
        # Rounding of the sets and of the average together moves it by at most one unit.
        if printed is not None and abs(mean - printed.value) > printed.unit:
            remarks.append(f"{TITLES[name]} is printed as {printed.value}, the mean of its sets is {mean:f}")
    return cells, remarks


def computed_average(values: Values, members: Sequence[str]) -> Decimal | None:
    """The mean of the printed values of these sets; None if one is missing or suspect."""
    entries = [values[name] for name in members if name in values and not values[name].note.startswith(SUSPECT)]
    if len(entries) < len(members):
        return None
    return sum((entry.value for entry in entries), Decimal(0)) / len(entries)


def _printed(entry: Published) -> str:
    return f"{entry.value}?" if entry.note.startswith(SUSPECT) else str(entry.value)


def _source(values: Values, sources: Sequence[str]) -> str:
    numbers = sorted({sources.index(entry.source) + 1 for entry in values.values()})
    letters = sorted({entry.certainty for entry in values.values()}, key=list(CERTAINTY).index)
    seeds = {entry.seeds for entry in values.values()}
    text = f"[{', '.join(map(str, numbers))}] {', '.join(letters)}"
    return text + (f", {seeds.pop()} seeds" if len(seeds) == 1 and seeds != {""} else "")


def _measured(model: str, rows: Sequence[Row]) -> tuple[list[tuple[str, dict[str, Row]]], list[str]]:
    """Measured lines with a set of the tables, and remarks about those of another model."""
    shown, remarks = [], []
    for label, columns in lines_of(rows).items():
        known = {name: row for name, row in columns.items() if name in (*COLUMNS, *ZERO_SHOT_10)}
        if not known:
            continue
        shown.append((label, known))
        others = {str(row.get("model")) for row in known.values()}
        if others := {name for name in others if _bare(name) != _bare(model)}:
            remarks.append(f"{label} is measured with {', '.join(sorted(others))}: check that it is a {model}.")
    if rows and not shown:
        remarks.append("No measured row is shown: none is of ImageNet, its shifts or the ten zero-shot sets.")
    return shown, remarks


def _measured_cells(label: str, rows: dict[str, Row], metric: str) -> list[list[str]]:
    def text(value: float) -> str:
        return f"{100 * value:.2f}" if metric == "top1" else f"{value:.3f}"

    have = {name: float(row[metric]) for name, row in rows.items() if metric in row}
    if not have:
        return []
    cells = [text(have[name]) if name in have else "" for name in COLUMNS]
    for members in AVERAGES.values():
        values = [have[name] for name in members if name in have]
        part = "" if len(values) == len(members) else f" ({len(values)} of {len(members)})"
        cells.append(text(sum(values) / len(values)) + part if values else "")
    left_out = sum(int(row.get("left_out") or 0) for row in rows.values())
    precision = ", ".join(sorted({str(row.get("precision")) for row in rows.values()}))
    source = precision + (f", {left_out} samples left out" if left_out else "")
    return [[f"{label} (measured)", *cells, source]]
