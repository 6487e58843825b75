"""Opens the data sets that a config names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dive_fast.config.schema import EvaluationSet, GeometryConfig, ReferenceConfig, TargetConfig
from dive_fast.data.captions import with_lines
from dive_fast.data.class_parts import select_classes, select_shots
from dive_fast.data.classes import target_names
from dive_fast.data.holdout import Part, split
from dive_fast.data.sources.captioned_folder import open_captioned_folder
from dive_fast.data.sources.csv_table import open_csv
from dive_fast.data.sources.folder import open_folder
from dive_fast.data.sources.huggingface import Columns, open_huggingface
from dive_fast.data.sources.object_store import is_url, refuse_url, shown
from dive_fast.data.sources.source import Source
from dive_fast.data.sources.tar_stream import TarStream, open_tar_stream
from dive_fast.data.sources.vqa_json import open_vqa
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.errors import DataError, naming

if TYPE_CHECKING:
    from dive_fast.distributed import Ranks  # imports torch, which takes seconds


def open_target(config: TargetConfig | EvaluationSet, section: str = "", ranks: Ranks | None = None) -> Source:
    """The labelled images of ``data.target`` or of a set of ``evaluate.sets``.

    Args:
        section: config section for messages; default: ``data.target`` for a :class:`TargetConfig`, otherwise none.
        ranks: all ranks call this, and one process of each node reads a raw set; None: this process does.

    Raises:
        DataError: the files are missing or do not have the configured format.
    """
    is_target = isinstance(config, TargetConfig)
    section = section or ("data.target" if is_target else "")
    source = _open(config, ".cls", section, ranks)
    with naming(section):
        if isinstance(config, TargetConfig):
            return select_part(source, config, "train")
        return source if config.holdout is None else split(source, config.holdout, "held_out")


def select_part(source: Source, config: TargetConfig, part: Part) -> Source:
    """The samples of a complete target set that are trained on, or those that are held out.

    Raises:
        DataError: there are none, or a sample has no label.
    """
    if config.holdout is not None:
        source = split(source, config.holdout, part)
    if config.classes != "all":
        names = target_names(source, config.class_names)
        source, _ = select_classes(source, names, config.classes)
    if config.shots is not None and part == "train":
        source = select_shots(source, config.shots, config.shots_seed)
    return source


def open_reference(
    config: ReferenceConfig | GeometryConfig, section: str = "", ranks: Ranks | None = None
) -> Source:
    """The captioned images of ``data.reference`` or of ``evaluate.geometry``.

    Args:
        section: config section for messages; default: the section of the config's type.
        ranks: as for :func:`open_target`.

    Raises:
        DataError: the files are missing or do not have the configured format.
    """
    default = "data.reference" if isinstance(config, ReferenceConfig) else "evaluate.geometry"
    if isinstance(config, ReferenceConfig) and config.order == "stream":
        raise DataError(
            f"{section or default}.order = stream: only training reads a stream, this needs all pairs; set "
            f"{section or default}.order=indexed"
        )
    return _open(config, ".txt", section or default, ranks)


def open_stream(config: ReferenceConfig) -> TarStream:
    """The tars of ``data.reference`` with ``order = stream``, in which training reads its pairs.

    Raises:
        DataError: there are no tars.
    """
    with naming("data.reference"):
        return open_tar_stream(config.path, config.stream_buffer, config.captions == "lines")


def open_captioned(config: EvaluationSet, section: str = "", ranks: Ranks | None = None) -> Source:
    """The captioned images of a set of ``evaluate.sets`` with ``task = retrieval``.

    Args:
        section: config section for messages.
        ranks: as for :func:`open_target`.

    Raises:
        DataError: the files are missing or do not have the configured format.
    """
    return _open(config, ".txt", section, ranks)


def _open(config: Any, text: str, section: str, ranks: Ranks | None) -> Source:
    with naming(section):
        if is_url(config.path) and isinstance(config, ReferenceConfig) and config.format == "webdataset":
            raise DataError(
                f"{shown(config.path)}: only a stream reads an object store; set {section}.order=stream, or copy "
                "the set to a disk"
            )
        refuse_url(config.path)
        source = _source(config, text, ranks)
        if getattr(config, "loader", None) == "ffcv" and source.beton is None:
            raise DataError(
                f"{config.path}: loader = ffcv needs a set prepared for it: dive-fast prepare --container beton"
            )
    return source


def _source(config: Any, text: str, ranks: Ranks | None) -> Source:
    has_lines = getattr(config, "captions", "one") == "lines"
    source = _complete_texts(config, text, has_lines, ranks)
    return with_lines(source) if has_lines else source


def _complete_texts(config: Any, text: str, groups_captions: bool, ranks: Ranks | None) -> Source:
    """The set with the texts as they are stored.

    Args:
        groups_captions: whether the rows of a CSV that name the same file are one image.
    """
    if config.format == "folder":
        return (open_folder if text == ".cls" else open_captioned_folder)(config.path, ranks)
    if config.format == "csv":
        return open_csv(config.path, config.image_root, group=text == ".cls" or groups_captions, ranks=ranks)
    if config.format == "vqa":
        arguments = config.path, config.annotations, config.image_root

        def opened() -> Source:
            return open_vqa(*arguments, "prompt", images=True)

        return opened() if ranks is None else ranks.once_per_node(("vqa", *arguments), opened, DataError)
    if config.format == "huggingface":
        return _huggingface(config, text, ranks)
    if config.format == "webdataset":
        return open_webdataset(config.path, text, ranks=ranks)
    from dive_fast.data.prepared.read import open_prepared  # imports torch, which takes seconds

    return open_prepared(config.path, text)


def _huggingface(config: Any, text: str, ranks: Ranks | None) -> Source:
    label_column = getattr(config, "label_column", None)
    texts = text == ".txt" or config.text_column is not None
    columns = Columns(config.image_column, label_column, config.text_column)
    source = open_huggingface(config.path, columns, config.split, has_texts=texts, ranks=ranks)
    if not texts and not source.class_names and config.class_names is None:
        raise DataError(f"{config.path}: its labels are numbers without names; set class_names to a file of names")
    return source
