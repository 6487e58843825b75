"""The RSA score against NumPy: correlation of the cosine distances of all pairs."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dive_fast.evaluate.geometry import rsa
from dive_fast.towers import unit


def rows(count: int, width: int, seed: int) -> Tensor:
    return unit(torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def distances(embeddings: Tensor) -> NDArray[np.float64]:
    """Cosine distances of all pairs i < j."""
    points = embeddings.double().numpy()
    points = points / np.linalg.norm(points, axis=1, keepdims=True)
    return np.array([1 - points[i] @ points[j] for i in range(len(points)) for j in range(i + 1, len(points))])


def reference(before: Tensor, after: Tensor) -> float:
    return float(np.corrcoef(distances(before), distances(after))[0, 1])


@pytest.mark.parametrize("count", [3, 4, 50])
def test_rsa_is_the_correlation_of_the_distances_of_all_pairs(count: int) -> None:
    before = rows(count, 8, 0)
    for after in (rows(count, 8, 1), unit(before + 0.3 * rows(count, 8, 2)), unit(before - 2 * before.mean(0))):
        assert rsa(before, after) == pytest.approx(reference(before, after), abs=1e-12)


def test_rsa_keeps_its_digits_where_all_embeddings_are_near_one_another() -> None:
    # As CLIP's are: a narrow cone, where the distances are small beside the similarities.
    cone = rows(1, 32, 0)
    before = unit(cone + 1e-2 * rows(60, 32, 1))
    after = unit(before + 1e-3 * rows(60, 32, 2))
    assert rsa(before, after) == pytest.approx(reference(before, after), abs=1e-9)
    # Embeddings come in fp32, sums are kept in fp64.
    rounded = before.float(), after.float()
    assert rsa(*rounded) == pytest.approx(rsa(*(rows.double() for rows in rounded)), abs=1e-13)


def test_before_and_after_may_differ_in_width() -> None:
    before, after = rows(20, 8, 0), rows(20, 5, 1)
    assert rsa(before, after) == pytest.approx(reference(before, after), abs=1e-12)


@pytest.mark.parametrize("block", [1, 2, 7, 49, 50, 51])
def test_the_size_of_the_blocks_does_not_matter(block: int) -> None:
    before, after = rows(50, 8, 0), rows(50, 8, 1)
    assert rsa(before, after, block) == pytest.approx(rsa(before, after), abs=1e-13)


def test_rsa_is_one_where_the_geometry_has_not_changed() -> None:
    before = rows(40, 8, 0)
    rotation, _ = torch.linalg.qr(rows(8, 8, 3))
    for after in (before, before @ rotation, -before, torch.cat([before, torch.zeros(40, 3)], 1)):
        assert rsa(before, after) == pytest.approx(1, abs=1e-12)
    # Of other samples in the same places, nothing is kept.
    assert abs(rsa(before, before[torch.randperm(40, generator=torch.Generator().manual_seed(0))])) < 0.3


@pytest.mark.parametrize(("before", "after"), [(2, 2), (0, 0), (5, 4), (3, 5)])
def test_too_few_or_unequal_rows_are_an_error(before: int, after: int) -> None:
    message = rf"^rsa: expected the same number of rows, at least 3, got {before} and {after}$"
    with pytest.raises(ValueError, match=message):
        rsa(torch.ones(before, 4), torch.ones(after, 4))
