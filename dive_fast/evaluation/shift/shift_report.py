"""The report of shift: a row for each model, concept and set, correlations, and the files made from them."""

import csv
import io
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import reduce
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dive_fast.errors import DataError
from dive_fast.evaluation.results import LOCK
from dive_fast.evaluation.shift import shift_figures
from dive_fast.evaluation.shift.correlations import GROUPS, Thresholds, pearson, spearman
from dive_fast.evaluation.shift.gaussian import Gaussian
from dive_fast.evaluation.shift.measure_shift import (
    CONCEPTS,
    PRETRAINED,
    TUNED,
    UNIMODAL,
    ModelShift,
    SetDistances,
)
from dive_fast.evaluation.shift.set_accuracy import Accuracies
from dive_fast.io.atomic_files import atomic_file, write_atomic
from dive_fast.locks import file_lock

Row = dict[str, Any]
QUANTILES = {"shift_q05": 0.05, "shift_q50": 0.5, "shift_q95": 0.95}
FITTED, BASE, SET = "fitted", "held_out", "set"
"""Roles of a set."""
HEADINGS = {"image": "Images", "text": "Texts", "joint": "Image and text together"}


def rows_of(models: Sequence[ModelShift], thresholds: Thresholds, accuracies: Accuracies) -> list[Row]:
    """A row for each model, concept and set; docs/shift.md describes the fields.

    Raises:
        DataError: the models have embedded different samples of a set.
    """
    _check_same_samples(models)
    rows = []
    for model in models:
        roles = [(FITTED, model.fitted), (BASE, model.held_out), *((SET, each) for each in model.sets)]
        for concept, gaussian in model.gaussians.items():
            base = float(model.held_out.distance[concept].mean())
            for role, measured in roles:
                if concept in measured.distance:
                    row = _row(model, concept, gaussian, role, measured, base)
                    row["group"] = thresholds.group(row["ratio"]) if role == SET else None
                    row["accuracy"] = accuracies.get(model.label, {}).get(measured.name)
                    rows.append(row)
    before = {(row["concept"], row["set"]): row for row in rows if row["model"] == PRETRAINED}
    for row in rows:
        other = before.get((row["concept"], row["set"]))
        is_tuned = row["model"] == TUNED
        row["difference"] = row["shift_per_root"] - other["shift_per_root"] if is_tuned and other else None
    return rows


def _row(
    model: ModelShift, concept: str, gaussian: Gaussian, role: str, measured: SetDistances, base: float
) -> Row:
    values = measured.distance[concept]
    mean, root = float(values.mean()), math.sqrt(gaussian.rank)
    return {
        "model": model.label,
        "concept": concept,
        "set": measured.name,
        "role": role,
        "samples": len(values),
        "left_out": measured.num_left_out,
        "shift": mean,
        "shift_std": float(values.std()),
        "shift_rms": float(np.sqrt(np.square(values).mean())),
        **{name: float(np.quantile(values, share)) for name, share in QUANTILES.items()},
        "shift_per_root": mean / root,
        "ratio": mean / base,
        "outside": float(measured.outside[concept].mean()),
        "width": gaussian.width,
        "rank": gaussian.rank,
        "fit_samples": gaussian.num_samples,
        "shrinkage": gaussian.shrinkage,
        "condition": gaussian.condition,
        "expected_held_out": gaussian.expected_held_out,
        "weights": model.weights,
        "weights_digest": model.digest,
    }


def _check_same_samples(models: Sequence[ModelShift]) -> None:
    """Compares the samples of the checkpoints of one model; unimodal encoders of texts read no images."""
    checkpoints = [model for model in models if model.label != UNIMODAL]
    first, *others = ([model.fitted, model.held_out, *model.sets] for model in checkpoints)
    for other in others:
        for one, two in zip(first, other, strict=True):
            if not np.array_equal(one.sample, two.sample):
                raise DataError(
                    f"{one.name}: {len(one.sample)} samples could be read for the model before, {len(two.sample)} "
                    "for the one after: files change or cannot be reached; measure again"
                )


