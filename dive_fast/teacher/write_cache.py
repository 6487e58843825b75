"""Writes a teacher cache: embeds the complete reference set with the frozen model, on all ranks."""

import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dive_fast.data.loaders.loader import Options, load
from dive_fast.data.prefetch import Prefetcher
from dive_fast.data.samples import ReferenceSamples, SampleKey
from dive_fast.distributed import Ranks
from dive_fast.errors import DataError
from dive_fast.model.towers import Towers
from dive_fast.teacher import cache_files as store
from dive_fast.teacher.cache_files import CacheError, Layout, StaleCacheError
from dive_fast.teacher.fingerprint import Fingerprint, differences
from dive_fast.teacher.teacher import OnlineTeacher


def write_cache(
    folder: Path,
    towers: Towers,
    samples: ReferenceSamples,
    fingerprint: Fingerprint,
    ranks: Ranks,
    batch_size: int,
    options: Options,
) -> None:
    """Embeds the reference set into ``folder``; resumes an interrupted call.

    Args:
        folder: its parent is on a file system that all ranks share.
        towers: a copy of the frozen model, which is taken over.
        fingerprint: everything that determines the rows.
        batch_size: pairs embedded at once on each rank.
        options: the loader options of training.

    Raises:
        CacheError: an unfinished cache of another configuration has this name, or the disk is full.
        ChangedDataError: a file changed after the set was listed.
    """
    partial = store.partial_name(folder)
    embed = OnlineTeacher(towers, ranks)
    sizes = len(samples.source), samples.num_views, embed.towers.width, fingerprint["dtype"]
    layout = Layout.of(*sizes, samples.caption_counts)
    # Blocks of an interrupted call are not written again: a file that changed since must be noticed here.
    with ranks.raise_on_all(DataError):
        modified = samples.source.modified()
    try:
        todo = begin(partial, layout, fingerprint, store.COMPUTED, ranks, modified)
        _write_blocks(partial, layout, todo, embed, samples, ranks, batch_size, options)
        ranks.barrier()
        if ranks.is_main:
            store.finish(partial, folder, layout)
        ranks.barrier()
    except OSError as error:
        raise CacheError(
            f"teacher cache {folder}: {error}; finished blocks are kept: restart the same command to resume"
        ) from error


def begin(
    partial: Path, layout: Layout, fingerprint: Fingerprint, origin: str, ranks: Ranks, modified: str = ""
) -> list[int]:
    """Creates the files if there are none; returns this rank's share of the blocks that are not written yet.

    Args:
        origin: source of the rows; a cache has only one.
        modified: as for :func:`dive_fast.teacher.cache_files.create`.

    Raises:
        StaleCacheError: an unfinished cache of another configuration has this name.
        OSError: the disk does not have the space.
    """
    if store.is_there(partial):
        stored = store.read_manifest(partial)
        stored_fields = stored.fingerprint | {"origin": stored.origin}
        if different := differences(stored_fields, fingerprint | {"origin": origin}):
            raise StaleCacheError(
                f"{partial} is unfinished and belongs to another configuration ({'; '.join(different)}); "
                "rebuild it"
            )
        if stored.layout != layout:
            raise StaleCacheError(f"{partial} is unfinished and has {stored.layout}, not {layout}; rebuild it")
    elif ranks.is_main:
        store.create(partial, layout, fingerprint, origin, modified)
    ranks.barrier()
    finished = store.finished_blocks(partial)
    ranks.barrier()  # all ranks read the journals before any writes
    return [block for block in layout.blocks if block not in finished][ranks.rank :: ranks.world_size]


def remove(folder: Path) -> None:
    """Removes a cache, finished or not."""
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
    # Batches end with blocks, so that a resumed run forms the same batches and computes the same bits.
    batches = {block: list(_batches(layout, block, batch_size)) for block in todo}
    in_order = list(chain.from_iterable(batches.values()))
    loaded = load(samples.with_all_captions(), in_order, options)
    prefetched = Prefetcher(loaded, lambda batch: batch.to(ranks.device), ranks.device, limit=options.timeout)
    writer = store.Writer(partial, layout, ranks.rank)
    progress = ranks.progress(sum(map(len, in_order)), "teacher cache", "pair")
    try:
        for block in todo:
            rows: dict[str, list[Tensor]] = {half: [] for half in store.HALVES}
            for sample_keys in batches[block]:
                batch = next(prefetched)
                rows["image"].append(embed.image(batch).cpu())
                if layout.rows("text", block):  # later views have the texts of the first
                    texts = embed.text(batch).cpu()
                    if layout.caption_counts is not None:
                        requested = torch.tensor([sample for _, sample in sample_keys])
                        texts = texts[_text_rows(layout.caption_counts, batch.sample, requested)]
                    rows["text"].append(texts)
                progress.update(len(rows["image"][-1]))
            empty = torch.empty(0, layout.width)
            writer.write(block, {half: torch.cat([empty, *parts]).numpy() for half, parts in rows.items()})
    finally:
        prefetched.close()
        writer.close()
        progress.close()


def _text_rows(counts: NDArray[np.int64], read: Tensor, requested: Tensor) -> Tensor:
    """For each caption of the requested samples, its row among the captions of the samples that were read.

    They differ where the next image replaces an unusable one. The rows of that sample only fill their space: a
    training batch has the replacing sample too.
    """
    available = torch.from_numpy(counts)[read]
    first = available.cumsum(0) - available
    return torch.cat(
        [
            start + torch.arange(int(counts[sample])).clamp(max=count - 1)
            for start, count, sample in zip(first.tolist(), available.tolist(), requested.tolist(), strict=True)
        ]
    )


def _batches(layout: Layout, block: int, batch_size: int) -> Iterator[list[SampleKey]]:
    view, samples = layout.view_and_samples(block)
    for first in range(samples.start, samples.stop, batch_size):
        yield [(view, sample) for sample in range(first, min(first + batch_size, samples.stop))]
