"""SnD: distillation of the image features of the reference batch (Eq. 12, 13 of the DiVE paper)."""

from dive_fast.config.section import Section
from dive_fast.kernels.naive import unit
from dive_fast.methods.method import FirstStep, Group, Loss, Preset, ReferenceLoss, Setting, over_ranks
from dive_fast.methods.noise_floor import check_noise_floor
from dive_fast.model.features import Outputs, Pairs


class Snd(ReferenceLoss):
    """Mean squared length of the images' difference vectors, mean |u|^2, times the weight (Eq. 12)."""

    name, title = "snd", "SnD"
    needs_texts = False
    norms = {"image_norm": "|u|"}

    def __init__(self, options: Section, setting: Setting) -> None:
        """Takes lambda of Eq. 13."""
        super().__init__(options, setting)
        self.weight = setting.weight

    def loss(self, outputs: Outputs, teacher: Pairs | None, group: Group = None) -> Loss:
        """The weighted distillation loss."""
        assert teacher is not None
        square = (unit(outputs.image) - teacher.image).square().sum(1)
        loss = over_ranks(square.mean(), group)
        norm = over_ranks(square.detach().sqrt().mean(), group)
        return Loss(self.weight * loss, {"distillation_loss": loss.detach(), "image_norm": norm})

    def check_first_step(self, first: FirstStep) -> None:
        """Validates the noise floor of |u|."""
        check_noise_floor(first, self.norms)


PRESETS = (
    Preset(
        "snd",
        "SnD",
        "Contrastive loss + weight * mean squared length of the images' difference vectors, Eq. 12-13.",
        "contrastive",
        "snd",
        "#b5485d",
    ),
)
