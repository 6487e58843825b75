"""Correlations of shift: with accuracy over sets, and between modalities and models over samples."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

GROUPS = ("same", "near", "far")
"""Groups of sets, by their shift relative to that of held-out samples of the fitted set."""


class Thresholds(NamedTuple):
    """Bounds of the groups, relative to the mean distance of held-out samples of the fitted set."""

    near: float = 1.02
    """From here on a set is near OOD; below it is like the fitted set."""
    far: float = 1.1
    """From here on a set is far OOD."""

    def group(self, ratio: float) -> str:
        """The group of a set whose mean distance is ``ratio`` times that of held-out samples."""
        return GROUPS[(ratio >= self.near) + (ratio >= self.far)]


def pearson(x: Sequence[float] | NDArray[np.float64], y: Sequence[float] | NDArray[np.float64]) -> float | None:
    """Pearson correlation of two lists of n values, in fp64; None for n < 3 or values that are all equal."""
    first, second = (np.asarray(values, np.float64) for values in (x, y))
    if len(first) != len(second):
        raise ValueError(f"expected the same number of values, got {len(first)} and {len(second)}")
    if len(first) < 3:
        return None
    a, b = first - first.mean(), second - second.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    # Values that are equal up to rounding have no correlation.
    if any(float(c @ c) <= 1e-24 * float(v @ v) for c, v in ((a, first), (b, second))) or scale == 0:
        return None
    return max(-1.0, min(1.0, float(a @ b) / scale))


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Rank correlation: :func:`pearson` of the ranks, where equal values share their mean rank."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: Sequence[float]) -> NDArray[np.float64]:
    distinct, row, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    if not len(distinct):
        return np.zeros(0)
    last = np.cumsum(counts)
    mean_rank: NDArray[np.float64] = last - (counts - 1) / 2
    return mean_rank[row]
