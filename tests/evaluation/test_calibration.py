"""Metrics of calibration, compared with sums over samples, with scikit-learn and with a calibrated classifier."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dive_fast.evaluation import plots
from dive_fast.evaluation.calibration import (
    BINS,
    METRICS,
    Probabilities,
    calibration,
    calibration_error,
    reliability,
    summarize_probabilities,
)


def draw(count: int, seed: int, classes: int = 30) -> tuple[Tensor, Tensor]:
    """Logits whose confidences fill all bins above 1 / classes, and labels that are often the predicted class."""
    generator = torch.Generator().manual_seed(seed)
    scale = 6 * torch.rand(count, 1, generator=generator)
    logits = scale * torch.randn(count, classes, generator=generator)
    random = torch.randint(classes, (count,), generator=generator)
    return logits, torch.where(torch.rand(count, generator=generator) < 0.6, logits.argmax(1), random)


def literal_error(confidence: list[float], right: list[bool]) -> float:
    """The definition, bin by bin."""
    error = 0.0
    for index in range(BINS):
        members = [i for i, c in enumerate(confidence) if index / BINS < c <= (index + 1) / BINS]
        if members:
            accuracy = sum(right[i] for i in members) / len(members)
            mean = sum(confidence[i] for i in members) / len(members)
            error += len(members) / len(confidence) * abs(accuracy - mean)
    return error


def test_ece_of_four_samples_is_0_pooled_and_a_quarter_in_halves() -> None:
    confidence, right = torch.full((4,), 0.75, dtype=torch.float64), torch.tensor([True, True, True, False])
    assert calibration_error(confidence, right) == 0
    assert calibration_error(confidence, right, 2) == 0.25
    # A last batch of one sample counts a third as much as one of three.
    assert calibration_error(confidence, right, 3) == 0.75 * 0.25 + 0.25 * 0.75
    assert calibration_error(confidence, right, 512) == 0


@pytest.mark.parametrize("count", [1, 511, 512, 513, 2000])
def test_metrics_equal_definitions_sample_by_sample(count: int) -> None:
    logits, labels = draw(count, count)
    right = logits.argmax(1) == labels
    metrics = calibration(summarize_probabilities(logits, labels), right)
    assert list(metrics) == list(METRICS)
    rows = [[math.exp(value - max(row)) for value in row] for row in logits.double().tolist()]
    shares = [[value / sum(row) for value in row] for row in rows]
    confidence, correct = [max(row) for row in shares], right.tolist()
    batches = [slice(start, start + 512) for start in range(0, count, 512)]
    per_batch = [literal_error(confidence[part], correct[part]) for part in batches]
    expected = {
        "confidence": sum(confidence) / count,
        "ece": literal_error(confidence, correct),
        "ece_batched": sum(
            error * len(confidence[part]) / count for error, part in zip(per_batch, batches, strict=True)
        ),
        "nll": sum(-math.log(row[label]) for row, label in zip(shares, labels.tolist(), strict=True)) / count,
        "brier": sum(
            sum((value - (c == label)) ** 2 for c, value in enumerate(row))
            for row, label in zip(shares, labels.tolist(), strict=True)
        )
        / count,
    }
    assert metrics == pytest.approx(expected, abs=1e-12)


def test_metrics_equal_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    curves = pytest.importorskip("sklearn.calibration")
    logits, labels = draw(3000, 1)
    shares, right = logits.double().softmax(1).numpy(), logits.argmax(1) == labels
    summaries = summarize_probabilities(logits, labels)
    measured = calibration(summaries, right)
    classes = range(shares.shape[1])
    assert measured["nll"] == pytest.approx(metrics.log_loss(labels, shares, labels=classes), abs=1e-12)
    assert measured["brier"] == pytest.approx(metrics.brier_score_loss(labels, shares, labels=classes), abs=1e-12)
    # scikit-learn has the points of the diagram without empty bins, and no calibration error.
    accuracy, confidence = curves.calibration_curve(right, summaries.confidence, n_bins=BINS)
    bins = reliability(summaries.confidence, right)
    filled = np.array(bins.samples) > 0
    assert np.array(bins.accuracy)[filled] == pytest.approx(accuracy, abs=1e-12)
    assert np.array(bins.confidence)[filled] == pytest.approx(confidence, abs=1e-12)
    weights = np.array(bins.samples)[filled] / 3000
    assert measured["ece"] == pytest.approx(float((weights * abs(accuracy - confidence)).sum()), abs=1e-12)


def test_ece_equals_torchmetrics() -> None:
    """torchmetrics puts a confidence on an edge into the upper bin; none of these is on one."""
    torchmetrics = pytest.importorskip("torchmetrics.classification")
    logits, labels = draw(3000, 2)
    metric = torchmetrics.MulticlassCalibrationError(logits.shape[1], n_bins=BINS, norm="l1")
    expected = float(metric(logits.double().softmax(1), labels))
    confidence = summarize_probabilities(logits, labels).confidence
    assert calibration_error(confidence, logits.argmax(1) == labels) == pytest.approx(expected, abs=1e-6)


def test_floor_of_a_calibrated_classifier() -> None:
    """Labels drawn with the predicted confidence: the error is the estimator's own, as docs/evaluation.md says.

    Confidences as those of a good and of a poor classifier, on as many samples as ImageNet's validation set has.
    """
    generator = torch.Generator().manual_seed(0)
    pooled, batched = [], []
    for power in (0.2, 0.3, 0.6, 1.0):
        confidence = torch.rand(50_000, generator=generator, dtype=torch.float64) ** power
        right = torch.rand(50_000, generator=generator, dtype=torch.float64) < confidence
        pooled.append(calibration_error(confidence, right))
        batched.append(calibration_error(confidence, right, 512))
    assert all(0.002 < error < 0.006 for error in pooled)
    assert all(0.028 < error < 0.047 for error in batched)


def test_reliability_puts_edges_into_the_lower_bin() -> None:
    confidence = torch.tensor([0.05, 0.1, 0.1 + 1e-12, 0.5, 0.95, 1.0], dtype=torch.float64)
    bins = reliability(confidence, torch.tensor([True, False, True, True, False, True]))
    assert bins.samples == (2, 1, 0, 0, 1, 0, 0, 0, 0, 2)
    assert bins.accuracy == (0.5, 1, 0, 0, 1, 0, 0, 0, 0, 0.5)
    assert bins.confidence == pytest.approx((0.075, 0.1, 0, 0, 0.5, 0, 0, 0, 0, 0.975))


def test_diagrams_leave_out_rows_without_calibration(tmp_path: Path) -> None:
    retrieval = {"title": "pairs", "set": "pairs", "image_to_text_r1": 0.5}
    assert not plots.reliability([retrieval], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    logits, labels = draw(100, 3)
    summaries, right = summarize_probabilities(logits, labels), logits.argmax(1) == labels
    row = {"title": "set", "set": "set", "top1": 0.6} | calibration(summaries, right)
    row["reliability"] = reliability(summaries.confidence, right)._asdict()
    for count in (1, 5):
        assert plots.reliability([retrieval, *[row] * count], tmp_path / f"{count}.png", "a model")
    sizes = [Image.open(tmp_path / f"{count}.png").size for count in (1, 5)]
    assert sizes[1][0] > 3 * sizes[0][0]  # four panels in a row, the fifth below
    assert sizes[1][1] > 1.5 * sizes[0][1]


def test_summaries_of_extreme_logits_are_finite() -> None:
    logits = torch.tensor([[0.0, 3000.0], [3000.0, 0.0], [1.0, 1.0]])
    summaries = summarize_probabilities(logits, torch.tensor([0, 0, -2]))
    assert summaries.nll.tolist() == pytest.approx([3000, 0, math.log(2)])
    assert summaries.brier.tolist() == pytest.approx([2, 0, 0.5])
    assert summaries.confidence.tolist() == [1, 1, 0.5]
    assert isinstance(summaries, Probabilities)
