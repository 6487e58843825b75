"""The labelled images on which radii are learned after training: neither trained on nor reported."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dive_fast.checkpoint.manifest import MANIFEST, read_identity
from dive_fast.config.recorded import FILE, is_recorded
from dive_fast.config.schema import Config
from dive_fast.data.classes import check_labels, imagenet_rows, target_names
from dive_fast.data.open_dataset import open_target, select_part
from dive_fast.data.prompt_files import Template, read_templates
from dive_fast.data.shared_images import MAX_READ, ImageLocations, copies
from dive_fast.data.sources.source import Source
from dive_fast.errors import ConfigError, DataError, naming, nearest, warn_on_main_rank
from dive_fast.evaluation.datasets.evaluation_set import Labelled
from dive_fast.evaluation.datasets.resolve import Opened
from dive_fast.io.safe_read import read_json

logger = logging.getLogger(__name__)

MIN_PER_CLASS = 10
"""Images per class below which the split is reported as small."""
MAX_COPIES = 0.1
"""Share of an evaluation set's images that may be copies of training images."""


class Unseen(NamedTuple):
    """A labelled split, with the prompts of its classes."""

    name: str
    """Name for messages and reports, e.g. ``data.target.holdout = 0.1``."""
    source: Source
    class_names: tuple[str, ...]
    templates: tuple[Template, ...]
    imagenet_rows: tuple[int, ...] | None
    """For each class, its number among ImageNet's 1000; None if unknown."""
    chosen: str | None
    """Name of the evaluation set; None: the held-out part of ``data.target``."""

    @property
    def num_classes(self) -> int:
        """Number of classes that have images."""
        return len(np.unique(self.source.samples.labels))


class Record(NamedTuple):
    """The training images of a run, as recorded next to its weights."""

    holdout: float | None
    """``data.target.holdout``"""
    content: str
    """:meth:`dive_fast.data.sources.source.Source.digest` of the images that were trained on."""


def open_unseen(config: Config, learn_on: str | None, weights: Path, opened: Opened) -> Unseen:
    """The held-out part of ``data.target``, or an evaluation set, validated against the run's training images.

    Args:
        learn_on: name of a labelled evaluation set; None: the held-out part.
        weights: weights of the run, next to which its training images are recorded.
        opened: the sets of ``evaluate.sets``.

    Raises:
        ConfigError: the config has no held-out part or labelled set of that name, or the weights were trained on
            images of it.
        DataError: the data set cannot be opened, or a label has no class name.
    """
    return _held_out(config, weights) if learn_on is None else _chosen(config, learn_on, weights, opened)


def shared_with(unseen: Unseen, opened: Opened) -> dict[str, str]:
    """The evaluation sets that measure images of a split, each with the reason not to report it.

    Copies are recognized among at most :data:`dive_fast.data.shared_images.MAX_READ` images of equal size.
    """
    images, reasons = ImageLocations(unseen.source), {}
    for name, data in opened.items():
        if name == unseen.chosen:
            reasons[name] = "the radii are learned on it"
        elif shared := images.num_shared(ImageLocations(data.source)):
            reasons[name] = f"the radii are learned on {shared} of its {len(data.source)} images"
        elif pairs := copies(data.source, unseen.source):
            reasons[name] = f"the radii are learned on copies of {len(pairs)} of its {len(data.source)} images"
    return reasons


def warn_of_size(unseen: Unseen, batch_size: int) -> None:
    """Reports a split of few images, whose radii fit these images."""
    count, classes = len(unseen.source), unseen.num_classes
    remedy = "the radii fit these images; use more"
    if count < batch_size:
        warn_on_main_rank(f"{unseen.name}: {count} images are less than a batch of {batch_size}: {remedy}")
    elif count < MIN_PER_CLASS * classes:
        warn_on_main_rank(
            f"{unseen.name}: {count} images of {classes} classes are less than {MIN_PER_CLASS} per class: {remedy}"
        )


def read_record(weights: Path) -> Record | None:
    """The training images of the run that wrote a checkpoint or a file of weights; None where nothing says so.

    Args:
        weights: as for :func:`dive_fast.checkpoint.load_weights.load_into`.

    Raises:
        ConfigError: the record of a checkpoint cannot be read.
    """
    if (weights / MANIFEST).exists():
        return _record_of(read_identity(weights))
    path = (weights if weights.is_dir() else weights.parent) / FILE
    try:
        tree = read_json(path)
    except (OSError, ValueError):
        return None
    return _record_of(tree.get("identity")) if is_recorded(tree) else None


def _record_of(identity: Any) -> Record | None:
    data = identity.get("data") if isinstance(identity, Mapping) else None
    target = data.get("target") if isinstance(data, Mapping) else None
    if not isinstance(target, Mapping) or not isinstance(target.get("content"), str):
        return None
    share = target.get("holdout")
    return Record(float(share) if isinstance(share, int | float) else None, target["content"])


