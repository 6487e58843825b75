"""Adam on a number of each tensor, such as the strength that a rule learns."""

import torch
from torch import Tensor

from dive_fast.projections.anchored_group import AnchoredGroup

ADAM = ("mean", "square")
"""Names of its moments among a rule's numbers."""
DECAYS, EPSILON = (0.9, 0.999), 1e-8


def adam_step(group: AnchoredGroup, gradient: Tensor, rate: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The step of Adam at the present update, ``(P,)``, to be subtracted, and the moments to keep, by name.

    Args:
        gradient: ``(P,)``.
        rate: learning rate.
    """
    mean = DECAYS[0] * group.value("mean") + (1 - DECAYS[0]) * gradient
    square = DECAYS[1] * group.value("square") + (1 - DECAYS[1]) * gradient.square()
    # Powers of a number by a tensor: the count of updates is on the device.
    corrections = [1 - torch.pow(decay, group.updates + 1) for decay in DECAYS]
    step = rate * (mean / corrections[0]) / ((square / corrections[1]).sqrt() + EPSILON)
    return step, {"mean": mean, "square": square}
