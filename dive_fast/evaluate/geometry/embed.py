"""Image-caption pairs and their embeddings, to measure geometry on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dive_fast.config.schema import Config, ReferenceConfig
from dive_fast.data.loaders.loader import Options, batches_of
from dive_fast.data.open_dataset import open_reference
from dive_fast.data.prepared.format import MANIFEST
from dive_fast.data.samples import ReferenceSamples, SampleKey
from dive_fast.data.sources.source import Source
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError, DataError
from dive_fast.model.features import Pairs
from dive_fast.model.towers import Towers, tokenizer_of, unit


def describe_pairs(
    config: Config, path: str | None = None, kind: str | None = None, image_root: str | None = None
) -> ReferenceConfig:
    """The captioned set at a path, or the config's ``data.reference``.

    Args:
        kind: its format, as ``data.reference.format``; default: what lies at the path.
        image_root: as ``data.reference.image_root``.

    Raises:
        ConfigError: neither a path nor ``data.reference``, or arguments that do not go together.
    """
    if path is None:
        if kind is not None or image_root is not None:
            raise ConfigError("--format, --image-root: they tell of the set that --pairs names; name one")
        if config.data.reference is None:
            raise ConfigError(
                "data.reference: the config has no pairs to measure geometry on; name some by --pairs"
            )
        return config.data.reference
    kind = kind or _format_at(path)
    if image_root is not None and kind != "csv":
        raise ConfigError("--image-root: only csv data has one; leave it out")
    given = {"format": kind, "path": path, "image_root": image_root}
    return ReferenceConfig.model_validate(given)


def open_pairs(
    config: Config, data: ReferenceConfig, towers: Towers, source: Source | None = None
) -> ReferenceSamples:
    """The samples of a captioned set, in the evaluation view.

    Args:
        source: the set, if it has been opened.

    Raises:
        DataError: the set is not there, or not as its format says.
    """
    tokenizer = tokenizer_of(config.model, data.text_length)
    source = open_reference(data) if source is None else source
    return ReferenceSamples(source, tokenizer, towers.preprocess, towers.pooled_at, seed=0)


@torch.no_grad()
def embed(
    towers: Towers,
    samples: ReferenceSamples,
    ranks: Ranks,
    batch_size: int,
    workers: int = 0,
    limit: int | None = None,
) -> Pairs:
    """Embeddings of pairs in fp32, each once on any number of ranks; all ranks call it.

    A pair whose image cannot be decoded is left out; the log names it.

    Args:
        towers: left as they were: mode and autocast.
        batch_size: pairs encoded at once on each rank.
        workers: loader processes on each rank.
        limit: how many, spread evenly over the set; default: all.

    Returns:
        ``(N, D)`` unit rows of each half in the set's order, the same on every rank, on its device.

    Raises:
        DataError: too many images in a row cannot be decoded.
    """
    chosen = spread(len(samples.source), limit)
    share = ranks.local_range(len(chosen))
    places: list[SampleKey] = [(0, sample) for sample in chosen[share.start : share.stop]]
    with _in_fp32(towers):
        nothing = torch.empty(0, towers.width, device=ranks.device)
        images, texts = [nothing], [nothing]
        with ranks.raise_on_all(DataError), ranks.progress(len(places), "embeddings", "pair") as bar:
            options = Options(workers=workers, device=ranks.device)
            for number, batch in enumerate(batches_of(samples, places, batch_size, options)):
                wanted = places[number * batch_size : (number + 1) * batch_size]
                # A broken sample's neighbour has taken its place: it has one of its own.
                itself = batch.sample == torch.tensor([sample for _, sample in wanted])
                batch = batch.to(ranks.device)
                image, text = towers.encode_pairs(batch.images, batch.text)
                kept = itself.to(ranks.device)
                images.append(unit(image)[kept])
                texts.append(unit(text)[kept])
                bar.update(len(wanted))
    return Pairs(*(ranks.gather(torch.cat(half)) for half in (images, texts)))


def spread(count: int, limit: int | None) -> list[int]:
    """At most ``limit`` of ``count`` places, evenly spaced; None: all."""
    wanted = count if limit is None else min(limit, count)
    return [place * count // wanted for place in range(wanted)]


@contextmanager
def _in_fp32(towers: Towers) -> Iterator[None]:
    """Difference vectors may be shorter than what half precision rounds off."""
    training, autocast = towers.training, towers.autocast
    towers.eval()
    towers.autocast = None
    try:
        yield
    finally:
        towers.train(training)
        towers.autocast = autocast


def _format_at(path: str) -> str:
    if Path(path).suffix.lower() in (".csv", ".tsv"):
        return "csv"
    return "prepared" if (Path(path) / MANIFEST).is_file() else "webdataset"
