"""Self-distillation from a moving teacher, and penalties on both towers' last maps: what TRACER and CaRot share.

Norms are Frobenius norms, not squared: with the square, the published weights would belong to another loss.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from dive_fast.kernels import contrastive_loss
from dive_fast.kernels.precision import product
from dive_fast.methods.method import Group, Loss, TargetLoss, TeacherOutputs
from dive_fast.model.features import Outputs


def cross_norm(image_map: Tensor, text_map: Tensor) -> Tensor:
    """``|Wv Wt^T|_F``, ``()``, of last maps ``(w_v, D)`` and ``(w_t, D)``; subgradient 0 where it is 0."""
    return torch.linalg.vector_norm(product(image_map, text_map))


def orthogonality_norm(image_map: Tensor) -> Tensor:
    """``|Wv^T Wv - I|_F``, ``()``, of a last map ``(w, D)``; subgradient 0 where its columns are orthonormal.

    With D > w it cannot reach 0.
    """
    columns = image_map.T
    identity = torch.eye(len(columns), dtype=image_map.dtype, device=image_map.device)
    return torch.linalg.vector_norm(product(columns, columns) - identity)


class SelfDistillation(TargetLoss):
    """The contrastive loss and, from the second step, a distillation from a moving teacher.

    The first step has none, by the number of the step and not of updates: student and teacher are still equal.
    """

    teacher: ClassVar[Literal["none", "frozen", "moving"]] = "moving"
    needs_run_length = True

    def loss(
        self, outputs: Outputs, labels: Tensor, group: Group = None, teacher: TeacherOutputs | None = None
    ) -> Loss:
        """The losses over all ranks' pairs; FLYP's alone where the weights of the others are 0."""
        scale = outputs.logit_scale
        contrastive = contrastive_loss(*outputs.pairs, scale, group=group, backend=self.backend)
        metrics = {"contrastive_loss": contrastive.detach(), "logit_scale": scale.detach().squeeze()}
        if self.step == 0 or not self.distills:
            return Loss(contrastive, metrics)
        assert teacher is not None
        distillation = self.distillation(outputs, teacher, group)
        return Loss(contrastive + distillation.loss, metrics | distillation.metrics)

    @property
    def distills(self) -> bool:
        """Whether a term of the distillation has a weight."""
        raise NotImplementedError

    def distillation(self, outputs: Outputs, teacher: TeacherOutputs, group: Group) -> Loss:
        """The weighted distillation and its terms."""
        raise NotImplementedError
