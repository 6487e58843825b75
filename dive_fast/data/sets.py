"""From a config's words to a data set."""

from dive_fast.config import EvaluationSet, ReferenceConfig, TargetConfig
from dive_fast.data.prepared import open_prepared
from dive_fast.data.source import Source, open_csv, open_folder, open_webdataset


def open_target(config: TargetConfig | EvaluationSet) -> Source:
    """The labelled images of ``data.target`` or of a set of ``evaluate.sets``.

    Raises:
        DataError: they are not there, or not as the format says.
    """
    if config.format == "folder":
        return open_folder(config.path)
    if config.format == "csv":
        return open_csv(config.path, config.image_root, group=True)
    return (
        open_webdataset(config.path, ".cls")
        if config.format == "webdataset"
        else open_prepared(config.path, ".cls")
    )


def open_reference(config: ReferenceConfig) -> Source:
    """The captioned images of ``data.reference``.

    Raises:
        DataError: they are not there, or not as the format says.
    """
    if config.format == "csv":
        return open_csv(config.path, config.image_root, group=False)
    return (
        open_webdataset(config.path, ".txt")
        if config.format == "webdataset"
        else open_prepared(config.path, ".txt")
    )
