"""The interface of a projection: a change of gradients and weights around the optimizer's step.

ZeRO 1 and 2 keep the fp32 weights of a parameter group as one flat tensor, of which each rank has a part. A part
cuts parameters anywhere: a rank can hold no piece of a tensor, a piece that begins within a row, and padding at the
end. A :class:`FlatGroup` names the pieces, so that a projection reads the same with every ZeRO stage.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """The piece of one parameter that this rank updates."""

    name: str
    """Name of the parameter in the towers."""
    shape: torch.Size
    """Shape of the whole parameter."""
    start: int
    """Index of the piece's first element in the flattened parameter."""
    weights: Tensor
    """``(n,)`` fp32, a view of the weights that the optimizer updates; changed in place."""
    gradient: Callable[[], Tensor | None]
    """``(n,)``, a view of the gradient; in :meth:`Projection.before_step` multiplied by ``FlatGroup.gradient_scale``.
    None where the parameter has none."""


@dataclass
class FlatGroup:
    """The pieces of one parameter group on this rank, in the order of the parameters."""

    index: int
    """Place of the group among the optimizer's; every rank has the same groups in the same order."""
    names: tuple[str, ...]
    """All parameters of the group, of which this rank may hold none."""
    segments: list[Segment]
    reduce: Callable[[Tensor], None]
    """Sums a tensor over the ranks that share the parameters, in place; nothing where each rank has all of them."""
    gradient_scale: Tensor = field(default_factory=lambda: torch.ones(()))
    """``()``, loss scale times the divisor of clipping."""
    skipped: Tensor = field(default_factory=lambda: torch.zeros(()))
    """``()``, 1 where this update is skipped, otherwise 0."""


class Projection:
    """Hooks around the step of torch's fused AdamW; both are called once for each parameter group."""

    def start(self, groups: list[FlatGroup]) -> None:
        """Sees the groups once, before the first step and before a checkpoint is loaded, e.g. to copy an anchor."""

    def before_step(self, group: FlatGroup) -> None:
        """Changes gradients in place, still scaled."""

    def after_step(self, group: FlatGroup) -> None:
        """Changes weights in place. A skipped update has left weights and moments as they were."""
