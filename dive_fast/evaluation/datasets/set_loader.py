"""The loader of an evaluation set: the requested one if it can read the set, otherwise ``plain``."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import NamedTuple

from dive_fast.config.schema import Loader
from dive_fast.data.sources.source import Source
from dive_fast.data.transforms import Preprocess
from dive_fast.distributed import Ranks
from dive_fast.evaluation.datasets.evaluation_set import EvaluatedSet, Labelled


class SetLoader(NamedTuple):
    """The loader of a set."""

    name: Loader
    reason: str = ""
    """The reason why it is not the requested one; empty if it is."""


def loader_of(requested: Loader, data: EvaluatedSet, preprocess: Preprocess) -> SetLoader:
    """The loader that decodes the images of a set."""
    if requested == "plain":
        return SetLoader("plain")
    if reason := _obstacle(requested, data, preprocess):
        return SetLoader("plain", reason)
    return SetLoader(requested)


def loader_of_pairs(requested: Loader, source: Source, preprocess: Preprocess) -> SetLoader:
    """The loader that decodes the images of pairs."""
    if requested != "plain" and (reason := _obstacle_of_source(requested, source, preprocess)):
        return SetLoader("plain", reason)
    return SetLoader(requested)


def remark_on_loaders(
    requested: Loader, opened: Mapping[str, EvaluatedSet], preprocess: Preprocess, ranks: Ranks
) -> None:
    """Prints a line for each reason why ``plain`` decodes sets instead of the requested loader."""
    names: dict[str, list[str]] = {}
    for name, data in opened.items():
        if reason := loader_of(requested, data, preprocess).reason:
            names.setdefault(reason, []).append(name)
    for reason, sets in names.items():
        ranks.print(f"{', '.join(sets)}: loader plain instead of {requested}: {reason}")


def _obstacle(requested: Loader, data: EvaluatedSet, preprocess: Preprocess) -> str:
    """The reason why a loader cannot read a set; empty if it can."""
    if reason := _obstacle_of_source(requested, data.source, preprocess):
        return reason
    if isinstance(data, Labelled) and data.border:
        return "the border of each image is cut off"
    if requested == "ffcv" and data.reports_skipped:
        return "it cannot leave out broken images, which on_skipped = report accepts"
    return ""


def _obstacle_of_source(requested: Loader, source: Source, preprocess: Preprocess) -> str:
    if not _is_installed(requested):
        return "it is not installed"
    if requested == "ffcv":
        if source.beton is None:
            return "the set is not prepared by dive-fast prepare --container beton"
        if preprocess.resize_mode == "longest":
            return "it does not support the borders of resize_mode longest"
    return ""


def _is_installed(loader: Loader) -> bool:
    try:
        return find_spec("ffcv" if loader == "ffcv" else "nvidia.dali") is not None
    except ModuleNotFoundError:  # a package around it is missing
        return False
