"""TRACER (arXiv 2605.29380): self-distillation from a teacher that averages all weights of the run so far.

::

    L = L_con + .9 L_SD + .05 |Wv Wt^T|_F                L_con: FLYP's loss; Wv, Wt: last maps of both towers
    L_SD = 2000 FD + CRD + ICL + CKD                     terms of dive_fast.kernels.distillation_loss

    psi_0 = theta_0, A_0 = kappa_0;  after update k = 1 .. T:
        A_k = A_{k-1} + kappa_k,  psi += (kappa_k / A_k) (theta_k - psi)
        kappa_k = Beta(beta, beta) density at tau_k = (k + 1/2) / (T + 1)

so that the teacher psi_k is the mean of theta_0 .. theta_k with weights kappa. Terms and weights are those of the
authors' code; the paper writes FD as squared lengths and CRD without the 1/2. The sum A starts at kappa_0
(Definition 3.3, and the code), not at 0 as in Algorithm 1, where the first update would overwrite theta_0.

The shipped configs train as published: bf16, weight decay .1 (appendix and code; the main text has .01), batches
of 512 or, for ViT-L/14, 224. TRACER + DiVE is in neither paper: it has DiVE's default weight, and fp16, since bf16
rounds difference vectors away. For ``teacher_every`` above 1 the paper does not say at which steps the teacher
moves; ours moves after the first one, as CaRot's.
"""

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from dive_fast.config.section import NonNegativeFloat, Positive, Section
from dive_fast.kernels import distillation_loss
from dive_fast.methods.method import Group, Loss, Preset, Setting, TeacherOutputs
from dive_fast.methods.self_distillation import SelfDistillation, cross_norm
from dive_fast.model.features import Outputs

if TYPE_CHECKING:  # imports open_clip, which takes seconds
    from dive_fast.model.towers import Towers

TERMS = ("feature", "relational", "interactive", "cross")
"""Terms of L_SD: FD, CRD, ICL and CKD."""


class Tracer(SelfDistillation):
    """Contrastive loss, distillation of features and logits, and a penalty; state: the sum A of the teacher."""

    name, title = "tracer", "TRACER"
    kernel_sum: Tensor

    class Options(Section):
        """Options of the distillation and of its teacher."""

        distillation_weight: NonNegativeFloat = 0.9
        """Weight of the four distillation terms together."""
        feature_weight: NonNegativeFloat = 2000.0
        """Weight of FD inside their sum: mean squared differences of the unit features' elements."""
        relational_weight: NonNegativeFloat = 1.0
        """Weight of CRD: KL divergence of the logits from the teacher's."""
        interactive_weight: NonNegativeFloat = 1.0
        """Weight of ICL: contrastive loss of each tower with the teacher's other tower."""
        cross_weight: NonNegativeFloat = 1.0
        """Weight of CKD: KL divergence of ICL's logits from the teacher's."""
        projection_weight: NonNegativeFloat = 0.05
        """Weight of the norm of the product of both towers' last maps."""
        kernel_beta: Annotated[float, Field(ge=0.01, le=10)] = 0.5
        """Shape beta of the Beta(beta, beta) density by which the teacher averages the run's weights. 1: all count
        alike; below 1: those of begin and end count more."""
        kernel_clock: Literal["steps", "updates"] = "steps"
        """Argument of the density. `steps`: the step, over the steps of the run. `updates`: the number of the
        teacher's update, over the steps of the run, as the authors' code has it: with `teacher_every` above 1 it
        keeps more of the pre-trained weights."""
        teacher_every: Positive = 1
        """Steps from one update of the teacher to the next; the first follows the first step."""

    def __init__(self, options: Section, setting: Setting) -> None:
        """Starts with the first weight of the average."""
        super().__init__(options, setting)
        values: dict[str, Any] = options.model_dump()
        self._weights = {f"{term}_weight": values[f"{term}_weight"] for term in TERMS}
        self._weight, self._penalty_weight = values["distillation_weight"], values["projection_weight"]
        self._beta, self._clock, self._every = (
            values[f] for f in ("kernel_beta", "kernel_clock", "teacher_every")
        )
        self._total_steps = setting.total_steps
        # Not torch.tensor: on the planner's fake tensors it keeps a real one, and plans after this one crashed.
        self.register_buffer("kernel_sum", torch.full((), self._kernel(0), dtype=torch.float64))

    @property
    def distills(self) -> bool:
        """Whether a term of the distillation has a weight."""
        return self._weight > 0 and any(self._weights.values())

    def distillation(self, outputs: Outputs, teacher: TeacherOutputs, group: Group) -> Loss:
        """The weighted sum of FD, CRD, ICL and CKD."""
        assert teacher.text is not None
        result = distillation_loss(
            *outputs.pairs,
            outputs.logit_scale,
            teacher.image,
            teacher.text,
            teacher.logit_scale,
            group=group,
            backend=self.backend,
            **self._weights,
        )
        fields = result._asdict()
        terms = {f"{term}_loss": fields[f"{term}_loss"] for term in TERMS if self._weights[f"{term}_weight"]}
        return Loss(self._weight * result.loss, terms)

    def penalty(self, towers: "Towers") -> Tensor | None:
        """The weighted ``|Wv Wt^T|_F``."""
        return None if self._penalty_weight == 0 else self._penalty_weight * cross_norm(*towers.projections())

    def teacher_rate(self, applied: Tensor) -> Tensor | None:
        """``kappa_k / A_k`` where the teacher is updated after this step; a skipped step adds nothing to A."""
        if self.step % self._every:
            return None
        kernel = self._kernel(self.step // self._every + 1 if self._clock == "updates" else self.step + 1)
        self.kernel_sum += kernel * applied.double()
        return (kernel / self.kernel_sum).to(applied.dtype)

    def _kernel(self, k: int) -> float:
        """``kappa_k``, the Beta(beta, beta) density at ``(k + 1/2) / (T + 1)``."""
        if k > self._total_steps:
            raise ValueError(
                f"step {self.step + 1} of a run of {self._total_steps}: create the method with the run's "
                "total_steps"
            )
        tau, beta = (k + 0.5) / (self._total_steps + 1), self._beta
        normalizer = math.lgamma(2 * beta) - 2 * math.lgamma(beta)
        return math.exp(normalizer + (beta - 1) * (math.log(tau) + math.log1p(-tau)))


PRESETS = (
    Preset(
        "tracer",
        "TRACER",
        "Contrastive loss + distillation from the Beta-weighted average of the run's weights.",
        "tracer",
        None,
        "#b0413e",
    ),
    Preset(
        *("tracer_fd", "TRACER, FD only", "TRACER with the distillation of features alone.", "tracer", None),
        "#e39a86",
        fixed={"relational_weight": 0.0, "interactive_weight": 0.0, "cross_weight": 0.0},
    ),
    Preset(
        "tracer_dive",
        "TRACER + DiVE",
        "TRACER on the target batch, DiVE on the reference batch: a combination that is in neither paper.",
        "tracer",
        "dive",
        "#16327a",
    ),
)
