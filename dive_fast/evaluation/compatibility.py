"""Accuracy of learned prompts after an update of the model: prompts of an old model plugged into a new one.

::

    gain  = acc(new, m) - acc(new, zero-shot)          share = gain / (acc(new, m') - acc(new, zero-shot))

m are prompts learned with the old model, m' those that the same method learned with the new one. Prompts are
compatible where gain > 0. Accuracies are the metrics of the sets, in [0, 1].
"""

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dive_fast.config.schema import EvaluationSet, ModelConfig
from dive_fast.data.text_tokenizer import Tokenizer
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError, UserError
from dive_fast.evaluation import evaluator
from dive_fast.evaluation.datasets.evaluation_set import Labelled
from dive_fast.evaluation.datasets.resolve import Opened
from dive_fast.evaluation.plots import (
    BLUE,
    GREEN,
    ORANGE,
    OTHERS,
    WIDTH,
    add_title,
    new_figure,
    save_figure,
    style_axes,
)
from dive_fast.evaluation.results import Results
from dive_fast.evaluation.tables import Row
from dive_fast.io.atomic_files import write_atomic
from dive_fast.model import prompt_file, towers
from dive_fast.model.learned_prompts import LearnedPrompts
from dive_fast.model.model_identity import weights_digest
from dive_fast.model.towers import Towers

logger = logging.getLogger(__name__)

NAME = "compatibility"
"""Files ``compatibility.json``, ``.md`` and ``.png`` in the output folder."""


class Accuracies(NamedTuple):
    """The metric of one set, or a mean over sets, by each model and its prompts."""

    old_zero_shot: float
    old: float
    """Old model with the prompts."""
    new_zero_shot: float
    new: float
    """New model with the prompts."""
    retrained: float | None = None
    """New model with prompts that were learned with it; None: not measured."""

    @property
    def gain(self) -> float:
        """Difference from the new model without the prompts."""
        return self.new - self.new_zero_shot

    @property
    def share(self) -> float | None:
        """Share of the gain of retrained prompts; None: not measured, or these gain nothing."""
        if self.retrained is None or self.retrained <= self.new_zero_shot:
            return None
        return self.gain / (self.retrained - self.new_zero_shot)


HEADERS = {
    "old_zero_shot": "old, zero-shot",
    "old": "old, prompts",
    "new_zero_shot": "new, zero-shot",
    "new": "new, prompts",
    "retrained": "new, retrained",
}
COLOURS = dict(zip(HEADERS, (OTHERS[0], BLUE, OTHERS[1], ORANGE, GREEN), strict=True))


class Update(NamedTuple):
    """The accuracies of an update."""

    sets: dict[str, Accuracies]
    """By the names of the measured sets."""
    summaries: dict[str, Accuracies]
    """Harmonic means over base and new classes, and the mean over several sets."""


def mean(values: Sequence[Accuracies]) -> Accuracies:
    """The mean of each accuracy over sets."""
    return _combined(values, lambda column: sum(column) / len(column))


def harmonic_mean(base: Accuracies, new: Accuracies) -> Accuracies:
    """The harmonic mean of each accuracy on base and on new classes."""
    return _combined((base, new), lambda column: harmonic(*column))


def harmonic(first: float, second: float) -> float:
    """The harmonic mean of two accuracies; 0 where both are 0."""
    return 2 * first * second / (first + second) if first + second else 0.0


def _combined(values: Sequence[Accuracies], combine: Any) -> Accuracies:
    columns = {
        kind: [value for each in values if (value := getattr(each, kind)) is not None]
        for kind in Accuracies._fields
    }
    return Accuracies(**{kind: combine(column) for kind, column in columns.items() if len(column) == len(values)})


def halves(sets: Mapping[str, EvaluationSet]) -> dict[str, tuple[str, str]]:
    """The sets that are the base and the new classes of one data set: a name for both -> their names."""
    parts: dict[str, dict[str, str]] = {}
    for name, config in sets.items():
        if config.classes != "all":
            parts.setdefault(config.model_copy(update={"classes": "all"}).model_dump_json(), {})[
                config.classes
            ] = name
    pairs = [(each["base"], each["new"]) for each in parts.values() if len(each) == 2]
    return {base.removesuffix("-base"): (base, new) for base, new in pairs}


