"""Measures of how far fine-tuning has moved the geometry of the embeddings.

Embeddings are unit rows; ``before`` and ``after`` have the same samples in the same order. Sums are fp64 and over
blocks of rows, on their device: memory besides the rows is a few numbers for each pair. Time grows with N D^2, and
for uniformity with N^2 D.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dive_fast.evaluation.geometry.pair_moments import (
    Moments,
    Spreads,
    in_fp64,
    mean_row,
    moments,
    pool,
    spreads_of_distances,
)
from dive_fast.model.features import Pairs
from dive_fast.numerics import full_fp32

UNIFORMITY_SCALE = 2.0
"""t of the uniformity, as in Wang & Isola (2020)."""
QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}
"""Quantiles of the lengths of difference vectors that are reported."""
ROUNDING = 1e-13
"""Squared distance of unit rows that fp32 rounding alone explains; rows no further apart have no geometry."""
BLOCK = 2048
"""Rows that are in memory in fp64 at once: 8 MiB at width 512, and 16 MiB for similarities in fp32."""
WELL_CONDITIONED = 2
"""Rows for each dimension from which the moments of all distances come from sums over rows."""


class GeometryError(ValueError):
    """The embeddings have no geometry to measure; the message is one line and says why."""


@dataclass(frozen=True)
class Differences:
    """Difference vectors of N pairs, Eq. 4-5, and their mean."""

    before: Pairs
    after: Pairs
    average: Tensor
    """``(D,)`` fp64: m = mean_j (u_j + v_j) / 2 over these pairs; Eq. 6 without its memory of other batches."""

    @property
    def image(self) -> Tensor:
        """``(N, D)``: u_j"""
        return self.after.image - self.before.image

    @property
    def text(self) -> Tensor:
        """``(N, D)``: v_j"""
        return self.after.text - self.before.text

    def blocks(self, block: int) -> Iterator[tuple[Tensor, Tensor]]:
        """u and v, some rows at a time."""
        return _differences(self.before, self.after, block)


def _differences(before: Pairs, after: Pairs, block: int) -> Iterator[tuple[Tensor, Tensor]]:
    for first in range(0, len(before.image), block):
        part = slice(first, first + block)
        yield after.image[part] - before.image[part], after.text[part] - before.text[part]


def compare(before: Pairs, after: Pairs, block: int = BLOCK) -> dict[str, float]:
    """All measures of this module by name; docs/geometry.md describes each. Names are stable.

    Args:
        before, after: ``(N, D)`` unit rows for the same N >= 3 pairs, on one device.
        block: rows that are in memory in fp64 at once.

    Raises:
        GeometryError: too few or unequal rows, rows that are not finite, or embeddings that all coincide.
    """
    for pairs in (before, after):
        _check_counts("images and captions", len(pairs.image), len(pairs.text))
    halves = {
        "_image": ([before.image], [after.image]),
        "_text": ([before.text], [after.text]),
        "": (list(before), list(after)),
    }
    _check_rows("rsa_image", before.image, after.image)
    _check_rows("rsa_text", before.text, after.text)
    of_image = moments(before.image, after.image, block, normalize=True)
    of_text = moments(before.text, after.text, block, normalize=True)
    of_half = {"_image": of_image, "_text": of_text, "": pool([of_image, of_text])}
    metrics = {f"rsa{half}": _rsa(of_half[half], *rows, block, f"rsa{half}") for half, rows in halves.items()} | {
        f"cka{half}": _cka(of_half[half], f"cka{half}") for half in halves
    }
    return metrics | describe(after, block) | difference_statistics(differences(before, after, block), block)


def describe(pairs: Pairs, block: int = BLOCK) -> dict[str, float]:
    """Measures of one model: ``alignment``, ``uniformity_image``, ``uniformity_text``, ``modality_gap``.

    Args:
        pairs: ``(N, D)`` unit rows for N >= 3 pairs.

    Raises:
        GeometryError: too few or unequal rows.
    """
    _check_counts("images and captions", len(pairs.image), len(pairs.text))
    return {
        "alignment": alignment(pairs, block),
        "uniformity_image": uniformity(pairs.image, block),
        "uniformity_text": uniformity(pairs.text, block),
        "modality_gap": modality_gap(pairs, block),
    }


def rsa(before: Tensor, after: Tensor, block: int = BLOCK, *, name: str = "rsa") -> float:
    """Representation similarity analysis (paper, appendix D): correlation of distances before and after.

    The Pearson correlation between the cosine distances of all pairs i < j before and after fine-tuning, in time
    that grows with N D^2: see :mod:`dive_fast.evaluation.geometry.pair_moments`.

    Args:
        before, after: ``(N, D)`` unit rows for the same N >= 3 samples; D may differ.
        block: rows that are in memory in fp64 at once.
        name: name of the score in errors.

    Raises:
        GeometryError: fewer than three rows, different numbers of rows, rows that are not finite, or rows that all
            have the same distance, whose correlation is undefined.
    """
    _check_rows(name, before, after)
    return _rsa(moments(before, after, block, normalize=True), [before], [after], block, name)


def _rsa(moments: Moments, before: list[Tensor], after: list[Tensor], block: int, name: str) -> float:
    """RSA of rows in parts, and the moments of all of them."""
    width = max(len(mean) for mean in moments.means)
    if moments.size >= WELL_CONDITIONED * width:
        spreads = spreads_of_distances(moments, before, after, block)
    else:
        spreads = _spreads_by_pairs(moments, torch.cat(before), torch.cat(after), block)
    for when, spread in (("before", spreads.before), ("after", spreads.after)):
        if spread <= ROUNDING**2:
            raise GeometryError(
                f"{name}: {when} fine-tuning all embeddings are equally far from one another; "
                "a correlation needs distances that differ"
            )
    return _within_one(spreads.both / math.sqrt(spreads.before * spreads.after))


def _spreads_by_pairs(moments: Moments, before: Tensor, after: Tensor, block: int) -> Spreads:
    """Variances and covariance of the distances of few rows, pair by pair."""
    count = moments.size
    means = [float(product.trace()) / (count - 1) for product in (moments.xx, moments.yy)]
    sums = torch.zeros(5, dtype=torch.float64, device=before.device)
    tiles = (_distances(rows, centre, block) for rows, centre in zip((before, after), moments.means, strict=True))
    for distances in zip(*tiles, strict=True):
        # Correlation does not depend on a constant shift; subtracting the mean keeps the sums well conditioned.
        x, y = (tile - mean for tile, mean in zip(distances, means, strict=True))
        sums += torch.stack([x.sum(), y.sum(), x.dot(x), y.dot(y), x.dot(y)])
    x_mean, y_mean, xx, yy, xy = (sums / (count * (count - 1) / 2)).tolist()
    return Spreads(xx - x_mean**2, yy - y_mean**2, xy - x_mean * y_mean)


def _distances(rows: Tensor, centre: Tensor, block: int) -> Iterator[Tensor]:
    """Cosine distances of all pairs i < j in fp64, tile by tile, flat."""
    for first in range(0, len(rows), block):
        (left,) = in_fp64(rows[first : first + block], block, normalize=True, centre=centre)
        for second in range(first, len(rows), block):
            (right,) = in_fp64(rows[second : second + block], block, normalize=True, centre=centre)
            tile = (left.square().sum(1)[:, None] + right.square().sum(1)) / 2 - left @ right.T
            yield tile[torch.ones_like(tile, dtype=torch.bool).triu(1)] if second == first else tile.flatten()


def cka(before: Tensor, after: Tensor, block: int = BLOCK, *, name: str = "cka") -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019, Eq. 4 by features): 1 for equal geometries.

    ``|Y'X|^2 / (|X'X| |Y'Y|)`` in Frobenius norms, with X and Y the rows minus their mean. Biased towards 1 unless
    N is much larger than D.

    Args:
        before, after: ``(N, D)`` rows for the same N >= 3 samples; D may differ.
        block: rows that are in memory in fp64 at once.
        name: name of the score in errors.

    Raises:
        GeometryError: fewer than three rows, different numbers of rows, rows that are not finite, or all equal.
    """
    _check_rows(name, before, after)
    return _cka(moments(before, after, block, normalize=False), name)


