"""Teacher of the target half: a copy of the towers, frozen, or moved towards the student after each update."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dive_fast.data.batch import Text
from dive_fast.kernels.naive import unit
from dive_fast.methods.method import TargetLoss, TeacherOutputs
from dive_fast.model.towers import Towers


class TargetTeacher:
    """A copy of the pre-trained towers that embeds the target batch without gradient, in the student's autocast.

    Each rank holds a complete copy, 4 bytes a parameter. It encodes the batch's distinct, trimmed texts.
    """

    def __init__(self, towers: Towers, loss: TargetLoss) -> None:
        """Copies the towers.

        Args:
            towers: the pre-trained towers on their device, before blocks are recomputed or compiled; with fast
                blocks where the student has them. The head is not copied.
            loss: the target loss, which defines whether and how fast the teacher moves.
        """
        head, towers.head = towers.head, None
        self._towers = copy.deepcopy(towers).eval().requires_grad_(False)
        towers.head = head
        self._loss, self.moves = loss, loss.teacher == "moving"

    @torch.no_grad()
    def __call__(self, images: Tensor, text: Text | None, micro_batch_size: int | None) -> TeacherOutputs:
        """Embeds the target batch.

        Args:
            images: ``(B, 3, H, W)``.
            text: distinct texts and their pairs; None skips the text tower.
            micro_batch_size: number of images or texts embedded at once; None: all.
        """
        size = micro_batch_size or len(images)
        image = torch.cat([unit(self._towers.encode_image(piece)) for piece in images.split(size)])
        rows = None
        if text is not None:
            encoded = [self._towers.encode_text(piece, text.length) for piece in text.tokens.split(size)]
            rows = unit(torch.cat(encoded))[text.index]
        return TeacherOutputs(image, rows, self._towers.scale().detach())

    @torch.no_grad()
    def move(self, student: Towers, skipped: Tensor) -> None:
        """Moves a moving teacher towards the student unless the update was skipped; never waits for the device.

        Args:
            skipped: ``()``, 1 where the last update was skipped, otherwise 0.
        """
        if not self.moves:
            return
        applied = 1.0 - skipped.float()
        rate = self._loss.teacher_rate(applied) * applied
        tuned = {name: p.detach() for name, p in student.named_parameters() if p.requires_grad}
        moving = {name: p for name, p in self._towers.named_parameters() if name in tuned}
        teacher: Any = list(moving.values())  # torch's stubs have lists of scalars here
        steps = torch._foreach_sub([tuned[name] for name in moving], teacher)
        torch._foreach_mul_(steps, rate)
        torch._foreach_add_(teacher, steps)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """The weights of a moving teacher by name; nothing for a frozen one, which has the pre-trained weights."""
        if self.moves:
            yield from self._towers.named_parameters()
