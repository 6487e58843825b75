"""The forgetting probe: reference pairs that are not trained on, measured before and after training."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dive_fast.config.schema import EvaluateConfig
from dive_fast.data.samples import ReferenceSamples
from dive_fast.data.sources.source import Source
from dive_fast.data.spread import spread
from dive_fast.data.text_tokenizer import Tokenizer
from dive_fast.distributed import Ranks
from dive_fast.evaluation.datasets.set_loader import loader_of_pairs
from dive_fast.evaluation.geometry.embed import EmbeddedPairs, embed_readable
from dive_fast.evaluation.geometry.measures import compare, describe, rsa
from dive_fast.evaluation.retrieval import paired_recalls
from dive_fast.identity import Identity, digest
from dive_fast.model.features import Pairs
from dive_fast.model.towers import Towers

MIN_PAIRS = 50
"""Fewer pairs are not measured: at 50, one pair moves the recall by two points."""
MAX_SHARE = 10
"""At most one in this many reference pairs is held out."""
PROBE, GEOMETRY = "probe", "geometry"
"""Names of the two kinds of pairs that a run may measure."""
BEFORE, PAIRS = "before/", "pairs"
"""Prefix of the pre-trained model's metrics, and name of the number of pairs that were read."""


class HeldOut(NamedTuple):
    """The reference pairs that a run holds out."""

    samples: tuple[int, ...] = ()
    """In ascending order, spread evenly over the set."""
    remark: str = ""
    """The reason why there are none, with a remedy."""
    untrained: tuple[int, ...] = ()
    """The held-out pairs and all others of their images, in ascending order."""


def hold_out_images(requested: int, reference: Source | None, batch_size: int) -> HeldOut:
    """As :func:`hold_out`; the other pairs of the held-out images, e.g. rows of a CSV, are not trained on either.

    Args:
        reference: the set; None: the config has none.
    """
    count = 0 if reference is None else len(reference)
    chosen = hold_out(requested, count, batch_size)
    if reference is None or not chosen.samples:
        return chosen
    untrained = _pairs_of_images(reference, chosen.samples)
    if count - len(untrained) < batch_size:
        return HeldOut(remark=f"no forgetting probe: {len(untrained)} of the {count} pairs have its images")
    return chosen._replace(untrained=untrained)


def _pairs_of_images(reference: Source, chosen: Sequence[int]) -> tuple[int, ...]:
    """All pairs with the images of the chosen ones: the same file, or in a prepared set equal bytes."""
    if reference.hashes is not None:
        ids = np.ascontiguousarray(reference.hashes[:, :8]).view(np.uint64).ravel()
        return tuple(np.flatnonzero(np.isin(ids, ids[list(chosen)])).tolist())
    images = np.stack([reference.samples.file_rows, reference.samples.offsets], axis=1)
    images = np.ascontiguousarray(images).view("V16").ravel()
    return tuple(np.flatnonzero(np.isin(images, images[list(chosen)])).tolist())


def hold_out(requested: int, count: int, batch_size: int) -> HeldOut:
    """Chooses the held-out pairs of a reference set: the same ones for every method.

    Args:
        requested: ``evaluate.probe``.
        count: pairs in the set; 0: the config has no reference set.
        batch_size: ``data.reference.batch_size``, for which enough pairs remain.
    """
    if requested == 0:
        return HeldOut()
    if count == 0:
        return HeldOut(remark="no forgetting probe: it needs image-caption pairs, set data.reference")
    number = min(requested, count // MAX_SHARE, count - batch_size)
    if number >= MIN_PAIRS:
        chosen = tuple(spread(count, number))
        return HeldOut(chosen, untrained=chosen)
    if requested < MIN_PAIRS:
        return HeldOut(remark=f"no forgetting probe: evaluate.probe = {requested} is below {MIN_PAIRS} pairs")
    return HeldOut(
        remark=f"no forgetting probe: of the {count} pairs of data.reference, {max(0, number)} can be held out; "
        f"it needs {MIN_PAIRS}; to compare on other pairs, set evaluate.geometry"
    )


class PairMeasure:
    """Pairs on which the tuned embeddings are compared with the pre-trained ones."""

    def __init__(
        self, name: str, samples: ReferenceSamples, count: int, ranks: Ranks, options: EvaluateConfig
    ) -> None:
        """Chooses the pairs without reading their images.

        Args:
            name: :data:`PROBE` or :data:`GEOMETRY`, which determines the metrics and prefixes them.
            count: number of pairs, spread evenly over the samples.
            options: batch size, loader and workers.
        """
        self.name, self.count = name, min(count, len(samples.source))
        self._samples, self._ranks, self._options = samples, ranks, options
        self.before: EmbeddedPairs | None = None
        """The pre-trained embeddings, once they are known."""

    def embed(self, towers: Towers) -> EmbeddedPairs:
        """Embeds the pairs in fp32; all ranks call it."""
        options = self._options
        sizes = options.batch_size, options.workers, self.count
        return embed_readable(towers, self._samples, self._ranks, *sizes, options.loader, name="")

    def identity(self) -> Identity:
        """The pairs: everything but the models that determines the metrics.

        Raises:
            ChangedDataError: a file of the pairs changed after the set was listed.
        """
        source = self._samples.source
        source.check_files(spread(len(source), self.count))
        loader = loader_of_pairs(self._options.loader, source, self._samples.preprocess).name
        data = {"pairs": self.data(), "modified": source.listed_modified(), "loader": loader}
        return {"name": self.name} | data

    def data(self) -> str:
        """A digest of the contents of the pairs."""
        return digest([self._samples.source.digest(), self.count])

    def compare(self, after: EmbeddedPairs) -> dict[str, float]:
        """The metrics of the tuned embeddings; those of the pre-trained ones are named ``before/...``.

        Raises:
            GeometryError: the embeddings have no geometry, or other pairs could be read than before.
        """
        assert self.before is not None
        if self.name == GEOMETRY:
            metrics = compare(self.before.pairs, after.pairs) | {PAIRS: len(after.samples)}
            return metrics | _named_before(describe(self.before.pairs))
        samples = sorted(set(self.before.samples) & set(after.samples))
        return self._probe(self.before.of(samples), after.of(samples), samples)

    def _probe(self, before: Pairs, after: Pairs, samples: Sequence[int]) -> dict[str, float]:
        texts = [self._samples.source.samples.texts(row)[0] for row in samples]
        captions = caption_numbers(texts, self._samples.tokenizer).to(self._ranks.device)
        recalls = (paired_recalls(pairs, captions, self._ranks) for pairs in (before, after))
        recalls_before, recalls_after = recalls
        similarity = rsa(torch.cat(before), torch.cat(after))
        return recalls_after | {"rsa": similarity, PAIRS: len(samples)} | _named_before(recalls_before)


def caption_numbers(captions: Sequence[str], tokenizer: Tokenizer) -> Tensor:
    """``(N,)``: equal numbers for captions of equal tokens, in the order of their first occurrence."""
    number_of: dict[tuple[int, ...], int] = {}
    rows = (tuple(row) for row in tokenizer(list(captions)).tolist())
    return torch.tensor([number_of.setdefault(row, len(number_of)) for row in rows])


def _named_before(metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{BEFORE}{name}": value for name, value in metrics.items()}
