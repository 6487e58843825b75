"""Audits a teacher cache: embeds a random sample of its pairs again and compares the rows."""

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
"""Longest difference of two unit rows due to rounding: fp32 sums in another order, or float16 storage."""


def allowed(dtype: str, tolerance: float | None) -> float:
    """The longest difference that ``teacher.tolerance`` allows in a cache of this dtype."""
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
            f"{self.pairs} pairs embedded again differ by at most {self.image_max:.1e} (image rows) and "
            f"{self.text_max:.1e} (text rows)"
        )

    def within(self, tolerance: float) -> bool:
        """Whether no row differs by more than ``tolerance``; NaN counts as more."""
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
    """Embeds pairs drawn by the run's seed again and compares them with the cache's rows.

    Args:
        towers: a copy of the frozen model, which the audit takes over.
        pairs: number of pairs; at most all are drawn.
    """
    layout = teacher.store.layout
    draws = stream(samples.seed, Draw.AUDIT, 0)
    count = min(pairs, layout.samples * layout.views)
    drawn = draws.choice(layout.samples * layout.views, count, replace=False).tolist()
    keys: list[SampleKey] = [divmod(row, layout.samples) for row in drawn]
    online = OnlineTeacher(towers, ranks)
    lengths = []
    for batch in batches_of(samples, keys, batch_size, options):
        batch = batch.to(ranks.device)
        lengths.append(_lengths(teacher(batch), online(batch)))
    differences = torch.cat(lengths) if lengths else torch.zeros(1, 2)
    (image_mean, text_mean), (image_max, text_max) = differences.mean(0).tolist(), differences.amax(0).tolist()
    return Audit(count, image_mean, image_max, text_mean, text_max)


def check_audit(result: Audit, teacher: CachedTeacher, tolerance: float | None = None) -> None:
    """Checks that a cache's audit is within the tolerance.

    Args:
        tolerance: longest difference of two unit rows; None: the differences due to rounding.

    Raises:
        StaleCacheError: rows differ by more; the message has the differences and the likely cause.
    """
    limit = allowed(teacher.store.layout.dtype, tolerance)
    if not result.within(limit):
        raise StaleCacheError(
            f"teacher cache {teacher.store.folder}: {result}; teacher.tolerance allows {limit:.0e}. "
            f"Most likely {_cause(result.image_max > limit, result.text_max > limit)}; rebuild it"
        )


def write_audit(path: Path, result: Audit) -> None:
    """Saves an audit as JSON."""
    write_json(path, asdict(result))


def _lengths(cached: Pairs, fresh: Pairs) -> torch.Tensor:
    """Lengths ``(B, 2)`` of the differences of image rows and of text rows."""
    return torch.stack([(one - other).norm(dim=1).cpu() for one, other in zip(cached, fresh, strict=True)], dim=1)


def _cause(images_differ: bool, texts_differ: bool) -> str:
    if images_differ and texts_differ:
        return "the weights or the order of the samples changed since the cache was written"
    if images_differ:
        return "the image files or their decoder changed since the cache was written"
    return "the captions or the tokenizer changed since the cache was written"
