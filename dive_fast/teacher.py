"""The frozen model's embeddings of the reference set: computed online at every step, or once into a cache.

Either way in fp32: a difference vector of 1e-3 is lost in a half-precision teacher's rounding.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dive_fast.config import ConfigError
from dive_fast.data.batch import ReferenceBatch
from dive_fast.data.loader import Options, batches_of
from dive_fast.data.samples import ReferenceSamples
from dive_fast.objective import Pairs
from dive_fast.ranks import Ranks
from dive_fast.towers import Towers, unit

FORMAT = 2
FINGERPRINT = "fingerprint.json"
Fingerprint = dict[str, Any]


class Teacher(Protocol):
    """Gives a reference batch its frozen embeddings."""

    runs_ahead: bool
    """Whether it only looks them up, which a thread may do before the step that needs them."""

    def __call__(self, batch: ReferenceBatch) -> Pairs:
        """Unit rows ``(B, D)`` fp32 of both halves of each pair, on the batch's device."""


class OnlineTeacher:
    """A frozen copy of the pre-trained model, run at every step."""

    runs_ahead = False

    def __init__(self, towers: Towers, ranks: Ranks) -> None:
        """Takes the towers over; they must be a copy of their own."""
        self.towers = towers.to(ranks.device).eval().requires_grad_(False)
        self.towers.autocast = None

    @torch.no_grad()
    def __call__(self, batch: ReferenceBatch) -> Pairs:
        """Embeds the batch."""
        image, text = self.towers.encode_pairs(batch.images, batch.text)
        return Pairs(unit(image), unit(text))


class CachedTeacher:
    """Embeddings read by sample and view from the files that :func:`write_cache` made."""

    runs_ahead = True

    def __init__(self, folder: Path, fingerprint: Fingerprint) -> None:
        """Opens a cache.

        Raises:
            ConfigError: the cache was made from something else; names every field that differs.
        """
        found = json.loads((folder / FINGERPRINT).read_text())
        differing = [
            f"{name}: the cache has {found.get(name)!r}, this run {fingerprint.get(name)!r}"
            for name in sorted(found.keys() | fingerprint.keys())
            if found.get(name) != fingerprint.get(name)
        ]
        if differing:
            raise ConfigError(
                f"teacher cache {folder} was made from something else ({'; '.join(differing)}); "
                "remove that folder to have it made anew, or set teacher.path to another"
            )
        self._num_views = int(found["views"])
        self._image: NDArray[np.float32] = np.load(folder / "image.npy", mmap_mode="r")
        self._text: NDArray[np.float32] = np.load(folder / "text.npy", mmap_mode="r")

    def __call__(self, batch: ReferenceBatch) -> Pairs:
        """Reads the batch's rows."""
        image = self._image[(batch.sample * self._num_views + batch.view).numpy()]
        text = self._text[batch.sample.numpy()]
        device = batch.images.device
        return Pairs(*(torch.from_numpy(rows).to(device, non_blocking=True) for rows in (image, text)))


def fingerprint(
    towers: Towers, model: dict[str, Any], samples: ReferenceSamples, text_length: int | None, options: Options
) -> Fingerprint:
    """What a cache depends on; two runs may share one exactly when theirs are equal.

    Args:
        model: the config's ``model`` section.
        text_length: context length of the captions, if not the model's.
        options: loaders differ in the last bits of the pixels, and DALI between CPU and GPU.
    """
    return {
        "format": FORMAT,
        "model": model,
        "weights": weights_digest(towers),
        "data": samples.source.digest(),
        "preprocess": repr(towers.preprocess),
        "views": samples.num_views,
        "crops": None if samples.views == "eval" else samples.seed,
        "text_length": text_length,
        "loader": f"dali on {options.device.type}" if options.loader == "dali" else options.loader,
    }


def weights_digest(towers: Towers) -> str:
    """A hash of all weights, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(towers.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_cache(
    folder: Path,
    towers: Towers,
    samples: ReferenceSamples,
    print_of_cache: Fingerprint,
    ranks: Ranks,
    batch_size: int,
    options: Options,
) -> None:
    """Embeds the whole reference set, every rank its share, into ``folder``: whole, or not there at all.

    Args:
        folder: its parent is on a file system that all ranks share.
        towers: the frozen model, a copy of its own.
        print_of_cache: what :func:`fingerprint` gave.
        batch_size: pairs embedded at once on each rank.
        options: of the loader; the one that training has.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    embed = OnlineTeacher(towers, ranks)
    num_samples, num_views = len(samples.source), samples.num_views
    if ranks.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        width = embed.towers.width
        for name, count in (("image", num_samples * num_views), ("text", num_samples)):
            np.lib.format.open_memmap(partial / f"{name}.npy", "w+", np.float32, (count, width)).flush()
    ranks.barrier()
    image = np.lib.format.open_memmap(partial / "image.npy", "r+")
    text = np.lib.format.open_memmap(partial / "text.npy", "r+")
    share = ranks.share(num_samples)
    places = [(view, sample) for view in range(num_views) for sample in share]
    rows = np.array([sample * num_views + view for view, sample in places], dtype=np.int64)
    progress = ranks.progress(len(places), "teacher cache", "pair")
    done = 0
    for batch in batches_of(samples, places, batch_size, options):
        embeddings = embed(batch.to(ranks.device))
        own = rows[done : done + len(batch.sample)]
        image[own] = embeddings.image.cpu().numpy()
        text[own // num_views] = embeddings.text.cpu().numpy()
        done += len(own)
        progress.update(len(own))
    progress.close()
    image.flush()
    text.flush()
    ranks.barrier()
    if ranks.first:
        (partial / FINGERPRINT).write_text(json.dumps(print_of_cache, indent=2) + "\n")
        partial.rename(folder)
    ranks.barrier()


def is_cache(folder: Path) -> bool:
    """Whether a whole cache is there."""
    return (folder / FINGERPRINT).is_file()
