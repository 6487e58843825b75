"""Comparison of two checkpoints by the geometry of their embeddings: report, table and figures."""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from dive_fast.checkpoint.load_weights import exported
from dive_fast.config.schema import EvaluateConfig, ModelConfig, ReferenceConfig
from dive_fast.data.open_dataset import open_reference
from dive_fast.data.spread import spread
from dive_fast.distributed import Ranks
from dive_fast.errors import DataError, UserError
from dive_fast.evaluation.datasets.set_loader import loader_of_pairs
from dive_fast.evaluation.geometry import figures
from dive_fast.evaluation.geometry.embed import embed, open_pairs
from dive_fast.evaluation.geometry.measures import GeometryError, compare, describe
from dive_fast.evaluation.results import LOCK
from dive_fast.io.atomic_files import write_atomic
from dive_fast.io.safe_read import parse_json, read_text
from dive_fast.locks import file_lock
from dive_fast.model import towers
from dive_fast.model.features import Pairs

logger = logging.getLogger(__name__)

PRETRAINED = "pre-trained"


class Embedded(NamedTuple):
    """Embeddings of the same pairs by two models."""

    before: Pairs
    after: Pairs
    num_available: int
    """Number of pairs in the set; fewer may have been embedded."""
    num_undecodable: int = 0
    """Number of selected pairs that were left out because the image cannot be decoded."""
    num_skipped: int = 0
    """Number of samples of the set that have no image or no caption."""


def embed_both(
    model_config: ModelConfig,
    options: EvaluateConfig,
    before: Path | None,
    after: Path,
    data: ReferenceConfig,
    ranks: Ranks,
    limit: int | None = None,
    place: str = "",
) -> Embedded:
    """Embeds pairs by two checkpoints of a model; all ranks must call this.

    Args:
        options: batch size, loader and workers.
        before: a checkpoint that :func:`dive_fast.checkpoint.load_weights.load_into` accepts; None: pre-trained.
        after: another checkpoint.
        limit: number of pairs, spread evenly over the set; default: all.
        place: option that ``data`` comes from, for messages; default: ``data.reference``.

    Raises:
        ConfigError: the weights do not exist, or do not fit the model.
        DataError: the pairs cannot be read.
    """
    # Before a model is built and anything is embedded, so that a typo in a path is reported at once.
    source = open_reference(data, place, ranks)
    with ranks.raise_on_all(UserError):
        if ranks.is_main:
            source.report_skipped(data.path)
        model = towers.create(model_config, weights=before is None)
        samples = open_pairs(model_config, data, model, source)
        pretrained = {name: tensor.clone() for name, tensor in model.export(model.state_dict()).items()}
        states = [pretrained if path is None else exported(model, model_config, path) for path in (before, after)]
    if reason := loader_of_pairs(options.loader, source, model.preprocess).reason:
        ranks.print(f"{data.path}: loader plain instead of {options.loader}: {reason}")
    model = model.to(ranks.device)
    embedded = []
    for state in states:
        model.load_exported(state)
        embedded.append(embed(model, samples, ranks, options.batch_size, options.workers, limit, options.loader))
    num_before, num_after = (len(pairs.image) for pairs in embedded)
    if num_before != num_after:
        raise DataError(
            f"{data.path}: {num_before} pairs could be read for the model before, {num_after} for the one after: "
            "files change or cannot be reached; measure again"
        )
    undecodable = len(spread(len(source), limit)) - num_before
    return Embedded(embedded[0], embedded[1], len(source), undecodable, len(source.skipped))


