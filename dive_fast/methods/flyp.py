"""FLYP and FLYP with replay: contrastive fine-tuning (Eq. 1)."""

from dive_fast.config.schema import ObjectiveConfig
from dive_fast.kernels import contrastive_loss
from dive_fast.methods.method import Group, Loss, Objective
from dive_fast.model.features import Outputs, Pairs


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

    @classmethod
    def of(cls, config: ObjectiveConfig, width: int) -> "FlypReplay":
        """For any width."""
        return cls(cls.weight_of(config))

    def reference(self, features: Outputs, teacher: Pairs | None, group: Group = None) -> Loss:
        """The weighted contrastive loss."""
        loss = contrastive_loss(*features.pairs, features.logit_scale, group=group, backend=self.backend)
        return Loss(self.weight * loss, {"replay_loss": loss.detach()})