def measure_update(
    old: ModelConfig,
    new: ModelConfig,
    prompts: Path,
    retrained: Path | None,
    sets: Mapping[str, EvaluationSet],
    opened: Opened,
    ranks: Ranks,
    results: Results,
    options: evaluator.Options,
) -> tuple[list[Row], Update]:
    """Measures both models without prompts and with them; all ranks must call this.

    Each measurement is a row of the results with its own label, and one that exists already is not repeated.

    Args:
        prompts: file of prompts that were learned with ``old``.
        retrained: file of prompts that were learned with ``new``; None: not measured.
        options: its label is not used.

    Returns:
        The rows, and the accuracies.

    Raises:
        ConfigError: a set has no classes, or prompts do not fit a model or were learned with another one.
    """
    if unlabelled := [name for name, data in opened.items() if not isinstance(data, Labelled)]:
        raise ConfigError(f"{unlabelled[0]}: prompts take no part without classes; leave this set out")
    rows: list[Row] = []
    columns: dict[str, dict[str, float]] = {}
    prepared: list[_Prepared] = []
    runs: list[tuple[ModelConfig, list[tuple[str, Path | None]]]] = [
        (old, [("old_zero_shot", None), ("old", prompts)]),
        (new, [("new_zero_shot", None), ("new", prompts), *([("retrained", retrained)] if retrained else [])]),
    ]
    # Both before the first measurement, which takes long.
    with ranks.raise_on_all(UserError):
        prepared += [_prepare(model, kinds) for model, kinds in runs]
    if ranks.is_main and len({weights_digest(evaluated) for evaluated, *_ in prepared}) == 1:
        logger.warning("--upgrade: both models have the same weights, so that nothing was updated")
    if ranks.is_main:
        known = {file: each for model in prepared for file, each in model.prompts.items()}
        for file, each in known.items():
            for line in remarks_on_new_classes(sets, opened, each.origin.class_names, file):
                logger.warning("%s", line)
    for model, kinds in runs:
        evaluated, tokenizer, loaded = prepared.pop(0)
        evaluated = evaluated.to(ranks.device).eval().set_precision(options.precision)
        for kind, path in kinds:
            measured = _measure(evaluated, tokenizer, model, path, loaded, sets, opened, ranks, results, options)
            rows += measured
            columns[kind] = {str(row["set"]): float(row["value"]) for row in measured}
        del evaluated
    accuracies = {name: Accuracies(**{kind: values[name] for kind, values in columns.items()}) for name in opened}
    means = {
        f"{name}, harmonic mean": harmonic_mean(accuracies[base], accuracies[other])
        for name, (base, other) in halves(sets).items()
    }
    overall = {"mean": mean(list(accuracies.values()))} if len(accuracies) > 1 else {}
    return rows, Update(accuracies, means | overall)


class _Prepared(NamedTuple):
    """A model on the CPU, and prompts that fit it."""

    towers: Towers
    tokenizer: Tokenizer
    prompts: dict[Path, LearnedPrompts]


def _prepare(model: ModelConfig, kinds: Sequence[tuple[str, Path | None]]) -> _Prepared:
    """Creates a model, and reads the prompts that are measured with it.

    Args:
        kinds: fields of :class:`Accuracies` with their prompts.

    Raises:
        ConfigError: prompts do not fit the model, or were learned with another one.
    """
    loaded = {path: prompt_file.load(path) for _, path in kinds if path is not None}
    evaluated, tokenizer = towers.create(model), towers.tokenizer_of(model)
    for file, each in loaded.items():
        prompt_file.attach(each, file, evaluated, tokenizer)
    for kind, path in kinds:
        if path is not None and kind != "new":
            _require_origin(loaded[path], path, evaluated, model)
    return _Prepared(evaluated, tokenizer, loaded)


def remarks_on_new_classes(
    sets: Mapping[str, EvaluationSet], opened: Opened, learned: Collection[str], path: Path
) -> list[str]:
    """Lines about sets of new classes (``classes: new``) that prompts were trained on.

    Args:
        learned: names of the classes that they were trained on.
        path: of the prompts, for messages.
    """
    remarks = []
    for name, data in opened.items():
        if sets[name].classes != "new" or not isinstance(data, Labelled):
            continue
        if common := set(learned).intersection(data.class_names):
            remarks.append(
                f"{name}: {path} was trained on {len(common)} of its {len(data.class_names)} new classes, so its "
                "accuracy is not that of unseen classes; train with data.target.classes=base"
            )
    return remarks