def measure(embedded: Embedded, labels: dict[str, str]) -> dict[str, Any]:
    """Compares two models on the same pairs; returns the report.

    Args:
        labels: names of what is compared: ``model``, ``before``, ``after``, ``pairs``.

    Raises:
        DataError: there are too few pairs, or their embeddings have no geometry.
    """
    try:
        metrics = compare(embedded.before, embedded.after)
        metrics_before = describe(embedded.before)
    except GeometryError as error:
        raise DataError(f"{labels['pairs']}: {error}") from error
    counts = {
        "num_pairs": len(embedded.before.image),
        "num_available": embedded.num_available,
        "num_undecodable": embedded.num_undecodable,
        "num_skipped": embedded.num_skipped,
    }
    return {**labels, **counts, "metrics": metrics, "metrics_before": metrics_before}


def write(report: dict[str, Any], embedded: Embedded, folder: Path, training: Path | None = None) -> list[Path]:
    """Writes ``geometry.json`` and figures; returns the files.

    Args:
        training: the run's ``metrics.jsonl``; curves over training are drawn if it has geometry metrics.
    """
    with file_lock(folder / LOCK, f"results folder {folder}", wait=True):
        files = [folder / name for name in ("geometry.json", "geometry_rsa.png", "geometry_differences.png")]
        write_atomic(files[0], (json.dumps(report, indent=2) + "\n").encode())
        figures.draw_rsa(embedded.before, embedded.after, report["metrics"], files[1])
        figures.draw_differences(embedded.before, embedded.after, files[2])
        if training is not None and training.is_file():
            try:
                lines = [parse_json(line) for line in read_text(training).splitlines()]
                drawn = figures.has_course(lines)
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                # Everything else is measured and written.
                logger.warning("%s: curves are not drawn: a line is not a line of metrics: %s", training, error)
                return files
            if drawn:
                files.append(folder / "geometry_course.png")
                figures.draw_course(lines, files[-1])
        return files


def table(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    after, before = report["metrics"], report["metrics_before"]
    similarity = _columns(
        ("1: unchanged", "images", "captions", "pooled"),
        *((name, *(f"{after[key + half]:.4f}" for half in _HALVES)) for key, name in _SIMILARITIES.items()),
    )
    models = _columns(
        ("each model", "before", "after"),
        *((name, f"{before[key]:.4f}", f"{after[key]:.4f}") for key, name in _DESCRIPTIONS.items()),
    )
    lengths = _columns(
        ("difference vectors", "images u", "captions v"),
        *((name, *(f"{after[half + key]:.3g}" for half in ("image", "text"))) for key, name in _LENGTHS.items()),
    )
    others = _columns(*((name, f"{after[key]:.3g}") for key, name in _SHARED.items()))
    counts = f"{report['num_pairs']} of {report['num_available']} pairs"
    left_out = [
        f"{report[key]} {reason}"
        for key, reason in (("num_undecodable", "undecodable"), ("num_skipped", "without image or caption"))
        if report.get(key)
    ]
    counts += f" (left out: {', '.join(left_out)})" if left_out else ""
    header = f"{counts} of {report['pairs']}: {report['before']} -> {report['after']}"
    return "\n\n".join([header, similarity, models, f"{lengths}\n{others}"])


_HALVES = ("_image", "_text", "")
_SIMILARITIES = {"rsa": "RSA", "cka": "linear CKA"}
_DESCRIPTIONS = {
    "alignment": "alignment",
    "uniformity_image": "uniformity, images",
    "uniformity_text": "uniformity, captions",
    "modality_gap": "modality gap",
}
_LENGTHS = {
    "_norm": "mean length",
    "_norm_std": "standard deviation",
    "_norm_q05": "5 % are below",
    "_norm_q50": "median",
    "_norm_q95": "95 % are below",
    "_cosine_to_average": "mean cosine to m",
}
_SHARED = {
    "average_norm": "|m|",
    "pair_cosine": "mean cosine of u to v",
    "average_loss": "AVL",
    "pairwise_loss": "PVL",
    "equality": "equality",
}


def _columns(*rows: tuple[str, ...]) -> str:
    return "\n".join(f"{first:<24}" + "".join(f"{cell:>12}" for cell in others) for first, *others in rows)
