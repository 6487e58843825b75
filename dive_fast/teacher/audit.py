"""A random part of a teacher cache, embedded again and compared: is it this model's, of this data?"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dive_fast.data.loaders.loader import Options, batches_of
from dive_fast.data.random_streams import Draw, stream
from dive_fast.data.samples import ReferenceSamples, SampleKey
from dive_fast.distributed import Ranks
from dive_fast.model.features import Pairs
from dive_fast.model.towers import Towers
from dive_fast.teacher.cache_files import StaleCacheError, write_json
from dive_fast.teacher.teacher import CachedTeacher, OnlineTeacher

TOLERANCE = {"float32": 1e-4, "float16": 1e-3}
"""Longest difference of two unit rows that rounding may make: of fp32 arithmetic in another order, of storage."""


def allowed(dtype: str, tolerance: float | None) -> float:
    """What ``teacher.tolerance`` stands for in a cache of this dtype."""
    return TOLERANCE[dtype] if tolerance is None else tolerance


@dataclass(frozen=True)
class Audit:
    """Lengths of the differences between cached and fresh unit rows: the noise floor of difference vectors."""

    pairs: int
    image_mean: float
    image_max: float
    text_mean: float
    text_max: float

    def __str__(self) -> str:
        return (
            f"{self.pairs} pairs embedded again: image rows differ by {self.image_mean:.1e} on average, "
            f"{self.image_max:.1e} at most, text rows by {self.text_mean:.1e} and {self.text_max:.1e}"
        )

    def within(self, tolerance: float) -> bool:
        """Whether no row differs by more; one that is not a number does."""
        return self.image_max <= tolerance and self.text_max <= tolerance


def audit(
    teacher: CachedTeacher,
    towers: Towers,
    samples: ReferenceSamples,
    ranks: Ranks,
    batch_size: int,
    options: Options,
    pairs: int,
) -> Audit:
    """Embeds some pairs again, drawn by the run's seed, and compares the cache's rows with them.

    Args:
        towers: the frozen model, a copy of its own.
        pairs: how many, at most all.
    """
    layout = teacher.store.layout
    draws = stream(samples.seed, Draw.AUDIT, 0)
    count = min(pairs, layout.samples * layout.views)
    chosen = draws.choice(layout.samples * layout.views, count, replace=False).tolist()
    places: list[SampleKey] = [divmod(row, layout.samples) for row in chosen]
    online = OnlineTeacher(towers, ranks)
    lengths = []
    for batch in batches_of(samples, places, batch_size, options):
        batch = batch.to(ranks.device)
        lengths.append(_lengths(teacher(batch), online(batch)))
    both = torch.cat(lengths) if lengths else torch.zeros(1, 2)
    (image_mean, text_mean), (image_max, text_max) = both.mean(0).tolist(), both.amax(0).tolist()
    return Audit(count, image_mean, image_max, text_mean, text_max)


def judge(found: Audit, teacher: CachedTeacher, tolerance: float | None = None) -> None:
    """Holds a cache to its audit.

    Args:
        tolerance: longest difference of two unit rows; None: what rounding explains.

    Raises:
        StaleCacheError: rows differ by more; says by how much, and what is most likely the cause.
    """
    limit = allowed(teacher.store.layout.dtype, tolerance)
    if not found.within(limit):
        raise StaleCacheError(
            f"teacher cache {teacher.store.folder}: {found}; teacher.tolerance allows {limit:.0e}. "
            f"Most likely {_cause(found.image_max > limit, found.text_max > limit)}; rebuild it"
        )


def write_audit(path: Path, found: Audit) -> None:
    """Saves what was found, as JSON."""
    write_json(path, asdict(found))


def _lengths(cached: Pairs, fresh: Pairs) -> torch.Tensor:
    """``(B, 2)``: of the differences of images and of texts."""
    return torch.stack([(one - other).norm(dim=1).cpu() for one, other in zip(cached, fresh, strict=True)], dim=1)


def _cause(images_differ: bool, texts_differ: bool) -> str:
    if images_differ and texts_differ:
        return "the weights or the order of the samples are others than when it was written"
    if images_differ:
        return "the image files or their decoder are others than when it was written"
    return "the captions or the tokenizer are others than when it was written"
