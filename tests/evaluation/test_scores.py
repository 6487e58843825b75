"""Metrics of predictions, compared with counts class by class and region by region in NumPy."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dive_fast.evaluation.scores import Predictions, Regions, recall_at, scores

Labels = NDArray[np.int64]


def draw(count: int, classes: int, seed: int) -> tuple[Labels, Labels, Labels]:
    """Random labels, predictions of the same and two more classes, and whether the top five are right."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, count) ** 2 % classes  # some classes never occur
    predicted = np.where(rng.random(count) < 0.6, label, rng.integers(0, classes + 2, count))
    return label, predicted, ((predicted == label) | (rng.random(count) < 0.5)).astype(np.int64)


def by_class(label: Labels, predicted: Labels, in_top5: Labels) -> dict[str, float]:
    recalls, f1s = [], []
    for row in np.unique(label):
        hits = int(((label == row) & (predicted == row)).sum())
        recalls.append(hits / int((label == row).sum()))
        claims = int((predicted == row).sum())
        precision = hits / claims if claims else 0.0
        f1s.append(2 * precision * recalls[-1] / (precision + recalls[-1]) if hits else 0.0)
    return {
        "top1": float((label == predicted).mean()),
        "top5": float(in_top5.mean()),
        "mean_class_recall": float(np.mean(recalls)),
        "macro_f1": float(np.mean(f1s)),
    }


@pytest.mark.parametrize(("count", "classes"), [(1, 1), (1, 9), (7, 3), (200, 12), (999, 100)])
def test_scores_equal_counts_class_by_class(count: int, classes: int) -> None:
    for seed in range(3):
        drawn = draw(count, classes, seed)
        metrics = scores(Predictions(*map(torch.from_numpy, drawn)))
        assert metrics == pytest.approx(by_class(*drawn), abs=1e-12)
        assert list(metrics) == list(by_class(*drawn))


def test_scores_equal_scikit_learn_as_in_wilds() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    label, predicted, in_top5 = draw(500, 20, 5)
    metrics = scores(Predictions(*map(torch.from_numpy, (label, predicted, in_top5))))
    occurring = np.unique(label)
    f1 = sklearn.f1_score(label, predicted, average="macro", labels=occurring)
    assert metrics["macro_f1"] == pytest.approx(f1, abs=1e-12)
    recall = sklearn.recall_score(label, predicted, average="macro", labels=occurring)
    assert metrics["mean_class_recall"] == pytest.approx(recall, abs=1e-12)


def test_worst_region_ignores_region_other() -> None:
    label = torch.zeros(10, dtype=torch.int64)
    predicted = torch.tensor([0, 0, 0, 1, 0, 1, 1, 1, 1, 1])
    of_sample = torch.tensor([0, 0, 0, 0, 1, 1, 1, 3, 3, 3])
    regions = Regions(of_sample, ("Asia", "Africa", "nowhere", "Other"), ("Other",))
    metrics = scores(Predictions(label, predicted, label), regions)
    assert metrics["region/Asia"] == 3 / 4
    assert metrics["region/Africa"] == metrics["worst_region"] == 1 / 3
    assert metrics["region/Other"] == 0
    assert "region/nowhere" not in metrics


def test_recall_at_counts_positions_below_k() -> None:
    assert recall_at(torch.tensor([0, 1, 4, 5, 9, 10])) == [1 / 6, 3 / 6, 5 / 6]
