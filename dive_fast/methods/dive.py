"""DiVE: average and pairwise vector loss on the reference batch (Eq. 5-9 of arXiv 2511.09973)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dive_fast.config.section import Decay, NonNegativeFloat, Section
from dive_fast.kernels import difference_loss, dive_loss
from dive_fast.methods.flyp import Contrastive
from dive_fast.methods.method import (
    FirstStep,
    Group,
    Loss,
    Preset,
    ReferenceLoss,
    Setting,
    TargetLoss,
    update_average,
)
from dive_fast.methods.noise_floor import check_noise_floor
from dive_fast.model.features import Outputs, Pairs


class Dive(ReferenceLoss):
    """Average vector loss (AVL) + pairwise vector loss (PVL), times lambda; its state is the average vector."""

    name, title = "dive", "DiVE"
    default_weight = 1000.0
    norms = {"image_norm": "|u|", "text_norm": "|v|"}
    average_vector: Tensor

    class Options(Section):
        """Options of the difference vector losses."""

        decay: Decay = 0.99
        """Decay of the average vector, Eq. 6."""
        average_weight: NonNegativeFloat = 1.0
        """Weight of the average vector loss (AVL, Eq. 7) inside lambda's bracket; 0 leaves PVL alone."""
        pairwise_weight: NonNegativeFloat = 1.0
        """Weight of the pairwise vector loss (PVL, Eq. 8) inside lambda's bracket; 0 leaves AVL alone."""
        mean_gradient: bool = True
        """Whether the batch's share of the average vector carries gradient, as Eq. 6-7 read literally."""

    def __init__(self, options: Section, setting: Setting) -> None:
        """Starts with a zero average vector."""
        super().__init__(options, setting)
        values: dict[str, Any] = options.model_dump()
        # One update stands for k steps.
        self._options = values | {"decay": values["decay"] ** setting.reference_every}
        self.weight = setting.weight
        self.register_buffer("average_vector", torch.zeros(setting.width))

    def loss(self, outputs: Outputs, teacher: Pairs | None, group: Group = None) -> Loss:
        """The weighted difference losses; moves the average vector."""
        assert teacher is not None
        result = difference_loss(
            *outputs.pairs, *teacher, self.average_vector, group=group, backend=self.backend, **self._options
        )
        update_average(self.average_vector, result.average_vector)
        return Loss(self.weight * result.loss, _metrics(result))

    def fused(
        self,
        target_loss: TargetLoss,
        target: Outputs,
        labels: Tensor,
        reference: Outputs,
        teacher: Pairs | None,
        group: Group,
    ) -> Loss | None:
        """Contrastive and difference losses in three launches; moves the average vector."""
        if type(target_loss) is not Contrastive:
            return None
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
        return Loss(result.loss, metrics | _metrics(result))

    def check_first_step(self, first: FirstStep) -> None:
        """Validates the noise floor of |u| and |v|."""
        check_noise_floor(first, self.norms)


def _metrics(result: NamedTuple) -> dict[str, Tensor]:
    fields = result._asdict()
    metrics = {name: fields[name] for name in ("average_loss", "pairwise_loss", "image_norm", "text_norm")}
    return metrics | {"average_norm": fields["average_vector"].norm()}


PRESETS = (
    Preset("dive", "DiVE", "Contrastive loss + weight * (AVL + PVL), Eq. 9.", "contrastive", "dive", "#2f6fb0"),
    Preset(
        *("avl", "AVL", "DiVE with the average vector loss alone.", "contrastive", "dive", "#8a7a3d"),
        fixed={"pairwise_weight": 0.0},
    ),
    Preset(
        *("pvl", "PVL", "DiVE with the pairwise vector loss alone.", "contrastive", "dive", "#3d3d3d"),
        fixed={"average_weight": 0.0},
    ),
)
