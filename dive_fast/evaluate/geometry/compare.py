"""From one checkpoint to another: how far the geometry has moved on given pairs, as JSON, table and pictures."""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from dive_fast.checkpoint.load_weights import exported
from dive_fast.config.schema import Config, ReferenceConfig
from dive_fast.data.open_dataset import open_reference
from dive_fast.distributed import Ranks
from dive_fast.errors import DataError, UserError
from dive_fast.evaluate.geometry import figures
from dive_fast.evaluate.geometry.embed import embed, open_pairs, spread
from dive_fast.evaluate.geometry.measures import GeometryError, compare, describe
from dive_fast.evaluate.results import LOCK
from dive_fast.io.atomic_files import write_atomic
from dive_fast.io.safe_read import parse_json, read_text
from dive_fast.locks import file_lock
from dive_fast.model import towers
from dive_fast.model.features import Pairs

logger = logging.getLogger(__name__)

PRETRAINED = "pre-trained"


class Embedded(NamedTuple):
    """The same pairs, embedded by two models."""

    before: Pairs
    after: Pairs
    num_available: int
    """Pairs that the set has; fewer may have been embedded."""
    num_undecodable: int = 0
    """Of those that were to be embedded: left out, because the image cannot be decoded."""
    num_skipped: int = 0
    """Samples of the set that are not pairs, for lack of an image or a caption."""


def embed_both(
    config: Config,
    before: Path | None,
    after: Path,
    data: ReferenceConfig,
    ranks: Ranks,
    limit: int | None = None,
) -> Embedded:
    """Embeds pairs by two checkpoints of the config's model; all ranks call it.

    Args:
        before: a checkpoint as :func:`dive_fast.checkpoint.load_weights.load_into` takes it; None: the pre-trained model.
        after: another.
        limit: of pairs, spread evenly over the set; default: all.

    Raises:
        ConfigError: the weights are not there, or not those of the model.
        DataError: the pairs cannot be read.
    """
    with ranks.raise_on_all(UserError):
        # Before a model is built and anything is embedded: a typo in a path should not cost minutes.
        source = open_reference(data, "" if data is config.data.reference else "--pairs")
        if ranks.is_main:
            source.report_skipped(data.path)
        model = towers.create(config.model, weights=before is None)
        samples = open_pairs(config, data, model, source)
        pretrained = {name: tensor.clone() for name, tensor in model.export(model.state_dict()).items()}
        states = [pretrained if path is None else exported(model, config.model, path) for path in (before, after)]
    model = model.to(ranks.device)
    found = []
    for state in states:
        model.load_exported(state)
        found.append(embed(model, samples, ranks, config.evaluate.batch_size, config.evaluate.workers, limit))
    first, second = (len(pairs.image) for pairs in found)
    if first != second:
        raise DataError(
            f"{data.path}: {first} pairs could be read for the model before, {second} for the one after: files "
            "change or cannot be reached; measure again"
        )
    undecodable = len(spread(len(source), limit)) - first
    return Embedded(found[0], found[1], len(source), undecodable, len(source.skipped))


def measure(embedded: Embedded, about: dict[str, str]) -> dict[str, Any]:
    """The report of two models on the same pairs.

    Args:
        about: ``model``, ``before``, ``after``, ``pairs``: what is compared, and on what.

    Raises:
        DataError: the pairs are too few, or their embeddings have no geometry.
    """
    try:
        metrics = compare(embedded.before, embedded.after)
        own = describe(embedded.before)
    except GeometryError as error:
        raise DataError(f"{about['pairs']}: {error}") from error
    counts = {
        "num_pairs": len(embedded.before.image),
        "num_available": embedded.num_available,
        "num_undecodable": embedded.num_undecodable,
        "num_skipped": embedded.num_skipped,
    }
    return {**about, **counts, "metrics": metrics, "metrics_before": own}


def write(report: dict[str, Any], embedded: Embedded, folder: Path, training: Path | None = None) -> list[Path]:
    """Leaves ``geometry.json`` and pictures; returns what was written.

    Args:
        training: the run's ``metrics.jsonl``: its course is drawn too, where it tells of difference vectors.
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
                # All else is measured and written.
                logger.warning("%s: its course is not drawn: a line is none of metrics: %s", training, error)
                return files
            if drawn:
                files.append(folder / "geometry_course.png")
                figures.draw_course(lines, files[-1])
        return files


def table(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    found, own = report["metrics"], report["metrics_before"]
    similarity = _columns(
        ("1: unchanged", "images", "captions", "pooled"),
        *((name, *(f"{found[key + half]:.4f}" for half in _HALVES)) for key, name in _SIMILARITIES.items()),
    )
    models = _columns(
        ("each model", "before", "after"),
        *((name, f"{own[key]:.4f}", f"{found[key]:.4f}") for key, name in _DESCRIPTIONS.items()),
    )
    lengths = _columns(
        ("difference vectors", "images u", "captions v"),
        *((name, *(f"{found[half + key]:.3g}" for half in ("image", "text"))) for key, name in _LENGTHS.items()),
    )
    others = _columns(*((name, f"{found[key]:.3g}") for key, name in _SHARED.items()))
    counts = f"{report['num_pairs']} of {report['num_available']} pairs"
    left = [
        f"{report[key]} {what}"
        for key, what in (("num_undecodable", "undecodable"), ("num_skipped", "without image or caption"))
        if report.get(key)
    ]
    counts += f" (left out: {', '.join(left)})" if left else ""
    head = f"{counts} of {report['pairs']}: {report['before']} -> {report['after']}"
    return "\n\n".join([head, similarity, models, f"{lengths}\n{others}"])


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
