"""Teachers embed a reference batch with the frozen model: online at every step, or by reading a cache.

Both compute in fp32: a difference vector of length 1e-3 is lost in a half-precision teacher's rounding.
"""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dive_fast.data.batch import ReferenceBatch
from dive_fast.distributed import Ranks
from dive_fast.model.features import Pairs
from dive_fast.model.towers import Towers, unit
from dive_fast.teacher.cache_files import HALVES, StaleCacheError, Store
from dive_fast.teacher.fingerprint import Fingerprint, differences


class Teacher(Protocol):
    """Maps a reference batch to its frozen embeddings."""

    runs_ahead: bool
    """Whether a thread may call it before the step, since it only reads stored rows."""

    def __call__(self, batch: ReferenceBatch) -> Pairs:
        """Unit rows ``(B, D)`` fp32 of both halves of each pair, on the batch's device."""


class OnlineTeacher:
    """A frozen copy of the pre-trained model, run at every step."""

    runs_ahead = False

    def __init__(self, towers: Towers, ranks: Ranks) -> None:
        """Takes over ``towers``, which must be a copy: it freezes them and disables autocast."""
        self.towers = towers.to(ranks.device).eval().requires_grad_(False)
        self.towers.autocast = None

    def __call__(self, batch: ReferenceBatch) -> Pairs:
        """Embeds images and captions of the batch."""
        return Pairs(self.image(batch), self.text(batch))

    @torch.no_grad()
    def image(self, batch: ReferenceBatch) -> Tensor:
        """Unit rows ``(B, D)`` fp32 of the batch's images."""
        return unit(self.towers.encode_image(batch.images))

    @torch.no_grad()
    def text(self, batch: ReferenceBatch) -> Tensor:
        """Unit rows fp32 of the batch's captions, ``(B, D)`` where it has one per image."""
        return unit(self.towers.encode_text(batch.text.tokens, batch.text.length))[batch.text.index]


class CachedTeacher:
    """Reads embeddings by sample and view from a cache."""

    runs_ahead = True

    def __init__(self, folder: Path, fingerprint: Fingerprint, verify: bool = True) -> None:
        """Opens a cache.

        Args:
            fingerprint: fingerprint that the cache must have.
            verify: check each block against its checksum when it is first read.

        Raises:
            StaleCacheError: it is damaged, or belongs to another configuration; the message names every field that
                differs.
        """
        self.store = Store(folder, verify)
        if different := differences(self.store.fingerprint, fingerprint):
            raise StaleCacheError(
                f"teacher cache {folder} belongs to another configuration ({'; '.join(different)}); "
                "set teacher.path to another folder, or rebuild it"
            )

    def __call__(self, batch: ReferenceBatch) -> Pairs:
        """Reads the batch's rows.

        Raises:
            StaleCacheError: their bytes have changed since they were written.
        """
        device = batch.images.device
        sample, view = batch.sample.numpy(), batch.view.numpy()
        caption = None if batch.caption is None else batch.caption.numpy()
        dtype = getattr(torch, self.store.layout.dtype)
        rows = []
        for half in HALVES:
            # New page-locked memory for each call: the previous copy to the device may still be in progress.
            shape = len(sample), self.store.layout.width
            buffer = torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
            self.store.read(half, sample, view, buffer.numpy(), caption)
            rows.append(buffer.to(device, non_blocking=True).float())
        return Pairs(*rows)
