"""Measures of how far fine-tuning has moved the geometry of the embeddings.

Embeddings are unit rows; ``before`` and ``after`` have the same samples in the same order. Sums are accumulated in
fp64 over blocks of rows: memory grows with N, not with N squared.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dive_fast.model.features import Pairs

UNIFORMITY_SCALE = 2.0
"""t of the uniformity, as in Wang & Isola (2020)."""
QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}
"""Quantiles of the lengths of difference vectors that are reported."""
ROUNDING = 1e-13
"""Squared distance of unit rows that fp32 rounding alone explains; rows no further apart have no geometry."""


class GeometryError(ValueError):
    """The embeddings have no geometry to measure; the message is one line and says why."""


class Differences(NamedTuple):
    """Difference vectors of N pairs, Eq. 4-5, and their mean."""

    image: Tensor
    """``(N, D)``: u_j"""
    text: Tensor
    """``(N, D)``: v_j"""
    average: Tensor
    """``(D,)`` fp64: m = mean_j (u_j + v_j) / 2 over these pairs; Eq. 6 without its memory of other batches."""


def compare(before: Pairs, after: Pairs, block: int = 1024) -> dict[str, float]:
    """All measures of this module by name; docs/geometry.md describes each. Names are stable.

    Args:
        before, after: ``(N, D)`` unit rows for the same N >= 3 pairs, on one device.
        block: rows whose similarities are in memory at once.

    Raises:
        GeometryError: too few or unequal rows, rows that are not finite, or embeddings that all coincide.
    """
    for pairs in (before, after):
        _check_counts("images and captions", len(pairs.image), len(pairs.text))
    both = torch.cat(before), torch.cat(after)
    halves = {"_image": (before.image, after.image), "_text": (before.text, after.text), "": both}
    metrics = {f"rsa{half}": rsa(*rows, block, name=f"rsa{half}") for half, rows in halves.items()}
    metrics |= {f"cka{half}": cka(*rows, block, name=f"cka{half}") for half, rows in halves.items()}
    return metrics | describe(after, block) | difference_statistics(differences(before, after))


def describe(pairs: Pairs, block: int = 1024) -> dict[str, float]:
    """Measures of one model: ``alignment``, ``uniformity_image``, ``uniformity_text``, ``modality_gap``.

    Args:
        pairs: ``(N, D)`` unit rows for N >= 3 pairs.

    Raises:
        GeometryError: too few or unequal rows.
    """
    _check_counts("images and captions", len(pairs.image), len(pairs.text))
    return {
        "alignment": alignment(pairs),
        "uniformity_image": uniformity(pairs.image, block),
        "uniformity_text": uniformity(pairs.text, block),
        "modality_gap": modality_gap(pairs),
    }


def rsa(before: Tensor, after: Tensor, block: int = 1024, *, name: str = "rsa") -> float:
    """Representation similarity analysis (paper, appendix D): correlation of distances before and after.

    The Pearson correlation between the cosine distances of all pairs i < j before and after fine-tuning.

    Args:
        before, after: ``(N, D)`` unit rows for the same N >= 3 samples; D may differ.
        block: rows in a tile; memory is ``block * block`` in addition to the rows.
        name: name of the score in errors.

    Raises:
        GeometryError: fewer than three rows, different numbers of rows, rows that are not finite, or rows that all
            have the same distance, whose correlation is undefined.
    """
    _check_rows(name, before, after)
    # Correlation does not depend on a constant shift; subtracting the mean keeps the sums well conditioned.
    shifts = [_mean_similarity(rows, block) for rows in (before, after)]
    sums = torch.zeros(5, dtype=torch.float64, device=before.device)
    for similarities in _similarities((before, after), block):
        x, y = (values - shift for values, shift in zip(similarities, shifts, strict=True))
        sums += torch.stack([x.sum(), y.sum(), x.dot(x), y.dot(y), x.dot(y)])
    x_mean, y_mean, xx, yy, xy = (sums / _num_pairs(len(before))).tolist()
    spreads = {"before": xx - x_mean**2, "after": yy - y_mean**2}
    for when, spread in spreads.items():
        if spread <= ROUNDING**2:
            raise GeometryError(
                f"{name}: {when} fine-tuning all embeddings are equally far from one another; "
                "a correlation needs distances that differ"
            )
    return _within_one((xy - x_mean * y_mean) / math.sqrt(spreads["before"] * spreads["after"]))


def cka(before: Tensor, after: Tensor, block: int = 1024, *, name: str = "cka") -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019, Eq. 4 by features): 1 for equal geometries.

    ``|Y'X|^2 / (|X'X| |Y'Y|)`` in Frobenius norms, with X and Y the rows minus their mean. Biased towards 1 unless
    N is much larger than D.

    Args:
        before, after: ``(N, D)`` unit rows for the same N >= 3 samples; D may differ.
        block: rows that are in memory in fp64 at once.
        name: name of the score in errors.

    Raises:
        GeometryError: fewer than three rows, different numbers of rows, rows that are not finite, or all equal.
    """
    _check_rows(name, before, after)
    means = [rows.mean(0, dtype=torch.float64) for rows in (before, after)]
    products: list[Tensor] = []
    for first in range(0, len(before), block):
        x, y = (
            rows[first : first + block].double() - mean for rows, mean in zip((before, after), means, strict=True)
        )
        block_products = [x.T @ x, y.T @ y, y.T @ x]
        products = [a + b for a, b in zip(products, block_products, strict=True)] if products else block_products
    for when, product in zip(("before", "after"), products[:2], strict=True):
        if float(product.trace()) / len(before) <= ROUNDING:
            raise GeometryError(f"{name}: {when} fine-tuning all embeddings coincide; they have no geometry")
    xx, yy, xy = (float(product.norm()) for product in products)
    return _within_one(xy * xy / (xx * yy))


