"""SPD (arXiv 2411.01713), Selective Projection Decay: shrinks d = W - W0 where the loss points back to W0.

::

    a = <G, d>,  Wn = W - lr u,  e = Wn - W0              u: AdamW's step on G
    if a > 0:   W <- Wn - strength r e,   r = clamp((|e| - |d|) / |e|, 0, 1)

a > 0 says that the descent direction -G leads towards the anchor; r > 0 that the step still leads away, carried by
momentum. All norms are those of complete tensors. The authors' code has lambda, our ``strength``, as its
``weight_decay``, and no other decay; above 1 / r it overshoots the anchor. Its variant with row-wise L1 norms is
not here, nor the rule with a < 0 that a third party shipped, which freezes the radius.
"""

from typing import Any

import torch

from dive_fast.config.section import NonNegativeFloat, Section
from dive_fast.projections.anchored_group import AnchoredGroup
from dive_fast.projections.projection import Projection


class SPD(Projection):
    """Shrinks the deviation of tensors whose gradient points back to the anchor while they still move away."""

    name, title = "spd", "SPD"
    summary = "Decay towards the pre-trained weights, where the gradient points there and momentum does not."
    strength = "decay"

    class Options(Section):
        """Options of SPD."""

        strength: NonNegativeFloat = 1.0
        """Factor on the share of the deviation that is removed, lambda; 1 keeps the distance that a tensor had
        before the step."""

    def __init__(self, options: Section) -> None:
        """Reads the options."""
        values: dict[str, Any] = options.model_dump()
        self._strength: float = values["strength"]

    def before_step(self, group: AnchoredGroup) -> None:
        """Measures a and ``|d|^2`` of each tensor."""
        a, squares = group.sums("gd", "dd")
        group.measures |= {"triggered": (a > 0).double(), "squares": squares}

    def after_step(self, group: AnchoredGroup) -> None:
        """Shrinks the deviations."""
        before, triggered = group.measures["squares"].sqrt(), group.measures["triggered"]
        after = group.sums("dd")[0].sqrt()
        ratio = torch.where(after > 0, (after - before) / torch.where(after > 0, after, 1.0), 0.0).clamp(0, 1)
        decay = torch.where(group.applied & (triggered > 0), self._strength * ratio, 0.0)
        group.add_to_weights(-decay)
        group.measures |= {"applied": (decay > 0).double(), "decay": decay}