def _cka(moments: Moments, name: str) -> float:
    for when, product in (("before", moments.xx), ("after", moments.yy)):
        if float(product.trace()) / moments.size <= ROUNDING:
            raise GeometryError(f"{name}: {when} fine-tuning all embeddings coincide; they have no geometry")
    xx, yy, xy = (float(product.norm()) for product in (moments.xx, moments.yy, moments.xy))
    return _within_one(xy * xy / (xx * yy))


def alignment(pairs: Pairs, block: int = BLOCK) -> float:
    """Mean squared distance between an image and its caption (Wang & Isola 2020, alpha = 2): 0 to 4."""
    parts = zip(pairs.image.split(block), pairs.text.split(block), strict=True)
    return _mean([lengths_of(image - text).square() for image, text in parts])


def uniformity(rows: Tensor, block: int = BLOCK) -> float:
    """Uniformity of rows on the sphere (Wang & Isola 2020): ``log mean_{i<j} exp(-2 |x_i - x_j|^2)``.

    Distances come from products of rows minus their mean in the data type of the rows. In fp32 their errors are at
    most about D 2^-24 of the squared distances from the mean; errors of single distances cancel, and the result is
    exact to 1e-6.

    Args:
        rows: ``(N, D)`` unit rows, N >= 2.

    Returns:
        0 where all rows coincide, lower the more even they are; not below -4 except for small N.
    """
    count, dtype = len(rows), rows.dtype
    centre = mean_row(rows, block, normalize=True)
    total = torch.zeros((), dtype=torch.float64, device=rows.device)

    def extended(first: int) -> tuple[Tensor, Tensor]:
        """Two factors with -t |x_i - x_j|^2 = 2 t x_i.x_j - t |x_i|^2 - t |x_j|^2 as their product."""
        (wide,) = in_fp64(rows[first : first + block], block, normalize=True, centre=centre)
        square, one = -UNIFORMITY_SCALE * wide.square().sum(1, keepdim=True), wide.new_ones(len(wide), 1)
        left = torch.cat([2 * UNIFORMITY_SCALE * wide, square, one], 1)
        return left.to(dtype), torch.cat([wide, one, square], 1).to(dtype)

    with full_fp32():
        for first in range(0, count, block):
            left, right = extended(first)
            total += (left @ right.T).expm1_().triu_(1).sum(1).double().sum()
            for second in range(first + block, count, block):
                total += (left @ extended(second)[1].T).expm1_().sum(1).double().sum()
    return math.log1p(float(total) / (count * (count - 1) / 2))


