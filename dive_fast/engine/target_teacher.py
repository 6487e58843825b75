"""The teacher of the target half: a copy of the towers, frozen, or moved towards the student after each update."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from dive_fast.data.batch import Text
from dive_fast.kernels.naive import unit
from dive_fast.methods.method import TargetLoss, TeacherOutputs
from dive_fast.model.towers import Towers


class TargetTeacher:
    """A copy of the pre-trained towers that embeds the target batch without gradient, in the student's autocast.

    It is whole on each rank: 4 bytes for each parameter. It shares the batch's distinct, trimmed texts.
    """

    def __init__(self, towers: Towers, loss: TargetLoss) -> None:
        """Copies the towers.

        Args:
            towers: as pre-trained, on their device, before blocks are replaced or compiled; the head is left out.
            loss: says whether the teacher moves, and how far.
        """
        head, towers.head = towers.head, None
        self._towers = copy.deepcopy(towers).eval().requires_grad_(False)
        towers.head = head
        self._loss, self.moves = loss, loss.teacher == "moving"

    @torch.no_grad()
    def __call__(self, images: Tensor, text: Text | None, micro_batch_size: int | None) -> TeacherOutputs:
        """The target batch's embeddings.

        Args:
            images: ``(B, 3, H, W)``.
            text: distinct texts and their pairs; None leaves the text tower out.
            micro_batch_size: images or texts embedded at once; None: all.
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
        """Moves a moving teacher towards the student, unless the update was skipped; the host waits for nothing.

        Args:
            skipped: ``()``, 1 where the last update was skipped, otherwise 0.
        """
        if not self.moves:
            return
        applied = 1.0 - skipped.float()
        rate = self._loss.teacher_rate(applied) * applied
        names, ours = zip(*self._towers.named_parameters(), strict=True)
        tuned = dict(student.named_parameters())
        moved = [name for name in names if tuned[name].requires_grad]
        teacher = [parameter for name, parameter in zip(names, ours, strict=True) if name in set(moved)]
        steps = torch._foreach_sub([tuned[name].detach() for name in moved], teacher)
        torch._foreach_mul_(steps, rate)
        torch._foreach_add_(teacher, steps)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """The weights of a moving teacher by name; none of a frozen one, which are the pre-trained ones."""
        if self.moves:
            yield from self._towers.named_parameters()
