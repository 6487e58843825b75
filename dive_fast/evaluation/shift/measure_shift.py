"""Shift of sets from a fitted set for each of some checkpoints of a model, sample by sample."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dive_fast.checkpoint.load_weights import exported
from dive_fast.config.schema import EvaluateConfig, ModelConfig
from dive_fast.data.spread import spread
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError, DataError, UserError
from dive_fast.evaluation.datasets.set_loader import loader_of_pairs
from dive_fast.evaluation.shift.encoders import (
    Encoder,
    ImageEncoder,
    TextEncoder,
    TowersEncoder,
    UnimodalEncoder,
)
from dive_fast.evaluation.shift.gaussian import (
    FitOptions,
    Gaussian,
    ShiftError,
    check_enough,
    distances,
    fit,
    moments_of,
)
from dive_fast.evaluation.shift.shift_features import FeatureBlock, StoredFeatures, store_features
from dive_fast.evaluation.shift.shift_sets import OpenedSet
from dive_fast.model import towers as models
from dive_fast.model.towers import Towers

CONCEPTS = ("image", "text", "joint")
PRETRAINED, TUNED, UNIMODAL = "pre-trained", "tuned", "unimodal"
HELD_OUT = "held-out"
"""Name of the part of the fitted set that the Gaussian is not fitted to."""


class ShiftOptions(NamedTuple):
    """Options of the measure."""

    fit: FitOptions = FitOptions()
    concepts: tuple[str, ...] = CONCEPTS
    joint: Literal["mean", "concatenation"] = "mean"
    """The joint embedding: the mean or the concatenation of the unit rows of image and text."""
    normalize: bool = False
    """Whether image and text features become unit rows; the paper takes them as they are."""
    held_out_every: int = 10
    """Without a held-out set: every so many images of the fitted set are held out."""
    limit: int | None = None


@dataclass(frozen=True)
class SetDistances:
    """Distances of the samples of a set that could be read."""

    name: str
    sample: NDArray[np.int64]
    """``(N,)``: indices of the samples in their set, ascending."""
    distance: Mapping[str, NDArray[np.float64]]
    """``(N,)``: D of each sample, by concept."""
    outside: Mapping[str, NDArray[np.float64]]
    """``(N,)``: share of the squared deviation in directions that are not kept, by concept."""
    num_left_out: int = 0
    """Number of selected samples that could not be read."""


@dataclass(frozen=True)
class ModelShift:
    """Shift of all sets for one checkpoint."""

    label: str
    """:data:`PRETRAINED`, :data:`TUNED` or :data:`UNIMODAL`."""
    weights: str
    """Path of the weights, or the names of pre-trained models."""
    digest: str
    """Digest of the weights; of CLIP as in the rows of ``dive-fast evaluate``."""
    gaussians: Mapping[str, Gaussian]
    """By concept."""
    fitted: SetDistances
    held_out: SetDistances
    sets: Sequence[SetDistances]


class Models(NamedTuple):
    """Checkpoints of one model."""

    config: ModelConfig
    before: Path | None
    """None: the pre-trained weights."""
    after: Path | None
    """None: there is no tuned model."""
    image_encoder: str | None = None
    """Unimodal encoder of images that is measured too, a name or folder of timm."""
    text_encoder: str | None = None
    """Unimodal encoder of texts that is measured too, a name or folder of transformers."""


def measure_all(
    checkpoints: Models,
    fitted: OpenedSet,
    held_out: OpenedSet | None,
    sets: Sequence[OpenedSet],
    ranks: Ranks,
    evaluate: EvaluateConfig,
    features: Path,
    options: ShiftOptions,
) -> list[ModelShift]:
    """Measures the pre-trained model, the tuned one, and the unimodal encoders; all ranks must call this.

    Args:
        held_out: unseen samples of the distribution of ``fitted``; None: a part of it is held out.
        evaluate: batch size, loader and workers.
        features: folder of stored features, which all ranks see.

    Raises:
        ConfigError: weights do not exist or do not fit the model, or no concept can be measured.
        DataError: a set cannot be read, or its embeddings have no distances.
    """
    every = [fitted, *([] if held_out is None else [held_out]), *sets]
    concepts = [name for name in options.concepts if _has(fitted, name)]
    if not concepts:
        raise ConfigError(f"{fitted.name} has no {' or '.join(options.concepts)}: nothing can be measured")
    for data in every:
        if missing := [name for name in concepts if not _has(data, name)]:
            ranks.print(f"{data.name}: no texts or no images: {', '.join(missing)} not measured")
    with ranks.raise_on_all(UserError):
        towers = models.create(checkpoints.config, weights=checkpoints.before is None)
        encoder = TowersEncoder(towers, models.tokenizer_of(checkpoints.config))
        unimodal = _unimodal(checkpoints, concepts)
        # Before anything is embedded, which may take hours.
        _check_size(fitted, held_out, _widths(encoder, concepts, options), options)
        if unimodal is not None:
            _check_size(fitted, held_out, _widths(unimodal, concepts, options), options, f"{UNIMODAL} ")
        states = _states(checkpoints, towers)
    for data in every:
        if data.has_images and (reason := loader_of_pairs(evaluate.loader, data.source, towers.preprocess).reason):
            ranks.print(f"{data.name}: loader plain instead of {evaluate.loader}: {reason}")
    towers = towers.to(ranks.device)

    def measure(label: str, weights: str, encoder: Encoder) -> ModelShift:
        stored = [
            store_features(encoder, data, features, ranks, evaluate, options.limit, f"{label}: {data.name}")
            for data in every
        ]
        widths = _widths(encoder, concepts, options)
        return _measure(label, weights, encoder.digest, stored, held_out is not None, widths, ranks, options)

    measured = []
    for label, path, state in states:
        towers.load_exported(state)
        name = str(path or checkpoints.config.pretrained or checkpoints.config.name)
        measured.append(measure(label, name, encoder))
    if unimodal is not None:
        measured.append(measure(UNIMODAL, unimodal.names, unimodal.to(ranks.device)))
    return measured


def _states(checkpoints: Models, towers: Towers) -> list[tuple[str, Path | None, dict[str, Tensor]]]:
    """Label, file and weights of each checkpoint.

    Args:
        towers: with the pre-trained weights, unless others are measured instead.
    """
    config, before, after = checkpoints.config, checkpoints.before, checkpoints.after
    pretrained = {name: tensor.clone() for name, tensor in towers.export(towers.state_dict()).items()}
    states = [(PRETRAINED, before, pretrained if before is None else exported(towers, config, before))]
    return states if after is None else [*states, (TUNED, after, exported(towers, config, after))]


def _unimodal(checkpoints: Models, concepts: Sequence[str]) -> UnimodalEncoder | None:
    """The unimodal encoders; None if there are none.

    Raises:
        ConfigError: one cannot be loaded, or its half is not measured.
    """
    image, text = checkpoints.image_encoder, checkpoints.text_encoder
    for half, name in (("image", image), ("text", text)):
        if name is not None and half not in concepts:
            raise ConfigError(
                f"--{half}-encoder: the {half}s are not measured: the fitted set has none, or --concepts "
                "leaves them out"
            )
    if image is None and text is None:
        return None
    return UnimodalEncoder(
        None if image is None else ImageEncoder(image), None if text is None else TextEncoder(text)
    )


def _has(data: OpenedSet, concept: str) -> bool:
    return {"image": data.has_images, "text": data.has_texts}.get(concept, data.has_images and data.has_texts)


def _widths(encoder: Encoder, concepts: Sequence[str], options: ShiftOptions) -> dict[str, int]:
    """The width h of each concept that an encoder has."""
    widths: dict[str, int] = dict(encoder.widths.items())
    if encoder.is_joint:
        both = encoder.widths["image"], encoder.widths["text"]
        widths["joint"] = sum(both) if options.joint == "concatenation" else both[0]
    return {name: widths[name] for name in concepts if name in widths}


def _held_out_mask(data: OpenedSet, options: ShiftOptions) -> NDArray[np.bool_]:
    """``(N,)``: the selected samples of every k-th image, so that no image is both fitted and held out."""
    chosen = np.array(spread(len(data.source), options.limit), np.int64)
    mask = np.zeros(len(data.source), np.bool_)
    mask[chosen] = data.source.samples.image_numbers(chosen) % options.held_out_every == options.held_out_every - 1
    return mask


def _check_size(
    data: OpenedSet,
    held_out: OpenedSet | None,
    widths: Mapping[str, int],
    options: ShiftOptions,
    label: str = "",
) -> None:
    count = len(spread(len(data.source), options.limit))
    if held_out is None:
        num_held_out = int(_held_out_mask(data, options).sum())
        if not num_held_out:
            raise DataError(
                f"{data.name}: fewer than {options.held_out_every} images, of which one would be held out: name "
                "held-out data by --held-out, or use a smaller --hold-out-every"
            )
        count -= num_held_out
    try:
        for concept, width in widths.items():
            check_enough(count, width, options.fit, f"{data.name}, {label}{concept}")
    except ShiftError as error:
        raise DataError(str(error)) from error


def _measure(
    label: str,
    weights: str,
    digest: str,
    stored: Sequence[StoredFeatures],
    has_held_out_set: bool,
    widths: Mapping[str, int],
    ranks: Ranks,
    options: ShiftOptions,
) -> ModelShift:
    fitted = stored[0]
    is_held_out = np.zeros(len(fitted.data.source), np.bool_)
    if not has_held_out_set:
        is_held_out = _held_out_mask(fitted.data, options)
    concepts = list(widths)

    def rows_to_fit() -> Iterator[dict[str, Tensor]]:
        for block in fitted.blocks(ranks):
            kept = torch.from_numpy(~is_held_out[block.sample])
            yield {name: rows[kept] for name, rows in embeddings(block, concepts, options).items()}

    try:
        moments = moments_of(rows_to_fit, widths, ranks, ranks.device)
        gaussians: dict[str, Gaussian] = {}
        with ranks.raise_on_all(ShiftError):
            if ranks.is_main:
                for name in concepts:
                    gaussians[name] = fit(moments[name], options.fit, f"{label}, {fitted.data.name}, {name}")
    except ShiftError as error:
        raise DataError(f"{fitted.data.location}: {error}") from error
    # The ranks of different machines may round an eigenvalue to different sides of the cut.
    gaussians = ranks.broadcast(gaussians)
    measured = [_distances(each, gaussians, ranks, options) for each in stored]
    complete, *others_measured = measured
    if has_held_out_set:
        held_out, *sets = others_measured
    else:
        held_out, sets = _part(complete, is_held_out, HELD_OUT), others_measured
        complete = _part(complete, ~is_held_out, complete.name)
    return ModelShift(label, weights, digest, gaussians, complete, held_out, sets)


def embeddings(block: FeatureBlock, concepts: Sequence[str], options: ShiftOptions) -> dict[str, Tensor]:
    """The embeddings z of some samples by concept, as far as they have them: ``(n, h)``."""
    halves = {"image": block.image, "text": block.text}
    features = {name: rows for name, rows in halves.items() if rows is not None}
    units = {name: torch.nn.functional.normalize(rows.double(), dim=1) for name, rows in features.items()}
    rows_of = units.copy() if options.normalize else features.copy()
    if "joint" in concepts and len(units) == 2:
        image, text = units.values()
        rows_of["joint"] = (image + text) / 2 if options.joint == "mean" else torch.cat([image, text], 1)
    return {name: rows_of[name] for name in concepts if name in rows_of}


def _distances(
    stored: StoredFeatures, gaussians: Mapping[str, Gaussian], ranks: Ranks, options: ShiftOptions
) -> SetDistances:
    concepts = [name for name in gaussians if _has(stored.data, name)]
    # Allocated at once: small results between large blocks would keep the memory of these from being reused.
    local_sample = torch.empty(stored.num_selected, dtype=torch.int64)
    local_values = {name: torch.empty(stored.num_selected, 2, dtype=torch.float64) for name in concepts}
    count = 0
    on_device = {
        name: gaussian._replace(
            mean=gaussian.mean.to(ranks.device),
            variances=gaussian.variances.to(ranks.device),
            directions=gaussian.directions.to(ranks.device),
        )
        for name, gaussian in gaussians.items()
    }
    with ranks.raise_on_all(DataError):
        for block in stored.blocks(ranks):
            part = slice(count, count := count + len(block.sample))
            local_sample[part] = torch.from_numpy(block.sample)
            for name, rows in embeddings(block, concepts, options).items():
                measured = distances(on_device[name], rows.to(ranks.device))
                local_values[name][part] = torch.stack(measured, 1).cpu()
    sample = ranks.gather(local_sample[:count].to(ranks.device)).cpu()
    order = sample.argsort()
    columns = {
        name: ranks.gather(each[:count].to(ranks.device)).cpu()[order] for name, each in local_values.items()
    }
    if not len(sample):
        raise DataError(f"{stored.data.location}: no sample of it can be read")
    return SetDistances(
        stored.data.name,
        sample[order].numpy(),
        {name: each[:, 0].numpy() for name, each in columns.items()},
        {name: each[:, 1].numpy() for name, each in columns.items()},
        stored.num_selected - len(sample),
    )


def _part(measured: SetDistances, mask: NDArray[np.bool_], name: str) -> SetDistances:
    """The samples of a set that a mask over all its samples selects."""
    kept = mask[measured.sample]
    if not kept.any():
        raise DataError(f"{measured.name}: none of the samples that are {name} can be read")
    distance, outside = (
        {concept: each[kept] for concept, each in values.items()}
        for values in (measured.distance, measured.outside)
    )
    return SetDistances(name, measured.sample[kept], distance, outside)