def alignment(pairs: Pairs) -> float:
    """Mean squared distance between an image and its caption (Wang & Isola 2020, alpha = 2): 0 to 4."""
    return _mean_square(pairs.image - pairs.text)


def uniformity(rows: Tensor, block: int = 1024) -> float:
    """Uniformity of rows on the sphere (Wang & Isola 2020): ``log mean_{i<j} exp(-2 |x_i - x_j|^2)``.

    Args:
        rows: ``(N, D)`` unit rows, N >= 2.

    Returns:
        0 where all rows coincide, lower the more even they are; not below -4 except for small N.
    """
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    for (similarity,) in _similarities((rows,), block):
        # |x - y|^2 = 2 - 2 x.y for unit rows.
        total += (2 * UNIFORMITY_SCALE * (similarity - 1)).exp_().sum()
    return math.log(float(total) / _num_pairs(len(rows)))


def modality_gap(pairs: Pairs) -> float:
    """Distance between the mean image and the mean caption embedding (Liang et al. 2022)."""
    image, text = (rows.mean(0, dtype=torch.float64) for rows in pairs)
    return float((image - text).norm())


def differences(before: Pairs, after: Pairs) -> Differences:
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
    u, v = after.image - before.image, after.text - before.text
    return Differences(u, v, (u.mean(0, dtype=torch.float64) + v.mean(0, dtype=torch.float64)) / 2)


def difference_statistics(vectors: Differences) -> dict[str, float]:
    """Lengths of u, v and m, the losses AVL and PVL, and the equality of the vectors; see docs/geometry.md."""
    m, average_norm = vectors.average, float(vectors.average.norm())
    lengths = {name: lengths_of(rows) for name, rows in (("image", vectors.image), ("text", vectors.text))}
    statistics: dict[str, float] = {}
    for name, values in lengths.items():
        statistics |= {f"{name}_norm": float(values.mean()), f"{name}_norm_std": float(values.std(correction=0))}
        statistics |= {f"{name}_norm_{key}": float(values.quantile(share)) for key, share in QUANTILES.items()}
    total = sum(float(values.square().mean()) for values in lengths.values())
    # A vector of length 0 has no direction: its cosine counts as 0.
    cosines = {name: cosines_to(m, rows) for name, rows in (("image", vectors.image), ("text", vectors.text))}
    product = (vectors.image.double() * vectors.text.double()).sum(1)
    pair_cosines = product / (lengths["image"] * lengths["text"]).clamp(min=torch.finfo(torch.float64).tiny)
    return statistics | {
        "average_norm": average_norm,
        "average_loss": _mean_square(vectors.image - m) + _mean_square(vectors.text - m),
        "pairwise_loss": _mean_square(vectors.image - vectors.text),
        # If nothing has moved, all difference vectors are equal.
        "equality": 2 * average_norm**2 / total if total > 0 else 1.0,
        "image_cosine_to_average": float(cosines["image"].mean()),
        "text_cosine_to_average": float(cosines["text"].mean()),
        "pair_cosine": float(pair_cosines.mean()),
    }


def lengths_of(rows: Tensor) -> Tensor:
    """Euclidean lengths of rows: ``(N, D) -> (N,)`` fp64."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return lengths


def cosines_to(direction: Tensor, rows: Tensor) -> Tensor:
    """Cosines ``(N,)`` fp64 of rows ``(N, D)`` to a direction ``(D,)``; 0 where either has length 0."""
    scale = lengths_of(rows) * direction.norm()
    return (rows.double() @ direction.double()) / scale.clamp(min=torch.finfo(torch.float64).tiny)


def _similarities(sets: Sequence[Tensor], block: int) -> Iterator[list[Tensor]]:
    """Yields cosines of all pairs i < j of rows, tile by tile: one flat fp64 tensor for each set."""
    count = len(sets[0])
    for first in range(0, count, block):
        left = [_directions(rows[first : first + block]) for rows in sets]
        for second in range(first, count, block):
            right = [_directions(rows[second : second + block]) for rows in sets]
            tiles = [a @ b.T for a, b in zip(left, right, strict=True)]
            if second == first:
                above = torch.ones_like(tiles[0], dtype=torch.bool).triu(1)
                yield [tile[above] for tile in tiles]
            else:
                yield [tile.flatten() for tile in tiles]


def _mean_similarity(rows: Tensor, block: int) -> Tensor:
    """Mean cosine of all pairs, up to rounding."""
    parts = [_directions(part).sum(0) for part in rows.split(block)]
    total, count = torch.stack(parts).sum(0), len(rows)
    return (total @ total - count) / (count * (count - 1))


def _directions(rows: Tensor) -> Tensor:
    """Unit rows normalized in fp64: errors of fp32 lengths exceed the distances of embeddings in a narrow cone."""
    wide = rows.double()
    return wide / wide.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def _mean_square(rows: Tensor) -> float:
    """Mean squared length of the rows."""
    return float(lengths_of(rows).square().mean())


def _num_pairs(count: int) -> float:
    return count * (count - 1) / 2


def _within_one(value: float) -> float:
    """Clamps a number to [-1, 1], which rounding may have exceeded."""
    return max(-1.0, min(1.0, value))


def _check_rows(name: str, before: Tensor, after: Tensor) -> None:
    _check_counts(name, len(before), len(after))
    for when, rows in (("before", before), ("after", after)):
        if not bool(rows.isfinite().all()):
            raise GeometryError(f"{name}: {when} fine-tuning not all embeddings are finite")


def _check_counts(name: str, first: int, second: int) -> None:
    if first != second or first < 3:
        raise GeometryError(f"{name}: expected the same number of rows, at least 3, got {first} and {second}")
