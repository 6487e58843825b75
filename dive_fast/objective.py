"""What is minimised: the loss of the target half, the loss of the reference half, and the state they carry.

An objective turns features into losses and knows nothing of towers, batches or DeepSpeed. Features are
un-normalised; losses are those of the global batch over ``group`` (see dive_fast.kernels).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dive_fast.config import ObjectiveConfig
from dive_fast.kernels import contrastive_loss, difference_loss, dive_loss
from dive_fast.kernels.backend import Backend

Group = dist.ProcessGroup | None


class Pairs(NamedTuple):
    """Features of the two halves of each pair, ``(B, D)`` each."""

    image: Tensor
    text: Tensor


class Loss(NamedTuple):
    """A loss, ``()``, with gradient, and what to log beside it, ``()`` each on the device, without."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Flyp(nn.Module):
    """Contrastive fine-tuning: Eq. 1 on the target batch and nothing else."""

    needs_reference = False
    backend: Backend = "auto"
    """Of the loss kernels."""

    def target(self, features: Pairs, logit_scale: Tensor, group: Group = None) -> Loss:
        """Loss of the target half."""
        loss = contrastive_loss(*features, logit_scale, group=group, backend=self.backend)
        return Loss(loss, {"contrastive_loss": loss.detach(), "logit_scale": logit_scale.detach().squeeze()})


class Dive(Flyp):
    """Contrastive loss on the target, weighted AVL + PVL on the reference (Eq. 9); holds the average vector."""

    needs_reference = True
    average_vector: Tensor

    def __init__(
        self,
        width: int,
        *,
        weight: float = 1000.0,
        decay: float = 0.99,
        average_weight: float = 1.0,
        pairwise_weight: float = 1.0,
        mean_gradient: bool = True,
    ) -> None:
        """Starts with a zero average vector of ``width`` elements."""
        super().__init__()
        self.weight = weight
        self._options = {
            "decay": decay,
            "average_weight": average_weight,
            "pairwise_weight": pairwise_weight,
            "mean_gradient": mean_gradient,
        }
        self.register_buffer("average_vector", torch.zeros(width))

    def reference(self, features: Pairs, teacher: Pairs, group: Group = None) -> Loss:
        """Loss of the reference half, lambda included; moves the average vector."""
        result = difference_loss(
            *features, *teacher, self.average_vector, group=group, backend=self.backend, **self._options
        )
        self._move(result.average_vector)
        return Loss(self.weight * result.loss, _difference_metrics(result))

    def joint(
        self, target: Pairs, logit_scale: Tensor, reference: Pairs, teacher: Pairs, group: Group = None
    ) -> Loss:
        """Both losses in one call; moves the average vector."""
        result = dive_loss(
            *target,
            logit_scale,
            *reference,
            *teacher,
            self.average_vector,
            weight=self.weight,
            group=group,
            backend=self.backend,
            **self._options,
        )
        self._move(result.average_vector)
        metrics = {"contrastive_loss": result.contrastive_loss, "logit_scale": logit_scale.detach().squeeze()}
        return Loss(result.loss, metrics | _difference_metrics(result))

    def _move(self, average_vector: Tensor) -> None:
        # One batch with a NaN would otherwise stay in the average for ever, though its step is skipped.
        whole = torch.isfinite(average_vector).all()
        self.average_vector.copy_(torch.where(whole, average_vector, self.average_vector))


def create(config: ObjectiveConfig, width: int) -> Flyp | Dive:
    """The objective that a config names, for embeddings of ``width`` elements."""
    if config.name == "flyp":
        return Flyp()
    return Dive(
        width,
        weight=config.weight,
        decay=config.decay,
        average_weight=config.average_weight,
        pairwise_weight=config.pairwise_weight,
        mean_gradient=config.mean_gradient,
    )


def _difference_metrics(result: NamedTuple) -> dict[str, Tensor]:
    fields = result._asdict()
    metrics = {name: fields[name] for name in ("average_loss", "pairwise_loss", "image_norm", "text_norm")}
    return metrics | {"average_norm": fields["average_vector"].norm()}
