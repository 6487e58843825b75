"""What is minimised: the loss of the target half, the loss of the reference half, and the state they carry.

An objective turns features into losses and knows nothing of towers, batches or DeepSpeed. Features are
un-normalised; losses are those of the global batch over ``group`` (see dive_fast.kernels).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from dive_fast.config import ObjectiveConfig
from dive_fast.kernels import contrastive_loss, difference_loss, dive_loss
from dive_fast.kernels.backend import Backend
from dive_fast.kernels.naive import unit

Group = dist.ProcessGroup | None

LAMBDA, OTHER_WEIGHTS = 1000.0, {"snd": 1.0, "flyp_replay": 1.0}
"""Weight of the reference half, unless told otherwise: the paper's for DiVE and its variants, and for others."""


class Pairs(NamedTuple):
    """Features of the two halves of each pair, ``(B, D)`` each."""

    image: Tensor
    text: Tensor


class Loss(NamedTuple):
    """A loss, ``()``, with gradient, and what to log beside it, ``()`` each on the device, without."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Objective(nn.Module):
    """The contrastive loss on the target batch (Eq. 1); subclasses add a loss on a reference batch."""

    needs_reference = True
    needs_teacher = True
    backend: Backend = "auto"
    """Of the loss kernels."""

    def target(self, features: Pairs, logit_scale: Tensor, group: Group = None) -> Loss:
        """Loss of the target half."""
        loss = contrastive_loss(*features, logit_scale, group=group, backend=self.backend)
        return Loss(loss, {"contrastive_loss": loss.detach(), "logit_scale": logit_scale.detach().squeeze()})

    def reference(self, features: Pairs, logit_scale: Tensor, teacher: Pairs | None, group: Group = None) -> Loss:
        """Loss of the reference half, its weight included.

        Args:
            teacher: unit rows of the frozen model; None where the objective needs none.
        """
        raise NotImplementedError

    def joint(
        self,
        target: Pairs,
        logit_scale: Tensor,
        reference: Pairs,
        teacher: Pairs | None,
        group: Group = None,
    ) -> Loss:
        """Both losses."""
        first = self.target(target, logit_scale, group)
        second = self.reference(reference, logit_scale, teacher, group)
        return Loss(first.loss + second.loss, first.metrics | second.metrics)


class Flyp(Objective):
    """Contrastive fine-tuning: Eq. 1 on the target batch and nothing else."""

    needs_reference = needs_teacher = False


class FlypReplay(Objective):
    """The same loss on reference pairs, weighted, beside the target's."""

    needs_teacher = False

    def __init__(self, weight: float) -> None:
        """Takes the weight of the reference batch's loss."""
        super().__init__()
        self.weight = weight

    def reference(self, features: Pairs, logit_scale: Tensor, teacher: Pairs | None, group: Group = None) -> Loss:
        """The weighted contrastive loss."""
        loss = contrastive_loss(*features, logit_scale, group=group, backend=self.backend)
        return Loss(self.weight * loss, {"replay_loss": loss.detach()})


class Snd(Objective):
    """Distillation of the image tower's features: weight times mean |u|^2 (Eq. 12, 13)."""

    def __init__(self, weight: float) -> None:
        """Takes lambda of Eq. 13."""
        super().__init__()
        self.weight = weight

    def reference(self, features: Pairs, logit_scale: Tensor, teacher: Pairs | None, group: Group = None) -> Loss:
        """The weighted distillation loss."""
        assert teacher is not None
        square = (unit(features.image) - teacher.image).square().sum(1)
        loss = over_ranks(square.mean(), group)
        norm = over_ranks(square.detach().sqrt().mean(), group)
        metrics = {"distillation_loss": loss.detach(), "image_norm": norm}
        # Captions have no part in it; a tower without gradient in one of two backwards would confuse ZeRO.
        return Loss(self.weight * (loss + 0.0 * features.text.float().sum()), metrics)


