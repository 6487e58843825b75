"""Opens the evaluation sets of a config."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from dive_fast.config.schema import EvaluateConfig, EvaluationSet, Metric
from dive_fast.data.class_parts import labels_of, select_classes
from dive_fast.data.classes import imagenet_rows, join_names, remarks
from dive_fast.data.open_dataset import open_captioned, open_target
from dive_fast.data.prompt_files import Template
from dive_fast.data.sources.source import Source
from dive_fast.data.sources.vqa_json import ENOUGH, read_answers, read_questions, source_of
from dive_fast.data.spread import spread
from dive_fast.distributed import Ranks
from dive_fast.errors import DataError, UserError, naming
from dive_fast.evaluation.datasets import layouts
from dive_fast.evaluation.datasets.catalog import find_dataset, open_known
from dive_fast.evaluation.datasets.class_names import class_names_of, templates_of
from dive_fast.evaluation.datasets.evaluation_set import Asked, EvaluatedSet, Labelled

Opened = dict[str, EvaluatedSet]
"""Opened sets by their name in the config."""


def open_evaluation(config: EvaluationSet, place: str = "", ranks: Ranks | None = None) -> EvaluatedSet:
    """Opens an evaluation set: a known data set, or one of the user's own.

    Args:
        place: config section of the set, for messages.
        ranks: all ranks call this, and one process of each node lists a known or raw set; None: this process
            does.

    Raises:
        ConfigError: the known data set does not exist.
        DataError: files are missing, a label has no class name, or samples cannot be measured and the set does not
            accept this by ``on_skipped``.
    """
    opened = _open_complete(config, place, ranks)
    if config.classes == "all":
        return opened
    with naming(place):
        if not isinstance(opened, Labelled) or opened.members is not None or opened.regions is not None:
            raise DataError(f"classes = {config.classes}: this set's labels are not classes; remove it")
        source, names = select_classes(opened.source, opened.class_names, config.classes)
    labels = labels_of(config.classes, len(opened.class_names))
    imagenet = None if opened.imagenet_rows is None else tuple(opened.imagenet_rows[label] for label in labels)
    remark = f"{len(source):,} of {len(opened.source):,} images, of {len(labels)} {config.classes} classes"
    remarks = (*opened.remarks, remark)
    return replace(opened, source=source, class_names=names, imagenet_rows=imagenet, remarks=remarks)


def _open_complete(config: EvaluationSet, place: str, ranks: Ranks | None) -> EvaluatedSet:
    """Opens a set with all classes; arguments as in :func:`open_evaluation`."""
    if config.dataset is not None:
        with naming(place and f"{place}.dataset"):
            find_dataset(config.dataset)
        known = config.dataset, config.path, config.class_names, config.templates
        with naming(place):
            if ranks is None:
                return open_known(*known)
            return ranks.once_per_node(("evaluation set", *known), lambda: open_known(*known), UserError)
    return _open_own(config, place, ranks)


def _open_own(config: EvaluationSet, place: str, ranks: Ranks | None) -> EvaluatedSet:
    """Opens a set of the user's own; arguments as in :func:`open_evaluation`."""
    reports, consent = config.on_skipped == "report", f"{place or 'evaluate.sets.<name>'}.on_skipped=report"
    remedy = f"repair or remove it, or accept results without it by {consent}"
    with naming(place):
        if config.task == "vqa":
            asked = _open_questions(config, ranks)
            _check_skipped(config, asked.source, consent)
            return replace(asked, reports_skipped=reports, remedy=remedy)
        source = (open_captioned if config.task == "retrieval" else open_target)(config, ranks=ranks)
        _check_skipped(config, source, consent)
        if config.task == "retrieval":
            captioned = layouts.captioned(source, str(config.format))
            lines = (*layouts.remarks_on_files(source), *captioned.remarks)
            return replace(captioned, reports_skipped=reports, remedy=remedy, remarks=lines)
    with naming(place if config.class_names is None or not place else f"{place}.class_names"):
        listed = None if config.class_names is None else class_names_of(config.class_names)
        names = join_names(source, listed, config.class_names or config.path)
    with naming(place and f"{place}.templates"):
        templates = templates_of(config.templates or "imagenet")
    held_out = [source.held_out] if source.held_out else []
    return Labelled(
        source,
        names,
        templates,
        layout=str(config.format),
        imagenet_rows=imagenet_rows(source.class_names),
        remarks=(
            *held_out,
            *layouts.remarks_on_files(source),
            *remarks(names, source.class_names, config.class_names),
        ),
        reports_skipped=reports,
        remedy=remedy,
    )


def _check_skipped(config: EvaluationSet, source: Source, consent: str) -> None:
    """Refuses a set of which samples are left out, unless it accepts this by ``consent``."""
    if source.skipped and config.on_skipped == "error":
        raise DataError(
            f"{config.path}: {layouts.describe_skipped(source.skipped)}; repair or remove them, or accept results "
            f"without them by {consent}"
        )


