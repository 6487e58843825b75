"""Writing a teacher cache: the whole reference set through the frozen model, on all ranks, once."""

import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from dive_fast.data.loaders.loader import Options, load
from dive_fast.data.prefetch import Prefetcher
from dive_fast.data.samples import ReferenceSamples, SampleKey
from dive_fast.distributed import Ranks
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
    partial = store.partial_name(folder)
    embed = OnlineTeacher(towers, ranks)
    layout = Layout(len(samples.source), samples.num_views, embed.towers.width, fingerprint["dtype"])
    try:
        todo = begin(partial, layout, fingerprint, store.COMPUTED, ranks, samples.source.modified())
        _write_blocks(partial, layout, todo, embed, samples, ranks, batch_size, options)
        ranks.barrier()
        if ranks.is_main:
            store.finish(partial, folder, layout)
        ranks.barrier()
    except OSError as error:
        raise CacheError(
            f"teacher cache {folder}: {error}; what is written stays: run the same command again"
        ) from error


def begin(
    partial: Path, layout: Layout, fingerprint: Fingerprint, origin: str, ranks: Ranks, modified: str = ""
) -> list[int]:
    """Creates the files where none are; returns this rank's share of the blocks that are not written yet.

    Args:
        origin: where the rows come from; a cache has only one.
        modified: as for :func:`dive_fast.teacher.cache_files.create`.

    Raises:
        StaleCacheError: something else was begun under this name.
        OSError: the disk has not the space.
    """
    if store.is_there(partial):
        found_layout, found, found_origin, _ = store.read_manifest(partial)
        if different := differences(found | {"origin": found_origin}, fingerprint | {"origin": origin}):
            raise StaleCacheError(
                f"{partial} was begun as the cache of something else ({'; '.join(different)}); rebuild it"
            )
        if found_layout != layout:
            raise StaleCacheError(f"{partial}: {found_layout} was begun there, not {layout}; rebuild it")
    elif ranks.is_main:
        store.create(partial, layout, fingerprint, origin, modified)
    ranks.barrier()
    finished = store.done(partial)
    ranks.barrier()  # before any rank writes more
    return [block for block in layout.blocks if block not in finished][ranks.rank :: ranks.world_size]


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
    batches = {block: list(_batches(layout, block, batch_size)) for block in todo}
    in_order = list(chain.from_iterable(batches.values()))
    loaded = load(samples, in_order, options)
    ahead = Prefetcher(loaded, lambda batch: batch.to(ranks.device), ranks.device, limit=options.timeout)
    writer = store.Writer(partial, layout, ranks.rank)
    progress = ranks.progress(sum(map(len, in_order)), "teacher cache", "pair")
    try:
        for block in todo:
            rows: dict[str, list[Tensor]] = {half: [] for half in store.HALVES}
            for _ in batches[block]:
                batch = next(ahead)
                rows["image"].append(embed.image(batch).cpu())
                if layout.rows("text", block):  # else they are there since the first view
                    rows["text"].append(embed.text(batch).cpu())
                progress.update(len(rows["image"][-1]))
            nothing = torch.empty(0, layout.width)
            writer.write(block, {half: torch.cat([nothing, *own]).numpy() for half, own in rows.items()})
    finally:
        ahead.close()
        writer.close()
        progress.close()


def _batches(layout: Layout, block: int, batch_size: int) -> Iterator[list[SampleKey]]:
    view, samples = layout.place(block)
    for first in range(samples.start, samples.stop, batch_size):
        yield [(view, sample) for sample in range(first, min(first + batch_size, samples.stop))]
