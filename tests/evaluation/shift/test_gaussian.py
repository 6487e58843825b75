"""Gaussians of embeddings and Mahalanobis distances: hand checks, SciPy, scikit-learn, ranks, errors."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from scipy import stats
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import ledoit_wolf as sklearn_ledoit_wolf
from torch import Tensor

from dive_fast.distributed import Ranks
from dive_fast.evaluation.shift.correlations import Thresholds, pearson, spearman
from dive_fast.evaluation.shift.gaussian import (
    FitOptions,
    Gaussian,
    Moments,
    ShiftError,
    distances,
    fit,
    ledoit_wolf,
    moments_of,
)

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
SQUARE = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
ANY = FitOptions(shrinkage=None)


def sample(count: int, width: int, seed: int = 0) -> Tensor:
    """Correlated rows of which the mean is far from zero, as fp32 embeddings are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing + 30
    return rows.float()


def moments(rows: Tensor, ranks: Ranks = ALONE, block: int = 7) -> Moments:
    def blocks() -> Iterator[dict[str, Tensor]]:
        local = ranks.local_range(len(rows))
        for part in rows[local.start : local.stop].split(block):
            yield {"image": part}

    return moments_of(blocks, {"image": rows.shape[1]}, ranks, CPU)["image"]


def fitted(rows: Tensor, options: FitOptions = ANY, ranks: Ranks = ALONE) -> Gaussian:
    return fit(moments(rows, ranks), options)


def test_distances_by_hand() -> None:
    repeated = SQUARE.repeat(10, 1)  # enough samples; S = 4/3 I of four becomes 40/39 I of forty
    values = distances(fitted(repeated), torch.tensor([[3.0, 1.0], [4.0, 5.0]])).distance * math.sqrt(
        40 / 39 * 3 / 4
    )
    assert values.tolist() == pytest.approx([1.7320508, 4.3301270], abs=1e-7)
    four = fit(moments(SQUARE), FitOptions(shrinkage=1.0))  # S is a multiple of I, which shrinkage keeps
    points = torch.cat([torch.tensor([[3.0, 1.0], [4.0, 5.0]]), SQUARE])
    expected = [1.7320508, 4.3301270, *[1.2247449] * 4]
    assert distances(four, points).distance.tolist() == pytest.approx(expected, abs=1e-7)


def test_distances_equal_scipy() -> None:
    rows, others = sample(300, 6), sample(5, 6, seed=1)
    covariance = np.cov(rows.double().numpy().T)
    inverse, mean = np.linalg.inv(covariance), rows.double().numpy().mean(0)
    expected = [mahalanobis(row, mean, inverse) for row in others.double().numpy()]
    measured = distances(fitted(rows), others)
    assert measured.distance.tolist() == pytest.approx(expected, rel=1e-9)
    assert measured.outside.tolist() == [0] * 5


def test_mean_square_on_fitted_samples() -> None:
    rows = sample(400, 6)
    squares = distances(fitted(rows), rows).distance.square()
    assert float(squares.mean()) == pytest.approx(6 * 399 / 400, rel=1e-10)
    held_out = distances(fitted(rows), sample(40_000, 6, seed=2)).distance.square().mean().sqrt()
    expected = fitted(rows).expected_held_out
    assert expected is not None
    assert expected > math.sqrt(6)
    assert float(held_out) == pytest.approx(expected, rel=0.03)


def test_cut_removes_directions_and_reports_them() -> None:
    rows = torch.cat([sample(300, 5), torch.full((300, 2), 4.0)], 1)  # two directions without variance
    gaussian = fitted(rows)
    assert (gaussian.rank, gaussian.width) == (5, 7)
    point = rows[:1].clone()
    point[0, 6] += 1e3
    measured = distances(gaussian, torch.cat([rows[:1], point]))
    assert float(measured.distance[0]) == pytest.approx(float(measured.distance[1]), rel=1e-6)
    assert measured.outside[0] < 1e-9
    assert measured.outside[1] > 0.9
    square = distances(gaussian, rows).distance.square().mean()
    assert float(square) == pytest.approx(5 * 299 / 300, rel=1e-9)
    assert fitted(sample(300, 5), FitOptions(cut=0.5)).rank < 5


def test_ledoit_wolf_equals_scikit_learn() -> None:
    for count in (9, 50):
        rows = sample(count, 20)
        expected, shrinkage = sklearn_ledoit_wolf(rows.double().numpy())
        gaussian = fitted(rows, FitOptions(shrinkage="ledoit-wolf"))
        assert gaussian.shrinkage == pytest.approx(shrinkage, rel=1e-9)
        estimate = gaussian.directions @ gaussian.variances.diag() @ gaussian.directions.T
        # scikit-learn divides by N.
        np.testing.assert_allclose(estimate * (count - 1) / count, expected, rtol=1e-9, atol=1e-12)
    assert ledoit_wolf(moments(SQUARE)) == 0


def on_each_rank(rows: Tensor) -> list[float]:
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), CPU)
    return list(distances(fitted(rows, ranks=ranks), rows).distance.tolist())


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_give_the_same_distances(world_size: int) -> None:
    rows = sample(121, 6)
    alone = distances(fitted(rows), rows).distance.tolist()
    for values in run_ranks(world_size, on_each_rank, rows):
        assert values == pytest.approx(alone, rel=1e-10)


def test_unusable_embeddings_are_refused() -> None:
    with pytest.raises(
        ShiftError, match=r"^fit: 119 samples for .* width 6, of which 120 are needed .* 1\.03 times"
    ):
        fitted(sample(119, 6))
    with pytest.raises(ShiftError, match=r"the covariance is singular; .*--shrinkage ledoit-wolf$"):
        fitted(sample(5, 6))
    assert fitted(sample(5, 6), FitOptions(shrinkage=0.1)).rank == 6
    with pytest.raises(ShiftError, match="at least 2 samples, got 1"):
        fitted(sample(1, 6))
    with pytest.raises(ShiftError, match="all embeddings coincide"):
        fitted(sample(1, 6).repeat(200, 1))
    broken = sample(200, 6)
    broken[3, 2] = math.nan
    with pytest.raises(ShiftError, match="not all embeddings are finite"):
        fitted(broken)
    with pytest.raises(ShiftError, match="width 5 for a Gaussian of width 6"):
        distances(fitted(sample(200, 6)), sample(2, 5))


def test_correlations_equal_scipy() -> None:
    x, y = [1.0, 2.0, 2.0, 7.0, 4.0], [0.9, 0.5, 0.6, 0.1, 0.6]
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y)[0], rel=1e-12)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0], rel=1e-12)
    assert pearson([1, 2], [1, 2]) is pearson([0.1] * 5, y) is None
    with pytest.raises(ValueError, match="same number"):
        pearson(x, y[1:])
    assert [Thresholds().group(ratio) for ratio in (0.9, 1.02, 1.0999, 1.1, 9)] == [
        "same",
        "near",
        "near",
        "far",
        "far",
    ]
