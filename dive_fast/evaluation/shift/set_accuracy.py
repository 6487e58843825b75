"""Accuracy of models on sets, to be compared with shift: from results of an evaluation, or a table."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dive_fast.errors import DataError
from dive_fast.io.safe_read import parse_json, read_text

Accuracies = dict[str, dict[str, float]]
"""Accuracy in [0, 1] by label of the model and name of the set."""


def read_accuracies(path: Path, digests: Mapping[str, str], locations: Mapping[str, str]) -> Accuracies:
    """Reads accuracies from a file, by its suffix.

    - ``.jsonl``: the results of ``dive-fast evaluate``; rows belong to the model of their ``weights_digest``, the
      last row counts. Rows under attack are ignored.
    - ``.json``: ``{set: accuracy}``, which belong to the last model, or ``{label: {set: accuracy}}``.
    - ``.csv``: columns ``set`` and ``accuracy``, optionally ``model``, likewise.

    Args:
        digests: digest of the weights by label of the model, in the order of measuring.
        locations: location of each set by its name: results may have either.

    Raises:
        DataError: the file cannot be read, or no accuracy in it belongs to a model and a set.
    """
    try:
        text = read_text(path)
        if path.suffix == ".jsonl":
            pairs = _of_results([parse_json(line) for line in text.splitlines() if line.strip()], digests)
        elif path.suffix == ".json":
            pairs = _of_tree(parse_json(text), list(digests))
        elif path.suffix == ".csv":
            pairs = _of_table(list(csv.DictReader(io.StringIO(text))), list(digests))
        else:
            raise ValueError("expected .jsonl, .json or .csv")
        accuracies: Accuracies = {}
        for label, name, value in pairs:
            if label not in digests:
                raise ValueError(f"no model {label} is measured, only {' and '.join(digests)}")
            number = float(value)
            if not 0 <= number <= 1:
                raise ValueError(f"the accuracy {value} of {name} is not between 0 and 1")
            accuracies.setdefault(label, {})[name] = number
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{error!r} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path}: cannot read accuracies: {reason}") from error
    return _of_sets(accuracies, locations, path)


def _of_sets(accuracies: Accuracies, locations: Mapping[str, str], path: Path) -> Accuracies:
    matched = {
        label: {
            name: values[known]
            for name, location in locations.items()
            if (known := next((each for each in (name, location) if each in values), None)) is not None
        }
        for label, values in accuracies.items()
    }
    if not any(matched.values()):
        listed = sorted({name for values in accuracies.values() for name in values})
        raise DataError(
            f"{path}: no accuracy of a measured set ({', '.join(locations)})"
            + (f"; it has {', '.join(listed)}" if listed else " by these weights: evaluate the same model")
        )
    return matched


def _of_results(rows: Sequence[Mapping[str, Any]], digests: Mapping[str, str]) -> list[tuple[str, str, Any]]:
    return [
        (label, row["set"], row["value"])
        for row in rows
        for label, digest in digests.items()
        if row.get("weights_digest") == digest and "attack" not in row
    ]


def _of_tree(tree: Any, labels: Sequence[str]) -> list[tuple[str, str, Any]]:
    if not isinstance(tree, dict):
        raise ValueError("expected an object of accuracies by set")
    if any(isinstance(value, dict) for value in tree.values()):
        return [(label, name, value) for label, values in tree.items() for name, value in values.items()]
    return [(labels[-1], name, value) for name, value in tree.items()]


def _of_table(rows: Sequence[Mapping[str, str]], labels: Sequence[str]) -> list[tuple[str, str, Any]]:
    return [(row.get("model") or labels[-1], row["set"], row["accuracy"]) for row in rows]
