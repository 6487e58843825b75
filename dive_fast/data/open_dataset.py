"""Opens the data sets that a config names."""

from typing import Any

from dive_fast.config.schema import EvaluationSet, GeometryConfig, ReferenceConfig, TargetConfig
from dive_fast.data.captions import with_lines
from dive_fast.data.holdout import split
from dive_fast.data.prepared.read import open_prepared
from dive_fast.data.sources.captioned_folder import open_captioned_folder
from dive_fast.data.sources.csv_table import open_csv
from dive_fast.data.sources.folder import open_folder
from dive_fast.data.sources.huggingface import Columns, open_huggingface
from dive_fast.data.sources.source import Source
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.errors import DataError, naming


def open_target(config: TargetConfig | EvaluationSet, section: str = "") -> Source:
    """The labelled images of ``data.target`` or of a set of ``evaluate.sets``.

    Args:
        section: config section for messages; default: ``data.target`` for a :class:`TargetConfig`, otherwise none.

    Raises:
        DataError: the files are missing or do not have the configured format.
    """
    is_target = isinstance(config, TargetConfig)
    section = section or ("data.target" if is_target else "")
    source = _open(config, ".cls", section)
    if config.holdout is None:
        return source
    try:
        return split(source, config.holdout, "train" if is_target else "held_out")
    except DataError as error:
        raise DataError(f"{section}: {error}" if section else str(error)) from error


def open_reference(config: ReferenceConfig | GeometryConfig, section: str = "") -> Source:
    """The captioned images of ``data.reference`` or of ``evaluate.geometry``.

    Args:
        section: config section for messages; default: the section of the config's type.

    Raises:
        DataError: the files are missing or do not have the configured format.
    """
    default = "data.reference" if isinstance(config, ReferenceConfig) else "evaluate.geometry"
    return _open(config, ".txt", section or default)


def open_captioned(config: EvaluationSet, section: str = "") -> Source:
    """The captioned images of a set of ``evaluate.sets`` with ``task = retrieval``.

    Args:
        section: config section for messages.

    Raises:
        DataError: the files are missing or do not have the configured format.
    """
    return _open(config, ".txt", section)


def _open(config: Any, text: str, section: str) -> Source:
    with naming(section):
        source = _source(config, text)
        if getattr(config, "loader", None) == "ffcv" and source.beton is None:
            raise DataError(
                f"{config.path}: loader = ffcv needs a set prepared for it: dive-fast prepare --container beton"
            )
    return source


def _source(config: Any, text: str) -> Source:
    has_lines = getattr(config, "captions", "one") == "lines"
    source = _whole_texts(config, text, has_lines)
    return with_lines(source) if has_lines else source


def _whole_texts(config: Any, text: str, groups_captions: bool) -> Source:
    """The set with the texts as they are stored.

    Args:
        groups_captions: whether the rows of a CSV that name the same file are one image.
    """
    if config.format == "folder":
        return (open_folder if text == ".cls" else open_captioned_folder)(config.path)
    if config.format == "csv":
        return open_csv(config.path, config.image_root, group=text == ".cls" or groups_captions)
    if config.format == "huggingface":
        return _huggingface(config, text)
    return (open_webdataset if config.format == "webdataset" else open_prepared)(config.path, text)


def _huggingface(config: Any, text: str) -> Source:
    label_column = getattr(config, "label_column", None)
    texts = text == ".txt" or config.text_column is not None
    columns = Columns(config.image_column, label_column, config.text_column)
    source = open_huggingface(config.path, columns, config.split, has_texts=texts)
    if not texts and not source.class_names and config.class_names is None:
        raise DataError(f"{config.path}: its labels are numbers without names; set class_names to a file of names")
    return source