class Dive(Objective):
    """Contrastive loss on the target, weighted AVL + PVL on the reference (Eq. 9); holds the average vector."""

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

    def reference(self, features: Pairs, logit_scale: Tensor, teacher: Pairs | None, group: Group = None) -> Loss:
        """The weighted difference losses; moves the average vector."""
        assert teacher is not None
        result = difference_loss(
            *features, *teacher, self.average_vector, group=group, backend=self.backend, **self._options
        )
        _move(self.average_vector, result.average_vector)
        return Loss(self.weight * result.loss, _difference_metrics(result))

    def joint(
        self,
        target: Pairs,
        logit_scale: Tensor,
        reference: Pairs,
        teacher: Pairs | None,
        group: Group = None,
    ) -> Loss:
        """Both losses in one call of the kernels; moves the average vector."""
        assert teacher is not None
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
        _move(self.average_vector, result.average_vector)
        metrics = {"contrastive_loss": result.contrastive_loss, "logit_scale": logit_scale.detach().squeeze()}
        return Loss(result.loss, metrics | _difference_metrics(result))


class Cosine(Objective):
    """DiVE with the cosines of tuned and frozen embeddings in the place of u and v (Eq. 10, 11 in Eq. 6-8)."""

    average_cosine: Tensor

    def __init__(self, *, weight: float, decay: float, start: float, mean_gradient: bool) -> None:
        """Takes lambda of Eq. 9 and the decay of Eq. 6.

        Args:
            start: the average before the first step: 0 as Eq. 6 has it; 1, what cosines are before fine-tuning.
        """
        super().__init__()
        self.weight, self.decay, self.mean_gradient = weight, decay, mean_gradient
        self.register_buffer("average_cosine", torch.tensor(float(start)))

    def reference(self, features: Pairs, logit_scale: Tensor, teacher: Pairs | None, group: Group = None) -> Loss:
        """The weighted losses; moves the average."""
        assert teacher is not None
        u, v = ((unit(ours) * theirs).sum(1) for ours, theirs in zip(features, teacher, strict=True))
        mean = ((u + v) / 2).mean()
        if group is not None:
            # Differentiable: the average is of all ranks' rows, and so is its gradient.
            mean = all_reduce(mean, group=group) / dist.get_world_size(group)
        average = self.decay * self.average_cosine + (1 - self.decay) * mean
        m = average if self.mean_gradient else average.detach()
        average_loss = over_ranks(((u - m).square() + (v - m).square()).mean(), group)
        pairwise_loss = over_ranks((u - v).square().mean(), group)
        _move(self.average_cosine, average.detach())
        metrics = {
            "average_loss": average_loss.detach(),
            "pairwise_loss": pairwise_loss.detach(),
            "image_cosine": over_ranks(u.detach().mean(), group),
            "text_cosine": over_ranks(v.detach().mean(), group),
            "average_cosine": average.detach(),
        }
        return Loss(self.weight * (average_loss + pairwise_loss), metrics)


def create(config: ObjectiveConfig, width: int) -> Objective:
    """The objective that a config names, for embeddings of ``width`` elements."""
    name = config.name
    weight = OTHER_WEIGHTS.get(name, LAMBDA) if config.weight is None else config.weight
    if name == "flyp":
        return Flyp()
    if name == "flyp_replay":
        return FlypReplay(weight)
    if name == "snd":
        return Snd(weight)
    if name == "cosine":
        start, mean_gradient = config.average_start, config.mean_gradient
        return Cosine(weight=weight, decay=config.decay, start=start, mean_gradient=mean_gradient)
    return Dive(
        width,
        weight=weight,
        decay=config.decay,
        average_weight=0.0 if name == "pvl" else config.average_weight,
        pairwise_weight=0.0 if name == "avl" else config.pairwise_weight,
        mean_gradient=config.mean_gradient,
    )


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


def _move(average: Tensor, to: Tensor) -> None:
    # One batch with a NaN would otherwise stay in the average for ever, though its step is skipped.
    whole = torch.isfinite(to).all()
    average.copy_(torch.where(whole, to, average))


def _difference_metrics(result: NamedTuple) -> dict[str, Tensor]:
    fields = result._asdict()
    metrics = {name: fields[name] for name in ("average_loss", "pairwise_loss", "image_norm", "text_norm")}
    return metrics | {"average_norm": fields["average_vector"].norm()}
