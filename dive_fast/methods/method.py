"""What is minimised: the loss of the target half, the loss of the reference half, and the state they carry.

An objective turns features into losses and knows nothing of towers, batches or DeepSpeed. Features are
un-normalised; losses are those of the global batch over ``group`` (see dive_fast.kernels).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from dive_fast.config.schema import ObjectiveConfig
from dive_fast.kernels import contrastive_loss, difference_loss, dive_loss
from dive_fast.kernels.backend import Backend
from dive_fast.kernels.naive import unit

Group = dist.ProcessGroup | None


class Pairs(NamedTuple):
    """Features of the two halves of each pair, ``(B, D)`` each."""

    image: Tensor
    text: Tensor


class Outputs(NamedTuple):
    """What the towers make of one half of a step, a row for each of its pairs."""

    image: Tensor
    """``(B, D)``"""
    text: Tensor | None
    """``(B, D)``; None where the objective has no use for the texts of this half."""
    logit_scale: Tensor
    """``(1,)``"""
    logits: Tensor | None = None
    """``(B, C)`` of the classification head; None where there is none."""

    @property
    def pairs(self) -> Pairs:
        """Both features of each pair."""
        assert self.text is not None
        return Pairs(self.image, self.text)


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


class Flyp(Objective):
    """Contrastive fine-tuning: Eq. 1 on the target batch and nothing else."""

    needs_reference = needs_teacher = False


class CrossEntropy(Objective):
    """Vanilla fine-tuning and LP-FT: classes by a linear head on the image tower, no text, no reference."""

    needs_reference = needs_teacher = target_has_texts = False
    needs_head = True

    def target(self, features: Outputs, labels: Tensor, group: Group = None) -> Loss:
        """The cross-entropy of the head's logits."""
        assert features.logits is not None
        loss = over_ranks(nn.functional.cross_entropy(features.logits, labels), group)
        return Loss(loss, {"cross_entropy": loss.detach()})


class FlypReplay(Objective):
    """The same loss on reference pairs, weighted, beside the target's."""

    needs_teacher = False

    def __init__(self, weight: float) -> None:
        """Takes the weight of the reference batch's loss."""
        super().__init__()
        self.weight = weight

    @classmethod
    def of(cls, config: ObjectiveConfig, width: int) -> "FlypReplay":
        """For any width."""
        return cls(cls.weight_of(config))

    def reference(self, features: Outputs, teacher: Pairs | None, group: Group = None) -> Loss:
        """The weighted contrastive loss."""
        loss = contrastive_loss(*features.pairs, features.logit_scale, group=group, backend=self.backend)
        return Loss(self.weight * loss, {"replay_loss": loss.detach()})


class Snd(Objective):
    """Distillation of the image tower's features: weight times mean |u|^2 (Eq. 12, 13)."""

    reference_has_texts = False

    def __init__(self, weight: float) -> None:
        """Takes lambda of Eq. 13."""
        super().__init__()
        self.weight = weight

    @classmethod
    def of(cls, config: ObjectiveConfig, width: int) -> "Snd":
        """For any width."""
        return cls(cls.weight_of(config))

    def reference(self, features: Outputs, teacher: Pairs | None, group: Group = None) -> Loss:
        """The weighted distillation loss."""
        assert teacher is not None
        square = (unit(features.image) - teacher.image).square().sum(1)
        loss = over_ranks(square.mean(), group)
        norm = over_ranks(square.detach().sqrt().mean(), group)
        return Loss(self.weight * loss, {"distillation_loss": loss.detach(), "image_norm": norm})


class Dive(Objective):
    """Contrastive loss on the target, weighted AVL + PVL on the reference (Eq. 9); holds the average vector."""

    average_vector: Tensor
    default_weight = 1000.0

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

    @classmethod
    def of(cls, config: ObjectiveConfig, width: int) -> "Dive":
        """DiVE, or one of its two losses alone."""
        return cls(
            width,
            weight=cls.weight_of(config),
            decay=_decay(config),
            average_weight=0.0 if config.name == "pvl" else config.average_weight,
            pairwise_weight=0.0 if config.name == "avl" else config.pairwise_weight,
            mean_gradient=config.mean_gradient,
        )

    def reference(self, features: Outputs, teacher: Pairs | None, group: Group = None) -> Loss:
        """The weighted difference losses; moves the average vector."""
        assert teacher is not None
        result = difference_loss(
            *features.pairs, *teacher, self.average_vector, group=group, backend=self.backend, **self._options
        )
        _move(self.average_vector, result.average_vector)
        return Loss(self.weight * result.loss, _difference_metrics(result))

    def joint(
        self, target: Outputs, labels: Tensor, reference: Outputs, teacher: Pairs | None, group: Group = None
    ) -> Loss:
        """Both losses in one call of the kernels; moves the average vector."""
        assert teacher is not None
        result = dive_loss(
            *target.pairs,
            target.logit_scale,
            *reference.pairs,
            *teacher,
            self.average_vector,
            weight=self.weight,
            group=group,
            backend=self.backend,
            **self._options,
        )
        _move(self.average_vector, result.average_vector)
        scale = target.logit_scale.detach().squeeze()
        metrics = {"contrastive_loss": result.contrastive_loss, "logit_scale": scale}
        return Loss(result.loss, metrics | _difference_metrics(result))


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
            decay=_decay(config),
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
        _move(self.average_cosine, average.detach())
        metrics = {
            "average_loss": average_loss.detach(),
            "pairwise_loss": pairwise_loss.detach(),
            "image_cosine": over_ranks(u.detach().mean(), group),
            "text_cosine": over_ranks(v.detach().mean(), group),
            "average_cosine": average.detach(),
        }
        return Loss(self.weight * (average_loss + pairwise_loss), metrics)


KINDS: dict[str, type[Objective]] = {
    "vanilla_ft": CrossEntropy,
    "lp_ft": CrossEntropy,
    "flyp": Flyp,
    "flyp_replay": FlypReplay,
    "snd": Snd,
    "cosine": Cosine,
    "avl": Dive,
    "pvl": Dive,
    "dive": Dive,
}
"""By the name in a config: what an objective needs is known before there is one."""


def create(config: ObjectiveConfig, width: int) -> Objective:
    """The objective that a config names, for embeddings of ``width`` elements."""
    return KINDS[config.name].of(config, width)


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


def _decay(config: ObjectiveConfig) -> float:
    """Of one update: where every k-th step has one, the average is to remember as many steps as ever."""
    return config.decay**config.reference_every


def _move(average: Tensor, to: Tensor) -> None:
    # One batch with a NaN would otherwise stay in the average for ever, though its step is skipped.
    whole = torch.isfinite(to).all()
    average.copy_(torch.where(whole, to, average))


def _difference_metrics(result: NamedTuple) -> dict[str, Tensor]:
    fields = result._asdict()
    metrics = {name: fields[name] for name in ("average_loss", "pairwise_loss", "image_norm", "text_norm")}
    return metrics | {"average_norm": fields["average_vector"].norm()}
