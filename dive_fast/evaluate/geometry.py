"""How far fine-tuning has moved the geometry of the embeddings."""

import torch
from torch import Tensor


def rsa(before: Tensor, after: Tensor, block: int = 1024) -> float:
    """RSA correlation score (paper, appendix D): do the same pairs of embeddings lie near one another?

    The Pearson correlation between the cosine distances of all pairs i < j before and after fine-tuning, summed in
    fp64 over blocks of rows, so that memory stays at ``block * N``.

    Args:
        before, after: ``(N, D)`` unit rows for the same N >= 3 samples; D may differ.

    Raises:
        ValueError: fewer than three rows, or different numbers of rows.
    """
    if len(before) != len(after) or len(before) < 3:
        raise ValueError(f"rsa: expected the same number of rows, at least 3, got {len(before)} and {len(after)}")
    # Correlation does not change when a constant is taken off; the mean distance keeps the sums well conditioned.
    shifts = [_mean_similarity(rows.double()) for rows in (before, after)]
    sums = torch.zeros(5, dtype=torch.float64)
    for first in range(0, len(before), block):
        pairs = []
        for rows, shift in zip((before.double(), after.double()), shifts, strict=True):
            similarity = rows[first : first + block] @ rows[first:].T - shift
            upper = torch.ones_like(similarity, dtype=torch.bool).triu(1)
            pairs.append(similarity[upper])
        x, y = pairs
        sums += torch.stack([x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()]).cpu()
    count = len(before) * (len(before) - 1) / 2
    x_mean, y_mean, xx, yy, xy = sums / count
    return float((xy - x_mean * y_mean) / torch.sqrt((xx - x_mean**2) * (yy - y_mean**2)))


def _mean_similarity(rows: Tensor) -> Tensor:
    total = rows.sum(0)
    count = len(rows)
    return (total @ total - rows.square().sum()) / (count * (count - 1))
