"""DiVE: contrastive loss on the target, AVL and PVL on the reference batch (Eq. 9)."""

from typing import NamedTuple

import torch
from torch import Tensor

from dive_fast.config.schema import ObjectiveConfig
from dive_fast.kernels import difference_loss, dive_loss
from dive_fast.methods.method import Group, Loss, Objective, decay_per_update, update_average
from dive_fast.model.features import Outputs, Pairs


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
            decay=decay_per_update(config),
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
        update_average(self.average_vector, result.average_vector)
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
        update_average(self.average_vector, result.average_vector)
        scale = target.logit_scale.detach().squeeze()
        metrics = {"contrastive_loss": result.contrastive_loss, "logit_scale": scale}
        return Loss(result.loss, metrics | _difference_metrics(result))


def _difference_metrics(result: NamedTuple) -> dict[str, Tensor]:
    fields = result._asdict()
    metrics = {name: fields[name] for name in ("average_loss", "pairwise_loss", "image_norm", "text_norm")}
    return metrics | {"average_norm": fields["average_vector"].norm()}