def _require_origin(prompts: LearnedPrompts, path: Path, evaluated: Towers, model: ModelConfig) -> None:
    """Validates that prompts were learned with a model.

    Raises:
        ConfigError: they were learned with other weights.
    """
    if prompts.origin.weights != weights_digest(evaluated):
        raise ConfigError(
            f"{path}: learned with {prompts.origin.model}, and not with these weights of {model_label(model)}"
        )


def _measure(
    evaluated: Towers,
    tokenizer: Tokenizer,
    model: ModelConfig,
    path: Path | None,
    loaded: Mapping[Path, LearnedPrompts],
    sets: Mapping[str, EvaluationSet],
    opened: Opened,
    ranks: Ranks,
    results: Results,
    options: evaluator.Options,
) -> list[Row]:
    """The rows of one model, without prompts or with those of a file."""
    evaluated.prompts = None if path is None else loaded[path].to(ranks.device)
    name = model_label(model)
    label = name if path is None else f"{name} with {path.absolute().parent.name}"
    fields: Row = {"model": model.name, "pretrained": model.pretrained, "weights": None, "head": None}
    fields |= {} if path is None else {"prompts": str(path)}
    labelled = replace(options, label=label)
    return evaluator.measure_all(evaluated, tokenizer, sets, opened, ranks, results, labelled, fields)


def model_label(model: ModelConfig) -> str:
    """A model's name in tables."""
    return model.name if model.pretrained is None else f"{model.name}/{model.pretrained}"


def as_markdown(update: Update) -> str:
    """The table of all sets, in percent; gain in percentage points, share in percent."""
    accuracies = update.sets | update.summaries
    has_retrained = any(each.retrained is not None for each in accuracies.values())
    kinds = [kind for kind in HEADERS if has_retrained or kind != "retrained"]
    headers = ["Set", *(HEADERS[kind] for kind in kinds), "gain", *(["share"] if has_retrained else [])]
    lines = [f"| {' | '.join(headers)} |", f"| --- |{' ---: |' * (len(headers) - 1)}"]
    for name, each in accuracies.items():
        values = [getattr(each, kind) for kind in kinds]
        cells = [name, *(f"{100 * value:.1f}" for value in values), f"{100 * each.gain:+.1f}"]
        if has_retrained:
            cells.append("-" if each.share is None else f"{100 * each.share:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def message(update: Update) -> str:
    """One sentence on all sets, the title of the figure."""
    measured = list(update.sets.values())
    gain = mean(measured).gain
    kept = sum(each.gain > 0 for each in measured)
    return (
        f"Old prompts change the new model by {100 * gain:+.1f} points and help on {kept} of {len(measured)} sets"
    )


def write(update: Update, folder: Path) -> list[str]:
    """Writes accuracies, table and figure into a folder; returns the names of the files."""
    accuracies = update.sets | update.summaries
    values = {name: each._asdict() | {"gain": each.gain, "share": each.share} for name, each in accuracies.items()}
    write_atomic(folder / f"{NAME}.json", (json.dumps(values, indent=2) + "\n").encode())
    write_atomic(folder / f"{NAME}.md", as_markdown(update).encode())
    draw(update, folder / f"{NAME}.png")
    return [f"{NAME}.{end}" for end in ("json", "md", "png")]


def draw(update: Update, path: Path, title: str | None = None) -> None:
    """Draws the accuracies of each set, the old model's above the new model's; a line is the gain.

    Args:
        title: of the figure; default: :func:`message`.
    """
    accuracies = update.sets | update.summaries
    figure = new_figure(WIDTH, 1.2 + 0.42 * len(accuracies))
    axis = figure.subplots()
    for row, each in enumerate(accuracies.values()):
        values = {kind: 100 * value for kind, value in each._asdict().items() if value is not None}
        axis.plot([values["new_zero_shot"], values["new"]], [row + 0.15] * 2, color=COLOURS["new"], linewidth=2)
        for kind, value in values.items():
            height = row - 0.15 if kind.startswith("old") else row + 0.15
            marker = "s" if kind.endswith("zero_shot") else "o"
            label = HEADERS[kind] if row == 0 else None
            axis.plot([value], [height], marker, color=COLOURS[kind], markersize=7, label=label, clip_on=False)
    axis.set_yticks(range(len(accuracies)), list(accuracies))
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.25)
    axis.set_xlabel("accuracy, %")
    style_axes(axis)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    add_title(figure, title or message(update))
    save_figure(figure, path)
