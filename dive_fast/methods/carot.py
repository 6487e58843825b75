"""CaRot (arXiv 2311.01723): self-distillation from an exponential moving average, and orthogonal last maps.

::

    L = L_con + 1.5 L_sd + .2 |Wv^T Wv - I|_F + .05 |Wv Wt^T|_F      L_con: FLYP's loss; Wv, Wt: last maps
    L_sd = mean_i [ CE(softmax(l~_i), l_i) + CE(softmax(k~_i), k_i) ]
        l, k logits of images and of texts with the model's own scale, ~ the teacher's

    psi_0 = theta_0;  after steps 0, 500, 1000, ...:  psi <- m psi + (1 - m) theta
        m(step) = .05 + .85 step / (.2 T) while step < .2 T, then .9

All of it follows the authors' code (the published weights belong to its norms, which are not squared).
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dive_fast.config.section import NonNegativeFloat, Positive, Section, Share
from dive_fast.kernels import distillation_loss
from dive_fast.methods.method import Group, Loss, Preset, Setting, TeacherOutputs
from dive_fast.methods.self_distillation import SelfDistillation, cross_norm, orthogonality_norm
from dive_fast.model.features import Outputs

if TYPE_CHECKING:  # imports open_clip, which takes seconds
    from dive_fast.model.towers import Towers


class Carot(SelfDistillation):
    """Contrastive loss, cross-entropies of the logits from the teacher's, and two penalties; no state."""

    name, title = "carot", "CaRot"

    class Options(Section):
        """Options of the distillation, its teacher and the penalties."""

        distillation_weight: NonNegativeFloat = 1.5
        """Weight of the cross-entropies from the teacher's logits, summed over both directions."""
        orthogonality_weight: NonNegativeFloat = 0.2
        """Weight of the distance of the image tower's last map from orthonormal columns."""
        projection_weight: NonNegativeFloat = 0.05
        """Weight of the norm of the product of both towers' last maps."""
        teacher_every: Positive = 500
        """Steps from one update of the teacher to the next; the first follows the first step."""
        decay_start: Share = 0.05
        """Decay of the teacher's average at the start of the run."""
        decay_end: Share = 0.9
        """Decay after the ramp."""
        decay_ramp: Share = 0.2
        """Share of the run's steps in which the decay rises."""

    def __init__(self, options: Section, setting: Setting) -> None:
        """Takes the weights and the length of the run."""
        super().__init__(options, setting)
        self._options: dict[str, Any] = options.model_dump()
        self._ramp = self._options["decay_ramp"] * setting.total_steps

    @property
    def distills(self) -> bool:
        """Whether the distillation has a weight."""
        return bool(self._options["distillation_weight"] > 0)

    def distillation(self, outputs: Outputs, teacher: TeacherOutputs, group: Group) -> Loss:
        """The weighted cross-entropies; their gradient is that of KL divergences."""
        assert teacher.text is not None
        result = distillation_loss(
            *outputs.pairs,
            outputs.logit_scale,
            teacher.image,
            teacher.text,
            teacher.logit_scale,
            relational_weight=2.0,
            group=group,
            backend=self.backend,
        )
        cross_entropies = result.loss + 2 * result.teacher_entropy
        metrics = {"self_distillation_loss": cross_entropies.detach()}
        return Loss(self._options["distillation_weight"] * cross_entropies, metrics)

    def penalty(self, towers: "Towers") -> Tensor | None:
        """The sum of both weighted norms."""
        cross, orthogonality = (self._options[f"{norm}_weight"] for norm in ("projection", "orthogonality"))
        if cross == orthogonality == 0:
            return None
        image_map, text_map = towers.projections()
        terms = [cross * cross_norm(image_map, text_map)] if cross else []
        terms += [orthogonality * orthogonality_norm(image_map)] if orthogonality else []
        return torch.stack(terms).sum()

    def teacher_rate(self, applied: Tensor) -> Tensor | None:
        """``1 - m`` where the teacher is updated after this step."""
        if self.step % self._options["teacher_every"]:
            return None
        return torch.full_like(applied, 1 - self.decay(self.step))

    def decay(self, step: int) -> float:
        """``m`` of the update that follows the step of this number, the first being 0."""
        start, end = (float(self._options[name]) for name in ("decay_start", "decay_end"))
        return start + (end - start) * step / self._ramp if step < self._ramp else end


PRESETS = (
    Preset(
        "carot",
        "CaRot",
        "Contrastive loss + distillation from a moving average + orthogonality of the last maps.",
        "carot",
        None,
        "#3f8f6b",
    ),
)
