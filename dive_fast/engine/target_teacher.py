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


def split_prompts(rows: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
    """Splits text rows into those of the prompts, ``(count, D)``, and those of the second prompts, if any."""
    return (rows, None) if len(rows) == count else (rows[:count], rows[count:])


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
        # What the student does not tune stays equal, so that both share it.
        shared: dict[int, Any] = {id(p): p for p in towers.parameters() if not p.requires_grad}
        self._towers = copy.deepcopy(towers, shared).eval().requires_grad_(False)
        towers.head = head
        self._loss, self.moves = loss, loss.teacher == "moving"

    @torch.no_grad()
    def __call__(self, images: Tensor, text: Text | None, micro_batch_size: int | None) -> TeacherOutputs:
        """Embeds the target batch, and the texts that the target loss draws itself.

        Args:
            images: ``(B, 3, H, W)``.
            text: distinct texts and those of each pair, all prompts before all second prompts; None: no texts.
            micro_batch_size: number of images or texts embedded at once; None: all.
        """
        size, count = micro_batch_size or len(images), len(images)
        image = torch.cat([unit(self._towers.encode_image(piece)) for piece in images.split(size)])
        rows = second = own = None
        if text is not None:
            rows, second = split_prompts(self._encode(text, size), count)
        if (texts := self._loss.teacher_texts()) is not None:
            own = self._encode(texts.to(images.device), size)
        return TeacherOutputs(image, rows, self._towers.scale().detach(), second, own)

    def _encode(self, text: Text, size: int) -> Tensor:
        """Unit rows of the texts of each pair; encodes ``size`` texts at once."""
        encoded = [self._towers.encode_text(piece, text.length) for piece in text.tokens.split(size)]
        return unit(torch.cat(encoded))[text.index]

    @torch.no_grad()
    def move(self, student: Towers, skipped: Tensor) -> None:
        """Moves a moving teacher towards the student unless the update was skipped; never waits for the device.

        Args:
            skipped: ``()``, 1 where the last update was skipped, otherwise 0.
        """
        if not self.moves:
            return
        applied = 1.0 - skipped.float()
        if (rate := self._loss.teacher_rate(applied)) is None:
            return
        rate = rate * applied
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
