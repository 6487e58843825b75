"""One Gaussian fitted to embeddings, and the Mahalanobis distance from it (FRAMES-VQA, arXiv 2505.21755).

    mu = mean z,   S = sum (z - mu)(z - mu)' / (N - 1),   D(x) = sqrt((z - mu)' S^+ (z - mu))

The Gaussian is not class-conditional. All sums are fp64, in two passes over blocks of rows, and are reduced over
ranks; S^+ comes from the eigenvalues of S, with an explicit cut. The mean of D^2 over the N fitted samples is
r (N - 1) / N for r directions that are kept, if S is not shrunk.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dive_fast.distributed import Ranks

CUT = 1e-10
"""Default cut: directions whose variance is at most this share of the largest variance are not used."""
SAMPLES_PER_DIMENSION = 20
"""Samples for each dimension that a covariance needs without shrinkage."""
LEDOIT_WOLF = "ledoit-wolf"

Rows = Mapping[str, Tensor]
"""Rows ``(n, h)`` of the same samples, by the name of what is embedded; h differs between names."""


class ShiftError(ValueError):
    """A distance cannot be measured; the message is one line and says why."""


class FitOptions(NamedTuple):
    """The estimate of the covariance."""

    cut: float = CUT
    """Directions whose variance is at most ``cut`` times the largest variance are not used."""
    shrinkage: float | Literal["ledoit-wolf"] | None = None
    """rho of (1 - rho) S + rho (trace S / h) I in (0, 1], or the estimate of Ledoit and Wolf (2004); None: 0."""


class Moments(NamedTuple):
    """Moments of N rows, over all ranks, in fp64."""

    num_samples: int
    mean: Tensor
    """``(h,)``"""
    products: Tensor
    """``(h, h)``: sum of (z - mu)(z - mu)'."""
    quartic: float
    """Sum of the 4th powers of |z - mu|."""


class Gaussian(NamedTuple):
    """A Gaussian fitted to N rows of width h, on the CPU."""

    num_samples: int
    mean: Tensor
    """``(h,)`` fp64"""
    variances: Tensor
    """``(r,)`` fp64: eigenvalues of the directions that are kept, largest first."""
    directions: Tensor
    """``(h, r)`` fp64: their unit eigenvectors."""
    shrinkage: float
    """rho that was used."""
    condition: float
    """Smallest over largest eigenvalue before the cut."""

    @property
    def width(self) -> int:
        """h"""
        return len(self.mean)

    @property
    def rank(self) -> int:
        """r, the number of directions that are kept."""
        return len(self.variances)

    @property
    def expected_held_out(self) -> float | None:
        """Root mean square D of other samples of the same normal distribution; None if S is shrunk or N too small.

        ``E[D^2] = r (N - 1) (N + 1) / (N (N - r - 2))``: more than r, since mu and S are estimates.
        """
        count, rank = self.num_samples, self.rank
        if self.shrinkage or count <= rank + 2:
            return None
        return math.sqrt(rank * (count - 1) * (count + 1) / (count * (count - rank - 2)))


class Distances(NamedTuple):
    """Distances of n rows from a Gaussian."""

    distance: Tensor
    """``(n,)`` fp64: D."""
    outside: Tensor
    """``(n,)`` fp64: share of |z - mu|^2 in directions that are not kept, which D does not see."""


def check_enough(num_samples: int, width: int, options: FitOptions, name: str) -> None:
    """Refuses a covariance from too few samples.

    Raises:
        ShiftError: there are fewer than :data:`SAMPLES_PER_DIMENSION` samples per dimension, and no shrinkage.
    """
    needed = SAMPLES_PER_DIMENSION * width
    if num_samples < needed and options.shrinkage is None:
        ratio = (num_samples - 1) / (num_samples - width - 2) if num_samples > width + 2 else math.inf
        effect = (
            f"distances of unseen samples of the same distribution would be {math.sqrt(ratio):.2f} times too long"
            if math.isfinite(ratio)
            else "the covariance is singular"
        )
        raise ShiftError(
            f"{name}: {num_samples} samples for a covariance of width {width}, of which {needed} are needed "
            f"({SAMPLES_PER_DIMENSION} per dimension): {effect}; name a larger set, or choose --shrinkage "
            "ledoit-wolf"
        )


