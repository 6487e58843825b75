"""Cosine: DiVE with cosines instead of difference vectors (Eq. 10-11)."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from dive_fast.config.schema import ObjectiveConfig
from dive_fast.kernels.naive import unit
from dive_fast.methods.method import Group, Loss, Objective, decay_per_update, over_ranks, update_average
from dive_fast.model.features import Outputs, Pairs


class Cosine(Objective):
    """DiVE with the cosines of tuned and frozen embeddings in the place of u and v (Eq. 10, 11 in Eq. 6-8)."""

    average_cosine: Tensor
    default_weight = 1000.0

    def __init__(self, *, weight: float, decay: float, start: float, mean_gradient: bool) -> None:
        """Takes lambda of Eq. 9 and the decay of Eq. 6.

        Args:
            start: the average before the first step: 0 as Eq. 6 has it; 1, what cosines are before fine-tuning.
        """
        super().__init__()
        self.weight, self.decay, self.mean_gradient = weight, decay, mean_gradient
        self.register_buffer("average_cosine", torch.tensor(float(start)))

    @classmethod
    def of(cls, config: ObjectiveConfig, width: int) -> "Cosine":
        """For any width."""
        return cls(
            weight=cls.weight_of(config),
            decay=decay_per_update(config),
            start=config.average_start,
            mean_gradient=config.mean_gradient,
        )

    def reference(self, features: Outputs, teacher: Pairs | None, group: Group = None) -> Loss:
        """The weighted losses; moves the average."""
        assert teacher is not None
        u, v = ((unit(ours) * theirs).sum(1) for ours, theirs in zip(features.pairs, teacher, strict=True))
        mean = ((u + v) / 2).mean()
        if group is not None:
            # Differentiable: the average is of all ranks' rows, and so is its gradient.
            mean = all_reduce(mean, group=group) / dist.get_world_size(group)
        average = self.decay * self.average_cosine + (1 - self.decay) * mean
        m = average if self.mean_gradient else average.detach()
        average_loss = over_ranks(((u - m).square() + (v - m).square()).mean(), group)
        pairwise_loss = over_ranks((u - v).square().mean(), group)
        update_average(self.average_cosine, average.detach())
        metrics = {
            "average_loss": average_loss.detach(),
            "pairwise_loss": pairwise_loss.detach(),
            "image_cosine": over_ranks(u.detach().mean(), group),
            "text_cosine": over_ranks(v.detach().mean(), group),
            "average_cosine": average.detach(),
        }
        return Loss(self.weight * (average_loss + pairwise_loss), metrics)
