"""Classification of image sets by class prompts or a trained head, and what it is worth in figures."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dive_fast.config.schema import EvaluateConfig, EvaluationSet
from dive_fast.data.loaders.loader import Options, batches_of
from dive_fast.data.prompts import Tokenizer, warn_about_prompts, warn_once
from dive_fast.data.samples import EvaluationSamples
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError, DataError
from dive_fast.evaluate import retrieval
from dive_fast.evaluate.classifier import Classifier, cached_classifier, lacked, of_head
from dive_fast.evaluate.datasets.evaluation_set import BROKEN, Captioned, Labelled, StrictSamples, progress
from dive_fast.evaluate.datasets.resolve import Opened, metric_of, open_evaluation
from dive_fast.evaluate.scores import Predictions, scores
from dive_fast.model import head as heads
from dive_fast.model.towers import Towers, unit

logger = logging.getLogger(__name__)


class Measured(NamedTuple):
    """What was found on one set."""

    scores: dict[str, float]
    """Shares in [0, 1], by the names of :func:`dive_fast.evaluate.scores.scores` or of retrieval."""
    classifier: Literal["prompts", "head", "captions"]
    samples: int
    """How many the figures are of."""
    left_out: int = 0
    """How many more the set has, which could not be read."""


def classifier_for(
    towers: Towers,
    tokenizer: Tokenizer,
    data: Labelled,
    ranks: Ranks,
    head: heads.Head | None = None,
    cache: Path | None = None,
) -> Classifier:
    """The head where it has all of the set's classes, else the prompts; all ranks call it.

    Raises:
        ConfigError: the head is of another width, or ambiguous.
    """
    rows = None if head is None else of_head(head, data.class_names, data.imagenet_rows)
    if rows is None:
        if head is not None and ranks.is_main and set(head.class_names) & set(data.class_names):
            # Suites have sets of other classes, for which prompts are meant.
            warn_once(
                f"prompts classify a set of {len(data.class_names)} classes: the head has some of them, but not "
                f"{lacked(head, data.class_names)!r}"
            )
        if ranks.is_main:
            warn_about_prompts(data.class_names, data.templates, tokenizer)
        weight = cached_classifier(towers, tokenizer, data.class_names, data.templates, ranks, cache)
        return Classifier("prompts", weight, None, data.members)
    weight, bias, _ = rows
    if weight.shape[1] != towers.width:
        raise ConfigError(f"the head is for features of width {weight.shape[1]}, the model's have {towers.width}")
    return Classifier("head", weight.to(ranks.device), bias.to(ranks.device), data.members)


@torch.no_grad()
def predict(
    towers: Towers,
    classes: Classifier,
    samples: EvaluationSamples,
    ranks: Ranks,
    batch_size: int,
    workers: int,
    name: str = "",
) -> Predictions:
    """Predictions for every image, each exactly once over all ranks, which all call it and all get them.

    Args:
        batch_size: images encoded at once on each rank.
        name: of the set, for the progress bar; empty: none is shown.

    Raises:
        DataError: an image is broken, or the features are no finite numbers.
    """
    places = [(0, sample) for sample in ranks.local_range(len(samples.source))]
    # A column for each of the set's images, which is zero on all ranks but one: their sum has them all in order.
    found = torch.zeros(3, len(samples.source), dtype=torch.int64, device=ranks.device)
    at = places[0][1] if places else 0
    finite = torch.ones((), dtype=torch.bool, device=ranks.device)
    with ranks.raise_on_all(DataError), progress(ranks, len(places), name, "image") as bar:
        for batch in batches_of(samples, places, batch_size, Options(workers=workers, device=ranks.device)):
            batch = batch.to(ranks.device)
            logits = classes.logits(unit(towers.encode_image(batch.images)))
            predicted, top = logits.argmax(1), logits.topk(min(5, logits.shape[1]), dim=1).indices
            labels = batch.labels
            in_top = (top == labels[:, None]).any(1) | (predicted == labels)
            found[:, at : at + len(labels)] = torch.stack([labels, predicted, in_top.long()])
            finite &= logits.isfinite().all()
            at += len(labels)
            bar.update(len(labels))
        if not bool(finite):
            raise DataError(f"{name or 'the set'}: the logits are not finite: the weights are broken, or overflow")
    if ranks.group is not None:
        dist.all_reduce(found, group=ranks.group)
    return Predictions(*found.cpu())


def accuracy(
    towers: Towers, weights: Tensor, samples: EvaluationSamples, ranks: Ranks, batch_size: int, workers: int
) -> float:
    """Share of images whose nearest class is theirs, over all ranks.

    Args:
        weights: what :func:`classifier` gave.
        batch_size: images encoded at once on each rank.
    """
    found = predict(towers, Classifier("prompts", weights), samples, ranks, batch_size, workers)
    return scores(found)["top1"]


def measure(
    towers: Towers,
    tokenizer: Tokenizer,
    data: Labelled | Captioned,
    ranks: Ranks,
    *,
    batch_size: int,
    workers: int,
    head: heads.Head | None = None,
    cache: Path | None = None,
    name: str = "",
) -> Measured:
    """Every figure of one set; all ranks call it and all get them.

    Args:
        head: classifies the sets whose classes it has; prompts classify the others.
        cache: folder of the prompts' embeddings; None: they are computed anew.
        name: for the progress bar; empty: none is shown.

    Raises:
        ConfigError, DataError: the user's to mend; the message says how.
    """
    if isinstance(data, Captioned):
        options = Options(workers=workers, device=ranks.device)
        recalls, count, broken = retrieval.recalls(towers, tokenizer, data, ranks, batch_size, options, name)
        return Measured(recalls, "captions", count, len(data.source.skipped) + broken)
    classes = classifier_for(towers, tokenizer, data, ranks, head, cache)
    samples = StrictSamples(data.source, towers.preprocess, data.border, data.reports_skipped, data.remedy)
    found = predict(towers, classes, samples, ranks, batch_size, workers, name)
    kept, regions = found.label != BROKEN, data.regions
    count = int(kept.sum())
    if count == 0:
        raise DataError(f"{name or 'the set'}: none of its {len(kept)} images can be read")
    if count < len(kept):
        found = Predictions(*(column[kept] for column in found))
        regions = None if regions is None else regions._replace(of_sample=regions.of_sample[kept])
    return Measured(scores(found, regions), classes.kind, count, len(data.source.skipped) + len(kept) - count)


def measure_sets(
    towers: Towers,
    tokenizer: Tokenizer,
    config: EvaluateConfig,
    opened: Opened,
    ranks: Ranks,
    head: heads.Head | None = None,
) -> dict[str, Measured]:
    """Every figure of each opened set; all ranks call it and all get them.

    Args:
        head: a trained one, for the sets whose classes it has.
    """
    return {
        name: measure(
            towers, tokenizer, data, ranks, batch_size=config.batch_size, workers=config.workers, head=head
        )
        for name, data in opened.items()
    }


def values(measured: Mapping[str, Measured], sets: Mapping[str, EvaluationSet]) -> dict[str, float]:
    """Each set in one number, its metric: name -> share in [0, 1]."""
    return {name: found.scores[metric_of(sets[name])] for name, found in measured.items()}


def report_left_out(measured: Mapping[str, Measured], ranks: Ranks) -> None:
    """One line for each set of which samples were left out."""
    for name, found in measured.items():
        if found.left_out and ranks.is_main:
            logger.warning("%s: figures are of %d samples, %d are left out", name, found.samples, found.left_out)


def evaluate(
    towers: Towers, tokenizer: Tokenizer, config: EvaluateConfig, ranks: Ranks, head: heads.Head | None = None
) -> dict[str, float]:
    """Each set of the config in one number, its ``metric``, by default top-1: name -> share in [0, 1].

    Args:
        head: a trained one, for the sets whose classes it has.
    """
    opened = {
        name: open_evaluation(evaluation, f"evaluate.sets.{name}") for name, evaluation in config.sets.items()
    }
    measured = measure_sets(towers, tokenizer, config, opened, ranks, head)
    report_left_out(measured, ranks)
    return values(measured, config.sets)
