"""Teacher of the target half: a copy of the towers, frozen, or moved towards the student after each update."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dive_fast.data.batch import Text
from dive_fast.kernels import MovingAverage
from dive_fast.kernels.naive import unit
from dive_fast.methods.method import TargetLoss, TeacherOutputs
from dive_fast.model.towers import Towers


def split_prompts(rows: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
    """Splits text rows into those of the prompts, ``(count, D)``, and those of the second prompts, if any."""
    return (rows, None) if len(rows) == count else (rows[:count], rows[count:])


class TargetTeacher:
    """A copy of the pre-trained towers that embeds the target batch without gradient, in the student's autocast.

    Each rank holds a copy of every parameter that the student tunes, 4 bytes each; the others are the student's
    own, since they stay equal. It encodes the batch's distinct, trimmed texts, and is in evaluation mode: no
    dropout, and BatchNorms with the statistics of pre-training, as the student has them.
    """

    def __init__(self, towers: Towers, loss: TargetLoss) -> None:
        """Copies the towers.

        Args:
            towers: the pre-trained towers on their device, before blocks are recomputed or compiled; with fast
                blocks where the student has them, and without gradient where it is not tuned. The head is not
                copied.
            loss: the target loss, which defines whether and how fast the teacher moves.
        """
        head, towers.head = towers.head, None
        tuned = {name: parameter for name, parameter in towers.named_parameters() if parameter.requires_grad}
        shared: dict[int, Any] = {id(p): p for p in towers.parameters() if not p.requires_grad}
        self.towers = copy.deepcopy(towers, shared).eval().requires_grad_(False)
        towers.head = head
        self.copies = {name: p for name, p in self.towers.named_parameters() if name in tuned}
        """The parameters that are not the student's own, by name."""
        self._loss, self.moves = loss, loss.teacher == "moving"
        if self.moves:
            # The student's parameters themselves, whose `.data` DeepSpeed moves to other memory.
            students = [tuned[name] for name in self.copies]
            self._average = MovingAverage(list(self.copies.values()), students, loss.backend)

    @torch.no_grad()
    def __call__(self, images: Tensor, text: Text | None, micro_batch_size: int | None) -> TeacherOutputs:
        """Embeds the target batch, and the texts that the target loss draws itself.

        Args:
            images: ``(B, 3, H, W)``.
            text: distinct texts and those of each pair, all prompts before all second prompts; None: no texts.
            micro_batch_size: number of images embedded at once; texts are cut into as many pieces as images, like
                the student's. None: all at once.
        """
        count = len(images)
        size = micro_batch_size or count
        pieces = math.ceil(count / size)
        image = torch.cat([unit(self.towers.encode_image(piece)) for piece in images.split(size)])
        prompts = second_prompts = part_texts = None
        if text is not None:
            prompts, second_prompts = split_prompts(self._encode(text, pieces), count)
        if (texts := self._loss.teacher_texts()) is not None:
            part_texts = self._encode(texts.to(images.device), math.ceil(len(texts.tokens) / size))
        return TeacherOutputs(image, prompts, self.towers.scale().detach(), second_prompts, part_texts)

    def _encode(self, text: Text, pieces: int) -> Tensor:
        """Unit rows of the texts of each pair; distinct texts are encoded in at most ``pieces`` pieces."""
        parts = [tokens for tokens in text.tokens.tensor_split(pieces) if len(tokens)]
        encoded = [self.towers.encode_text(tokens, text.length) for tokens in parts]
        return unit(torch.cat(encoded))[text.index]

    @torch.no_grad()
    def move(self, skipped: Tensor) -> None:
        """Moves a moving teacher towards the student unless the update was skipped; never waits for the device.

        ``psi <- psi + w (theta - psi)`` with w of :meth:`TargetLoss.teacher_rate`, in fp32.

        Args:
            skipped: ``()``, 1 where the last update was skipped, otherwise 0.
        """
        if not self.moves:
            return
        applied = 1.0 - skipped.float()
        if (rate := self._loss.teacher_rate(applied)) is not None:
            self._average.move((rate * applied).float())

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that a moving teacher does not share with the student, by name; nothing for a frozen one."""
        if self.moves:
            yield from self.copies.items()
