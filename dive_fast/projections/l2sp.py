"""L2-SP (arXiv 1802.01483): a penalty on the distance of the weights from their anchors.

::

    L + strength / 2 sum |W - W0|^2                       d = W - W0
    coupled:    G <- G + strength d                       before AdamW's moments, as SPD's paper states it
    decoupled:  W <- W - lr u - lr strength d             u: AdamW's step on G

With AdamW the pull of ``coupled`` is divided by the square root of the second moment, so a strength of one form
says nothing about the other. The paper has a second term for tensors without a pre-trained start, which take no
part here. ``decoupled`` is this project's; AdamW's weight decay follows it.
"""

from typing import Any, Literal

import torch

from dive_fast.config.section import NonNegativeFloat, Section
from dive_fast.projections.anchored_group import AnchoredGroup
from dive_fast.projections.projection import Projection


class L2SP(Projection):
    """Pulls every tensor towards its anchor, in proportion to the distance."""

    name, title = "l2sp", "L2-SP"
    summary = "A penalty on the squared distance of the weights from the pre-trained ones."

    class Options(Section):
        """Options of L2-SP."""

        strength: NonNegativeFloat = 0.01
        """Weight of the penalty: about 1e-4 to 0.1 for `coupled`, 0.1 to 10 for `decoupled`."""
        form: Literal["coupled", "decoupled"] = "coupled"
        """`coupled`: the penalty's gradient is added to that of the loss, the definition. `decoupled`: its step is
        made next to AdamW's, like AdamW's weight decay."""

    def __init__(self, options: Section) -> None:
        """Reads the options."""
        values: dict[str, Any] = options.model_dump()
        self._strength, self._is_coupled = values["strength"], values["form"] == "coupled"

    def before_step(self, group: AnchoredGroup) -> None:
        """Adds the gradient of the penalty, or makes its step: AdamW's own does not depend on the weights."""
        if self._is_coupled:
            pull = self._strength * group.gradient_scale.double()
            squares = group.add_to_gradients(pull.expand(len(group.shapes)), with_squares=True)
        else:
            pull = torch.where(group.applied, -group.learning_rate * self._strength, 0.0).double()
            squares = group.add_to_weights(pull.expand(len(group.shapes)), with_squares=True)
        assert squares is not None
        group.measures["squares"] = squares
