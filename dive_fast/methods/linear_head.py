"""Vanilla fine-tuning and LP-FT: a linear head on the image tower."""

from torch import Tensor, nn

from dive_fast.methods.method import Group, Loss, Objective, over_ranks
from dive_fast.model.features import Outputs


class CrossEntropy(Objective):
    """Vanilla fine-tuning and LP-FT: classes by a linear head on the image tower, no text, no reference."""

    needs_reference = needs_teacher = target_has_texts = False
    needs_head = True

    def target(self, features: Outputs, labels: Tensor, group: Group = None) -> Loss:
        """The cross-entropy of the head's logits."""
        assert features.logits is not None
        loss = over_ranks(nn.functional.cross_entropy(features.logits, labels), group)
        return Loss(loss, {"cross_entropy": loss.detach()})
