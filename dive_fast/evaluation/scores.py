"""Metrics of predictions: accuracies, recall and F1 over classes, the worst region, recall at K; all in [0, 1]."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Predictions(NamedTuple):
    """Labels and predictions of N samples, on the CPU, in the order of the data set."""

    label: Tensor
    """``(N,)`` int64: the true class."""
    predicted: Tensor
    """``(N,)`` int64: the class with the largest logit."""
    in_top5: Tensor
    """``(N,)`` int64: 1 where the true class is among the five largest logits, otherwise 0."""


class Regions(NamedTuple):
    """The region of each sample."""

    of_sample: Tensor
    """``(N,)`` int64: index into ``names``."""
    names: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    """Regions that ``worst_region`` ignores."""


def scores(predictions: Predictions, regions: Regions | None = None) -> dict[str, float]:
    """All metrics of a classified set.

    ``top1`` and ``top5``; ``mean_class_recall`` and ``macro_f1``, means over the classes that occur in the labels,
    as in WILDS; with regions also ``region/<name>``, the accuracy in each, and ``worst_region``, the smallest.
    """
    label, predicted, in_top5 = predictions
    right = label == predicted
    classes = int(torch.cat([label, predicted]).max()) + 1
    support = torch.bincount(label, minlength=classes)
    hits = torch.bincount(label[right], minlength=classes).double()
    claims = torch.bincount(predicted, minlength=classes)
    occurs = support > 0
    metrics = {
        "top1": _share(right),
        "top5": _share(in_top5),
        "mean_class_recall": float((hits[occurs] / support[occurs]).mean()),
        # 2 TP / (2 TP + FP + FN); 0 for a class without a true positive.
        "macro_f1": float((2 * hits[occurs] / (support + claims)[occurs]).mean()),
    }
    if regions is not None:
        shares = {
            name: _share(right[regions.of_sample == region])
            for region, name in enumerate(regions.names)
            if bool((regions.of_sample == region).any())
        }
        counted = [share for name, share in shares.items() if name not in regions.left_out]
        metrics["worst_region"] = min(counted)
        metrics |= {f"region/{name}": share for name, share in shares.items()}
    return metrics


def recall_at(positions: Tensor, cut_offs: Sequence[int] = (1, 5, 10)) -> list[float]:
    """The share of queries whose best right answer is among the first K, for each K.

    Args:
        positions: ``(N,)`` int64, the number of wrong answers before the best right one.
    """
    return [_share(positions < cut_off) for cut_off in cut_offs]


def _share(true: Tensor) -> float:
    # One division of two integers, so that the result is exactly the rounded fraction.
    return int(true.sum()) / len(true)
