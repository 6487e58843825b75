"""Measurement of evaluation sets: classification by class prompts or a trained head, retrieval, questions."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dive_fast.config.schema import EvaluateConfig, EvaluationSet, Loader
from dive_fast.data.loaders.loader import Options, batches_of
from dive_fast.data.prompts import warn_about_prompts, warn_once
from dive_fast.data.samples import EvaluationSamples
from dive_fast.data.text_tokenizer import Tokenizer
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError, DataError
from dive_fast.evaluation import retrieval
from dive_fast.evaluation.calibration import Bins, Probabilities, calibration, reliability, summarize_probabilities
from dive_fast.evaluation.classifier import (
    Classifier,
    cached_classifier,
    first_missing_class,
    prompted_classifier,
    select_head_rows,
)
from dive_fast.evaluation.datasets.evaluation_set import Asked, Captioned, EvaluatedSet, Labelled
from dive_fast.evaluation.datasets.resolve import Opened, metric_of, open_sets
from dive_fast.evaluation.datasets.set_loader import loader_of, remark_on_loaders
from dive_fast.evaluation.datasets.strict_samples import BROKEN, StrictSamples, progress
from dive_fast.evaluation.scores import Predictions, scores
from dive_fast.evaluation.visual_questions import answer_questions
from dive_fast.model import head as heads
from dive_fast.model.towers import Towers, unit

logger = logging.getLogger(__name__)


class Measured(NamedTuple):
    """Metrics of one set."""

    scores: dict[str, float]
    """Values named as in :func:`dive_fast.evaluation.scores.scores` and
    :func:`dive_fast.evaluation.calibration.calibration`, as recalls of retrieval, or as in
    :class:`dive_fast.evaluation.visual_questions.Answered`."""
    classifier: Literal["prompts", "learned prompts", "head", "captions", "ranked answers"]
    samples: int
    """Number of samples measured."""
    left_out: int = 0
    """Number of samples of the set that could not be read."""
    reliability: Bins | None = None
    """Bins of the reliability diagram; None without labels."""


def classifier_for(
    towers: Towers,
    tokenizer: Tokenizer,
    data: Labelled,
    ranks: Ranks,
    head: heads.Head | None = None,
    cache: Path | None = None,
) -> Classifier:
    """The head if it has all classes of the set, otherwise learned or class prompts; all ranks must call this.

    Raises:
        ConfigError: the head has another width than the model, or two classes of one name.
    """
    rows = None if head is None else select_head_rows(head, data.class_names, data.imagenet_rows)
    if rows is None:
        if head is not None and ranks.is_main and set(head.class_names) & set(data.class_names):
            # No warning for sets without any class of the head, such as others of a suite: prompts are expected.
            warn_once(
                f"prompts classify a set of {len(data.class_names)} classes: the head has some of them, but not "
                f"{first_missing_class(head, data.class_names)!r}"
            )
        scale = float(towers.scale().detach())
        if towers.prompts is not None:
            if ranks.is_main:
                warn_about_prompts(data.class_names, [towers.prompts.template], tokenizer)
            weight = prompted_classifier(towers, tokenizer, data.class_names, ranks)
            return Classifier("learned prompts", weight, None, data.members, scale)
        if ranks.is_main:
            warn_about_prompts(data.class_names, data.templates, tokenizer)
        weight = cached_classifier(towers, tokenizer, data.class_names, data.templates, ranks, cache)
        return Classifier("prompts", weight, None, data.members, scale)
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
    options: Options,
    name: str = "",
) -> tuple[Predictions, Probabilities]:
    """Predictions and their probabilities for all images; all ranks must call this, and all get the result.

    Each image is encoded by one rank.

    Args:
        batch_size: images encoded at once on each rank.
        name: name of the set on the progress bar; empty disables the bar.

    Raises:
        DataError: an image is broken, or the logits are not finite.
    """
    keys = [(0, sample) for sample in ranks.local_range(len(samples.source))]
    # Each image's column is nonzero on one rank only, so the sum over ranks has all predictions in order.
    columns = torch.zeros(3, len(samples.source), dtype=torch.int64, device=ranks.device)
    summaries = torch.zeros(3, len(samples.source), dtype=torch.float64, device=ranks.device)
    column = keys[0][1] if keys else 0
    finite = torch.ones((), dtype=torch.bool, device=ranks.device)
    with ranks.raise_on_all(DataError), progress(ranks, len(keys), name, "image") as bar:
        for batch in batches_of(samples, keys, batch_size, options):
            batch = batch.to(ranks.device)
            logits = classes.logits(unit(towers.encode_image(batch.images)))
            predicted, top = logits.argmax(1), logits.topk(min(5, logits.shape[1]), dim=1).indices
            labels = batch.labels
            in_top = (top == labels[:, None]).any(1) | (predicted == labels)
            rows = slice(column, column + len(labels))
            columns[:, rows] = torch.stack([labels, predicted, in_top.long()])
            summaries[:, rows] = torch.stack(summarize_probabilities(logits.double() * classes.scale, labels))
            finite &= logits.isfinite().all() & summaries[:, rows].isfinite().all()
            column += len(labels)
            bar.update(len(labels))
        if not bool(finite):
            raise DataError(
                f"{name or 'the set'}: the logits are not finite: weights are broken, or activations overflow"
            )
    if ranks.group is not None:
        dist.all_reduce(columns, group=ranks.group)
        dist.all_reduce(summaries, group=ranks.group)
    return Predictions(*columns.cpu()), Probabilities(*summaries.cpu())


def accuracy(
    towers: Towers, weights: Tensor, samples: EvaluationSamples, ranks: Ranks, batch_size: int, workers: int
) -> float:
    """Top-1 accuracy of a prompt classifier; all ranks must call this.

    Args:
        weights: ``(C, D)`` rows of :func:`dive_fast.evaluation.classifier.classifier`.
        batch_size: images encoded at once on each rank.
    """
    options = Options(workers=workers, device=ranks.device)
    predictions, _ = predict(towers, Classifier("prompts", weights), samples, ranks, batch_size, options)
    return scores(predictions)["top1"]


def measure(
    towers: Towers,
    tokenizer: Tokenizer,
    data: EvaluatedSet,
    ranks: Ranks,
    *,
    batch_size: int,
    workers: int,
    loader: Loader = "plain",
    head: heads.Head | None = None,
    cache: Path | None = None,
    name: str = "",
) -> Measured:
    """All metrics of one set; all ranks must call this, and all get the result.

    Args:
        loader: used if it can read the set; otherwise ``plain``.
        head: used if it has all classes of the set; otherwise prompts classify.
        cache: folder where the embeddings of prompts are cached; None disables the cache.
        name: name of the set on the progress bar and in messages; empty disables the bar.

    Raises:
        ConfigError, DataError: invalid config or data; the message says what to change.
    """
    options = Options(loader_of(loader, data, towers.preprocess).name, workers, ranks.device)
    if isinstance(data, Asked):
        answered = answer_questions(towers, tokenizer, data, ranks, batch_size, options, name)
        left_out = len(data.source.skipped) + answered.left_out
        return Measured(answered.metrics, "ranked answers", answered.samples, left_out)
    if isinstance(data, Captioned):
        recalls, count, broken = retrieval.recalls(towers, tokenizer, data, ranks, batch_size, options, name)
        return Measured(recalls, "captions", count, len(data.source.skipped) + broken)
    classes = classifier_for(towers, tokenizer, data, ranks, head, cache)
    samples = StrictSamples(data.source, towers.preprocess, data.border, data.reports_skipped, data.remedy)
    predictions, probabilities = predict(towers, classes, samples, ranks, batch_size, options, name)
    kept, regions = predictions.label != BROKEN, data.regions
    count = int(kept.sum())
    if count == 0:
        raise DataError(f"{name or 'the set'}: none of its {len(kept)} images can be read")
    if count < len(kept):
        predictions = Predictions(*(column[kept] for column in predictions))
        probabilities = Probabilities(*(column[kept] for column in probabilities))
        regions = None if regions is None else regions._replace(of_sample=regions.of_sample[kept])
    left_out = len(data.source.skipped) + len(kept) - count
    right = predictions.label == predictions.predicted
    metrics = scores(predictions, regions) | calibration(probabilities, right)
    return Measured(metrics, classes.kind, count, left_out, reliability(probabilities.confidence, right))


def measure_sets(
    towers: Towers,
    tokenizer: Tokenizer,
    config: EvaluateConfig,
    opened: Opened,
    ranks: Ranks,
    head: heads.Head | None = None,
) -> dict[str, Measured]:
    """All metrics of each opened set; all ranks must call this, and all get the result.

    Args:
        head: a trained head, used for the sets whose classes it has.
    """
    return {
        name: measure(
            towers,
            tokenizer,
            data,
            ranks,
            batch_size=config.batch_size,
            workers=config.workers,
            loader=config.loader,
            head=head,
        )
        for name, data in opened.items()
    }


def values(measured: Mapping[str, Measured], sets: Mapping[str, EvaluationSet]) -> dict[str, float]:
    """The metric of each set by name, in [0, 1]."""
    return {name: result.scores[metric_of(sets[name])] for name, result in measured.items()}


def report_left_out(measured: Mapping[str, Measured], ranks: Ranks) -> None:
    """Logs one line for each set from which samples were left out."""
    for name, result in measured.items():
        if result.left_out and ranks.is_main:
            logger.warning("%s: %d samples are measured, %d are left out", name, result.samples, result.left_out)


def evaluate(
    towers: Towers, tokenizer: Tokenizer, config: EvaluateConfig, ranks: Ranks, head: heads.Head | None = None
) -> dict[str, float]:
    """Opens and measures the config's sets; returns each set's ``metric`` by name, in [0, 1].

    All ranks must call this, and all get the result.

    Args:
        head: a trained head, used for the sets whose classes it has.
    """
    opened = open_sets(config.sets, ranks)
    remark_on_loaders(config.loader, opened, towers.preprocess, ranks)
    measured = measure_sets(towers, tokenizer, config, opened, ranks, head)
    report_left_out(measured, ranks)
    return values(measured, config.sets)