def moments_of(
    blocks: Callable[[], Iterable[Rows]], widths: Mapping[str, int], ranks: Ranks, device: torch.device
) -> dict[str, Moments]:
    """The moments of the rows of all ranks, in two passes over them; all ranks must call this.

    Args:
        blocks: starts a pass over this rank's rows, which need not be the same on each rank.
        widths: width h of the rows by name.

    Raises:
        ShiftError: there are fewer than two rows, or a value is not finite.
    """
    sums = {name: torch.zeros(width + 1, dtype=torch.float64, device=device) for name, width in widths.items()}
    with ranks.raise_on_all(ValueError):
        for block in blocks():
            for name, total in sums.items():
                rows = block[name].to(device, torch.float64)
                total[:-1] += rows.sum(0)
                total[-1] += len(rows)
    for name, total in sums.items():
        _sum_over(ranks, total)
        if not bool(total.isfinite().all()):
            raise ShiftError(f"{name}: not all embeddings are finite")
        if total[-1] < 2:
            raise ShiftError(f"{name}: a covariance needs at least 2 samples, got {int(total[-1])}")
    means = {name: total[:-1] / total[-1] for name, total in sums.items()}
    products = {name: total.new_zeros(len(total) - 1, len(total) - 1) for name, total in sums.items()}
    quartics = {name: total.new_zeros(1) for name, total in sums.items()}
    with ranks.raise_on_all(ValueError):
        for block in blocks():
            for name, mean in means.items():
                rows = block[name].to(device, torch.float64) - mean
                products[name].addmm_(rows.T, rows)
                quartics[name] += rows.square().sum(1).square().sum()
    moments = {}
    for name, mean in means.items():
        _sum_over(ranks, products[name])
        _sum_over(ranks, quartics[name])
        count = int(sums[name][-1])
        moments[name] = Moments(count, mean.cpu(), products[name].cpu(), float(quartics[name]))
    return moments


def fit(moments: Moments, options: FitOptions = FitOptions(), name: str = "fit") -> Gaussian:  # noqa: B008
    """The Gaussian of some moments.

    Args:
        name: name of the fitted set and of what is embedded, for errors.

    Raises:
        ShiftError: as :func:`check_enough`, or all embeddings coincide.
    """
    count, mean, products, _ = moments
    width = len(mean)
    check_enough(count, width, options, name)
    covariance = products / (count - 1)
    level = float(covariance.trace()) / width
    # Rounding of fp32 embeddings leaves this much of embeddings that coincide.
    if level <= 1e-13 * max(float(mean.square().mean()), torch.finfo(torch.float64).tiny):
        raise ShiftError(f"{name}: all embeddings coincide; a distance needs embeddings that differ")
    shrinkage = ledoit_wolf(moments) if options.shrinkage == LEDOIT_WOLF else float(options.shrinkage or 0)
    shrunk = covariance * (1 - shrinkage)
    shrunk.diagonal().add_(shrinkage * level)
    variances, directions = torch.linalg.eigh(shrunk)
    variances, directions = variances.flip(0), directions.flip(1)
    kept = int((variances > options.cut * variances[0]).sum())
    condition = float(variances[-1] / variances[0])
    return Gaussian(count, mean, variances[:kept].clone(), directions[:, :kept].clone(), shrinkage, condition)


def ledoit_wolf(moments: Moments) -> float:
    """The shrinkage of Ledoit and Wolf (2004), in [0, 1], from sums over rows.

    With C = sum x x' / N of the centred rows and m = trace C / h:

        delta = (|C|^2 - h m^2) / h,   beta = (sum_i |x_i|^4 / N - |C|^2) / (h N),   rho = min(beta, delta) / delta
    """
    count, mean, products, quartic = moments
    width = len(mean)
    covariance = products / count
    squares, level = float(covariance.square().sum()), float(covariance.trace()) / width
    delta = (squares - width * level**2) / width
    beta = (quartic / count - squares) / (width * count)
    # A covariance that is a multiple of I, up to rounding, is its own target.
    return min(max(beta, 0.0) / delta, 1.0) if delta > 1e-15 * level**2 else 0.0


def distances(gaussian: Gaussian, rows: Tensor) -> Distances:
    """The distances of rows ``(n, h)`` from a Gaussian on the device of the rows, in fp64.

    Raises:
        ShiftError: the rows have another width.
    """
    if rows.shape[1] != gaussian.width:
        raise ShiftError(f"embeddings of width {rows.shape[1]} for a Gaussian of width {gaussian.width}")
    centred = rows.double() - gaussian.mean.to(rows.device)
    shares = centred @ gaussian.directions.to(rows.device)
    squares = shares.square()
    total = centred.square().sum(1)
    outside = (total - squares.sum(1)).clamp(min=0) / total.clamp(min=torch.finfo(torch.float64).tiny)
    # Complete directions leave only rounding.
    outside = outside if gaussian.rank < gaussian.width else torch.zeros_like(outside)
    return Distances((squares / gaussian.variances.to(rows.device)).sum(1).sqrt(), outside)


def _sum_over(ranks: Ranks, values: Tensor) -> None:
    if ranks.group is not None:
        dist.all_reduce(values, group=ranks.group)
