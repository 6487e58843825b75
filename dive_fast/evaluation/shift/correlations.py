"""Correlations of shift: with accuracy over sets, and between modalities and models over samples."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = Sequence[float] | NDArray[np.float64]
"""``(n,)``"""
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


def pearson(x: Values, y: Values) -> float | None:
    """Pearson correlation of two lists of n values, in fp64; None for n < 3 or values that are all equal."""
    from scipy import stats

    first, second = _comparable(x, y)
    return None if first is None else float(stats.pearsonr(first, second).statistic)


def spearman(x: Values, y: Values) -> float | None:
    """Rank correlation: :func:`pearson` of the ranks, where equal values share their mean rank."""
    from scipy import stats

    first, second = _comparable(x, y)
    return None if first is None else float(stats.spearmanr(first, second).statistic)


def _comparable(x: Values, y: Values) -> tuple[NDArray[np.float64], NDArray[np.float64]] | tuple[None, None]:
    """Both lists as arrays; None if they have no correlation."""
    first, second = (np.asarray(values, np.float64) for values in (x, y))
    if len(first) != len(second):
        raise ValueError(f"expected the same number of values, got {len(first)} and {len(second)}")
    if len(first) < 3:
        return None, None
    for values in (first, second):
        # Values that are equal up to rounding have no correlation.
        if np.square(values - values.mean()).sum() <= 1e-24 * np.square(values).sum():
            return None, None
    return first, second
