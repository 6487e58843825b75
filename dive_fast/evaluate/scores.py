"""From predictions to figures: accuracies, recall and F1 over classes, the worst region; all in [0, 1]."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Predictions(NamedTuple):
    """What was predicted for each of N samples, on the CPU, in the order of the data set."""

    label: Tensor
    """``(N,)`` int64: the true class."""
    predicted: Tensor
    """``(N,)`` int64: the class with the largest logit."""
    in_top5: Tensor
    """``(N,)`` int64: 1 where the true class is among the five largest logits, else 0."""


class Regions(NamedTuple):
    """Which region each sample is from."""

    of_sample: Tensor
    """``(N,)`` int64."""
    names: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    """Regions that the worst is not looked for among."""


def scores(predictions: Predictions, regions: Regions | None = None) -> dict[str, float]:
    """Every figure of a classified set.

    ``top1``, ``top5``; ``mean_class_recall`` and ``macro_f1``: means over the classes that occur among the true
    ones, as WILDS takes them; with regions ``worst_region``, the smallest accuracy of one, and ``region/<name>``.
    """
    label, predicted, in_top5 = predictions
    right = label == predicted
    classes = int(torch.cat([label, predicted]).max()) + 1
    support = torch.bincount(label, minlength=classes)
    hits = torch.bincount(label[right], minlength=classes).double()
    claims = torch.bincount(predicted, minlength=classes)
    occurs = support > 0
    found = {
        "top1": _share(right),
        "top5": _share(in_top5),
        "mean_class_recall": float((hits[occurs] / support[occurs]).mean()),
        # 2 TP / (2 TP + FP + FN), which is 0 for a class that no sample of was found.
        "macro_f1": float((2 * hits[occurs] / (support + claims)[occurs]).mean()),
    }
    if regions is not None:
        shares = {
            name: _share(right[regions.of_sample == region])
            for region, name in enumerate(regions.names)
            if bool((regions.of_sample == region).any())
        }
        counted = [share for name, share in shares.items() if name not in regions.left_out]
        found["worst_region"] = min(counted)
        found |= {f"region/{name}": share for name, share in shares.items()}
    return found


def recall_at(ranks: Tensor, cut_offs: Sequence[int] = (1, 5, 10)) -> list[float]:
    """The share of queries whose best right answer is among the first K, for each K.

    Args:
        ranks: ``(N,)`` int64: how many wrong answers come before the best right one.
    """
    return [_share(ranks < cut_off) for cut_off in cut_offs]


def _share(true: Tensor) -> float:
    # Two integers and one division: the same number as counting by hand gives.
    return int(true.sum()) / len(true)
