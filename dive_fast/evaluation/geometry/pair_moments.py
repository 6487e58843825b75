"""Variances and covariances of the distances of all pairs of rows, from sums over rows.

The cosine distance of unit rows is half their squared distance. With rows x_i minus their mean and q_i = |x_i|^2,

    d_ij = (q_i + q_j) / 2 - x_i.x_j,        and with y_i, p_i of another set, since sum_i x_i = sum_i y_i = 0,
    sum_ij d_ij = N sum q,
    sum_ij d_ij e_ij = (N sum q p + sum q sum p) / 2 + |X'Y|^2        (Frobenius norm)

over all i and j, where d_ii = 0. So the moments of N^2 distances need N D^2 operations. Subtracting the square of
the mean is well conditioned if N is at least about 2 D, since the products x_i.x_j cannot all be equal then.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Second moments of two sets of N rows about their means, in fp64."""

    size: int
    """N"""
    means: tuple[Tensor, Tensor]
    """``(Dx,)`` and ``(Dy,)``"""
    xx: Tensor
    """``(Dx, Dx)``: X'X of the centred rows."""
    yy: Tensor
    """``(Dy, Dy)``"""
    xy: Tensor
    """``(Dx, Dy)``"""


class Spreads(NamedTuple):
    """Variances and covariance of the distances d and e of all pairs i < j in two sets."""

    before: float
    after: float
    both: float


def moments(x: Tensor, y: Tensor, block: int, *, normalize: bool) -> Moments:
    """The moments of rows ``(N, Dx)`` and ``(N, Dy)``.

    Args:
        block: rows that are in memory in fp64 at once.
        normalize: whether rows are normalized first.
    """
    means = mean_row(x, block, normalize=normalize), mean_row(y, block, normalize=normalize)
    xx, yy, xy = (
        torch.zeros(len(rows), len(columns), dtype=torch.float64, device=x.device)
        for rows, columns in ((means[0], means[0]), (means[1], means[1]), (means[0], means[1]))
    )
    sets = zip(
        in_fp64(x, block, normalize=normalize, centre=means[0]),
        in_fp64(y, block, normalize=normalize, centre=means[1]),
        strict=True,
    )
    for rows, others in sets:
        xx.addmm_(rows.T, rows)
        yy.addmm_(others.T, others)
        xy.addmm_(rows.T, others)
    return Moments(len(x), means, xx, yy, xy)


def pool(parts: Sequence[Moments]) -> Moments:
    """The moments of all rows of several parts about their common means."""
    size = sum(part.size for part in parts)
    x_mean, y_mean = (
        torch.stack([part.size * part.means[side] for part in parts]).sum(0) / size for side in range(2)
    )
    xx, yy, xy = (torch.stack(each).sum(0) for each in zip(*(part[2:] for part in parts), strict=True))
    for part in parts:
        x_shift, y_shift = part.means[0] - x_mean, part.means[1] - y_mean
        xx.addr_(x_shift, x_shift, alpha=part.size)
        yy.addr_(y_shift, y_shift, alpha=part.size)
        xy.addr_(x_shift, y_shift, alpha=part.size)
    return Moments(size, (x_mean, y_mean), xx, yy, xy)


def spreads_of_distances(moments: Moments, x: Sequence[Tensor], y: Sequence[Tensor], block: int) -> Spreads:
    """Variances and covariance of the cosine distances of all pairs.

    Args:
        moments: of all rows, normalized.
        x, y: the rows, in parts.
    """
    count = moments.size
    squares = torch.zeros(3, dtype=torch.float64, device=moments.xx.device)
    for rows, others in zip(x, y, strict=True):
        blocks = zip(
            in_fp64(rows, block, normalize=True, centre=moments.means[0]),
            in_fp64(others, block, normalize=True, centre=moments.means[1]),
            strict=True,
        )
        for part, other in blocks:
            q, p = part.square().sum(1), other.square().sum(1)
            squares += torch.stack([q.dot(q), p.dot(p), q.dot(p)])
    qq, pp, qp = squares.tolist()
    q_sum, p_sum = float(moments.xx.trace()), float(moments.yy.trace())
    values = []
    for product, first, second, matrix in (
        (qq, q_sum, q_sum, moments.xx),
        (pp, p_sum, p_sum, moments.yy),
        (qp, q_sum, p_sum, moments.xy),
    ):
        total = (count * product + first * second) / 2 + float(matrix.square().sum())
        values.append(total / (count * (count - 1)) - first * second / (count - 1) ** 2)
    return Spreads(*values)


def in_fp64(
    rows: Tensor, block: int, *, normalize: bool = False, centre: Tensor | None = None
) -> Iterator[Tensor]:
    """Blocks of rows in fp64.

    Args:
        normalize: whether each row gets length 1: errors of fp32 lengths exceed the distances of embeddings in a
            narrow cone.
        centre: ``(D,)``, subtracted from each row.
    """
    for part in rows.split(block):
        wide = part.double()
        if normalize:
            wide = wide / wide.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        yield wide if centre is None else wide - centre


def mean_row(rows: Tensor, block: int, *, normalize: bool = False) -> Tensor:
    """Mean ``(D,)`` of rows in fp64."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for part in in_fp64(rows, block, normalize=normalize):
        total += part.sum(0)
    return total / len(rows)
