"""FLYP with replay: the contrastive loss on the target batch and, weighted, on the reference batch."""

from torch import Tensor

from dive_fast.config.section import Section
from dive_fast.kernels import contrastive_loss
from dive_fast.methods.method import Group, Loss, Preset, ReferenceLoss, Setting
from dive_fast.model.features import Outputs, Pairs


class Replay(ReferenceLoss):
    """The contrastive loss on reference pairs, times the weight."""

    name, title = "replay", "replay"
    needs_teacher = False
    weight: float

    def __init__(self, options: Section, setting: Setting) -> None:
        """Takes the weight of the reference loss."""
        super().__init__(options, setting)
        self.weight = setting.weight

    def loss(self, outputs: Outputs, teacher: Pairs | None, group: Group = None) -> Loss:
        """The weighted contrastive loss over all ranks' pairs."""
        loss: Tensor = contrastive_loss(*outputs.pairs, outputs.logit_scale, group=group, backend=self.backend)
        return Loss(self.weight * loss, {"replay_loss": loss.detach()})


PRESETS = (
    Preset(
        "flyp_replay",
        "FLYP + replay",
        "Contrastive loss + weight * contrastive loss of the reference batch.",
        "contrastive",
        "replay",
        "#7b5ea7",
    ),
)
