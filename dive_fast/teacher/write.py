"""Writing a teacher cache: the whole reference set through the frozen model, on all ranks, once."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from dive_fast.data.ahead import Ahead
from dive_fast.data.loader import Options, load
from dive_fast.data.samples import Place, ReferenceSamples
from dive_fast.ranks import Ranks
from dive_fast.teacher import store
from dive_fast.teacher.fingerprint import Fingerprint, differences
from dive_fast.teacher.store import REBUILD, CacheError, Layout
from dive_fast.teacher.teachers import OnlineTeacher
from dive_fast.towers import Towers


def write_cache(
    folder: Path,
    towers: Towers,
    samples: ReferenceSamples,
    fingerprint: Fingerprint,
    ranks: Ranks,
    batch_size: int,
    options: Options,
) -> None:
    """Embeds the reference set into ``folder``, or what of it a run before has not.

    Args:
        folder: its parent is on a file system that all ranks share.
        towers: the frozen model, a copy of its own.
        fingerprint: of all that decides the rows.
        batch_size: pairs embedded at once on each rank.
        options: of the loader; those that training has.

    Raises:
        CacheError: something else was begun under this name, or the disk is full.
    """
    try:
        _write(folder, towers, samples, fingerprint, ranks, batch_size, options)
    except OSError as error:
        raise CacheError(
            f"teacher cache {folder}: {error}; what is written stays: run the same command again"
        ) from error


def _write(
    folder: Path,
    towers: Towers,
    samples: ReferenceSamples,
    fingerprint: Fingerprint,
    ranks: Ranks,
    batch_size: int,
    options: Options,
) -> None:
    partial = store.partial_name(folder)
    embed = OnlineTeacher(towers, ranks)
    layout = Layout(len(samples.source), samples.num_views, embed.towers.width, fingerprint["dtype"])
    if store.is_there(partial):
        _, found = store.read_manifest(partial)
        if different := differences(found, fingerprint):
            raise CacheError(
                f"{partial} was begun as the cache of something else ({'; '.join(different)}); {REBUILD}"
            )
    elif ranks.first:
        store.create(partial, layout, fingerprint)
    ranks.barrier()
    finished = store.done(partial)
    ranks.barrier()  # before any rank writes more
    todo = [block for block in layout.blocks if block not in finished][ranks.rank :: ranks.world_size]
    _write_blocks(partial, layout, todo, embed, samples, ranks, batch_size, options)
    ranks.barrier()
    if ranks.first:
        store.finish(partial, folder, layout)
    ranks.barrier()


def remove(folder: Path) -> None:
    """Removes a cache and what of it was begun."""
    for path in (folder, store.partial_name(folder)):
        if store.is_there(path):
            shutil.rmtree(path)


def _write_blocks(
    partial: Path,
    layout: Layout,
    todo: list[int],
    embed: OnlineTeacher,
    samples: ReferenceSamples,
    ranks: Ranks,
    batch_size: int,
    options: Options,
) -> None:
    # Batches end where blocks do: whatever was there before, the same pairs go together, and give the same bits.
    batches = [batch for block in todo for batch in _batches(layout, block, batch_size)]
    ahead = Ahead(load(samples, batches, options), lambda batch: batch.to(ranks.device), ranks.device)
    writer = store.Writer(partial, layout, ranks.rank)
    progress = ranks.progress(sum(map(len, batches)), "teacher cache", "pair")
    try:
        for block in todo:
            images, texts = [], []
            for _ in _batches(layout, block, batch_size):
                embeddings = embed(next(ahead))
                images.append(embeddings.image.cpu())
                texts.append(embeddings.text.cpu())
                progress.update(len(images[-1]))
            rows = {"image": torch.cat(images).numpy(), "text": torch.cat(texts).numpy()}
            if layout.place(block)[0] > 0:  # the captions are there since the first view
                rows["text"] = np.empty((0, layout.width), np.float32)
            writer.write(block, rows)
    finally:
        ahead.close()
        writer.close()
        progress.close()


def _batches(layout: Layout, block: int, batch_size: int) -> Iterator[list[Place]]:
    view, samples = layout.place(block)
    for first in range(samples.start, samples.stop, batch_size):
        yield [(view, sample) for sample in range(first, min(first + batch_size, samples.stop))]
