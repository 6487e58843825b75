"""From a config to its teacher: the reference samples as training sees them, their cache opened or written."""

import copy
import logging
import shutil
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch

from dive_fast.config.schema import Config
from dive_fast.data.loaders.loader import Options, loader_options
from dive_fast.data.samples import ReferenceSamples
from dive_fast.data.sources.source import Source
from dive_fast.distributed import Ranks
from dive_fast.locks import file_lock
from dive_fast.model.towers import Towers, tokenizer_of
from dive_fast.teacher import cache_files as store
from dive_fast.teacher import clip_retrieval as retrieval
from dive_fast.teacher.audit import Audit, allowed, audit, judge, write_audit
from dive_fast.teacher.cache_files import CacheError
from dive_fast.teacher.fingerprint import Fingerprint, fingerprint
from dive_fast.teacher.teacher import CachedTeacher, OnlineTeacher, Teacher
from dive_fast.teacher.write_cache import remove, write_cache

logger = logging.getLogger(__name__)


def reference_samples(config: Config, source: Source, towers: Towers) -> ReferenceSamples:
    """The samples of ``data.reference``.

    Args:
        source: what ``data.reference`` names.
    """
    data = config.data.reference
    assert data is not None
    tokenizer = tokenizer_of(config.model, data.text_length)
    return ReferenceSamples(source, tokenizer, towers.preprocess, towers.pooled_at, config.train.seed, data.views)


def open_teacher(config: Config, folder: Path, towers: Towers, samples: ReferenceSamples, ranks: Ranks) -> Teacher:
    """The teacher of a run, its cache written where there is none, and audited.

    Args:
        folder: the run's.
        towers: the frozen model; copied.

    Raises:
        CacheError: the cache is of something else, damaged, or fails its audit.
    """
    if config.teacher.mode == "online":
        return OnlineTeacher(copy.deepcopy(towers), ranks)
    path = cache_folder(config, folder)
    if not store.is_there(path) and ranks.is_main:
        logger.warning("no teacher cache in %s: the reference set is embedded first, once", path)
    teacher, found = open_cache(config, path, towers, samples, ranks)
    if ranks.is_main and found is not None:
        ranks.print(f"teacher cache {path}: {found}")
        folder.mkdir(parents=True, exist_ok=True)
        write_audit(folder / "audit.json", found)
    return teacher


def open_cache(
    config: Config, path: Path, towers: Towers, samples: ReferenceSamples, ranks: Ranks, rebuild: bool = False
) -> tuple[CachedTeacher, Audit | None]:
    """The cache of a config, written where there is none; and its audit, unless ``teacher.audit`` is 0.

    Args:
        rebuild: remove what is there and write it anew.

    Raises:
        CacheError: the cache is of something else, damaged, or fails its audit.
    """
    options = config.teacher
    wanted, loading = _wanted(config, towers, samples, ranks)
    frozen = copy.deepcopy(towers)
    if rebuild or not ranks.broadcast(store.is_there(path)):
        with _locked(path, ranks):
            if rebuild:
                if ranks.is_main:
                    remove(path)
                ranks.barrier()
            # Another run may have written it meanwhile.
            if not ranks.broadcast(store.is_there(path)):
                write_cache(path, frozen, samples, wanted, ranks, options.batch_size, loading)
    teacher = CachedTeacher(path, wanted, options.verify)
    if ranks.is_main and teacher.store.modified not in ("", samples.source.modified()):
        logger.warning(
            "teacher cache %s: the files of data.reference have other modification times than when it was "
            "written, but the same contents as far as their digest reads them; the cache is used",
            path,
        )
    if options.audit == 0:
        return teacher, None
    found = audit(teacher, frozen, samples, ranks, options.batch_size, loading, options.audit)
    judge(found, teacher, options.tolerance)
    return teacher, found


