"""Opens the evaluation sets of a config."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dive_fast.config.schema import EvaluationSet, Metric
from dive_fast.data.classes import imagenet_rows, join_names, remarks
from dive_fast.data.open_dataset import open_captioned, open_target
from dive_fast.data.prompts import Template
from dive_fast.data.sources.source import Source
from dive_fast.distributed import Ranks
from dive_fast.errors import DataError
from dive_fast.evaluate.datasets import layouts
from dive_fast.evaluate.datasets.catalog import find, open_known
from dive_fast.evaluate.datasets.class_names import class_names_of, templates_of
from dive_fast.evaluate.datasets.evaluation_set import Captioned, Labelled

Opened = dict[str, Labelled | Captioned]
"""Sets by the name that the config gives them."""


def open_evaluation(config: EvaluationSet, place: str = "") -> Labelled | Captioned:
    """What an evaluation set stands for.

    Args:
        place: the section of the config, for messages.

    Raises:
        ConfigError: no such known data set.
        DataError: something of it is missing, a label has no class name, or samples cannot be measured and the set
            is to be measured whole.
    """
    if config.dataset is not None:
        return open_known(config.dataset, config.path, config.class_names, config.templates)
    try:
        return _open_own(config, f"{place or 'evaluate.sets.<name>'}.on_skipped=report")
    except DataError as error:
        raise DataError(f"{place}: {error}" if place else str(error)) from error


def _open_own(config: EvaluationSet, consent: str) -> Labelled | Captioned:
    """A set of the user's.

    Args:
        consent: the override by which its owner accepts that samples are left out.
    """
    reports = config.on_skipped == "report"
    remedy = f"repair or remove it, or accept figures without it by {consent}"
    source = open_captioned(config) if config.task == "retrieval" else open_target(config)
    if source.skipped and not reports:
        raise DataError(
            f"{config.path}: {layouts.skipped_in_words(source.skipped)}; repair or remove them, or accept figures "
            f"without them by {consent}"
        )
    if config.task == "retrieval":
        found = layouts.captioned(source, str(config.format))
        said = (*layouts.remarks_on_files(source), *found.remarks)
        return replace(found, reports_skipped=reports, remedy=remedy, remarks=said)
    given = config.class_names
    names = join_names(source, None if given is None else class_names_of(given), given or config.path)
    return Labelled(
        source,
        names,
        templates_of(config.templates or "imagenet"),
        layout=str(config.format),
        imagenet_rows=imagenet_rows(source.class_names),
        remarks=(*layouts.remarks_on_files(source), *remarks(names, source.class_names, given)),
        reports_skipped=reports,
        remedy=remedy,
    )


def open_set(config: EvaluationSet) -> tuple[Source, tuple[str, ...], tuple[Template, ...]]:
    """Samples, class names and templates of an evaluation set; of retrieval, the samples alone.

    Raises:
        ConfigError, DataError: as :func:`open_evaluation`.
    """
    found = open_evaluation(config)
    if isinstance(found, Captioned):
        return found.source, (), ()
    return found.source, found.class_names, found.templates


def metric_of(config: EvaluationSet) -> Metric:
    """What is reported of a set in one number."""
    if config.metric is not None:
        return config.metric
    if config.dataset is not None:
        return find(config.dataset).metric
    return "top1" if config.task == "classification" else "image_to_text_r1"


def open_sets(sets: Mapping[str, EvaluationSet], ranks: Ranks) -> Opened:
    """Opens evaluation sets and says what a user should know of them.

    Raises:
        ConfigError, DataError: as :func:`open_evaluation`.
    """
    opened = {}
    for name, config in sets.items():
        opened[name] = open_evaluation(config, f"evaluate.sets.{name}")
        for remark in opened[name].remarks:
            ranks.print(f"{name}: {remark}")
    return opened


def remarks_on_missing_classes(opened: Opened, target: Sequence[str]) -> list[str]:
    """A line for each set with some of the classes that are trained on, but not all: fewer compete there.

    Args:
        target: the class names of the set that is trained on.
    """
    found = []
    for name, data in opened.items():
        is_own = bool(data.remedy)  # known sets have the classes that they are known for
        if is_own and isinstance(data, Labelled) and set(data.class_names) < set(target):
            missing = next(own for own in target if own not in data.class_names)
            found.append(
                f"evaluate.sets.{name} has {len(set(data.class_names))} of the {len(set(target))} classes of "
                f"data.target: {missing!r}, for one, competes for no image there"
            )
    return found