def _held_out(config: Config, weights: Path) -> Unseen:
    data, sets = config.data.target, ", ".join(config.evaluate.sets)
    if data.holdout is None:
        either = f", or learn on a labelled set that you do not report: --learn-on SET ({sets})" if sets else ""
        raise ConfigError(
            "data.target.holdout is not set, so all images were trained on: set it before training, e.g. "
            f"data.target.holdout=0.1{either}"
        )
    source, training = _parts(config)
    record = read_record(weights)
    if record is None:
        _warn_of_no_record(weights, "its held-out images")
    elif mistake := _mismatch(record, config, weights, training):
        raise ConfigError(f"{mistake}: it may have been trained on images that are held out here; use its config")
    name = f"data.target.holdout = {data.holdout:g}"
    _check_copies(name, source, training)
    with naming("data.target.class_names"):
        class_names = target_names(source, data.class_names, data.classes)
        check_labels(source, class_names)
    templates = read_templates(data.templates, "data.target.templates")
    return Unseen(name, source, class_names, templates, imagenet_rows(source.class_names), None)


def _chosen(config: Config, learn_on: str, weights: Path, opened: Opened) -> Unseen:
    if learn_on not in opened:
        names = ", ".join(opened) or "no sets"
        raise ConfigError(f"--learn-on {learn_on}: evaluate.sets has {names}{nearest(learn_on, list(opened))}")
    data = opened[learn_on]
    if not isinstance(data, Labelled):
        raise ConfigError(f"--learn-on {learn_on}: it has no labels; name a labelled set")
    if data.members is not None:
        raise ConfigError(f"--learn-on {learn_on}: its labels stand for several classes each; name another set")
    name = f"evaluate.sets.{learn_on}"
    _check_untrained(config, name, data.source, weights)
    return Unseen(name, data.source, data.class_names, data.templates, data.imagenet_rows, learn_on)


def _check_untrained(config: Config, name: str, source: Source, weights: Path) -> None:
    """Validates that the images of an evaluation set were not trained on.

    Raises:
        ConfigError: some were, or may have been.
    """
    try:
        held_out, training = _parts(config)
    except DataError as error:
        warn_on_main_rank(f"{error}; whether {name} has images that were trained on is not known")
        return
    images = ImageLocations(source)
    if shared := images.num_shared(ImageLocations(training)):
        raise ConfigError(
            f"{name}: {shared} of its {len(images)} images are training images (data.target.path); name a set "
            "of other images"
        )
    record = read_record(weights)
    mistake = "" if record is None else _mismatch(record, config, weights, training)
    if record is None:
        _warn_of_no_record(weights, f"images of {name}")
    elif mistake and images.num_shared(ImageLocations(held_out)):
        raise ConfigError(f"{mistake}: it may have been trained on images of {name}; use its config")
    elif mistake:
        warn_on_main_rank(f"{mistake}; whether it was trained on images of {name} is not known")
    _check_copies(name, source, training)


def _check_copies(name: str, source: Source, training: Source) -> None:
    """Reports images of a split that are copies of training images.

    Raises:
        ConfigError: more than :data:`MAX_COPIES` of the images that were read are.
    """
    if not (pairs := copies(source, training)):
        return
    shared = (
        f"{name}: at least {len(pairs)} of its {len(source)} images are copies of training images (the first: "
        f"{pairs[0][0]} is {pairs[0][1]})"
    )
    if len(pairs) > MAX_COPIES * min(len(source), MAX_READ):
        raise ConfigError(f"{shared}; learn on other images")
    warn_on_main_rank(f"{shared}; remove one of each")


def _parts(config: Config) -> tuple[Source, Source]:
    """The held-out images of ``data.target``, none without ``holdout``, and the training images."""
    data = config.data.target
    if data.holdout is None:
        training = open_target(data)
        return Source.of(()), training
    complete = open_target(data.model_copy(update={"holdout": None, "classes": "all", "shots": None}))
    with naming("data.target"):
        return select_part(complete, data, "held_out"), select_part(complete, data, "train")


def _mismatch(record: Record, config: Config, weights: Path, training: Source) -> str:
    """The difference between a run's training images and those of a config; empty if there is none."""
    here = config.data.target.holdout
    if record.holdout != here:
        share = "null" if here is None else f"{here:g}"
        there = "without it" if record.holdout is None else f"with {record.holdout:g}"
        return f"data.target.holdout = {share}, but {weights} was trained {there}"
    if record.content != training.digest():
        return f"data.target: {weights} was trained on other images, or they have changed since"
    return ""


def _warn_of_no_record(weights: Path, images: str) -> None:
    warn_on_main_rank(f"{weights}: no {FILE} of a run next to it: whether it was trained on {images} is not known")
