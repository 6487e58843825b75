"""Features of the target's classes by learned prompts, and their backward in pieces.

The text tower runs on all C class prompts in every step. Ranks encode equal shares of the classes; with
micro-batches each share is encoded in pieces without gradient, the loss is differentiated by the features, and
each piece is encoded again against its part of that gradient. The sum is exact, since the loss sees all classes.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dive_fast.distributed import Ranks

Encode = Callable[[Sequence[int]], Tensor]
"""Consecutive classes -> their unnormalised features, with gradient by the prompts."""


_FILLER = range(1)
"""Classes that a rank encodes where others have one more piece; their gradient is zero."""


class ClassFeatures:
    """The features of all classes in one step."""

    def __init__(self, encode: Encode, count: int, pieces: Callable[[int], Sequence[slice]], ranks: Ranks) -> None:
        """Encodes nothing yet.

        Args:
            count: C.
            pieces: number of classes -> the slices of them that are encoded at once.
        """
        self._encode, self._count, self._ranks = encode, count, ranks
        self._share = ranks.local_range(count)
        self._pieces = [self._share[each] for each in pieces(len(self._share))]
        # Under ZeRO 1 and 2 each backward reduces gradients, so all ranks have as many as the largest share.
        largest = -(-count // ranks.world_size)
        self._num_fillers = len(pieces(largest)) - len(self._pieces)
        self._kept: Tensor | None = None

    def leaf(self) -> Tensor:
        """The features of all classes, ``(C, D)`` in fp32, as a leaf that requires gradient; all ranks call it."""
        if len(self._pieces) == 1:
            rows = self._kept = self._encode(self._pieces[0])
        else:
            with torch.no_grad():
                rows = torch.cat([self._encode(piece) for piece in self._pieces or [_FILLER]])
        features = torch.zeros(self._count, rows.shape[1], device=rows.device)
        if len(self._share):
            features[self._share.start : self._share.stop] = rows.detach().float()
        if self._ranks.group is not None:
            dist.all_reduce(features, group=self._ranks.group)  # each row is nonzero on one rank
        return features.requires_grad_()

    def surrogates(self, gradient: Tensor) -> Iterator[Tensor]:
        """One loss, ``()``, a piece of this rank: their gradients by the prompts add up to that of the loss.

        The mean over ranks, as DeepSpeed reduces gradients, is that of the mean of the ranks' losses.

        Args:
            gradient: ``(C, D)`` fp32 of this rank's loss by :meth:`leaf`; all ranks iterate.
        """
        if self._ranks.group is not None:
            gradient = gradient.clone()
            dist.all_reduce(gradient, group=self._ranks.group)
        for piece in self._pieces:
            features = self._encode(piece) if self._kept is None else self._kept
            self._kept = None
            yield (features.float() * gradient[piece.start : piece.stop]).sum()
        for _ in range(self._num_fillers):
            yield 0.0 * self._encode(_FILLER).float().sum()

    def __len__(self) -> int:
        """Number of surrogates, equal on all ranks."""
        return len(self._pieces) + self._num_fillers
