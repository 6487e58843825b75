"""From a config's words to a data set."""

from typing import Any

from dive_fast.config import EvaluationSet, GeometryConfig, ReferenceConfig, TargetConfig
from dive_fast.data.prepared import open_prepared
from dive_fast.data.source import Source, open_csv, open_folder, open_webdataset


def open_target(config: TargetConfig | EvaluationSet) -> Source:
    """The labelled images of ``data.target`` or of a set of ``evaluate.sets``.

    Raises:
        DataError: they are not there, or not as the format says.
    """
    return _open(config, ".cls")


def open_reference(config: ReferenceConfig | GeometryConfig) -> Source:
    """The captioned images of ``data.reference`` or of ``evaluate.geometry``.

    Raises:
        DataError: they are not there, or not as the format says.
    """
    return _open(config, ".txt")


def _open(config: Any, text: str) -> Source:
    if config.format == "folder":
        return open_folder(config.path)
    if config.format == "csv":
        return open_csv(config.path, config.image_root, group=text == ".cls")
    return (open_webdataset if config.format == "webdataset" else open_prepared)(config.path, text)
