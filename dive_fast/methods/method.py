"""What is minimised: the loss of the target half, the loss of the reference half, and the state they carry.

An objective turns features into losses and knows nothing of towers, batches or DeepSpeed. Features are
un-normalised; losses are those of the global batch over ``group`` (see dive_fast.kernels).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dive_fast.config.schema import ObjectiveConfig
from dive_fast.kernels import contrastive_loss
from dive_fast.kernels.backend import Backend
from dive_fast.model.features import Outputs, Pairs

Group = dist.ProcessGroup | None


class Loss(NamedTuple):
    """A loss, ``()``, with gradient, and what to log beside it, ``()`` each on the device, without."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Objective(nn.Module):
    """The contrastive loss on the target batch (Eq. 1); subclasses add a loss on a reference batch."""

    needs_reference = True
    needs_teacher = True
    needs_head = False
    """Whether a linear classifier over the target's classes is trained on top of the image tower."""
    target_has_texts = reference_has_texts = True
    """Whether the text tower runs for this half. It stays as it is where it runs for neither."""
    default_weight = 1.0
    """Of the reference half: the paper's, unless the config has another."""
    backend: Backend = "auto"
    """Of the loss kernels."""

    @classmethod
    def of(cls, config: ObjectiveConfig, width: int) -> "Objective":
        """The objective of a config, for embeddings of ``width`` elements."""
        return cls()

    @classmethod
    def weight_of(cls, config: ObjectiveConfig) -> float:
        """Of the reference half: a batch at every k-th step alone counts k times as much."""
        return config.reference_every * (cls.default_weight if config.weight is None else config.weight)

    def target(self, features: Outputs, labels: Tensor, group: Group = None) -> Loss:
        """Loss of the target half.

        Args:
            labels: ``(B,)`` int64, the class of each pair.
        """
        scale = features.logit_scale
        loss = contrastive_loss(*features.pairs, scale, group=group, backend=self.backend)
        return Loss(loss, {"contrastive_loss": loss.detach(), "logit_scale": scale.detach().squeeze()})

    def reference(self, features: Outputs, teacher: Pairs | None, group: Group = None) -> Loss:
        """Loss of the reference half, its weight included.

        Args:
            teacher: unit rows of the frozen model; None where the objective needs none.
        """
        raise NotImplementedError

    def joint(
        self, target: Outputs, labels: Tensor, reference: Outputs, teacher: Pairs | None, group: Group = None
    ) -> Loss:
        """Both losses; arguments as above."""
        first, second = self.target(target, labels, group), self.reference(reference, teacher, group)
        return Loss(first.loss + second.loss, first.metrics | second.metrics)


def over_ranks(mean: Tensor, group: Group) -> Tensor:
    """The mean over all ranks' rows, of which this rank's carry their gradient.

    Averaging gradients over ranks, as DeepSpeed does, then gives the gradient of the global mean.

    Args:
        mean: over this rank's rows; ranks have equally many.
    """
    if group is None:
        return mean
    whole = mean.detach().clone()
    dist.all_reduce(whole, group=group)
    return mean + (whole / dist.get_world_size(group) - mean.detach())


def decay_per_update(config: ObjectiveConfig) -> float:
    """Of one update: where every k-th step has one, the average is to remember as many steps as ever."""
    return config.decay**config.reference_every


def update_average(average: Tensor, to: Tensor) -> None:
    # One batch with a NaN would otherwise stay in the average for ever, though its step is skipped.
    whole = torch.isfinite(to).all()
    average.copy_(torch.where(whole, to, average))
