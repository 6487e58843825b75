"""Vanilla fine-tuning and LP-FT (Kumar et al. 2022): cross-entropy of a linear head on the image tower."""

from torch import Tensor, nn

from dive_fast.methods.method import Group, HeadOptions, Loss, Preset, TargetLoss, TeacherOutputs, over_ranks
from dive_fast.model.features import Outputs


class CrossEntropy(TargetLoss):
    """Cross-entropy of a linear head's logits; the text tower does not run."""

    name, title = "cross_entropy", "cross-entropy"
    loss_metric = "cross_entropy"
    needs_texts = False
    needs_head = True

    class Options(HeadOptions):
        """Options of the head."""

    def loss(
        self, outputs: Outputs, labels: Tensor, group: Group = None, teacher: TeacherOutputs | None = None
    ) -> Loss:
        """The mean cross-entropy over all ranks' images."""
        assert outputs.logits is not None
        loss = over_ranks(nn.functional.cross_entropy(outputs.logits, labels), group)
        return Loss(loss, {"cross_entropy": loss.detach()})


PRESETS = (
    Preset(
        *("vanilla_ft", "vanilla FT", "Cross-entropy of a linear head on the image tower, without texts."),
        *("cross_entropy", None, "#d67fb0"),
        fixed={"probe": False},
        hidden=("probe_epochs", "probe_learning_rate"),
    ),
    Preset(
        *("lp_ft", "LP-FT", "The same from a head that was trained first, the tower frozen (linear probing)."),
        *("cross_entropy", None, "#6fae5a"),
        fixed={"probe": True},
    ),
)