def modality_gap(pairs: Pairs, block: int = BLOCK) -> float:
    """Distance between the mean image and the mean caption embedding (Liang et al. 2022)."""
    image, text = (mean_row(rows, block) for rows in pairs)
    return float((image - text).norm())


def differences(before: Pairs, after: Pairs, block: int = BLOCK) -> Differences:
    """Difference vectors: each embedding after fine-tuning minus the one before.

    Args:
        before, after: ``(N, D)`` unit rows for the same pairs.

    Raises:
        GeometryError: the embeddings differ in number or width.
    """
    if before.image.shape != after.image.shape or before.text.shape != after.text.shape:
        raise GeometryError(
            f"difference vectors need embeddings of one shape, got {tuple(before.image.shape)} before and "
            f"{tuple(after.image.shape)} after fine-tuning"
        )
    sums = [
        u.sum(0, dtype=torch.float64) + v.sum(0, dtype=torch.float64)
        for u, v in _differences(before, after, block)
    ]
    return Differences(before, after, torch.stack(sums).sum(0) / (2 * len(before.image)))


def difference_statistics(vectors: Differences, block: int = BLOCK) -> dict[str, float]:
    """Lengths of u, v and m, the losses AVL and PVL, and the equality of the vectors; see docs/geometry.md."""
    m, average_norm = vectors.average, float(vectors.average.norm())
    parts = [_statistics_of_rows(u, v, m) for u, v in vectors.blocks(block)]
    of_rows = _OfRows(*(torch.cat(each) for each in zip(*parts, strict=True)))
    lengths = {"image": of_rows.image_length, "text": of_rows.text_length}
    statistics: dict[str, float] = {}
    for name, values in lengths.items():
        statistics |= {f"{name}_norm": float(values.mean()), f"{name}_norm_std": float(values.std(correction=0))}
        statistics |= {f"{name}_norm_{key}": float(values.quantile(share)) for key, share in QUANTILES.items()}
    total = sum(float(values.square().mean()) for values in lengths.values())
    return statistics | {
        "average_norm": average_norm,
        "average_loss": float(of_rows.from_average.mean()),
        "pairwise_loss": float(of_rows.from_each_other.mean()),
        # If nothing has moved, all difference vectors are equal.
        "equality": 2 * average_norm**2 / total if total > 0 else 1.0,
        "image_cosine_to_average": float(of_rows.image_cosine.mean()),
        "text_cosine_to_average": float(of_rows.text_cosine.mean()),
        "pair_cosine": float(of_rows.pair_cosine.mean()),
    }


