"""Embeddings of large sets in files of some thousand samples each, so that an interrupted run resumes.

The files do not depend on the number of ranks: rank r of W writes and reads the blocks b with b % W = r.
"""

import json
import logging
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dive_fast.config.schema import EvaluateConfig
from dive_fast.data.loaders.loader import Options, batches_of
from dive_fast.data.samples import SampleKey
from dive_fast.data.spread import spread
from dive_fast.distributed import Ranks
from dive_fast.errors import DataError
from dive_fast.evaluation.datasets.set_loader import loader_of_pairs
from dive_fast.evaluation.datasets.strict_samples import BROKEN, StrictSamples
from dive_fast.evaluation.shift.encoders import Encoder
from dive_fast.evaluation.shift.shift_sets import OpenedSet
from dive_fast.identity import Identity, digest
from dive_fast.io.atomic_files import atomic_file, write_atomic
from dive_fast.locks import file_lock

logger = logging.getLogger(__name__)

BLOCK = 4096
"""Samples in a file: what an interrupted rank embeds again at most; 24 MiB at width 768."""
ROWS = 1024
"""Samples whose embeddings are in fp64 at once."""
ABOUT = "about.json"


@dataclass(frozen=True)
class FeatureBlock:
    """Features of some samples that could be read, as the towers return them."""

    sample: NDArray[np.int64]
    """``(n,)``: indices of the samples in their set, ascending."""
    image: Tensor | None
    """``(n, D)`` fp32 on the CPU; None if images were not embedded."""
    text: Tensor | None
    """As ``image``."""


@dataclass(frozen=True)
class StoredFeatures:
    """The features of a set by one model, in files."""

    folder: Path
    data: OpenedSet
    num_selected: int
    """Number of samples that were to be embedded."""
    num_blocks: int

    def blocks(self, ranks: Ranks) -> Iterator[FeatureBlock]:
        """This rank's blocks in parts of :data:`ROWS` samples, one file at a time in memory.

        Raises:
            DataError: a file is missing or damaged.
        """
        for number in range(ranks.rank, self.num_blocks, ranks.world_size):
            block = _read(_file(self.folder, number))
            for first in range(0, len(block.sample), ROWS):
                part = slice(first, first + ROWS)
                halves = (None if each is None else each[part] for each in (block.image, block.text))
                yield FeatureBlock(block.sample[part], *halves)


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:07d}.npz"


def _read(file: Path) -> FeatureBlock:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            halves = (torch.from_numpy(arrays[name]) if name in arrays else None for name in ("image", "text"))
            return FeatureBlock(arrays["sample"], *halves)
    except FileNotFoundError as error:
        raise DataError(
            f"{file}: missing; all ranks must see the folder of features, and nothing may remove it during a run"
        ) from error
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{file}: damaged: {error}; remove it and restart the same command") from error