def correlations_of(models: Sequence[ModelShift], rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Correlations over sets, with accuracy; and over the samples of each set.

    The shift of unimodal encoders is correlated with the accuracy of each other model, and sample by sample with
    the other models' shift of the same concept and of pairs.
    """
    accuracy = {(row["model"], row["set"]): row["accuracy"] for row in rows if row["accuracy"] is not None}
    labels = [model.label for model in models if model.label != UNIMODAL]
    over_sets = []
    for model in models:
        for label in labels if model.label == UNIMODAL else [model.label]:
            for concept in model.gaussians:
                points = [
                    (row["shift"], accuracy[label, row["set"]])
                    for row in rows
                    if (row["model"], row["concept"]) == (model.label, concept)
                    and row["role"] != FITTED
                    and (label, row["set"]) in accuracy
                ]
                if points:
                    shifts, accuracies = zip(*points, strict=True)
                    values = {"pearson": pearson(shifts, accuracies), "spearman": spearman(shifts, accuracies)}
                    names = {"model": model.label, "accuracy_of": label, "concept": concept}
                    over_sets.append(names | {"sets": len(points), **values})
    parts = [{part.name: part for part in (model.held_out, *model.sets)} for model in models]
    over_samples = []
    for one, two in combinations_with_replacement(range(len(models)), 2):
        is_unimodal = UNIMODAL in (models[one].label, models[two].label)
        for name in parts[one]:
            first, second = parts[one][name], parts[two][name]
            for concepts in _pairs(list(first.distance), list(second.distance), one == two, is_unimodal):
                over_samples.append(
                    {
                        "set": name,
                        "first": f"{models[one].label} {concepts[0]}",
                        "second": f"{models[two].label} {concepts[1]}",
                        **_over_samples(first, second, *concepts),
                    }
                )
    return {"over_sets": over_sets, "over_samples": over_samples}


def _pairs(
    first: Sequence[str], second: Sequence[str], is_same_model: bool, is_unimodal: bool
) -> Iterator[tuple[str, str]]:
    """The concepts of two models that are correlated: different ones of one model, the same ones of two.

    Args:
        is_unimodal: whether one of the models is unimodal encoders, whose concepts are correlated with pairs too.
    """
    order = {name: number for number, name in enumerate(CONCEPTS)}
    for one in sorted(first, key=order.__getitem__):
        for two in sorted(second, key=order.__getitem__):
            if is_same_model:
                is_pair = order[one] < order[two]
            else:
                is_pair = one == two or (is_unimodal and "joint" in (one, two))
            if is_pair:
                yield one, two


def _over_samples(first: SetDistances, second: SetDistances, one: str, two: str) -> Row:
    """The correlation over the samples that both models could read."""
    samples, rows, others = np.intersect1d(first.sample, second.sample, assume_unique=True, return_indices=True)
    return {"samples": len(samples), "pearson": pearson(first.distance[one][rows], second.distance[two][others])}


def as_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV with all fields."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: Sequence[Row], correlations: Mapping[str, Sequence[Row]], thresholds: Thresholds) -> str:
    """A table for each concept with a line for each set, the means of groups, and tables of correlations."""
    parts = []
    models = list(dict.fromkeys(row["model"] for row in rows))
    for concept in dict.fromkeys(row["concept"] for row in rows):
        of_concept = [row for row in rows if row["concept"] == concept]
        measured = [label for label in models if any(row["model"] == label for row in of_concept)]
        parts.append(_concept_table(concept, of_concept, measured))
    bounds = f"same: below {thresholds.near:g} of held-out; near: below {thresholds.far:g}; far: from there on"
    parts.append(
        f"D: mean Mahalanobis distance; D/√r: divided by the root of the rank; of held-out: D / D of held-out\n"
        f"samples ({bounds}).\n"
    )
    if correlations["over_sets"]:
        cells = [
            [
                *(row["model"], row["concept"], row["accuracy_of"], str(row["sets"])),
                *(_number(row["pearson"]), _number(row["spearman"])),
            ]
            for row in correlations["over_sets"]
        ]
        header = ["shift of", "concept", "accuracy of", "sets", "Pearson", "Spearman"]
        parts.append(f"### Shift and accuracy over sets\n\n{_table(header, cells)}")
    if correlations["over_samples"]:
        parts.append(
            f"### Shift of samples: Pearson correlations\n\n{_samples_table(correlations['over_samples'])}"
        )
    return "\n".join(parts)


def _concept_table(concept: str, rows: Sequence[Row], models: Sequence[str]) -> str:
    by_model = {label: {row["set"]: row for row in rows if row["model"] == label} for label in models}
    header = ["set", "samples"]
    with_accuracy = {row["model"] for row in rows if row["accuracy"] is not None}
    for label in models:
        header += [f"{label} D", "D/√r", "of held-out", "group", *(["accuracy"] if label in with_accuracy else [])]
    header += ["change of D/√r"] if TUNED in models else []
    cells = []
    for name, row in by_model[models[0]].items():
        names = {FITTED: f"{name} (fitted)", BASE: f"{name} (held out)" if name != "held-out" else name}
        counts = dict.fromkeys(str(by_model[label][name]["samples"]) for label in models)
        line = [names.get(row["role"], name), " / ".join(counts)]
        for label in models:
            line += _cells(by_model[label][name], label in with_accuracy)
        line += [f"{by_model[TUNED][name]['difference']:+.3f}"] if TUNED in models else []
        cells.append(line)
    cells += _means(by_model, models, with_accuracy)
    fits = [_fit_line(label, next(iter(by_model[label].values()))) for label in models]
    return f"### {HEADINGS[concept]}\n\n{_table(header, cells)}\n" + "".join(f"{line}\n" for line in fits)


def _cells(row: Row, has_accuracy: bool) -> list[str]:
    accuracy = "" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f}"
    return [
        f"{row['shift']:.2f}",
        f"{row['shift_per_root']:.3f}",
        f"{row['ratio']:.3f}",
        row["group"] or "",
        *([accuracy] if has_accuracy else []),
    ]


def _means(
    by_model: Mapping[str, Mapping[str, Row]], models: Sequence[str], with_accuracy: Collection[str]
) -> Iterator[list[str]]:
    """Means over the sets of a group, which the first model decides, and over all sets."""
    first = by_model[models[0]]
    sets = [name for name, row in first.items() if row["role"] == SET]
    groups = {group: [name for name in sets if first[name]["group"] == group] for group in GROUPS}
    for title, names in (*((f"mean of {group}", each) for group, each in groups.items()), ("mean of all", sets)):
        if len(names) < 2 or (title != "mean of all" and len(names) == len(sets)):
            continue
        line = [f"*{title}*", str(sum(first[name]["samples"] for name in names))]
        for label in models:
            means = [
                sum(by_model[label][name][field] for name in names) / len(names)
                for field in ("shift", "shift_per_root", "ratio")
            ]
            line += [f"{means[0]:.2f}", f"{means[1]:.3f}", f"{means[2]:.3f}", ""]
            if label in with_accuracy:
                known = [value for name in names if (value := by_model[label][name]["accuracy"]) is not None]
                line.append(f"{100 * sum(known) / len(known):.1f}" if len(known) == len(names) else "")
        if TUNED in models:
            line.append(f"{sum(by_model[TUNED][name]['difference'] for name in names) / len(names):+.3f}")
        yield line


def _fit_line(label: str, row: Row) -> str:
    expected = row["expected_held_out"]
    parts = [
        f"{label}: rank {row['rank']} of {row['width']}",
        f"fitted to {row['fit_samples']} samples",
        f"shrinkage {row['shrinkage']:.3g}" if row["shrinkage"] else "no shrinkage",
        f"condition {row['condition']:.2g}",
    ]
    if expected is not None:
        parts.append(f"a normal distribution would give held-out samples a root mean square D of {expected:.2f}")
    return f"- {'; '.join(parts)}."


def _samples_table(correlations: Sequence[Row]) -> str:
    sets = list(dict.fromkeys(row["set"] for row in correlations))
    pairs = list(dict.fromkeys((row["first"], row["second"]) for row in correlations))
    values = {(row["set"], row["first"], row["second"]): row["pearson"] for row in correlations}
    cells = [
        [f"{first} ~ {second}", *(_number(values.get((name, first, second))) for name in sets)]
        for first, second in pairs
    ]
    return _table(["", *sets], cells)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    def line(words: Sequence[str]) -> str:
        return "| " + " | ".join(word.replace("|", "\\|") for word in words) + " |\n"

    return line(header) + "|" + "---|" * len(header) + "\n" + "".join(map(line, cells))


def write(
    models: Sequence[ModelShift],
    rows: Sequence[Row],
    correlations: Mapping[str, Sequence[Row]],
    settings: Mapping[str, Any],
    keys: Mapping[str, Callable[[int], str]],
    thresholds: Thresholds,
    folder: Path,
) -> list[Path]:
    """Writes tables, distances of all samples and figures; returns the files.

    Args:
        settings: what was measured and how, for ``shift.json``.
        keys: for each set, a function from the index of a sample to its key.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with file_lock(folder / LOCK, f"results folder {folder}", wait=True):
        tables = {
            "shift.json": json.dumps({"settings": settings, "rows": rows, **correlations}, indent=2) + "\n",
            "shift.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
            "shift.csv": as_csv(rows),
            "shift.md": as_markdown(rows, correlations, thresholds),
        }
        files = [folder / name for name in tables]
        for file, text in zip(files, tables.values(), strict=True):
            write_atomic(file, text.encode())
        samples = folder / "shift_samples"
        samples.mkdir(exist_ok=True)
        for parts in zip(*((model.held_out, *model.sets) for model in models), strict=True):
            name = parts[0].name
            files.append(samples / f"{name}.csv")
            with atomic_file(files[-1]) as opened:
                _write_samples(opened, [model.label for model in models], parts, keys[name])
        files.append(folder / "shift_distributions.png")
        shift_figures.draw_distributions(models, files[-1])
        if shift_figures.has_joint(rows):
            files.append(folder / "shift_joint.png")
            shift_figures.draw_joint(rows, files[-1])
        if any(row["accuracy"] is not None for row in rows):
            files.append(folder / "shift_accuracy.png")
            shift_figures.draw_accuracy(rows, correlations["over_sets"], files[-1])
        return files


def _write_samples(
    file: BinaryIO, labels: Sequence[str], parts: Sequence[SetDistances], key_of: Callable[[int], str]
) -> None:
    """Writes a line for each sample: its key, and D of each concept and model."""
    samples = reduce(np.union1d, (part.sample for part in parts))
    columns = {
        f"{label} {concept}": _at(samples, part.sample, values)
        for label, part in zip(labels, parts, strict=True)
        for concept, values in part.distance.items()
    }
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["sample", "key", *columns])
    for row, sample in enumerate(samples.tolist()):
        distances = ("" if math.isnan(values[row]) else f"{values[row]:.6g}" for values in columns.values())
        writer.writerow([sample, key_of(sample), *distances])
    text.flush()
    text.detach()


def _at(samples: NDArray[np.int64], own: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values of some of the samples at the rows of all; NaN where there is none."""
    column = np.full(len(samples), np.nan)
    column[np.searchsorted(samples, own)] = values
    return column
