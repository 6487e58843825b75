"""SnD: distillation of the image features (Eq. 12, 13)."""

from dive_fast.config.schema import ObjectiveConfig
from dive_fast.kernels.naive import unit
from dive_fast.methods.method import Group, Loss, Objective, over_ranks
from dive_fast.model.features import Outputs, Pairs


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