def _open_questions(config: EvaluationSet, ranks: Ranks | None) -> Asked:
    """Opens a set of questions with its candidate answers; arguments as in :func:`open_evaluation`."""
    assert config.answers is not None
    where = config.path, config.annotations, config.image_root
    arguments = *where, config.answers, config.questions

    def read() -> Asked:
        candidates = read_answers(arguments[3])
        read = read_questions(*where, images=True)
        chosen = spread(len(read.usable), config.questions)
        read = read._replace(usable=[read.usable[row] for row in chosen])
        row_of = {answer: row for row, answer in enumerate(candidates.answers)}
        lists: dict[tuple[int, ...], int] = {}
        possible_of, ends, answers, agreeing = list[int](), list[int](), list[int](), list[int]()
        for each in read.usable:
            possible = candidates.possible(each.question)
            possible_of.append(lists.setdefault(possible, len(lists)))
            counts = {row_of[answer]: count for answer, count in each.counts.items() if answer in row_of}
            for row in sorted(counts.keys() & set(possible)):
                answers.append(row)
                agreeing.append(counts[row])
            ends.append(len(answers))
        sizes = {each.question: len(candidates.possible(each.question)) for each in read.usable}
        return Asked(
            source_of(read, [each.question for each in read.usable]),
            candidates.answers,
            tuple(lists),
            np.array(possible_of),
            np.array(ends),
            np.array(answers, np.int64),
            np.minimum(np.array(agreeing) / ENOUGH, 1),
            remarks=(
                f"{len(read.usable):,} questions, {len(sizes):,} of them different, with "
                f"{sum(sizes.values()) / len(sizes):.0f} of {len(candidates.answers):,} candidates each: "
                f"{sum(sizes.values()):,} texts are encoded",
            ),
        )

    return read() if ranks is None else ranks.once_per_node(("questions", *arguments), read, DataError)


def open_set(config: EvaluationSet) -> tuple[Source, tuple[str, ...], tuple[Template, ...]]:
    """Opens an evaluation set as samples, class names and templates; sets without labels have only samples.

    Raises:
        ConfigError, DataError: as :func:`open_evaluation`.
    """
    data = open_evaluation(config)
    if not isinstance(data, Labelled):
        return data.source, (), ()
    return data.source, data.class_names, data.templates


def metric_of(config: EvaluationSet) -> Metric:
    """The metric that summarizes a set in one number."""
    if config.metric is not None:
        return config.metric
    if config.dataset is not None:
        return find_dataset(config.dataset).metric
    defaults: dict[str, Metric] = {
        "classification": "top1",
        "retrieval": "image_to_text_r1",
        "vqa": "soft_accuracy",
    }
    return defaults[config.task]


def with_defaults(config: EvaluationSet) -> EvaluationSet:
    """An evaluation set with the defaults that do not depend on its files."""
    known = None if config.dataset is None else find_dataset(config.dataset)
    is_own = known is None and config.task == "classification"
    return config.model_copy(
        update={
            "metric": metric_of(config),
            "role": config.role or (None if known is None else known.role),
            "templates": config.templates or ("imagenet" if is_own else None),
        }
    )


def open_sets(sets: Mapping[str, EvaluationSet], ranks: Ranks, place: str = "evaluate.sets") -> Opened:
    """Opens evaluation sets and prints their remarks; all ranks must call this.

    Args:
        place: config section of the sets, for messages; empty where they are not those of a config.

    Raises:
        ConfigError, DataError: as :func:`open_evaluation`.
    """
    opened = {}
    for name, config in sets.items():
        # For each set: all ranks take part in opening the next one, or none.
        with ranks.raise_on_all(UserError):
            opened[name] = open_evaluation(config, place and f"{place}.{name}", ranks)
        for remark in opened[name].remarks:
            ranks.print(f"{name}: {remark}")
    return opened


def remarks_on_missing_classes(opened: Opened, target: Sequence[str]) -> list[str]:
    """A line for each of the user's sets that has only some of the target's classes.

    Args:
        target: class names of the training set.
    """
    lines = []
    for name, data in opened.items():
        is_own = bool(data.remedy)  # known sets have their published classes
        if is_own and isinstance(data, Labelled) and set(data.class_names) < set(target):
            missing = next(class_name for class_name in target if class_name not in data.class_names)
            lines.append(
                f"evaluate.sets.{name} has {len(set(data.class_names))} of the {len(set(target))} classes of "
                f"data.target: {missing!r}, for example, is never predicted there"
            )
    return lines


def remarks_on_untrained_classes(config: EvaluateConfig, opened: Opened, target: Sequence[str]) -> list[str]:
    """A line for each set that measures the target itself, and has classes that the target lacks.

    Args:
        target: class names of the training set.
    """
    lines = []
    for name, data in opened.items():
        is_target = name == config.select or config.sets[name].role == "id"
        if is_target and isinstance(data, Labelled) and (extra := sorted(set(data.class_names) - set(target))):
            key = "evaluate.select" if name == config.select else f"evaluate.sets.{name}.role"
            lines.append(
                f"{key}: {len(extra)} of the {len(set(data.class_names))} classes of {name} are none of "
                f"data.target, e.g. {extra[0]!r}: not trained; if only names differ, use the same class_names"
            )
    return lines