def adopt_cache(
    config: Config,
    path: Path,
    towers: Towers,
    samples: ReferenceSamples,
    ranks: Ranks,
    embeddings: retrieval.Embeddings,
    rebuild: bool = False,
) -> Audit:
    """Makes the cache of a config of embeddings from elsewhere; it gets its name once it has passed its audit.

    Args:
        rebuild: put it in the place of the cache that is there.

    Raises:
        CacheError: there is a cache, the embeddings are not those of the samples, or fail the audit.
    """
    if store.is_there(path) and not rebuild:
        raise CacheError(f"{path}: a teacher cache is there; add --rebuild to replace it, or set teacher.path")
    with _locked(path, ranks):
        return _adopt(config, path, towers, samples, ranks, embeddings, rebuild)


def _adopt(
    config: Config,
    path: Path,
    towers: Towers,
    samples: ReferenceSamples,
    ranks: Ranks,
    embeddings: retrieval.Embeddings,
    rebuild: bool,
) -> Audit:
    options, partial = config.teacher, store.partial_name(path)
    wanted, loading = _wanted(config, towers, samples, ranks)
    layout = store.Layout(len(samples.source), samples.num_views, towers.width, options.dtype)
    limit = allowed(options.dtype, options.tolerance)
    with ranks.raise_on_all(CacheError):
        if ranks.is_main:
            _remove_adopted(partial, rebuild)
    try:
        retrieval.adopt(embeddings, partial, layout, samples.source, wanted, ranks)
        with ranks.raise_on_all(CacheError):
            sizes = options.batch_size, loading, options.audit
            found = audit(CachedTeacher(partial, wanted), copy.deepcopy(towers), samples, ranks, *sizes)
            if not found.within(limit):
                raise CacheError(
                    f"{embeddings.folder}: {found}; teacher.tolerance allows {limit:.0e}, nothing is adopted. "
                    "Most likely other weights (quickgelu or not?), another preprocessing, or embeddings computed "
                    "in half precision: only then raise teacher.tolerance, else write the cache without --adopt"
                )
    except CacheError:
        if ranks.is_main:
            _remove_adopted(partial)
        raise
    if ranks.is_main:
        store.replace(partial, path)
    ranks.barrier()
    return found


def _remove_adopted(partial: Path, computed_too: bool = False) -> None:
    """Removes what was adopted but not audited: the files it came from may be others the next time."""
    if store.is_there(partial) and (computed_too or store.read_manifest(partial).origin != store.COMPUTED):
        shutil.rmtree(partial)


def export_cache(
    config: Config, path: Path, towers: Towers, samples: ReferenceSamples, ranks: Ranks, folder: Path
) -> int:
    """Writes the cache of a config as clip-retrieval's files; returns the number of partitions.

    Raises:
        CacheError: there is no cache, it is of something else or damaged, or the files cannot be written.
    """
    if not store.is_there(path):
        raise CacheError(f"{path}: no teacher cache to export; the same command without --export writes it")
    wanted, _ = _wanted(config, towers, samples, ranks)
    return retrieval.export(CachedTeacher(path, wanted).store, samples.source, folder)


def _wanted(
    config: Config, towers: Towers, samples: ReferenceSamples, ranks: Ranks
) -> tuple[Fingerprint, Options]:
    """What the cache of a config has to be, and how its samples are loaded."""
    data = config.data.reference
    assert data is not None
    # In fp32, whatever the images of training are.
    loading = replace(loader_options(config, data, ranks), dtype=torch.float32)
    length = data.text_length or towers.context_length
    return fingerprint(towers, samples, length, loading, config.teacher.dtype), loading


def _locked(path: Path, ranks: Ranks) -> AbstractContextManager[None]:
    """Keeps other processes from writing, replacing or removing a cache; whoever comes second waits."""
    return file_lock(path.with_name(f".{path.name}.lock"), f"teacher cache {path}", wait=True, ranks=ranks)


def cache_folder(config: Config, folder: Path) -> Path:
    """Where the cache of a run lies."""
    return Path(config.teacher.path) if config.teacher.path is not None else folder / "teacher"
