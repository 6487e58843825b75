"""Cosine: DiVE with cosines instead of difference vectors (Eq. 10, 11 in Eq. 6-8 of the DiVE paper)."""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from dive_fast.config.section import Decay, Section
from dive_fast.kernels.naive import unit
from dive_fast.methods.method import Group, Loss, Preset, ReferenceLoss, Setting, over_ranks, update_average
from dive_fast.model.features import Outputs, Pairs


class Cosine(ReferenceLoss):
    """AVL and PVL of the cosines u, v of tuned and frozen embeddings, times lambda; state: the average cosine."""

    name, title = "cosine", "Cosine"
    default_weight = 1000.0
    average_cosine: Tensor

    class Options(Section):
        """Options of the cosine losses."""

        decay: Decay = 0.99
        """Decay of the average cosine, Eq. 6."""
        average_start: Literal[0, 1] = 0
        """Average before the first step. 0 as Eq. 6 has it; 1, the cosines before fine-tuning."""
        mean_gradient: bool = True
        """Whether the batch's share of the average carries gradient, as Eq. 6-7 read literally."""

    def __init__(self, options: Section, setting: Setting) -> None:
        """Starts with the average cosine of the options."""
        super().__init__(options, setting)
        values: dict[str, Any] = options.model_dump()
        # One update stands for k steps.
        self.decay, self.mean_gradient = values["decay"] ** setting.reference_every, values["mean_gradient"]
        self.weight = setting.weight
        self.register_buffer("average_cosine", torch.full((), float(values["average_start"])))

    def loss(self, outputs: Outputs, teacher: Pairs | None, group: Group = None) -> Loss:
        """The weighted losses; moves the average cosine."""
        assert teacher is not None
        u, v = ((unit(ours) * theirs).sum(1) for ours, theirs in zip(outputs.pairs, teacher, strict=True))
        mean = ((u + v) / 2).mean()
        if group is not None:
            # Differentiable: the average is over all ranks' rows, and so is its gradient.
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


PRESETS = (
    Preset(
        "cosine",
        "Cosine",
        "DiVE with cosines instead of difference vectors, Eq. 10-11.",
        "contrastive",
        "cosine",
        "#4a9ba8",
    ),
)
