"""Image-caption pairs for measures of geometry, and their embeddings in fp32."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from dive_fast.config.schema import Loader, ModelConfig, ReferenceConfig
from dive_fast.data.data_paths import guess_format
from dive_fast.data.loaders.loader import Options, batches_of
from dive_fast.data.open_dataset import open_reference
from dive_fast.data.samples import ReferenceSamples, SampleKey
from dive_fast.data.sources.source import Source
from dive_fast.data.spread import spread
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError, DataError
from dive_fast.evaluation.datasets.set_loader import loader_of_pairs
from dive_fast.evaluation.datasets.strict_samples import progress
from dive_fast.model.features import Pairs
from dive_fast.model.towers import Towers, tokenizer_of, unit


class EmbeddedPairs(NamedTuple):
    """Embeddings of the pairs that could be read, in the order of the set."""

    pairs: Pairs
    """Unit rows ``(N, D)`` fp32 of images and of texts, on this rank's device."""
    samples: list[int]
    """Index of each pair in the set."""

    def of(self, samples: Sequence[int]) -> Pairs:
        """The rows of some of these samples."""
        row_of = {sample: row for row, sample in enumerate(self.samples)}
        rows = [row_of[sample] for sample in samples]
        return Pairs(*(half[rows] for half in self.pairs))


def describe_pairs(
    reference: ReferenceConfig | None,
    path: str | None = None,
    data_format: str | None = None,
    image_root: str | None = None,
) -> ReferenceConfig:
    """The section of the captioned set at a path, by default ``data.reference``.

    Args:
        reference: the config's ``data.reference``, used if there is no path.
        data_format: as ``data.reference.format``; default: guessed from the path.
        image_root: as ``data.reference.image_root``.

    Raises:
        ConfigError: there is neither a path nor ``data.reference``, or the arguments contradict each other.
    """
    if path is None:
        if data_format is not None or image_root is not None:
            raise ConfigError("--format, --image-root: they describe the set of --pairs; add --pairs")
        if reference is None:
            raise ConfigError(
                "data.reference: the config has no pairs to measure geometry on; name some by --pairs"
            )
        return reference
    data_format = data_format or guess_format(path)
    if image_root is not None and data_format != "csv":
        raise ConfigError("--image-root: only csv data has one; leave it out")
    section = {"format": data_format, "path": path, "image_root": image_root}
    return ReferenceConfig.model_validate(section)


def open_pairs(
    model: ModelConfig, data: ReferenceConfig, towers: Towers, source: Source | None = None
) -> ReferenceSamples:
    """Opens the samples of a captioned set, in the evaluation view.

    Args:
        source: the opened set; None: it is opened here.

    Raises:
        DataError: the set does not exist, or does not have its format.
    """
    tokenizer = tokenizer_of(model, data.text_length)
    source = open_reference(data) if source is None else source
    return ReferenceSamples(source, tokenizer, towers.preprocess, towers.pooled_at, seed=0)


def embed(
    towers: Towers,
    samples: ReferenceSamples,
    ranks: Ranks,
    batch_size: int,
    workers: int = 0,
    limit: int | None = None,
    loader: Loader = "plain",
) -> Pairs:
    """The unit rows of :func:`embed_readable`; all ranks must call this, and all get the result."""
    return embed_readable(towers, samples, ranks, batch_size, workers, limit, loader).pairs


@torch.no_grad()
def embed_readable(
    towers: Towers,
    samples: ReferenceSamples,
    ranks: Ranks,
    batch_size: int,
    workers: int = 0,
    limit: int | None = None,
    loader: Loader = "plain",
    name: str = "embeddings",
) -> EmbeddedPairs:
    """Embeds pairs in fp32, each on one rank; all ranks must call this, and all get the result.

    A pair whose image cannot be decoded is left out, with a warning that names it.

    Args:
        towers: their mode and autocast are restored.
        batch_size: pairs encoded at once on each rank.
        workers: loader processes on each rank.
        limit: number of pairs, spread evenly over the set; default: all.
        loader: used if it can read the set; otherwise ``plain``.
        name: name on the progress bar; empty disables the bar.

    Raises:
        DataError: too many images in a row cannot be decoded.
    """
    chosen = spread(len(samples.source), limit)
    local = ranks.local_range(len(chosen))
    keys: list[SampleKey] = [(0, sample) for sample in chosen[local.start : local.stop]]
    with in_fp32(towers):
        empty = torch.empty(0, towers.width, device=ranks.device)
        images, texts = [empty], [empty]
        samples_read = [torch.empty(0, dtype=torch.int64, device=ranks.device)]
        with ranks.raise_on_all(DataError), progress(ranks, len(keys), name, "pair") as bar:
            chosen_loader = loader_of_pairs(loader, samples.source, samples.preprocess).name
            options = Options(chosen_loader, workers, ranks.device)
            for number, batch in enumerate(batches_of(samples, keys, batch_size, options)):
                requested = keys[number * batch_size : (number + 1) * batch_size]
                # The loader replaces a broken sample by another one, which must not be counted twice.
                is_requested = batch.sample == torch.tensor([sample for _, sample in requested])
                batch = batch.to(ranks.device)
                image, text = towers.encode_pairs(batch.images, batch.text)
                kept = is_requested.to(ranks.device)
                images.append(unit(image)[kept])
                texts.append(unit(text)[kept])
                samples_read.append(batch.sample.to(ranks.device)[kept])
                bar.update(len(requested))
    pairs = Pairs(*(ranks.gather(torch.cat(half)) for half in (images, texts)))
    return EmbeddedPairs(pairs, ranks.gather(torch.cat(samples_read)).tolist())


@contextmanager
def in_fp32(towers: Towers) -> Iterator[None]:
    """Evaluation mode without autocast: difference vectors may be shorter than rounding in half precision."""
    training, autocast = towers.training, towers.autocast
    towers.eval()
    towers.autocast = None
    try:
        yield
    finally:
        towers.train(training)
        towers.autocast = autocast
