"""From a config's words to a data set."""

from typing import Any

from dive_fast.config.schema import EvaluationSet, GeometryConfig, ReferenceConfig, TargetConfig
from dive_fast.data.prepared.read import open_prepared
from dive_fast.data.sources.csv_table import open_csv
from dive_fast.data.sources.folder import open_folder
from dive_fast.data.sources.source import Source
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.errors import DataError


def open_target(config: TargetConfig | EvaluationSet, place: str = "") -> Source:
    """The labelled images of ``data.target`` or of a set of ``evaluate.sets``.

    Args:
        place: the section of the config, for messages; default: ``data.target`` for one.

    Raises:
        DataError: they are not there, or not as the format says.
    """
    return _open(config, ".cls", place or ("data.target" if isinstance(config, TargetConfig) else ""))


def open_reference(config: ReferenceConfig | GeometryConfig, place: str = "") -> Source:
    """The captioned images of ``data.reference`` or of ``evaluate.geometry``.

    Args:
        place: the section of the config, for messages; default: as above.

    Raises:
        DataError: they are not there, or not as the format says.
    """
    section = "data.reference" if isinstance(config, ReferenceConfig) else "evaluate.geometry"
    return _open(config, ".txt", place or section)


def open_captioned(config: EvaluationSet, place: str = "") -> Source:
    """The captioned images of a set of ``evaluate.sets`` with ``task = retrieval``.

    Args:
        place: the section of the config, for messages.

    Raises:
        DataError: they are not there, or not as the format says.
    """
    return _open(config, ".txt", place)


def _open(config: Any, text: str, place: str) -> Source:
    try:
        source = _source(config, text)
        if getattr(config, "loader", None) == "ffcv" and source.beton is None:
            raise DataError(
                f"{config.path}: loader = ffcv needs a set prepared for it: launch/prepare.py --container beton"
            )
    except DataError as error:
        raise DataError(f"{place}: {error}" if place else str(error)) from error
    return source


def _source(config: Any, text: str) -> Source:
    if config.format == "folder":
        return open_folder(config.path)
    if config.format == "csv":
        return open_csv(config.path, config.image_root, group=text == ".cls")
    return (open_webdataset if config.format == "webdataset" else open_prepared)(config.path, text)
