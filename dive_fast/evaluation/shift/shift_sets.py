"""The sets whose shift is measured, as the command line names them: images, captioned images, questions.

Imports no torch, so that a mistyped set is reported at once.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError

from dive_fast.config.schema import Config, EvaluationSet, ReferenceConfig
from dive_fast.data.data_paths import check_path, guess_format
from dive_fast.data.open_dataset import open_reference, open_target
from dive_fast.data.shared_images import ImageLocations, copies
from dive_fast.data.sources.source import Source, locate
from dive_fast.data.sources.vqa_json import VqaText, open_vqa
from dive_fast.errors import ConfigError, DataError, naming
from dive_fast.evaluation.datasets.catalog import candidate_folders, find_dataset, open_known
from dive_fast.evaluation.datasets.evaluation_set import Labelled

if TYPE_CHECKING:
    from dive_fast.distributed import Ranks  # imports torch, which takes seconds

VQA = "vqa"
FIELDS = {
    "format": ("folder", "webdataset", "csv", "huggingface", "prepared", VQA),
    "text": ("caption", "none", *get_args(VqaText)),
}
"""Values of the fields of a set that have a choice."""
PATHS = ("images", "annotations")
"""Fields that are paths."""
_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.+-]*)=(.+)", re.DOTALL)
_FIELD = re.compile(rf",({'|'.join((*FIELDS, *PATHS))})=")


@dataclass(frozen=True)
class SetOption:
    """A set as it is written: ``[NAME=]SET[,format=...][,images=...][,annotations=...][,text=...]``."""

    name: str
    location: str
    """A path, ``data.target``, ``data.reference``, a name in ``evaluate.sets``, or that of a known data set."""
    format: str | None = None
    text: str | None = None
    images: str | None = None
    annotations: str | None = None

    @property
    def is_vqa(self) -> bool:
        """Whether the set is a JSON file of questions."""
        return self.format == VQA or (self.format is None and self.location.lower().endswith(".json"))


@dataclass(frozen=True)
class OpenedSet:
    """The samples of a set, and what of them can be embedded."""

    name: str
    location: str
    source: Source
    has_images: bool = True
    has_texts: bool = True
    border: int = 0
    """Pixels at each edge that are not part of an image."""


def parse(text: str) -> SetOption:
    """Reads a set of the command line.

    Raises:
        ConfigError: a field is written twice or has an unknown value, or a field contradicts another one.
    """
    named = _NAME.fullmatch(text)
    # A path can contain =; the name of a folder before it cannot be a name.
    name, rest = (named[1], named[2]) if named else ("", text)
    location, *parts = _FIELD.split(rest)
    fields = dict(zip(parts[::2], parts[1::2], strict=True))
    if 2 * len(fields) != len(parts):
        raise ConfigError(f"{text}: a field is written twice")
    for field, values in FIELDS.items():
        if field in fields and fields[field] not in values:
            raise ConfigError(f"{text}: {field} is one of {', '.join(values)}")
    option = SetOption(name or _default_name(location), location, **fields)
    if not location or not option.name:
        raise ConfigError(f"{text}: expected [NAME=]SET, where SET is a path or the name of a set")
    if not option.is_vqa and (option.annotations or option.text in get_args(VqaText)):
        raise ConfigError(
            f"{text}: questions and answers are those of JSON files; write format={VQA} too for a section of the "
            "config"
        )
    if option.is_vqa and option.text in ("caption", "none"):
        raise ConfigError(f"{text}: the text of a {VQA} set is one of {', '.join(get_args(VqaText))}")
    return option


def parse_all(texts: Sequence[str]) -> list[SetOption]:
    """Reads sets whose names differ.

    Raises:
        ConfigError: as :func:`parse`, or two sets have the same name.
    """
    options = [parse(text) for text in texts]
    names = [option.name for option in options]
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"duplicate name {duplicate} among the sets; name them by NAME=SET")
    return options


def _default_name(location: str) -> str:
    if location in ("data.target", "data.reference"):
        return location
    path = Path(location.removeprefix("demo:"))
    return path.stem if path.suffix in (".json", ".csv", ".tsv", ".tar") else path.name


def section_of(option: SetOption, config: Config | None, root: str | None) -> Any:
    """The config section that a set stands for; None for questions.

    Args:
        root: folder of known data sets, or a pattern with ``{dataset}``.

    Raises:
        ConfigError: the config has no such section, or the set's fields contradict each other.
    """
    location = option.location
    if option.is_vqa:
        return None
    if location in ("data.target", "data.reference"):
        section = None if config is None else getattr(config.data, location.removeprefix("data."))
        if section is None:
            raise ConfigError(f"{location}: {'there is no config' if config is None else 'the config has none'}")
        _refuse_fields(option)
        return section
    if config is not None and location in config.evaluate.sets:
        _refuse_fields(option)
        return config.evaluate.sets[location]
    if root is not None and not os.path.exists(location):
        _refuse_fields(option)
        return EvaluationSet(path=root, dataset=location)
    if option.text == "none":
        data_format = option.format or guess_format(location)
        if data_format == "csv":
            raise ConfigError(f"{location}: csv data has titles; leave text=none out")
        return EvaluationSet.model_validate({"format": data_format, "path": location})
    data_format = option.format or guess_format(location)
    if option.images is not None and data_format != "csv":
        raise ConfigError(f"{location}: images= is the image folder of csv data and questions; leave it out")
    return ReferenceConfig.model_validate({"format": data_format, "path": location, "image_root": option.images})


def with_section(option: SetOption, config: Config | None) -> SetOption:
    """A set whose section in the config has questions as the JSON file that it stands for; others unchanged.

    Raises:
        ConfigError: a field is written that the section has.
    """
    sections: dict[str, Any] = {} if config is None else dict(config.evaluate.sets)
    if config is not None:
        sections |= {"data.target": config.data.target, "data.reference": config.data.reference}
    section = sections.get(option.location)
    if section is None or section.format != VQA:
        return option
    if option.format not in (None, VQA) or option.images or option.annotations:
        raise ConfigError(f"{option.location}: leave images= and annotations= out; the config has them")
    return replace(
        option, location=section.path, format=VQA, images=section.image_root, annotations=section.annotations
    )


def _refuse_fields(option: SetOption) -> None:
    if option.format or option.images or option.text:
        raise ConfigError(f"{option.location}: its format is known; leave format=, images= and text= out")


def check(option: SetOption, config: Config | None, root: str | None) -> None:
    """Checks quickly that a set exists, before anything is opened.

    Raises:
        ConfigError, DataError: it does not; as :func:`section_of`.
    """
    option = with_section(option, config)
    if option.is_vqa:
        for path in filter(None, (option.location, option.annotations)):
            if not locate(path).is_file():
                raise DataError(f"{path}: no such file")
        return
    try:
        section = section_of(option, config, root)
    except ValidationError as error:
        raise ConfigError(f"{option.location}: {error.errors()[0]['msg']}") from error
    if not isinstance(section, EvaluationSet) or section.dataset is None:
        check_path(section, option.name)
    elif not any(folder.is_dir() for folder in candidate_folders(section.dataset, section.path)):
        with naming(option.name):
            find_dataset(section.dataset)
            open_known(section.dataset, section.path)  # fails at once, with the accepted layouts


def open_set(
    option: SetOption, config: Config | None, root: str | None, needs: Mapping[str, bool], ranks: "Ranks"
) -> OpenedSet:
    """Opens a set; all ranks must call this.

    Args:
        needs: whether ``image`` and ``text`` are to be embedded, as far as the set has them.

    Raises:
        ConfigError, DataError: the set does not exist or cannot be read.
    """
    option = with_section(option, config)
    name, location = option.name, option.location
    if option.is_vqa:
        text: Any = option.text or "question"
        arguments = (option.location, option.annotations, option.images, text)
        source = ranks.once_per_node(
            (VQA, *arguments), lambda: open_vqa(*arguments, images=needs["image"]), DataError
        )
        return OpenedSet(name, location, source, has_images=needs["image"], has_texts=needs["text"])
    section = section_of(option, config, root)
    if isinstance(section, ReferenceConfig):
        source = open_reference(section, option.name, ranks)
        return OpenedSet(name, location, source, has_images=needs["image"], has_texts=needs["text"])
    if isinstance(section, EvaluationSet):
        if option.text == "none":
            return OpenedSet(name, location, open_target(section, name, ranks), has_texts=False)
        from dive_fast.evaluation.datasets.resolve import open_evaluation

        opened = open_evaluation(section, option.name, ranks)
        has_texts = not isinstance(opened, Labelled)
        return OpenedSet(
            name,
            location,
            opened.source,
            has_images=needs["image"] or not has_texts,
            has_texts=has_texts and needs["text"],
            border=opened.border if isinstance(opened, Labelled) else 0,
        )
    return OpenedSet(name, location, open_target(section, name, ranks), has_texts=False)


def remarks_on_overlap(fitted: OpenedSet, others: Sequence[OpenedSet]) -> list[str]:
    """A line for each set that has images of the fitted one; they are nearer than unseen ones.

    Copies are recognized among at most :data:`dive_fast.data.shared_images.MAX_READ` images of equal size, and
    only where images are measured.
    """
    lines, images = [], ImageLocations(fitted.source)
    for data in others:
        locations = ImageLocations(data.source)
        shared, kind = images.num_shared(locations), "images"
        if not shared and fitted.has_images and data.has_images:
            shared, kind = len(copies(data.source, fitted.source)), "copies of images"
        if shared:
            lines.append(
                f"{data.name}: {shared:,} of its {len(locations):,} images are {kind} of {fitted.name}, to which "
                "the Gaussian is fitted: their distances are shorter than those of unseen data"
            )
    return lines
