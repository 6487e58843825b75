"""Unit features of images, each encoded by one rank."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dive_fast.data.loaders.loader import Options, batches_of
from dive_fast.distributed import Ranks
from dive_fast.errors import DataError
from dive_fast.evaluation.datasets.strict_samples import BROKEN, StrictSamples, progress
from dive_fast.model.towers import Towers, unit


class ImageFeatures(NamedTuple):
    """Features of n images, on all ranks."""

    features: Tensor
    """``(n, D)``: unit rows; those of broken images are of other images."""
    is_broken: Tensor
    """``(n,)`` bool: whether an image could not be decoded."""


@torch.no_grad()
def embed_images(
    towers: Towers,
    samples: StrictSamples,
    rows: Sequence[int],
    ranks: Ranks,
    batch_size: int,
    options: Options,
    name: str = "",
) -> ImageFeatures:
    """Encodes the images of some samples; all ranks must call this, and all get the result.

    Args:
        rows: indices of the samples in their set.
        batch_size: images encoded at once on each rank.
        name: name of the set on the progress bar and in messages; empty disables the bar.

    Raises:
        DataError: an image is broken and must not be, or the features are not finite.
    """
    features = torch.zeros(len(rows), towers.width, device=ranks.device)
    broken = torch.zeros(len(rows), dtype=torch.int64, device=ranks.device)
    local = ranks.local_range(len(rows))
    row, keys = local.start, [(0, rows[number]) for number in local]
    with ranks.raise_on_all(DataError), progress(ranks, len(local), name, "image") as bar:
        for batch in batches_of(samples, keys, batch_size, options):
            encoded = unit(towers.encode_image(batch.images.to(ranks.device)))
            features[row : row + len(encoded)] = encoded
            broken[row : row + len(encoded)] = (batch.labels == BROKEN).long()
            row += len(encoded)
            bar.update(len(encoded))
        check_finite(features, name)
    if ranks.group is not None:
        for each in (features, broken):
            dist.all_reduce(each, group=ranks.group)  # each row is nonzero on one rank
    return ImageFeatures(features, broken.bool())


def check_finite(features: Tensor, name: str) -> None:
    """Checks features of a set called ``name``.

    Raises:
        DataError: they are not finite.
    """
    if not bool(features.isfinite().all()):
        raise DataError(
            f"{name or 'the set'}: the features are not finite: weights are broken, or activations overflow"
        )
