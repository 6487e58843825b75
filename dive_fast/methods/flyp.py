"""FLYP: contrastive fine-tuning on the target batch alone (Eq. 1 of the DiVE paper; Goyal et al. 2023)."""

from torch import Tensor

from dive_fast.kernels import contrastive_loss
from dive_fast.methods.method import Group, Loss, Preset, TargetLoss, TeacherOutputs
from dive_fast.model.features import Outputs


class Contrastive(TargetLoss):
    """The contrastive loss of images and texts, Eq. 1; pairs of one class stay negatives of each other."""

    name, title = "contrastive", "contrastive"
    loss_metric = "contrastive_loss"

    def loss(
        self, outputs: Outputs, labels: Tensor, group: Group = None, teacher: TeacherOutputs | None = None
    ) -> Loss:
        """The contrastive loss over all ranks' pairs."""
        scale = outputs.logit_scale
        loss = contrastive_loss(*outputs.pairs, scale, group=group, backend=self.backend)
        return Loss(loss, {"contrastive_loss": loss.detach(), "logit_scale": scale.detach().squeeze()})


PRESETS = (Preset("flyp", "FLYP", "Contrastive loss alone, Eq. 1.", "contrastive", None, "#d98c3f"),)