def store_features(
    encoder: Encoder,
    data: OpenedSet,
    root: Path,
    ranks: Ranks,
    options: EvaluateConfig,
    limit: int | None = None,
    name: str = "",
) -> StoredFeatures:
    """Embeds a set in fp32 into files below ``root``, unless they exist; all ranks must call this.

    A sample whose image cannot be decoded is left out, with a warning that names it.

    Args:
        encoder: embeds the images and texts that both it and the set have; at least one of them.
        root: a folder that all ranks see.
        options: batch size, loader and workers.
        limit: number of samples, spread evenly over the set; None: all.
        name: name on the progress bar.

    Raises:
        DataError: too many images in a row cannot be decoded, a feature is not finite, or the folder cannot be
            written.
    """
    identity = None
    with ranks.raise_on_all(DataError):
        if ranks.is_main:
            identity = _identity(encoder, data, ranks, limit)
    identity = ranks.broadcast(identity)
    folder = root / digest(identity)[:24]
    chosen = spread(len(data.source), limit)
    with encoder.embedding():
        stored = StoredFeatures(folder, data, len(chosen), -(-len(chosen) // BLOCK))
        with file_lock(root / f".{folder.name}.lock", f"features {folder}", wait=True, ranks=ranks):
            with ranks.raise_on_all(DataError):
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    if ranks.is_main:
                        write_atomic(folder / ABOUT, (json.dumps(identity, indent=1) + "\n").encode())
                    missing = [
                        number
                        for number in range(ranks.rank, stored.num_blocks, ranks.world_size)
                        if not _file(folder, number).is_file()
                    ]
                    _embed_blocks(encoder, stored, chosen, missing, ranks, options, name or data.name)
                except OSError as error:
                    raise DataError(f"{folder}: cannot write the features: {error}") from error
            ranks.barrier()
    return stored


def _halves(encoder: Encoder, data: OpenedSet) -> tuple[bool, bool]:
    """Whether images, and whether texts of a set are embedded."""
    return data.has_images and "image" in encoder.widths, data.has_texts and "text" in encoder.widths


def _identity(encoder: Encoder, data: OpenedSet, ranks: Ranks, limit: int | None) -> Identity:
    """Everything that determines the features of a set; texts alone do not depend on images."""
    source, (has_images, has_texts) = data.source, _halves(encoder, data)
    contents = (
        {"digest": source.digest(), "modified": source.listed_modified()}
        if has_images
        else {"digest": source.samples.digest()}
    )
    return {
        "features": encoder.identity(ranks.device),
        "set": contents | {"images": has_images, "texts": has_texts, "border": data.border, "limit": limit},
        "block": BLOCK,
    }


@torch.no_grad()
def _embed_blocks(
    encoder: Encoder,
    stored: StoredFeatures,
    chosen: list[int],
    missing: list[int],
    ranks: Ranks,
    options: EvaluateConfig,
    name: str,
) -> None:
    """Embeds the samples of some blocks, in order, and writes each block when it is complete."""
    parts = [chosen[number * BLOCK : (number + 1) * BLOCK] for number in missing]
    total = sum(map(len, parts))
    if not total:
        return
    local = range(ranks.rank, stored.num_blocks, ranks.world_size)
    done = sum(len(chosen[number * BLOCK : (number + 1) * BLOCK]) for number in local) - total
    batches = _batches(encoder, stored.data, [row for part in parts for row in part], ranks, options)
    pending: list[tuple[NDArray[np.int64], NDArray[np.bool_], dict[str, Tensor]]] = []
    numbers, num_pending = iter(zip(missing, parts, strict=True)), 0
    number, part = next(numbers)
    with ranks.progress(done + total, name, "sample", done) as bar:
        for rows, kept, features in batches:
            pending.append((rows, kept, features))
            num_pending += len(rows)
            bar.update(len(rows))
            while num_pending >= len(part):
                taken, pending = _split(pending, len(part))
                num_pending -= len(part)
                _write(_file(stored.folder, number), taken, stored.data)
                following = next(numbers, None)
                if following is None:
                    break
                number, part = following


Batch = tuple[NDArray[np.int64], NDArray[np.bool_], dict[str, Tensor]]
"""Samples ``(n,)``, whether each could be read, and the features ``(n, D)`` of all rows."""


def _batches(
    encoder: Encoder, data: OpenedSet, rows: list[int], ranks: Ranks, options: EvaluateConfig
) -> Iterator[Batch]:
    size, source = options.batch_size, data.source
    has_images, has_texts = _halves(encoder, data)

    def texts(part: list[int]) -> dict[str, Tensor]:
        return {"text": encoder.texts([source.samples.texts(row)[0] for row in part]).cpu()} if has_texts else {}

    if not has_images:
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            yield np.array(part), np.ones(len(part), np.bool_), texts(part)
        return
    loader = loader_of_pairs("plain" if data.border else options.loader, source, encoder.preprocess)
    settings = Options(loader.name, options.workers, ranks.device)
    keys: list[SampleKey] = [(0, row) for row in rows]
    images = StrictSamples(source, encoder.preprocess, data.border, reports_skipped=True)
    for number, batch in enumerate(batches_of(images, keys, size, settings)):
        part = rows[number * size : (number + 1) * size]
        features = {"image": encoder.images(batch.images.to(ranks.device)).cpu()} | texts(part)
        yield np.array(part), batch.labels.numpy() != BROKEN, features


def _split(pending: list[Batch], count: int) -> tuple[list[Batch], list[Batch]]:
    """The first ``count`` rows of some batches, and the others."""
    taken, left = list[Batch](), list[Batch]()
    for rows, kept, features in pending:
        here = min(max(count, 0), len(rows))
        count -= len(rows)
        for part, target in ((slice(0, here), taken), (slice(here, None), left)):
            if len(rows[part]):
                target.append((rows[part], kept[part], {name: each[part] for name, each in features.items()}))
    return taken, left


def _write(file: Path, batches: list[Batch], data: OpenedSet) -> None:
    kept = np.concatenate([kept for _, kept, _ in batches])
    sample = np.concatenate([rows for rows, _, _ in batches])[kept]
    arrays: dict[str, Any] = {"sample": sample.astype(np.int64)}
    for name in batches[0][2]:
        rows = torch.cat([features[name] for *_, features in batches]).float()[torch.from_numpy(kept)]
        if not bool((finite := rows.isfinite().all(1)).all()):
            first = int(sample[int((~finite).nonzero()[0])])
            raise DataError(
                f"{data.location}: the {name} features of {int((~finite).sum())} samples are not finite, the "
                f"first is {data.source.samples.key(first)}; check the weights of the model"
            )
        arrays[name] = rows.numpy()
    with atomic_file(file) as opened:
        np.savez(opened, **arrays)
