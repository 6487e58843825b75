"""Builds the teacher of a config: opens or writes the cache of the reference samples."""

import copy
import logging
import shutil
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch

from dive_fast.config.schema import Config, TeacherConfig
from dive_fast.data.loaders.loader import Options, loader_options
from dive_fast.data.samples import ReferenceSamples
from dive_fast.data.sources.source import Images
from dive_fast.distributed import Ranks
from dive_fast.locks import file_lock
from dive_fast.model.towers import Towers, tokenizer_of
from dive_fast.teacher import cache_files as store
from dive_fast.teacher import clip_retrieval as retrieval
from dive_fast.teacher.audit import Audit, allowed, audit, check_audit, write_audit
from dive_fast.teacher.cache_files import CacheError
from dive_fast.teacher.fingerprint import Fingerprint, fingerprint
from dive_fast.teacher.teacher import CachedTeacher, OnlineTeacher, Teacher
from dive_fast.teacher.write_cache import remove, write_cache

logger = logging.getLogger(__name__)


def reference_samples(config: Config, images: Images, towers: Towers) -> ReferenceSamples:
    """The samples of ``data.reference`` as training sees them.

    Args:
        images: the opened reference set, or its stream.
    """
    data = config.data.reference
    assert data is not None
    tokenizer = tokenizer_of(config.model, data.text_length)
    draws = data.captions == "lines"
    return ReferenceSamples(
        *(images, tokenizer, towers.preprocess, towers.pooled_at, config.train.seed, data.views, draws)
    )


def open_teacher(config: Config, folder: Path, towers: Towers, samples: ReferenceSamples, ranks: Ranks) -> Teacher:
    """Opens the teacher of a run; a missing cache is written first, and each cache is audited.

    Args:
        folder: the run folder.
        towers: the frozen model; copied.

    Raises:
        CacheError: the cache belongs to another configuration, is damaged, or fails its audit.
    """
    if config.teacher.mode == "online":
        return OnlineTeacher(copy.deepcopy(towers), ranks)
    path = cache_folder(config.teacher, folder)
    if not store.is_there(path):
        ranks.print(f"teacher cache: embedding the reference set once, into {path}")
    teacher, result = open_cache(config, path, towers, samples, ranks)
    if ranks.is_main and result is not None:
        ranks.print(f"teacher cache {path} is valid: {result}")
        folder.mkdir(parents=True, exist_ok=True)
        write_audit(folder / "audit.json", result)
    return teacher


def open_cache(
    config: Config, path: Path, towers: Towers, samples: ReferenceSamples, ranks: Ranks, rebuild: bool = False
) -> tuple[CachedTeacher, Audit | None]:
    """Opens the cache of a config, after writing it if it is missing.

    Args:
        rebuild: remove an existing cache and write it again.

    Returns:
        The teacher and its audit; no audit if ``teacher.audit`` is 0.

    Raises:
        CacheError: the cache belongs to another configuration, is damaged, or fails its audit.
    """
    options = config.teacher
    expected, loading = _fingerprint_and_loader(config, towers, samples, ranks)
    frozen = copy.deepcopy(towers)
    if rebuild or not ranks.broadcast(store.is_there(path)):
        with _locked(path, ranks):
            if rebuild:
                if ranks.is_main:
                    remove(path)
                ranks.barrier()
            # Another run may have written it while this one waited for the lock.
            if not ranks.broadcast(store.is_there(path)):
                write_cache(path, frozen, samples, expected, ranks, options.batch_size, loading)
    teacher = CachedTeacher(path, expected, options.verify)
    if ranks.is_main and teacher.store.modified not in ("", samples.source.listed_modified()):
        logger.warning(
            "teacher cache %s: modification times of data.reference's files changed since the cache was written, "
            "but the contents that their digest covers did not; the cache is used",
            path,
        )
    if options.audit == 0:
        return teacher, None
    result = audit(teacher, frozen, samples, ranks, options.batch_size, loading, options.audit)
    check_audit(result, teacher, options.tolerance)
    return teacher, result


