"""Who gives a reference batch its frozen embeddings: a copy of the model at every step, or the cache.

Either way computed in fp32: a difference vector of 1e-3 is lost in a half-precision teacher's rounding.
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

    def __call__(self, batch: ReferenceBatch) -> Pairs:
        """Embeds the batch."""
        return Pairs(self.image(batch), self.text(batch))

    @torch.no_grad()
    def image(self, batch: ReferenceBatch) -> Tensor:
        """Unit rows ``(B, D)`` fp32 of its images."""
        return unit(self.towers.encode_image(batch.images))

    @torch.no_grad()
    def text(self, batch: ReferenceBatch) -> Tensor:
        """Unit rows ``(B, D)`` fp32 of its captions."""
        return unit(self.towers.encode_text(batch.text.tokens, batch.text.length))[batch.text.index]


class CachedTeacher:
    """Embeddings read by sample and view from a cache."""

    runs_ahead = True

    def __init__(self, folder: Path, fingerprint: Fingerprint, verify: bool = True) -> None:
        """Opens a cache.

        Args:
            verify: hold each block of it to its checksum when it is first read.

        Raises:
            StaleCacheError: it was made from something else, names every field that differs; or it is damaged.
        """
        self.store = Store(folder, verify)
        if different := differences(self.store.fingerprint, fingerprint):
            raise StaleCacheError(
                f"teacher cache {folder} was made from something else ({'; '.join(different)}); "
                "set teacher.path to another folder, or rebuild it"
            )

    def __call__(self, batch: ReferenceBatch) -> Pairs:
        """Reads the batch's rows.

        Raises:
            StaleCacheError: bytes of them have changed since they were written.
        """
        device = batch.images.device
        sample, view = batch.sample.numpy(), batch.view.numpy()
        dtype = getattr(torch, self.store.layout.dtype)
        rows = []
        for half in HALVES:
            # A new piece of page-locked memory each time: the one before may still be on its way to the device.
            read = torch.empty(len(sample), self.store.layout.width, dtype=dtype, pin_memory=device.type == "cuda")
            self.store.read(half, sample, view, read.numpy())
            rows.append(read.to(device, non_blocking=True).float())
        return Pairs(*rows)
