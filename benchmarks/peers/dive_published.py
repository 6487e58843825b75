"""DiVE as in the paper (Eq. 4-9), on FLYP's recipe: one joint graph, and the frozen model runs at every step."""

from typing import Any

import torch
from torch import Tensor, nn

from peers.flyp import Flyp, Inputs, contrastive_loss


class DivePublished(Flyp):
    """FLYP with a frozen copy of the model and the average vector."""

    def __init__(
        self, model: nn.Module, teacher: nn.Module, *, weight: float = 1000.0, decay: float = 0.99, **recipe: Any
    ) -> None:
        """Takes over two copies of an open_clip model on one device; defaults are the paper's.

        Args:
            recipe: keyword arguments of :class:`Flyp`.
        """
        super().__init__(model, **recipe)
        self.teacher: Any = teacher.eval().requires_grad_(False)
        self.weight, self.decay = weight, decay
        self.average_vector = self.model.logit_scale.new_zeros(self.model.visual.output_dim).detach()

    def losses(self, inputs: Inputs) -> dict[str, Tensor]:
        """Losses of Eq. 9; updates the average vector."""
        # First, while no graph occupies memory.
        with torch.no_grad():
            frozen = embed(self.teacher, inputs.reference_images, inputs.reference_tokens)
        target = embed(self.model, inputs.target_images, inputs.target_tokens)
        contrastive = contrastive_loss(*target, self.model.logit_scale.exp())
        tuned = embed(self.model, inputs.reference_images, inputs.reference_tokens)
        average, pairwise, average_vector = difference_losses(*tuned, *frozen, self.average_vector, self.decay)
        self.average_vector = average_vector.detach()
        loss = contrastive + self.weight * (average + pairwise)
        return {
            "loss": loss,
            "contrastive_loss": contrastive,
            "average_loss": average,
            "pairwise_loss": pairwise,
        }


def embed(model: Any, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows of both halves of each pair, ``(B, D)`` each."""
    return model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)


def difference_losses(
    image: Tensor, text: Tensor, frozen_image: Tensor, frozen_text: Tensor, average_vector: Tensor, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Average and pairwise vector loss, ``()``, and the new average vector, ``(D,)``, with gradient (Eq. 4-8).

    Args:
        image, text: unit rows ``(B', D)`` of the model being tuned.
        frozen_image, frozen_text: unit rows ``(B', D)`` of the frozen model.
        average_vector: ``(D,)``, m of the previous step.
    """
    u, v = image - frozen_image, text - frozen_text
    m = decay * average_vector + (1 - decay) * ((u + v) / 2).mean(dim=0)
    average_loss = ((u - m) ** 2).sum(dim=1).mean() + ((v - m) ** 2).sum(dim=1).mean()
    pairwise_loss = ((u - v) ** 2).sum(dim=1).mean()
    return average_loss, pairwise_loss, m
