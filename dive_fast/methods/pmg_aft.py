"""PMG-AFT (Wang et al. 2024, arXiv 2401.04350): TeCoA near the frozen model and near its clean predictions."""

import torch.nn.functional as F
from torch import Tensor

from dive_fast.config.section import NonNegativeFloat, Section
from dive_fast.kernels.naive import kl_divergence
from dive_fast.methods.adversarial import AttackOptions
from dive_fast.methods.method import (
    Group,
    ImageInfo,
    Loss,
    Preset,
    Setting,
    Start,
    Student,
    TeacherOutputs,
    View,
    over_ranks,
)
from dive_fast.methods.tecoa import TeCoA, logits_of
from dive_fast.model.features import Outputs


class PmgAft(TeCoA):
    """Cross-entropy of adversarial images, and two divergences of their class distributions.

    ::

        loss = mean_i [ CE(z_i, y_i) + frozen_weight KL(p(z0_i) || p(z_i)) + clean_weight KL(p(c_i) || p(z_i)) ]

    z, z0 logits of the adversarial image by the tuned and the frozen model, c those of the clean image by the
    tuned model, all by the same frozen class embeddings; p the softmax. The gradient passes through z and c, as in
    the authors' code, whose weights are 1.
    """

    name, title = "pmg_aft", "PMG-AFT"
    teacher = "frozen"

    class Options(AttackOptions):
        """Options of the attack and of the divergences."""

        frozen_weight: NonNegativeFloat = 1.0
        """Factor on the divergence from the frozen model at adversarial images."""
        clean_weight: NonNegativeFloat = 1.0
        """Factor on the divergence from the tuned model at clean images."""

    def __init__(self, options: Section, setting: Setting) -> None:
        """Takes the options."""
        super().__init__(options, setting)
        assert isinstance(options, self.Options)
        self.options = options
        self._start: Start | None = None

    def start(self, start: Start) -> None:
        """Takes the head, which classifies the frozen model's features too."""
        super().start(start)
        self._start = start

    def views(self, images: Tensor, student: Student, info: ImageInfo) -> tuple[View, ...]:
        """The clean images."""
        return (View(info.unchanged),) if self.options.clean_weight else ()

    def loss(
        self, outputs: Outputs, labels: Tensor, group: Group = None, teacher: TeacherOutputs | None = None
    ) -> Loss:
        """The cross-entropy and the weighted divergences."""
        total, metrics = super().loss(outputs, labels, group)
        student = F.log_softmax(logits_of(outputs), 1)
        if self.options.frozen_weight:
            assert self._start is not None and self._start.towers is not None and teacher is not None
            assert self._start.towers.head is not None
            frozen = F.log_softmax(self._start.towers.head(teacher.image), 1)
            term = over_ranks(kl_divergence(frozen, student), group)
            total, metrics = total + self.options.frozen_weight * term, {**metrics, "frozen_kl": term.detach()}
        if outputs.views:
            clean = F.log_softmax(logits_of(outputs.views[0]), 1)
            term = over_ranks(kl_divergence(clean, student), group)
            total, metrics = total + self.options.clean_weight * term, {**metrics, "clean_kl": term.detach()}
        return Loss(total, metrics)


PRESETS = (
    Preset(
        "pmg_aft",
        "PMG-AFT",
        "TeCoA + frozen_weight * divergence from the frozen model at adversarial images + clean_weight * "
        "divergence from the tuned model at clean images (arXiv 2401.04350).",
        "pmg_aft",
        None,
        "#c77f4f",
    ),
)