def adopt_cache(
    config: Config,
    path: Path,
    towers: Towers,
    samples: ReferenceSamples,
    ranks: Ranks,
    embeddings: retrieval.Embeddings,
    rebuild: bool = False,
) -> Audit:
    """Makes the cache of a config from clip-retrieval's embeddings; it gets its name after passing its audit.

    Args:
        rebuild: replace an existing cache.

    Raises:
        CacheError: there is a cache, or the embeddings do not match the samples or fail the audit.
    """
    if store.is_there(path) and not rebuild:
        raise CacheError(f"{path}: a teacher cache exists; add --rebuild to replace it, or set teacher.path")
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
    expected, loading = _fingerprint_and_loader(config, towers, samples, ranks)
    layout = store.Layout(len(samples.source), samples.num_views, towers.width, options.dtype)
    limit = allowed(options.dtype, options.tolerance)
    with ranks.raise_on_all(CacheError):
        if ranks.is_main:
            _remove_adopted(partial, rebuild)
    try:
        retrieval.adopt(embeddings, partial, layout, samples.source, expected, ranks)
        with ranks.raise_on_all(CacheError):
            sizes = options.batch_size, loading, options.audit
            result = audit(CachedTeacher(partial, expected), copy.deepcopy(towers), samples, ranks, *sizes)
            if not result.within(limit):
                raise CacheError(
                    f"{embeddings.folder}: {result}; teacher.tolerance allows {limit:.0e}, nothing is adopted. "
                    "Most likely other weights (quickgelu or not?), another preprocessing, or embeddings computed "
                    "in half precision: only in this last case raise teacher.tolerance; otherwise write the cache "
                    "without --adopt"
                )
    except CacheError:
        if ranks.is_main:
            _remove_adopted(partial)
        raise
    if ranks.is_main:
        store.replace(partial, path)
    ranks.barrier()
    return result


def _remove_adopted(partial: Path, include_computed: bool = False) -> None:
    """Removes adopted rows without an audit: the files that they came from may change before the next attempt."""
    if store.is_there(partial) and (include_computed or store.read_manifest(partial).origin != store.COMPUTED):
        shutil.rmtree(partial)


def export_cache(
    config: Config, path: Path, towers: Towers, samples: ReferenceSamples, ranks: Ranks, folder: Path
) -> int:
    """Exports the cache of a config to clip-retrieval's files; returns the number of partitions.

    Raises:
        CacheError: there is no cache, it belongs to another configuration or is damaged, or the files cannot be
            written.
    """
    if not store.is_there(path):
        raise CacheError(f"{path}: no teacher cache to export; run the same command without --export to write it")
    expected, _ = _fingerprint_and_loader(config, towers, samples, ranks)
    return retrieval.export(CachedTeacher(path, expected).store, samples.source, folder)


def _fingerprint_and_loader(
    config: Config, towers: Towers, samples: ReferenceSamples, ranks: Ranks
) -> tuple[Fingerprint, Options]:
    """The fingerprint that a config's cache must have, and the loader options for its samples."""
    data = config.data.reference
    assert data is not None
    # fp32 images even if training loads 16-bit ones.
    loading = replace(loader_options(config, data, ranks), dtype=torch.float32)
    length = data.text_length or towers.context_length
    return fingerprint(towers, samples, length, loading, config.teacher.dtype), loading


def _locked(path: Path, ranks: Ranks) -> AbstractContextManager[None]:
    """Locks a cache against writing, replacement and removal by other processes; waits for the lock."""
    return file_lock(path.with_name(f".{path.name}.lock"), f"teacher cache {path}", wait=True, ranks=ranks)


def cache_folder(teacher: TeacherConfig, folder: Path) -> Path:
    """Folder of a run's cache.

    Args:
        folder: the run folder.
    """
    return Path(teacher.path) if teacher.path is not None else folder / "teacher"
