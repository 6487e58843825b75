"""Calibration of predicted probabilities: expected calibration error (ECE), log loss and Brier score.

A classifier is calibrated if it is right on the share c of the samples that it predicts with confidence c.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # names of metrics are read by commands that need no torch
    from torch import Tensor

BINS = 10
"""Number of bins of equal width in [0, 1] that confidences are divided into."""
ECE_BATCH = 512
"""Samples of a batch of ``ece_batched``, the evaluation batch of CaRot's code."""


class Probabilities(NamedTuple):
    """Three numbers of the predicted probabilities p of each of N samples with true class y, fp64."""

    confidence: Tensor
    """``(N,)``: the largest probability, that of the predicted class."""
    nll: Tensor
    """``(N,)``: ``-log p_y``, in nats."""
    brier: Tensor
    """``(N,)``: ``sum_c (p_c - [c = y])^2``, in [0, 2]."""


class Bins(NamedTuple):
    """The bins of a reliability diagram: bin i has the confidences in ``(i / 10, (i + 1) / 10]``."""

    samples: tuple[int, ...]
    confidence: tuple[float, ...]
    """Mean confidence in each bin; 0 in an empty one."""
    accuracy: tuple[float, ...]
    """Share of correct predictions in each bin; 0 in an empty one."""


METRICS = {"confidence": 1.0, "ece": 1.0, "ece_batched": 1.0, "nll": sys.float_info.max, "brier": 2.0}
"""Names of the metrics of :func:`calibration`, with the largest possible value of each; the smallest is 0."""


def summarize_probabilities(logits: Tensor, labels: Tensor) -> Probabilities:
    """Confidence, log loss and Brier score of ``softmax(logits)`` in fp64 on the device of the logits.

    Args:
        logits: ``(B, C)`` at the scale of the softmax, of exactly the classes that the data set has.
        labels: ``(B,)`` int64; the result of a sample with a negative label has no meaning.
    """
    log_probabilities = logits.double().log_softmax(1)
    columns = labels.clamp_min(0)[:, None]
    nll = -log_probabilities.gather(1, columns)[:, 0]
    errors = log_probabilities.exp_()
    confidence = errors.amax(1)
    errors.scatter_add_(1, columns, errors.new_full(columns.shape, -1.0))
    return Probabilities(confidence, nll, errors.square_().sum(1))


def calibration(probabilities: Probabilities, right: Tensor) -> dict[str, float]:
    """All metrics of calibration.

    ``confidence``, ``nll`` and ``brier`` are means over the samples; ``ece`` is the calibration error over all of
    them, and ``ece_batched`` that of batches of 512 in the order of the data set, as CaRot's code measures it.

    Args:
        right: ``(N,)`` bool: whether the predicted class is the true one.
    """
    confidence, nll, brier = probabilities
    return {
        "confidence": float(confidence.mean()),
        "ece": calibration_error(confidence, right),
        "ece_batched": calibration_error(confidence, right, ECE_BATCH),
        "nll": float(nll.mean()),
        "brier": float(brier.mean()),
    }


def calibration_error(confidence: Tensor, right: Tensor, batch_size: int | None = None) -> float:
    """Expected calibration error (L1), ``sum_b n_b / N |accuracy_b - mean confidence_b|`` over the bins b.

    Few samples in a bin make its accuracy noisy, so that even a calibrated classifier has an error, which is
    larger in small batches than over all samples. Errors of different batch sizes must not be compared.

    Args:
        confidence: ``(N,)`` fp64, in the order of the data set.
        right: ``(N,)`` bool.
        batch_size: average the errors of successive batches of this size, weighted by their numbers of samples;
            None: one error over all samples.
    """
    import torch

    count = len(confidence)
    batches = torch.arange(count) // (batch_size or count)
    # The weighted mean over batches of n_b / n_batch |gap| is the sum of |n_b gap| over batches and bins, over N.
    gaps = torch.bincount(batches * BINS + _bin_of(confidence), weights=confidence - right.double())
    return float(gaps.abs().sum()) / count


def reliability(confidence: Tensor, right: Tensor) -> Bins:
    """The bins of a reliability diagram.

    Args:
        confidence: ``(N,)`` fp64.
        right: ``(N,)`` bool.
    """
    import torch

    bins = _bin_of(confidence)
    samples = torch.bincount(bins, minlength=BINS)
    means = (
        torch.bincount(bins, weights=values.double(), minlength=BINS) / samples.clamp_min(1)
        for values in (confidence, right)
    )
    mean_confidence, accuracy = (tuple(mean.tolist()) for mean in means)
    return Bins(tuple(samples.tolist()), mean_confidence, accuracy)


def _bin_of(confidence: Tensor) -> Tensor:
    """Bin of each confidence; one on an edge belongs to the lower bin, as in scikit-learn's calibration curve."""
    import torch

    inner_edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)[1:-1]
    return torch.bucketize(confidence, inner_edges)