class _OfRows(NamedTuple):
    """Statistics ``(N,)`` fp64 of each pair's difference vectors."""

    image_length: Tensor
    text_length: Tensor
    image_cosine: Tensor
    """Cosine of u to m; a vector of length 0 has no direction: its cosine counts as 0."""
    text_cosine: Tensor
    pair_cosine: Tensor
    """Cosine of u to v."""
    from_average: Tensor
    """|u - m|^2 + |v - m|^2"""
    from_each_other: Tensor
    """|u - v|^2"""


def _statistics_of_rows(u: Tensor, v: Tensor, m: Tensor) -> _OfRows:
    lengths = lengths_of(u), lengths_of(v)
    product = (u.double() * v.double()).sum(1)
    return _OfRows(
        *lengths,
        cosines_to(m, u),
        cosines_to(m, v),
        product / (lengths[0] * lengths[1]).clamp(min=torch.finfo(torch.float64).tiny),
        lengths_of(u - m).square() + lengths_of(v - m).square(),
        lengths_of(u - v).square(),
    )


def lengths_of(rows: Tensor) -> Tensor:
    """Euclidean lengths of rows: ``(N, D) -> (N,)`` fp64."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return lengths


def cosines_to(direction: Tensor, rows: Tensor) -> Tensor:
    """Cosines ``(N,)`` fp64 of rows ``(N, D)`` to a direction ``(D,)``; 0 where either has length 0."""
    scale = lengths_of(rows) * direction.norm()
    return (rows.double() @ direction.double()) / scale.clamp(min=torch.finfo(torch.float64).tiny)


def _mean(parts: list[Tensor]) -> float:
    return float(torch.cat(parts).mean())


def _within_one(value: float) -> float:
    """Clamps a number to [-1, 1], which rounding may have exceeded."""
    return max(-1.0, min(1.0, value))


def _check_rows(name: str, before: Tensor, after: Tensor) -> None:
    _check_counts(name, len(before), len(after))
    for when, rows in (("before", before), ("after", after)):
        if not bool(torch.stack(rows.aminmax()).isfinite().all()):  # a NaN is both
            raise GeometryError(f"{name}: {when} fine-tuning not all embeddings are finite")


def _check_counts(name: str, first: int, second: int) -> None:
    if first != second or first < 3:
        raise GeometryError(f"{name}: expected the same number of rows, at least 3, got {first} and {second}")
